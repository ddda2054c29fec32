"""What becomes of a measurement that fails: a row that says so. Only a lost GPU ends a run."""

import gc
from collections.abc import Callable
from typing import Any

import torch

LOST = 75
"""Exit code of a run that ended with a lost GPU: what is done is kept, a new process can do the rest."""


class DeviceLost(RuntimeError):
    """The GPU takes no more work from this process, as after an access outside its memory."""


def attempt(row: dict[str, Any], action: Callable[[], Any]) -> Any:
    """Return what an action returns; None if it fails, which is noted as the row's status.

    Raises:
        DeviceLost: the GPU failed with it.
    """
    try:
        return action()
    except Exception as error:
        row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ensure_device(row["status"])  # not while the error holds what it could not finish
    return None


def ensure_device(reason: str) -> None:
    """Free what a failure left on the GPU.

    Args:
        reason: what failed.

    Raises:
        DeviceLost: the GPU takes no more work.
    """
    if not torch.cuda.is_available():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU was lost ({reason}): what was measured before is kept") from error
