"""Registers, constants and addresses: what instructions work on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import WORDS, GlobalMemory, SharedMemory, Who
from .program import Instruction, Program

Step = Callable[[], Any]
"""An instruction made ready to run; a branch returns whether it is taken."""

FILES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
"""Register files by the letters of their registers."""
TYPES = {
    "pred": np.bool_,
    **{f"{kind}{8 * np.dtype(word).itemsize}": word for kind in "bu" for word in WORDS.values()},
    **{"s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f32": np.float32, "f32x2": np.float32},  # two of them side by side in a 64-bit register
}


class Stopped(Exception):
    """A program cannot go on."""


def unknown(instruction: Instruction) -> Stopped:
    """Return the error for what is not in here."""
    return Stopped(f"this machine does not know the instruction {instruction}")


def known(kind: str, kinds: tuple[str, ...], instruction: Instruction) -> str:
    """Return a kind that is one of those; raise for another."""
    if kind not in kinds:
        raise unknown(instruction)
    return kind


def assign(target: np.ndarray, compute: Callable[[], Any]) -> Step:
    """Return the step that writes a result into a register."""

    def assign() -> None:
        target[:] = compute()

    return assign


class Operands:
    """What the parts of a machine share; see :class:`~tests.ptx.machine.Machine`."""

    program: Program
    shared: SharedMemory
    _memory: GlobalMemory
    _who: Who
    _arguments: dict[str, Any]
    _threads: int
    _warp: np.ndarray
    _files: dict[str, np.ndarray]
    _special: dict[str, np.ndarray]

    def _register(self, name: str) -> np.ndarray:
        letters = name[1:].rstrip("0123456789")
        return self._files[letters][int(name[1 + len(letters) :])]

    def _value(self, operand: str, kind: str) -> Any:
        """Return a register seen as a type, or a constant of it."""
        word = TYPES[kind]
        if operand in self._special:
            return self._special[operand].view(word)
        if operand.startswith("%"):
            register = self._register(operand)
            return register if register.dtype == word else register.view(word)
        if operand == "global_smem":
            return np.uint32(0)
        if operand in self.program.params:  # its address
            return np.array(list(self.program.params).index(operand), word)
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16)).view(word)
        number, size = int(operand, 0), np.dtype(word).itemsize
        if kind == "pred":
            return bool(number)
        return np.array(number % 2 ** (8 * size), f"u{size}").view(word)

    def _address(self, operand: str) -> tuple[Any, int]:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        shift = int(offset, 0) if offset else 0
        if base == "global_smem":
            return np.zeros(self._threads, np.int64), shift
        return self._register(base), shift

    def _lanes(self, instruction: Instruction) -> Callable[[], Any]:
        if instruction.predicate is None:
            return lambda: slice(None)
        predicate = self._register(instruction.predicate)
        if instruction.negated:
            return lambda: np.flatnonzero(~predicate)
        return lambda: np.flatnonzero(predicate)

    @staticmethod
    def _vector(operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{} ").split(",")]
