"""A GPU that launches nothing: what a launch costs the host, measured on a machine without one.

Kernels are compiled for sm_80, by the launchers that a GPU would take, and handed to a driver that ignores them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hf_fastattn.block_pool import BlockTables
from hf_fastattn.ops import _library

LAUNCHED = ("store_kv", "decode_schedule", "decode_attention", "packed_attention", "prefill_attention")


class _Driver:
    """Triton's view of it."""

    class launcher_cls:
        def __init__(self, src: Any, metadata: Any) -> None:
            pass

        def __call__(self, *args: Any) -> None:
            pass

    class utils:
        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 166912, "multiprocessor_count": 108}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)


@contextmanager
def launching() -> Iterator[None]:
    """Let CPU tensors take the way of a GPU's: blocks read by table, ops to their launchers. Results are noise."""
    from triton.runtime import driver

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        stack.enter_context(mock.patch.object(BlockTables, "even_runs", return_value=None))
        for name in LAUNCHED:
            direct = _library.DIRECT[name]
            stack.enter_context(mock.patch.dict(direct, cpu=direct["cuda"]))
        yield
