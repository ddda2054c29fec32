"""decode_schedule: who reads which keys in a decode step, worked out on the device once for all layers of a kind.

After stream-K (Osama et al., 2023): all KV tiles of the step are one list, cut into equal ranges for a fixed grid. A
CPU has a schedule of another kind, see ops/_cpu_schedule.py.
"""

import importlib

import torch
from torch import Tensor

from ._cpu_schedule import CpuSchedule
from ._library import define_op, has_triton, is_direct
from ._torch import make_cpu_schedule
from .shapes import NO_WINDOW, check_attention, check_shared_prefixes, check_window


def decode_schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    window: int = NO_WINDOW,
    shared_prefixes: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor | CpuSchedule:
    """Return the schedule of a decode step for decode_attention, whose arguments these are.

    Of q, k, v and block_table only shapes and dtypes are read, so that those of any layer of a kind serve; seq_lens and
    shared_prefixes are read on the device. It holds for the calls that follow, one after the other on one stream, until
    a length or the sharing changes: make it once per step for each (shapes, window).

    Returns:
        What to pass on, not to be read: on a GPU int32 of a shape that follows from shapes alone. On a CPU an object in
        eager calls with one query per sequence over blocks, else an empty tensor: decode_attention needs none there.

    Raises:
        ValueError, TypeError: as decode_attention.

    Oracle: `work` in hf_fastattn/kernels/_decode_plan.py; tests: tests/test_decode_schedule.py,
    tests/interpret/test_decode_schedule.py.
    """
    check_attention(q, k, v, block_table, seq_lens, None, None)
    check_window(window)
    if shared_prefixes is not None:
        check_shared_prefixes(shared_prefixes, block_table, None)
    if block_table is not None and seq_lens is not None and q.shape[2] == 1 and is_direct("decode_schedule", q):
        schedule = make_cpu_schedule(k, v, block_table, seq_lens, shared_prefixes, window)
        if schedule is not None:
            return schedule
    return _OP(q, k, v, block_table, seq_lens, shared_prefixes, window, batch_invariant)


def _no_schedule(q: Tensor, *_args: object) -> Tensor:
    return q.new_empty(0, 0, dtype=torch.int32)


def _fake_decode_schedule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
    shared_prefixes: Tensor | None,
    window: int,
    batch_invariant: bool,
) -> Tensor:
    if q.device.type != "cuda" or not has_triton():
        return _no_schedule(q)
    plans = importlib.import_module("hf_fastattn.kernels._decode_plan")
    if plans.supports(q, k, v, block_table) is not None:
        return _no_schedule(q)
    _, plan = plans.make_plan(q, k, v, block_table, shared_prefixes, batch_invariant)
    return q.new_empty(plan.shape, dtype=torch.int32)


_OP = define_op(
    "decode_schedule",
    "(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? seq_lens, Tensor? shared_prefixes, int window, "
    "bool batch_invariant) -> Tensor",
    _no_schedule,
    _fake_decode_schedule,
)
