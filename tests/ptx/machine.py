"""A machine that runs PTX: all threads of a program in lockstep, an instruction at a time, on numpy arrays.

What it is for: to see what the compiled kernels compute, and what memory they touch, where there is no GPU. It knows
the instructions that Triton writes for this package's kernels and refuses others. It says nothing about time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import matrix
from .memory import WORDS, GlobalMemory, MemoryFault, SharedMemory, Who
from .program import Instruction, Program
from .traffic import Traffic

Step = Callable[[], Any]

_FILES = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
_TYPES = {
    "pred": np.bool_,
    **{f"{kind}{8 * np.dtype(word).itemsize}": word for kind in "bu" for word in WORDS.values()},
    **{"s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f32": np.float32, "f32x2": np.float32},  # two of them side by side in a 64-bit register
}
_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    "ge": np.greater_equal,
}
_UNORDERED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
"""True also where an operand is NaN: the negation of another comparison."""


_DIVISIBLE = ("s32", "u32", "s16", "u16")


class Stopped(Exception):
    """A program cannot go on."""


class Machine:
    """Runs programs of one kernel, one at a time.

    Args:
        program: the kernel.
        shared_bytes: shared memory of a program.
    """

    def __init__(self, program: Program, shared_bytes: int) -> None:
        self.program, self._shared_bytes = program, shared_bytes
        shared = [opcode for opcode in program.opcodes if opcode.startswith(("ld.shared", "st.shared"))]
        self._shared_unit = min([4, *(np.dtype(_TYPES[opcode.split(".")[-1]]).itemsize for opcode in shared)])
        self._threads = program.num_threads
        self._warp = np.arange(self._threads) // 32
        self._files = {
            name: np.full((program.registers.get(name, 0), self._threads), 1 if word == np.bool_ else 0x7FC1, word)
            for name, word in _FILES.items()
        }
        axes = [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]
        self._special = {name: np.zeros(self._threads, np.uint32) for name in axes}
        self._special["%tid.x"] = np.arange(self._threads, dtype=np.uint32)
        self.launch((1, 1, 1), {}, GlobalMemory([]))
        self._blocks = [([(self._build(each), each) for each in block], block[-1]) for block in program.blocks]

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: dict[str, Any],
        memory: GlobalMemory,
        traffic: Traffic | None = None,
    ) -> None:
        """Prepare for the programs of a grid, with values of the kernel's parameters by name.

        Args:
            traffic: where accesses to shared memory are counted.
        """
        self._grid, self._arguments, self._memory, self._traffic = grid, arguments, memory, traffic
        for axis, size in zip("xyz", grid, strict=True):
            self._special[f"%nctaid.{axis}"][:] = size
        self._begin(0)

    def _begin(self, index: int) -> None:
        x, y, _ = self._grid
        for axis, value in zip("xyz", (index % x, index // x % y, index // x // y), strict=True):
            self._special[f"%ctaid.{axis}"][:] = value
        self.shared = SharedMemory(self._shared_bytes, self._shared_unit, self._traffic)
        self._who = Who(index, 0)
        self._issued: list[Any] = []  # asynchronous copies not yet in a group
        self._groups: list[list[Any]] = []
        self._products: list[list[np.ndarray]] = [[]]  # addresses that asynchronous products of each group read

    def run(self, index: int) -> Iterator[None]:
        """Run one program of the grid; pause after every atomic, with :meth:`save` and :meth:`restore` around a pause.

        Raises:
            Stopped: what went wrong, with the instruction and the line of the kernel.
        """
        self._begin(index)
        block = 0
        while True:
            steps, last = self._blocks[block]
            for step, instruction in steps:
                try:
                    taken = step()
                except (MemoryFault, Stopped, ValueError) as error:
                    raise Stopped(f"{error}\n  program {index}, {instruction.where}: {instruction}") from error
            operation = last.opcode.split(".")[0]
            if operation == "ret":
                break
            if operation == "atom":
                yield
            block = self.program.labels[last.operands[0]] if operation == "bra" and taken else block + 1
        if self._issued or any(self._groups) or any(self._products):
            raise Stopped(f"program {index} ends before its asynchronous copies and products")

    def save(self) -> Any:
        """Return the state of a paused program."""
        state = (self.shared, self._who, self._issued, self._groups, self._products)
        kept = {name: values.copy() for name, values in (*self._files.items(), *self._special.items())}
        return kept, state

    def restore(self, saved: Any) -> None:
        """Go on with a program that was paused."""
        kept, (self.shared, self._who, self._issued, self._groups, self._products) = saved
        for name, values in (*self._files.items(), *self._special.items()):
            values[:] = kept[name]

    # Operands

    def _build(self, instruction: Instruction) -> Step:
        name, *kinds = instruction.opcode.split(".")
        build = getattr(self, f"_build_{name}", None)
        if build is None:
            raise Stopped(f"this machine does not know the instruction {instruction}")
        if instruction.predicate and name not in ("ld", "st", "atom", "bra"):
            raise Stopped(f"this machine does not know a predicate at {instruction}")
        step: Step = build(instruction, kinds)
        return step

    def _register(self, name: str) -> np.ndarray:
        letters = name[1:].rstrip("0123456789")
        return self._files[letters][int(name[1 + len(letters) :])]

    def _value(self, operand: str, kind: str) -> Any:
        """Return a register seen as a type, or a constant of it."""
        word = _TYPES[kind]
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
        number = int(operand, 0)
        bits = 8 * np.dtype(word).itemsize
        return (
            bool(number) if kind == "pred" else np.array(number % 2**bits, np.uint64).astype(f"u{bits // 8}").view(word)
        )

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

    # Control

    def _build_bra(self, instruction: Instruction, _: list[str]) -> Step:
        if instruction.predicate is None:
            return lambda: True
        predicate, negated = self._register(instruction.predicate), instruction.negated

        def branch() -> bool:
            taken = bool(predicate[0])
            if (predicate != taken).any():
                raise Stopped("the threads of a program do not go the same way, which this machine does not know")
            return taken != negated

        return branch

    def _build_ret(self, *_: Any) -> Step:
        return lambda: None

    def _build_bar(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds == ["warp", "sync"]:  # the threads of a warp are in step anyway
            return lambda: None
        if kinds != ["sync"] or instruction.operands != ("0",):
            raise Stopped(f"this machine does not know the barrier {instruction}")

        def wait() -> None:
            self._who = Who(self._who.program, self._who.epoch + 1)
            self.shared.epoch = self._who.epoch
            self._memory.pass_barrier(self._who)

        return wait

    def _build_fence(self, *_: Any) -> Step:
        return lambda: None

    def _build_createpolicy(self, *_: Any) -> Step:
        return lambda: None

    # Arithmetic

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
            word = _TYPES[out]
            return self._computed(instruction, kinds[1], lambda a, b: np.multiply(a, b, dtype=word), out)
        if kinds[0] == "hi":
            kind = _known(kinds[1], ("s32", "u32"), instruction)
            wide = _TYPES[f"{kind[0]}64"]
            return self._computed(instruction, kind, lambda a, b: np.multiply(a, b, dtype=wide) >> 32)
        return self._elementwise(instruction, _bits_of(kinds[-1]), np.multiply)

    def _build_mad(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, a, b, c = instruction.operands
        kind = kinds[1]
        wide = f"{kind[0]}{2 * int(kind[1:])}" if kinds[0] == "wide" else kind
        target, summand, word = self._value(out, wide), self._value(c, wide), _TYPES[wide]
        left, right = self._value(a, kind), self._value(b, kind)

        def compute() -> None:
            target[:] = np.multiply(left, right, dtype=word) + summand

        return compute

    def _build_fma(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = _known(".".join(kinds), ("rn.f32", "rn.f32x2"), instruction)[3:]
        return self._computed(instruction, kind, lambda a, b, c: np.multiply(a, b, dtype=np.float64) + c)

    def _build_div(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[-1] == "f32":
            return self._elementwise(instruction, "f32", np.divide)
        return self._computed(instruction, _known(kinds[-1], _DIVISIBLE, instruction), _divide)

    def _build_rem(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = _known(kinds[-1], _DIVISIBLE, instruction)
        return self._computed(instruction, kind, lambda a, b: a - _divide(a, b) * b)

    def _build_min(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._extremum(instruction, kinds, np.fmin if kinds[-1] == "f32" else np.minimum)

    def _build_max(self, instruction: Instruction, kinds: list[str]) -> Step:
        return self._extremum(instruction, kinds, np.fmax if kinds[-1] == "f32" else np.maximum)

    def _extremum(self, instruction: Instruction, kinds: list[str], function: Callable[..., Any]) -> Step:
        if "NaN" in kinds or "ftz" in kinds:
            raise Stopped(f"this machine does not know the instruction {instruction}")
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
        target, source = self._value(out, "u32"), self._value(value, _known(kinds[0], ("b32",), instruction))
        return _assign(target, lambda: np.unpackbits(source.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1))

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
            raise Stopped(f"this machine does not know the instruction {instruction}")
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
                return _assign(target, lambda: convert(values[0]))
            return _assign(target, lambda: convert(values[0]) << 16 | convert(values[1]))
        if rounding == [] and to == "f32" and source in ("bf16", "f16"):
            decode, bits = (matrix.from_bf16 if source == "bf16" else matrix.from_fp16), self._value(operands[0], "b16")
            return _assign(self._value(out, "f32"), lambda: decode(bits))
        if rounding or to[0] == "f" or source[0] == "f":
            raise Stopped(f"this machine does not know the instruction {instruction}")
        target, wide, word = self._value(out, to), self._register(operands[0]), _TYPES[source]
        return _assign(target, lambda: wide.astype(f"u{np.dtype(word).itemsize}").view(word).astype(target.dtype))

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
        return _assign(self._value(out, kinds[-1]), lambda: value)

    # Between the threads of a warp

    def _build_shfl(self, instruction: Instruction, kinds: list[str]) -> Step:
        out, value, by, clamp, _ = instruction.operands
        target, source = self._value(out, "b32"), self._value(value, "b32")
        amount = self._value(by, "u32")
        lane = np.arange(self._threads) % 32
        if kinds[1] not in ("bfly", "idx", "up") or clamp != ("0" if kinds[1] == "up" else "31"):
            raise Stopped(f"this machine does not know the instruction {instruction}")

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
            raise Stopped(f"this machine does not know the instruction {instruction}")
        of_float = {"max": np.fmax.reduce, "min": np.fmin.reduce}  # the other operand where one is NaN
        of_int = {"max": np.max, "min": np.min, "add": np.sum}
        reduce: Callable[..., Any] = (of_float if kinds[2] == "f32" else of_int)[kinds[1]]
        out, value, _ = instruction.operands
        target, source = self._value(out, kinds[2]), self._value(value, kinds[2])
        return _assign(target, lambda: np.repeat(reduce(source.reshape(-1, 32), axis=1), 32).astype(target.dtype))

    # Memory

    def _build_ld(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[0] == "param":
            return self._build_parameter(instruction)
        targets = [self._register(name) for name in self._vector(instruction.operands[0])]
        base, offset = self._address(instruction.operands[1])
        lanes_of, size = self._lanes(instruction), np.dtype(_TYPES[kinds[-1]]).itemsize
        is_shared, constant = kinds[0] in ("shared", "shared::cta"), "nc" in kinds

        def load() -> None:
            lanes = lanes_of()
            address, warp = base[lanes].astype(np.int64) + offset, self._warp[lanes]
            if len(address) == 0:
                return
            if is_shared:
                values = self.shared.load(address, size, len(targets), warp)
            else:
                values = self._memory.load(address, size, len(targets), warp, self._who, constant=constant)
            for target, column in zip(targets, values.T, strict=True):
                target[lanes] = column

        return load

    def _build_parameter(self, instruction: Instruction) -> Step:
        target, name = self._register(instruction.operands[0]), instruction.operands[1].strip("[]")
        names, kinds = list(self.program.params), self.program.params
        address = None if name in kinds else self._register(name)

        def load() -> None:
            if address is not None and (address != address[0]).any():
                raise Stopped("the threads of a program read different parameters, which this machine does not know")
            which = name if address is None else names[address[0]]
            word = "f4" if kinds[which] == "f32" else f"i{target.dtype.itemsize}"
            target.view(word)[:] = self._arguments[which]

        return load

    def _build_st(self, instruction: Instruction, kinds: list[str]) -> Step:
        base, offset = self._address(instruction.operands[0])
        word = np.dtype(_TYPES[kinds[-1]])
        sources = [self._register(name) for name in self._vector(instruction.operands[1])]
        lanes_of, is_shared = self._lanes(instruction), kinds[0] in ("shared", "shared::cta")

        def store() -> None:
            lanes = lanes_of()
            address, warp = base[lanes].astype(np.int64) + offset, self._warp[lanes]
            if len(address) == 0:
                return
            values = np.stack([source[lanes].astype(word) for source in sources], axis=1)
            if is_shared:
                self.shared.store(address, values, warp)
            else:
                self._memory.store(address, values, warp, self._who)

        return store

    def _build_atom(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds != ["global", "gpu", "acq_rel", "add", "u32"]:
            raise Stopped(f"this machine does not know the instruction {instruction}")
        out, address, value = instruction.operands
        (base, offset), lanes_of = self._address(address), self._lanes(instruction)
        target, summand = self._register(out), self._register(value)

        def add() -> None:
            for lane in np.arange(self._threads)[lanes_of()].tolist():
                where = int(base[lane]) + offset
                target[lane] = self._memory.add(where, int(summand[lane]), int(self._warp[lane]), self._who)

        return add

    def _build_cp(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[1] == "commit_group":
            return self._commit_copies
        if kinds[1] == "wait_group":
            left = int(instruction.operands[0])
            return lambda: self._wait_for_copies(left)
        destination, source, size, *given = instruction.operands
        (to, to_offset), (start, offset), size = self._address(destination), self._address(source), int(size, 0)
        sizes = self._value(given[0], "u32") if given else np.full(self._threads, size)

        def copy() -> None:
            where = to.astype(np.int64) + to_offset
            values = np.zeros((self._threads, size), np.uint8)
            if ((sizes != 0) & (sizes != size)).any():
                raise Stopped(f"a copy of neither 0 nor {size} bytes")
            lanes = np.flatnonzero(sizes)
            address = start[lanes].astype(np.int64) + offset
            words = self._memory.load(address, 4, size // 4, self._warp[lanes], self._who)
            values[lanes] = words.view(np.uint8)
            self.shared.fill(where, size, self._warp)
            self._issued.append((where, values))

        return copy

    def _commit_copies(self) -> None:
        self._groups.append(self._issued)
        self._issued = []

    def _wait_for_copies(self, left: int) -> None:
        while len(self._groups) > left:
            for where, values in self._groups.pop(0):
                self.shared.land(where, values, self._warp)

    # Matrices

    def _rows_of_matrices(self, operand: str, count: int) -> Callable[[], np.ndarray]:
        """Return the addresses (count, threads) of the row of each 8 x 8 matrix that a lane holds a pair of."""
        base, offset = self._address(operand)
        thread = np.arange(self._threads)

        def rows() -> np.ndarray:
            address = base.astype(np.int64) + offset
            lane_of_row = thread // 32 * 32 + thread % 32 // 4
            return np.stack([address[lane_of_row + 8 * each] for each in range(count)])

        return rows

    def _build_ldmatrix(self, instruction: Instruction, kinds: list[str]) -> Step:
        targets = [self._register(name) for name in self._vector(instruction.operands[0])]
        rows = self._rows_of_matrices(instruction.operands[1], len(targets))
        base, offset = self._address(instruction.operands[1])
        thread, transposed = np.arange(self._threads), "trans" in kinds
        giving = np.flatnonzero(thread % 32 < 8 * len(targets))

        def load() -> None:
            address = base[giving].astype(np.int64) + offset
            self.shared.read(address, 16, self._warp[giving])
            if transposed:
                all_rows = base.astype(np.int64) + offset
                for each, target in enumerate(targets):
                    first = thread // 32 * 32 + 8 * each + thread % 4 * 2
                    low, high = (
                        self.shared.words[2][all_rows[first + i] // 2 + thread % 32 // 4].astype(np.uint32)
                        for i in (0, 1)
                    )
                    target[:] = high << 16 | low
                return
            for target, where in zip(targets, rows(), strict=True):
                target[:] = self.shared.words[4][where // 4 + thread % 4]

        return load

    def _build_stmatrix(self, instruction: Instruction, kinds: list[str]) -> Step:
        if "trans" in kinds:
            raise Stopped(f"this machine does not know the instruction {instruction}")
        sources = [self._register(name) for name in self._vector(instruction.operands[1])]
        rows = self._rows_of_matrices(instruction.operands[0], len(sources))
        thread = np.arange(self._threads)

        def store() -> None:
            for source, where in zip(sources, rows(), strict=True):
                self.shared.store(where + thread % 4 * 4, source[:, None], self._warp)

        return store

    def _build_mma(self, instruction: Instruction, kinds: list[str]) -> Step:
        element = _known(kinds[-2], ("bf16", "f16"), instruction)
        if kinds[:5] != ["sync", "aligned", "m16n8k16", "row", "col"] or kinds[5] != "f32":
            raise Stopped(f"this machine does not know the instruction {instruction}")
        decode = matrix.from_bf16 if element == "bf16" else matrix.from_fp16
        d, a, b, c = ([self._value(name, "b32") for name in self._vector(each)] for each in instruction.operands)

        def multiply() -> None:
            result = matrix.mma_m16n8k16(np.stack(a), np.stack(b), np.stack(c).view(np.float32), decode)
            for target, values in zip(d, result, strict=True):
                target.view(np.float32)[:] = values

        return multiply

    def _build_wgmma(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[0] == "fence":
            return lambda: None
        if kinds[0] == "commit_group":
            return lambda: self._products.append([])
        if kinds[0] == "wait_group":
            left = int(instruction.operands[0])
            return lambda: self._wait_for_products(left)
        element = _known(kinds[-1], ("bf16", "f16"), instruction)
        decode = matrix.from_bf16 if element == "bf16" else matrix.from_fp16
        columns = int(kinds[3].partition("n")[2].partition("k")[0])
        out, left, right, scale, *options = instruction.operands
        registers = [int(name[2:]) for name in self._vector(out)]
        transposed = [bool(int(option)) for option in options[2:]]  # behind the signs of A and B
        if options[:2] != ["1", "1"]:
            raise Stopped(f"this machine does not know the instruction {instruction}")
        accumulate = self._value(scale, "pred")
        a = [self._register(name) for name in self._vector(left)] if left.startswith("{") else None
        a_descriptor = None if a else self._register(left)
        b_descriptor = self._register(right)
        file = self._files["r"].view(np.float32)

        def multiply() -> None:
            if a_descriptor is None:
                x = matrix.operand_a(np.stack(a), decode).reshape(-1, 64, 16)
            else:
                x = self._described(a_descriptor, 64, transposed[0], decode)
            y = self._described(b_descriptor, columns, transposed[-1], decode).transpose(0, 2, 1)
            before = np.where(accumulate, file[registers], np.float32(0))
            file[registers] = matrix.wgmma(x, y, before)

        return multiply

    def _described(self, descriptor: np.ndarray, rows: int, transposed: bool, decode: matrix.Decode) -> np.ndarray:
        """Return the (groups, rows, 16) operands in shared memory that warpgroups' descriptors show."""
        groups = []
        for group in descriptor.reshape(-1, 128):
            if (group != group[0]).any():
                raise Stopped("the threads of a warpgroup have different descriptors")
            where = matrix.described(int(group[0]), rows, transposed=transposed)
            self.shared.use(where)
            self._products[-1].append(where)
            groups.append(decode(self.shared.words[2][where // 2]))
        return np.stack(groups)

    def _wait_for_products(self, left: int) -> None:
        while len(self._products) > left + 1:
            for where in self._products.pop(0):
                self.shared.finish(where, several=self._threads > 128)


def _bits_of(kind: str) -> str:
    """Integers wrap around whatever their sign."""
    return kind if kind[0] == "f" else f"u{kind[1:]}"


def _halves_of(register: np.ndarray) -> np.ndarray:
    """Return a view of a register as (threads, 2) words of half the size, the lower first."""
    return register.view(f"u{register.dtype.itemsize // 2}").reshape(-1, 2)


def _known(kind: str, kinds: tuple[str, ...], instruction: Instruction) -> str:
    if kind not in kinds:
        raise Stopped(f"this machine does not know the instruction {instruction}")
    return kind


def _assign(target: np.ndarray, compute: Callable[[], Any]) -> Step:
    def assign() -> None:
        target[:] = compute()

    return assign


def _divide(a: np.ndarray, b: Any) -> np.ndarray:
    """Return a / b, rounded to zero: exact in float64 for 32 bits."""
    if (b == 0).any():
        raise Stopped("a division by zero")
    return np.trunc(np.divide(a, b, dtype=np.float64)).astype(a.dtype)
