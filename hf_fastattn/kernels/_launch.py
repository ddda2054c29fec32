"""What the launchers share: the architecture of a device and the launch of a kernel on it."""

import functools
import warnings

import torch

INTERPRETED_ARCH = 80
"""Architecture whose configs the interpreter runs (TRITON_INTERPRET=1, CPU tensors)."""

KNOWN_ARCHS = (80, 90, 100)
"""Architectures with configs of their own: A100, H100/H200, B200. Others take the next smaller one's, warned once."""


class Unsupported(ValueError):
    """A kernel cannot do a call, for the reason given; nothing was launched."""


@functools.cache
def device_arch(device: torch.device) -> int:
    """Return the known architecture (80, 90 or 100) whose launch configs a device takes."""
    if device.type != "cuda":
        return INTERPRETED_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    arch = max((known for known in KNOWN_ARCHS if known <= capability), default=KNOWN_ARCHS[0])
    if capability != arch:
        warnings.warn(
            f"no launch configs were chosen for compute capability {major}.{minor}: using those of sm_{arch}",
            RuntimeWarning,
            stacklevel=2,
        )
    return arch
