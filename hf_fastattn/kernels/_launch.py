"""What the launchers share: the architecture of a device and the launch of a kernel on it."""

import functools
import warnings

import torch

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


class Unsupported(ValueError):
    """A kernel cannot do a call, for the reason given; nothing was launched."""


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
