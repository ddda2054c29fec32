"""Which implementation a linear layer takes at decode, by measured shape; written by ``python -m eval.tune_linear``.

An architecture without measured shapes follows the roofline arithmetic of decode_linear_plan.by_arithmetic: nobody has
timed it there yet. An architecture that is not listed takes the library.
"""

from typing import Any

TABLES: dict[int, dict[str, Any]] = {
    80: {"device": None, "date": None, "command": None, "shapes": {}},
    90: {"device": None, "date": None, "command": None, "shapes": {}},
    100: {"device": None, "date": None, "command": None, "shapes": {}},
}
"""Architecture -> device, date and command of the sweep; shapes: (N, K) -> ((largest M, Plan's fields), ...)."""
