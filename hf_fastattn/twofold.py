"""What a deep copy takes of an object and what a pickle takes, where these differ."""

import copy
from typing import Any


class Twofold:
    """A part of what ``__reduce_ex__`` returns: a deep copy gets one thing, a pickle another.

    Not ``__deepcopy__`` of the object's class: wrappers that pass on what they do not have (PEFT's, torch.compile's)
    would find it there, and a deep copy of the wrapper would be one of what it wraps.
    """

    def __init__(self, copied: Any, pickled: Any) -> None:
        self._copied, self._pickled = copied, pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._copied, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self._pickled,)
