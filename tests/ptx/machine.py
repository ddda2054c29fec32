"""A machine that runs PTX: all threads of a program in lockstep, an instruction at a time, on numpy arrays.

What it is for: to see what the compiled kernels compute, and what memory they touch, where there is no GPU. It knows
the instructions that Triton writes for this package's kernels and refuses others. It says nothing about time, takes
fences for granted, and multiplies matrices when a product is issued, not when it is waited for: only shared memory that
is written meanwhile is noticed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .accesses import Accesses
from .arithmetic import Arithmetic
from .memory import GlobalMemory, MemoryFault, SharedMemory, Who
from .operands import FILES, TYPES, Step, Stopped, unknown
from .products import Products
from .program import Instruction, Program
from .tensor_memory import TensorMemory, TensorProducts
from .traffic import Traffic


class Machine(Arithmetic, Accesses, Products, TensorProducts):
    """Runs programs of one kernel, one at a time.

    Args:
        program: the kernel.
        shared_bytes: shared memory of a program.
    """

    def __init__(self, program: Program, shared_bytes: int) -> None:
        self.program, self._shared_bytes = program, shared_bytes
        shared = [opcode for opcode in program.opcodes if opcode.startswith(("ld.shared", "st.shared"))]
        self._shared_unit = min([4, *(np.dtype(TYPES[opcode.split(".")[-1]]).itemsize for opcode in shared)])
        self._threads = program.num_threads
        self._warp = np.arange(self._threads) // 32
        self._files = {
            name: np.full((program.registers.get(name, 0), self._threads), 1 if word == np.bool_ else 0x7FC1, word)
            for name, word in FILES.items()
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
        self._tensor = TensorMemory(self.shared)
        self._active = np.ones(self._threads, np.bool_)  # threads of a branch that only some of them take

    def run(self, index: int) -> Iterator[None]:
        """Run one program of the grid; pause after every atomic, with :meth:`save` and :meth:`restore` around a pause.

        Raises:
            Stopped: what went wrong, with the instruction and the line of the kernel.
        """
        self._begin(index)
        block, join, before = 0, -1, {}
        while True:
            if block == join:
                self._rejoin(before)
                join = -1
            steps, last = self._blocks[block]
            if join >= 0 and not self._is_harmless(steps):
                raise Stopped(f"program {index}: not all threads go through {steps[0][1].where} and what it does")
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
            if operation == "bra" and taken is None:
                if join >= 0:
                    raise Stopped("threads part within a branch that only some of them take")
                join, before = self.program.labels[last.operands[0]], self._part(last)
            block = self.program.labels[last.operands[0]] if operation == "bra" and taken else block + 1
        if self._issued or any(self._groups) or any(self._products):
            raise Stopped(f"program {index} ends before its asynchronous copies and products")
        self._tensor.end()

    def _part(self, branch: Instruction) -> dict[str, np.ndarray]:
        """Go on with the threads that do not take a branch; return the registers for those that do."""
        self._active = self._register(branch.predicate or "") == branch.negated
        return {name: values.copy() for name, values in self._files.items()}

    def _rejoin(self, before: dict[str, np.ndarray]) -> None:
        """Go on with all threads, at the target of a branch that some have taken."""
        waiting = np.flatnonzero(~self._active)
        for name, values in self._files.items():
            values[:, waiting] = before[name][:, waiting]
        self._active = np.ones(self._threads, np.bool_)

    @staticmethod
    def _is_harmless(steps: list[tuple[Step, Instruction]]) -> bool:
        """Whether a block may run for threads that are not there, whose registers are restored behind it."""
        meeting = ("ld", "st", "atom", "cp", "bar", "barrier", "ret", "shfl", "ldmatrix", "stmatrix", "mma", "wgmma")
        names = {instruction.opcode.split(".")[0] for _, instruction in steps if ".param" not in instruction.opcode}
        return names.isdisjoint(meeting)

    def save(self) -> Any:
        """Return the state of a paused program."""
        state = (self.shared, self._who, self._issued, self._groups, self._products, self._tensor)
        kept = {name: values.copy() for name, values in (*self._files.items(), *self._special.items())}
        return kept, state

    def restore(self, saved: Any) -> None:
        """Go on with a program that was paused."""
        kept, (self.shared, self._who, self._issued, self._groups, self._products, self._tensor) = saved
        for name, values in (*self._files.items(), *self._special.items()):
            values[:] = kept[name]

    def _build(self, instruction: Instruction) -> Step:
        name, *kinds = instruction.opcode.split(".")
        build = getattr(self, f"_build_{name}", None)
        if build is None:
            raise unknown(instruction)
        if instruction.predicate and name not in ("ld", "st", "atom", "bra", "mbarrier", "tcgen05"):
            raise unknown(instruction)
        step: Step = build(instruction, kinds)
        return step

    def _build_bra(self, instruction: Instruction, _: list[str]) -> Step:
        if instruction.predicate is None:
            return lambda: True
        predicate, negated = self._register(instruction.predicate), instruction.negated

        def branch() -> bool | None:
            found = predicate[self._active]
            if (found != found[0]).any():
                return None
            return bool(found[0]) != negated

        return branch

    def _build_ret(self, *_: Any) -> Step:
        return lambda: None

    def _build_bar(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds == ["warp", "sync"]:  # the threads of a warp are in step anyway
            return lambda: None
        if kinds != ["sync"] or instruction.operands != ("0",):
            raise unknown(instruction)

        def wait() -> None:
            self._who = Who(self._who.program, self._who.epoch + 1)
            self.shared.epoch = self._who.epoch
            self._memory.pass_barrier(self._who)

        return wait

    _build_barrier = _build_bar  # the same, where threads of a warp need not arrive together

    def _build_fence(self, *_: Any) -> Step:
        return lambda: None

    def _build_createpolicy(self, *_: Any) -> Step:
        return lambda: None
