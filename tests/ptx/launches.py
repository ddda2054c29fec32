"""Launches on CPU tensors, compiled for a GPU and run by :class:`~tests.ptx.machine.Machine`."""

import contextlib
import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hf_fastattn.block_pool import BlockTables
from hf_fastattn.kernels import (
    _compile,
    _launch,
    decode_attention,
    decode_linear,
    decode_schedule,
    packed_attention,
    prefill_attention,
    store_kv,
)
from hf_fastattn.ops import _library

from .machine import Machine
from .memory import GlobalMemory
from .program import parse
from .traffic import Traffic

Edit = Callable[[str, str], str]
_compiled: dict[Any, Any] = {}


def run(
    launch: _launch.Launch,
    tensors: tuple[torch.Tensor | None, ...],
    arch: int,
    turns: random.Random,
    edit: Edit | None = None,
    traffic: Traffic | None = None,
) -> None:
    """Run a launch as compiled for sm_<arch>; its programs take turns at atomics, in an order that ``turns`` draws.

    Args:
        edit: makes of a kernel's name and PTX the PTX that runs.
        traffic: where accesses to memory are counted.

    Raises:
        tests.ptx.operands.Stopped: a program does what it must not do.
    """
    case = _compile.case_from_call(launch.kernel.__name__, launch, tensors, {})
    values = dict(zip((each.name for each in launch.kernel.params), (*tensors, *launch.scalars), strict=False))
    aligned = tuple(name for name in case.divisible if not _is_off(values[name]))
    case = dataclasses.replace(case, divisible=aligned)
    key = (arch, repr(case))
    if key not in _compiled:
        kernel = _compile.compiled(case, arch)
        ptx, shared_bytes = kernel.asm["ptx"], kernel.metadata.shared
        _launch.keep(_compiled, key, (ptx, Machine(parse(ptx), shared_bytes), shared_bytes), most=64)
    ptx, machine, shared_bytes = _compiled[key]
    if edit is not None:
        machine = Machine(parse(edit(case.name, ptx)), shared_bytes)
    arguments = [values[name] for name in launch.kernel.arg_names if name in case.signature]
    arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    names = machine.program.params
    arguments += [0] * (len(names) - len(arguments))  # scratch memory that these kernels do not ask for
    memory = GlobalMemory([tensor for tensor in tensors if tensor is not None], traffic)
    machine.launch(launch.grid, dict(zip(names, arguments, strict=True)), memory, traffic)
    with np.errstate(all="ignore"):
        take_turns(machine, int(np.prod(launch.grid)), turns)


def take_turns(machine: Machine, count: int, turns: random.Random) -> None:
    """Run the programs of a grid: which one starts or goes on is drawn anew whenever one has made an atomic."""
    waiting = list(range(count))
    turns.shuffle(waiting)
    paused: list[tuple[Iterator[None], Any]] = []
    while waiting or paused:
        if waiting and (not paused or turns.random() < 0.5):
            running = machine.run(waiting.pop())
        else:
            running, state = paused.pop(turns.randrange(len(paused)))
            machine.restore(state)
        if next(running, "ended") is None:
            paused.append((running, machine.save()))


def _is_off(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.data_ptr() % 16 != 0


@contextlib.contextmanager
def emulated(arch: int, seed: int = 0, edit: Edit | None = None, traffic: Traffic | None = None) -> Iterator[None]:
    """Let launches on CPU tensors choose the configs of an architecture and run as compiled for it, see :func:`run`."""
    turns = random.Random(seed)

    def call(launch: _launch.Launch, *tensors: torch.Tensor | None) -> None:
        run(launch, tensors, arch, turns, edit, traffic)

    with pytest.MonkeyPatch.context() as patch:
        for module in (_launch, decode_linear):
            patch.setattr(module, "INTERPRETED_ARCH", arch)
        patch.setattr(_launch.Launch, "__call__", call)
        _forget_choices()
        try:
            yield
        finally:
            _forget_choices()


def _forget_choices() -> None:
    """Configs are chosen once per device and layout of a call."""
    _launch.device_arch.cache_clear()
    decode_linear.table_arch.cache_clear()
    for module in (decode_attention, decode_linear, decode_schedule, packed_attention, prefill_attention, store_kv):
        module._kept.clear()


@contextlib.contextmanager
def on_the_way_of_a_gpu() -> Iterator[None]:
    """Let CPU tensors take the way of a GPU's: blocks read by table, ops to their launchers, eager and compiled."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Warning only once.*previously registered kernel", UserWarning)
        patch.setattr(BlockTables, "even_runs", lambda tables: None)
        registered = torch.library.Library("hf_fastattn", "IMPL")
        for name, direct in _library.DIRECT.items():
            patch.setitem(direct, "cpu", direct["cuda"])
            registered.impl(name, direct["cuda"], "CPU", allow_override=True)
        try:
            yield
        finally:
            registered._destroy()
