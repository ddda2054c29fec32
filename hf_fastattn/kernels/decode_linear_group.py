"""Launcher of decode_linear_group: the kernels of decode_linear, over several weights in one launch."""

from .decode_linear import launch_group as launch

__all__ = ["launch"]
