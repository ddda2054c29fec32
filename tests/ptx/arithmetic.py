"""Instructions that work on registers alone."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import matrix
from .operands import TYPES, Operands, Step, Stopped, assign, known, unknown
from .program import Instruction

_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    "ge": np.greater_equal,
}
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
"""True also where an operand is NaN: the negation of another comparison."""


_DIVISIBLE = ("s32", "u32", "s16", "u16")


class Arithmetic(Operands):
    """Builds the steps of arithmetic, comparisons, conversions and exchanges within a warp."""

    def _elementwise(self, instruction: Instruction, kind: str, function: Callable[..., Any]) -> Step:
        out, *operands = instruction.operands
        target, values = self._value(out, kind), [self._value(operand, kind) for operand in operands]
        return lambda: function(*values, out=target)

    def _computed(self, instruction: Instruction, kind: str, function: Callable[..., Any], out: str = "") -> Step:
        target, *operands = instruction.operands
        result, values = self._value(target, out or kind), [self._value(operand, kind) for operand in operands]

        def compute() -> None:
            result[:] = function(*values)

        return compute

    def _build_add(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, _bits_of(kinds[-1]), np.add)

    def _build_sub(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, _bits_of(kinds[-1]), np.subtract)

    def _build_neg(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, kinds[-1], np.negative)

    def _build_abs(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, kinds[-1], np.abs)

    def _build_mul(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[0] == "wide":
            out = f"{kinds[1][0]}{2 * int(kinds[1][1:])}"
            word = TYPES[out]
            return self._computed(instruction, kinds[1], lambda a, b: np.multiply(a, b, dtype=word), out)
        if kinds[0] == "hi":
            kind = known(kinds[1], ("s32", "u32"), instruction)
            wide = TYPES[f"{kind[0]}64"]
            return self._computed(instruction, kind, lambda a, b: np.multiply(a, b, dtype=wide) >> 32)
        return self._elementwise(instruction, _bits_of(kinds[-1]), np.multiply)

    def _build_mad(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, a, b, c = instruction.operands
        kind = kinds[1]
        wide = f"{kind[0]}{2 * int(kind[1:])}" if kinds[0] == "wide" else kind
        target, summand, word = self._value(out, wide), self._value(c, wide), TYPES[wide]
        left, right = self._value(a, kind), self._value(b, kind)

        def compute() -> None:
            target[:] = np.multiply(left, right, dtype=word) + summand

        return compute

    def _build_fma(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = known(".".join(kinds), ("rn.f32", "rn.f32x2"), instruction)[3:]
        return self._computed(instruction, kind, lambda a, b, c: np.multiply(a, b, dtype=np.float64) + c)

    def _build_div(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[-1] == "f32":
            return self._elementwise(instruction, "f32", np.divide)
        return self._computed(instruction, known(kinds[-1], _DIVISIBLE, instruction), _divide)

    def _build_rem(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = known(kinds[-1], _DIVISIBLE, instruction)
        return self._computed(instruction, kind, lambda a, b: a - _divide(a, b) * b)

    def _build_min(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._extremum(instruction, kinds, np.fmin if kinds[-1] == "f32" else np.minimum)

    def _build_max(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._extremum(instruction, kinds, np.fmax if kinds[-1] == "f32" else np.maximum)

    def _extremum(self, instruction: Instruction, kinds: list[str], function: Callable[..., Any]) -> Step:
        if "NaN" in kinds or "ftz" in kinds:
            raise unknown(instruction)
        if len(instruction.operands) == 4:  # of three values, on sm_100
            return self._computed(instruction, kinds[-1], lambda a, b, c: function(function(a, b), c))
        if "relu" in kinds:
            return self._computed(instruction, kinds[-1], lambda a, b: np.maximum(function(a, b), 0))
        return self._elementwise(instruction, kinds[-1], function)

    def _build_ex2(self, instruction: Instruction, _: list[str]) -> Step:
        return self._elementwise(instruction, "f32", np.exp2)

    def _bitwise(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, kinds[-1], _BITWISE[instruction.opcode.split(".")[0]])

    _build_and = _build_or = _build_xor = _bitwise

    def _build_not(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._elementwise(instruction, kinds[-1], np.invert)

    def _build_shl(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._shift(instruction, kinds[-1], np.left_shift)

    def _build_shr(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._shift(instruction, kinds[-1], np.right_shift)

    def _shift(self, instruction: Instruction, kind: str, function: Callable[..., Any]) -> Step:
        out, value, by = instruction.operands
        target, shifted, amount = self._value(out, kind), self._value(value, kind), self._value(by, "u32")
        width = 8 * target.dtype.itemsize

        def shift() -> None:
            if (amount >= width).any():
                raise Stopped(f"a shift by {np.max(amount)} bits of {width}")
            function(shifted, amount.astype(target.dtype), out=target)

        return shift

    def _build_popc(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, value = instruction.operands
        target, source = self._value(out, "u32"), self._value(value, known(kinds[0], ("b32",), instruction))
        return assign(target, lambda: np.unpackbits(source.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1))

    def _build_bfe(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, value, position, length = instruction.operands
        target, source = self._value(out, kinds[-1]), self._value(value, kinds[-1])
        width = 8 * target.dtype.itemsize
        left, right = width - int(position) - int(length), width - int(length)

        def extract() -> None:
            np.right_shift(np.left_shift(source, left), right, out=target)

        return extract

    def _build_setp(self, instruction: Instruction, kinds: list[str]) -> Step:
        if len(kinds) != 2:
            raise unknown(instruction)
        out, *operands = instruction.operands
        target, (a, b) = self._value(out, "pred"), (self._value(operand, kinds[1]) for operand in operands)
        if kinds[0] in _UNORDERED:
            function = _COMPARE[_UNORDERED[kinds[0]]]
            return lambda: np.logical_not(function(a, b), out=target)
        if kinds[0] == "ne" and kinds[1][0] == "f":  # ordered, unlike numpy's
            return lambda: np.logical_or(np.less(a, b), np.greater(a, b), out=target)
        compare = _COMPARE[kinds[0]]
        return lambda: compare(a, b, out=target)

    def _build_selp(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, a, b, predicate = instruction.operands
        target, chosen = self._value(out, kinds[-1]), self._value(predicate, "pred")
        yes, no = self._value(a, kinds[-1]), self._value(b, kinds[-1])

        def select() -> None:
            target[:] = np.where(chosen, yes, no)

        return select

    def _build_cvt(self, instruction: Instruction, kinds: list[str]) -> Step:
        *rounding, to, source = kinds
        out, *operands = instruction.operands
        if rounding == ["rn"] and source == "f32" and to in ("bf16x2", "f16x2", "bf16", "f16"):
            convert = matrix.to_bf16 if to.startswith("b") else matrix.to_fp16
            target = self._register(out)
            values = [self._value(operand, "f32") for operand in operands]
            if len(values) == 1:
                return assign(target, lambda: convert(values[0]))
            return assign(target, lambda: convert(values[0]) << 16 | convert(values[1]))
        if rounding == [] and to == "f32" and source in ("bf16", "f16"):
            decode, bits = (matrix.from_bf16 if source == "bf16" else matrix.from_fp16), self._value(operands[0], "b16")
            return assign(self._value(out, "f32"), lambda: decode(bits))
        if rounding or to[0] == "f" or source[0] == "f":
            raise unknown(instruction)
        target, wide, word = self._value(out, to), self._register(operands[0]), TYPES[source]
        return assign(target, lambda: wide.astype(f"u{np.dtype(word).itemsize}").view(word).astype(target.dtype))

    def _build_mov(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, source = instruction.operands
        if out.startswith("{"):
            parts = [None if name == "_" else self._register(name) for name in self._vector(out)]
            whole = self._register(source)

            def split() -> None:
                for part, half in zip(parts, _halves_of(whole).T, strict=True):
                    if part is not None:
                        part[:] = half

            return split
        if source.startswith("{"):
            whole, parts = self._register(out), [self._register(name) for name in self._vector(source)]

            def join() -> None:
                for part, half in zip(parts, _halves_of(whole).T, strict=True):
                    half[:] = part

            return join
        value = self._value(source, kinds[-1])
        return assign(self._value(out, kinds[-1]), lambda: value)

    def _build_shfl(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, value, by, clamp, _ = instruction.operands
        target, source = self._value(out, "b32"), self._value(value, "b32")
        amount = self._value(by, "u32")
        lane = np.arange(self._threads) % 32
        if kinds[1] not in ("bfly", "idx", "up") or clamp != ("0" if kinds[1] == "up" else "31"):
            raise unknown(instruction)

        def shuffle() -> None:
            shift = amount.astype(np.int64)
            if kinds[1] == "bfly":
                other = lane ^ shift
            elif kinds[1] == "idx":
                other = shift % 32 + 0 * lane
            else:
                other = np.where(lane >= shift, lane - shift, lane)
            target[:] = source[self._warp * 32 + other]

        return shuffle

    def _build_redux(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[2] not in ("s32", "u32", "f32"):
            raise unknown(instruction)
        of_float = {"max": np.fmax.reduce, "min": np.fmin.reduce}  # the other operand where one is NaN
        of_int = {"max": np.max, "min": np.min, "add": np.sum}
        reduce: Callable[..., Any] = (of_float if kinds[2] == "f32" else of_int)[kinds[1]]
        out, value, _ = instruction.operands
        target, source = self._value(out, kinds[2]), self._value(value, kinds[2])
        return assign(target, lambda: np.repeat(reduce(source.reshape(-1, 32), axis=1), 32).astype(target.dtype))


def _bits_of(kind: str) -> str:
    """Integers wrap around whatever their sign."""
    return kind if kind[0] == "f" else f"u{kind[1:]}"


def _halves_of(register: np.ndarray) -> np.ndarray:
    """Return a view of a register as (threads, 2) words of half the size, the lower first."""
    return register.view(f"u{register.dtype.itemsize // 2}").reshape(-1, 2)


def _divide(a: np.ndarray, b: Any) -> np.ndarray:
    """Return a / b, rounded to zero: exact in float64 for 32 bits."""
    if (b == 0).any():
        raise Stopped("a division by zero")
    return np.trunc(np.divide(a, b, dtype=np.float64)).astype(a.dtype)
