"""A GPU that compiles and launches nothing, but writes down what it was asked to."""

import os
from collections import defaultdict

import pytest
import torch


class Compiled:
    """Stands for a compiled kernel: writes down its launches as (kernel and specialisation, grid, arguments)."""

    function = packed_metadata = None

    def __init__(self, key, log):
        self.key, self.log = key, log

    def launch_metadata(self, grid, stream, *args):
        return None

    def run(self, grid_0, grid_1, grid_2, stream, function, packed, metadata, enter, leave, *args):
        self.log.append((self.key, (grid_0, grid_1, grid_2), tuple(map(described, args))))

    def __getitem__(self, grid):
        return lambda *args: self.run(*grid, 0, None, None, None, None, None, *args)


def described(value):
    """A tensor by all that a kernel could see of it but its place."""
    if not isinstance(value, torch.Tensor):
        return type(value), value
    return value.dtype, value.shape, value.stride(), value.data_ptr() % 16


class Driver:
    """Triton's view of the GPU."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch):
    """The launches since it was last cleared, and the kernels for which Triton was asked what to compile."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from hf_fastattn.kernels import (
        decode_attention,
        decode_linear,
        decode_schedule,
        packed_attention,
        prefill_attention,
        store_kv,
    )

    log, asked = [], []

    def do_compile(self, key, *args, **kwargs):
        kernel = self.device_caches[0][0][key] = Compiled(f"{self.__name__} {key}", log)
        return kernel

    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **kw: (asked.append(self), run(self, *a, **kw))[1])
    monkeypatch.setattr(driver, "_active", Driver())
    modules = (decode_attention, decode_schedule, store_kv, decode_linear, prefill_attention, packed_attention)
    for module in modules:
        for kept in ("_kept", "_schedules"):
            monkeypatch.setattr(module, kept, {}, raising=False)
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return log, asked


@pytest.fixture
def gpu_way(launched, by_table, monkeypatch):
    """Let CPU tensors take the way of a GPU's: blocks are read by table, ops go to their launchers. Attention gives 0.

    Returns:
        what ``launched`` returns.
    """
    from hf_fastattn.ops import _library

    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    for direct in _library.DIRECT.values():
        monkeypatch.setitem(direct, "cpu", direct["cuda"])
    return launched
