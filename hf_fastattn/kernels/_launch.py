"""What the launchers share: the architecture of a device and the launch of a kernel on it."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

INTERPRETED_ARCH = 80
"""Architecture whose configs the interpreter runs (TRITON_INTERPRET=1, CPU tensors)."""

KNOWN_ARCHS = (80, 90, 100)
"""Architectures with configs of their own for every kernel: A100, H100/H200, B200."""

SMALL = 86
"""The attention kernels' configs for GPUs that give a program 99 KiB of shared memory, whatever their generation.

RTX 30, 40 and 50, A10, L4, L40 and others (sm_86, sm_89, sm_120, sm_121). They are the conservative ones, for GPUs that
nobody knows, too.
"""

SHARED_BYTES = {80: 166912, SMALL: 101376, 90: 232448, 100: 232448}
"""Shared memory, in bytes, that a program needs to be given for the configs of an architecture."""

_COMPILED_FOR = (80, 86, 89, 90, 100, 120)  # tests/compile compiles the configs for these

ALWAYS = {"enable_fp_fusion": True}
"""Options of every launch. Triton 3.9 warns where this one is left open, and 3.10 is to take False then."""

MOST_KEPT = 1024
"""Calls of one op that are kept: every length of a dense cache is one, and they are small."""

Kept = TypeVar("Kept")


class Unsupported(ValueError):
    """A kernel cannot do a call, for the reason given; nothing was launched."""


class Launch:
    """A launch of a kernel, to be made with any tensors of the dtypes, sizes and strides that it was prepared for.

    Triton works out at every launch what the arguments specialise a kernel for, which takes the host longer than all
    else: 37 us for the 78 arguments of the decode kernel, on a slow CPU. Here that is done once. Later launches whose
    tensors lie at multiples of 16 bytes, as nearly all do, hand their arguments to the kernel that the first such
    launch has compiled.

    Args:
        device: of the tensors.
        kernel: what ``@triton.jit`` made. Its parameters are tensors, then scalars, then constants.
        grid: numbers of programs, up to three.
        scalars: values of the parameters behind the tensors.
        constants: names and values of the others, in their order.
        options: num_warps and others of Triton's own.
    """

    def __init__(
        self,
        device: torch.device,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[object, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, object],
    ) -> None:
        assert tuple(constants) == tuple(kernel.arg_names)[-len(constants) :]
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.scalars, self.constants, self.options = scalars, constants, {**ALWAYS, **options}
        self._device_index = device.index if device.type == "cuda" else -1  # none to change to
        self._fixed = (*scalars, *constants.values())
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device."""
        addresses = 0
        for tensor in tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        with torch.cuda.device(self._device_index):
            if addresses % 16:  # compiled for less
                self._launch(tensors)
            elif self._compiled is not None:
                self._compiled(*tensors, *self._fixed)
            else:
                compiled = self._launch(tensors)
                if compiled is not None:  # it is in the interpreter
                    self._compiled = compiled[self.grid]

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> Any:
        return self.kernel[self.grid](*tensors, *self.scalars, **self.constants, **self.options)


def keep(kept: dict[Any, Kept], key: Any, value: Kept, most: int = MOST_KEPT) -> Kept:
    """Keep what was prepared for a call under all that it depends on; return it."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = value
    return value


def layout(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Return what a launch may depend on besides a tensor's address: dtype, sizes and strides."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def layout_of_blocks(cache: Tensor) -> tuple[object, ...]:
    """Return the layout of a cache in blocks, whatever their number: pools grow, and layers may see theirs shifted."""
    return cache.dtype, cache.shape[1:], cache.stride(), cache.shape[0] > 0


@functools.cache
def device_arch(device: torch.device) -> int:
    """Return the architecture (80, 86, 90, 100) whose launch configs a device takes; warn once about an unknown GPU."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None) or properties.shared_memory_per_block
    arch = configs_of(10 * major + minor, shared)
    if 10 * major + minor not in _COMPILED_FOR:
        warnings.warn(
            f"no launch configs were chosen for compute capability {major}.{minor}: using those of sm_{arch}",
            RuntimeWarning,
            stacklevel=2,
        )
    return arch


def configs_of(capability: int, shared_bytes: int) -> int:
    """Return the architecture whose configs suit a GPU.

    Of those of its generation or an older one whose shared memory it has: the one with the most, the newest of several.
    SMALL if there is none.

    Args:
        capability: e.g. 89 for compute capability 8.9.
        shared_bytes: most shared memory of a program.
    """
    fitting = [arch for arch, needed in SHARED_BYTES.items() if arch <= capability and needed <= shared_bytes]
    return max(fitting, key=lambda arch: (SHARED_BYTES[arch], arch), default=SMALL)
