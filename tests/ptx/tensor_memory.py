"""The tensor memory of sm_100 and its matrix products, which one thread issues and a barrier in shared memory reports.

Source: PTX ISA, the chapter on tensor core instructions of the fifth generation (tcgen05). Products are computed when
they are issued; what they read and write counts as in use until somebody has waited for a barrier that reports them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import matrix
from .memory import MemoryFault, SharedMemory
from .operands import Operands, Step, Stopped, known, unknown
from .program import Instruction

LANES, COLUMNS = 128, 512
UNDER_WAY = 2**62
"""In the place of an epoch: later than any."""
ROWS = 128
"""Of the only kind of product that is known: row r of A and D lies in lane r."""

Cells = tuple[Any, Any]
"""Lanes and columns."""


@dataclass
class _Barrier:
    """A barrier in shared memory: arrivals that end a phase, those that are left, and what each ended phase reports."""

    count: int
    left: int
    reports: list[int] = field(default_factory=list)


class TensorMemory:
    """The tensor memory of one program, 128 lanes of 32-bit columns; NaN where nobody wrote.

    Args:
        shared: of the same program, from which products read operands.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self.words = np.full((LANES, COLUMNS), 0x7FC17FC1, np.uint32)
        self.columns = 0  # that are allocated
        self._stored = np.full((LANES, COLUMNS), -1, np.int64)  # epoch in which warps' last store to a word arrived,
        self._loaded = np.full((LANES, COLUMNS), -1, np.int64)  # and in which they last loaded it
        self._busy = np.zeros((LANES, COLUMNS), np.int32)  # products that were not waited for
        self._stores: list[Cells] = []  # that were not waited for
        self._issued: list[tuple[list[Cells], list[np.ndarray]]] = []
        self._committed: list[tuple[int, list[tuple[list[Cells], list[np.ndarray]]]]] = []
        self._commits = 0
        self._barriers: dict[int, _Barrier] = {}

    def load(self, cells: Cells, epoch: int) -> np.ndarray:
        """Return words that warps load."""
        self._check_access(cells)
        if (self._stored[cells] == UNDER_WAY).any():
            raise MemoryFault("tensor memory is loaded while a store to it is under way")
        self._loaded[cells] = epoch
        return self.words[cells]

    def store(self, cells: Cells, values: np.ndarray) -> None:
        """Write words that warps store."""
        self._check_access(cells)
        self._stored[cells] = UNDER_WAY
        self.words[cells] = values
        self._stores.append(cells)

    def _check_access(self, cells: Cells) -> None:
        if cells[1].max() >= self.columns:
            raise MemoryFault(f"column {cells[1].max()} of tensor memory, of which {self.columns} are allocated")
        if self._busy[cells].any():
            raise MemoryFault("tensor memory is accessed while a matrix product uses it")

    def wait_for_stores(self, epoch: int) -> None:
        """All warps have waited for their stores."""
        for cells in self._stores:
            self._stored[cells] = epoch
        self._stores = []

    def multiply(
        self, out: int, a: np.ndarray, b: np.ndarray, *, accumulate: bool, reads: list[Cells], used: Any, epoch: int
    ) -> None:
        """Add a @ b to (128, N) words at a column, or write it there.

        Args:
            reads: cells that operands come from. used: addresses of shared memory that they come from.
            epoch: of the program: what warps stored in it is not known to the thread that issues the product.
        """
        written: Cells = np.s_[:, out : out + b.shape[1]]  # type: ignore[assignment]
        if out + b.shape[1] > self.columns:
            raise MemoryFault(f"a matrix product writes behind the {self.columns} columns that are allocated")
        for cells in [*reads, *([written] if accumulate else [])]:
            if (self._stored[cells] >= epoch).any():
                raise MemoryFault("a matrix product reads tensor memory that warps stored to without wait or barrier")
        if (self._stored[written] >= epoch).any() or (self._loaded[written] >= epoch).any():
            raise MemoryFault("a matrix product writes tensor memory that warps accessed without a barrier")
        values = self.words[written].view(np.float32)
        values[:] = a @ b + (values if accumulate else np.float32(0))
        for where in used:
            self._shared.use(where)
        for cells in [written, *reads]:
            self._busy[cells] += 1
        self._issued.append(([written, *reads], used))

    def commit(self, barrier: int) -> None:
        """Let a barrier report when all products so far are done."""
        self._commits += 1
        self._committed.append((self._commits, self._issued))
        self._issued = []
        state = self._at(barrier)
        state.left -= 1
        if state.left == 0:
            state.left = state.count
            state.reports.append(self._commits)

    def _at(self, barrier: int) -> _Barrier:
        if barrier not in self._barriers:
            raise MemoryFault(f"there is no barrier at byte {barrier} of shared memory")
        return self._barriers[barrier]

    def make_barrier(self, address: int, count: int) -> None:
        """Begin to use shared memory as a barrier."""
        self._barriers[address] = _Barrier(count, count)

    def drop_barrier(self, address: int) -> None:
        """End that."""
        self._at(address)
        del self._barriers[address]

    def wait(self, barrier: int, parity: int) -> None:
        """Wait until the barrier's last phase of a parity has ended.

        Raises:
            Stopped: it would be forever, since nothing is under way that could end it.
        """
        state = self._at(barrier)
        if len(state.reports) % 2 == parity:
            raise Stopped("a wait for a barrier that nothing will end")
        if not state.reports:  # the phase before the first counts as ended
            return
        while self._committed and self._committed[0][0] <= state.reports[-1]:
            for cells, used in self._committed.pop(0)[1]:
                for each in cells:
                    self._busy[each] -= 1
                for where in used:
                    self._shared.finish(where, several=False)

    def end(self) -> None:
        """The program ends.

        Raises:
            Stopped: it leaves something behind.
        """
        if self.columns or self._issued or any(products for _, products in self._committed):
            raise Stopped("the program ends before its matrix products, or keeps tensor memory")


class TensorProducts(Operands):
    """Builds the steps of tcgen05, of barriers in shared memory, and of elect."""

    _tensor: TensorMemory
    _active: np.ndarray

    def _build_elect(self, instruction: Instruction, _: list[str]) -> Step:
        target = self._register(instruction.operands[0].partition("|")[2])

        def elect() -> None:
            target[:] = False
            active = np.flatnonzero(self._active)
            target[active[np.unique(active // 32, return_index=True)[1]]] = True

        return elect

    def _chosen(self, instruction: Instruction) -> Callable[[], np.ndarray]:
        """Return a function that returns the lanes that take part."""
        lanes_of = self._lanes(instruction)
        return lambda: np.intersect1d(np.arange(self._threads)[lanes_of()], np.flatnonzero(self._active))

    @staticmethod
    def _same(values: Any, lanes: np.ndarray) -> int:
        """Return the value that lanes agree upon."""
        taken = np.broadcast_to(values, (int(lanes[-1]) + 1,) if np.ndim(values) == 0 else values.shape)[lanes]
        if (taken != taken[0]).any():
            raise Stopped("threads that should agree have different values")
        return int(taken[0])

    def _one(self, instruction: Instruction) -> Callable[[], int | None]:
        """Return a function that returns the one lane that takes part, None if none does."""
        chosen = self._chosen(instruction)

        def one() -> int | None:
            lanes = chosen()
            if len(lanes) > 1:
                raise Stopped(f"{len(lanes)} threads issue what one should")
            return int(lanes[0]) if len(lanes) else None

        return one

    def _build_mbarrier(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = known(kinds[0], ("init", "inval", "try_wait"), instruction)
        if kind == "try_wait":
            (base, offset), chosen = self._address(instruction.operands[1]), self._chosen(instruction)
            parity = self._value(instruction.operands[2], "u32")

            def wait() -> None:
                if len(lanes := chosen()):
                    self._tensor.wait(self._same(base, lanes) + offset, self._same(parity, lanes))

            return wait
        (base, offset), one = self._address(instruction.operands[0]), self._one(instruction)

        def change() -> None:
            if (lane := one()) is not None:
                address = int(base[lane]) + offset
                if kind == "init":
                    self._tensor.make_barrier(address, int(instruction.operands[1], 0))
                else:
                    self._tensor.drop_barrier(address)

        return change

    def _build_tcgen05(self, instruction: Instruction, kinds: list[str]) -> Step:
        kind = kinds[0]
        if kind == "wait::st":
            return lambda: self._tensor.wait_for_stores(self._who.epoch)
        if kind in ("wait::ld", "relinquish_alloc_permit"):
            return lambda: None
        build = {
            "alloc": self._build_alloc,
            "dealloc": self._build_alloc,
            "ld": self._build_transfer,
            "st": self._build_transfer,
            "mma": self._build_tensor_product,
            "commit": self._build_commit,
        }
        if kind not in build or "cta_group::2" in kinds:
            raise unknown(instruction)
        return build[kind](instruction, kinds)

    def _build_alloc(self, instruction: Instruction, kinds: list[str]) -> Step:
        (base, offset), chosen = self._address(instruction.operands[0]), self._chosen(instruction)
        columns = int(instruction.operands[1], 0)

        def change() -> None:
            lanes = chosen()
            if lanes.tolist() != list(range(32)):
                raise Stopped(f"{len(lanes)} threads allocate tensor memory, not a warp")
            if kinds[0] == "alloc":
                self._tensor.columns = columns
                self.shared.store(base[:1].astype(np.int64) + offset, np.zeros((1, 1), np.uint32), self._warp[:1])
            else:
                self._tensor.columns = 0

        return change

    def _build_transfer(self, instruction: Instruction, kinds: list[str]) -> Step:
        shape = known(kinds[3], ("32x32b", "16x32bx2"), instruction)
        operands = list(instruction.operands)
        (vector,) = (operands.pop(i) for i in [next(i for i, each in enumerate(operands) if each.startswith("{"))])
        registers = [self._register(name) for name in self._vector(vector)]
        (base, offset), chosen = self._address(operands[0]), self._chosen(instruction)
        split = int(operands[1], 0) if shape == "16x32bx2" else 0
        lane = np.arange(self._threads) % 32

        def cells(threads: np.ndarray) -> Cells:
            address = base[threads].astype(np.int64) + offset
            if (address != address[threads // 32 * 32 - threads[0]]).any():
                raise Stopped("the threads of a warp name different addresses of tensor memory")
            of_warp = lane[threads] if shape == "32x32b" else lane[threads] % 16
            rows, columns = (address >> 16) + of_warp, address & 0xFFFF
            if (rows // 32 != self._warp[threads] % 4).any():
                raise Stopped("a warp accesses lanes of tensor memory that are not its own")
            if shape == "16x32bx2":
                columns = columns + lane[threads] // 16 * split
            return rows[:, None], columns[:, None] + np.arange(len(registers))

        def transfer() -> None:
            threads = chosen()
            if len(threads) == 0:
                return
            if kinds[0] == "ld":
                for register, values in zip(
                    registers, self._tensor.load(cells(threads), self._who.epoch).T, strict=True
                ):
                    register[threads] = values
            else:
                values = np.stack([register[threads] for register in registers], axis=1)
                self._tensor.store(cells(threads), values)

        return transfer

    def _build_commit(self, instruction: Instruction, _: list[str]) -> Step:
        (base, offset), one = self._address(instruction.operands[0]), self._one(instruction)

        def commit() -> None:
            if (lane := one()) is not None:
                self._tensor.commit(int(base[lane]) + offset)

        return commit

    def _build_tensor_product(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[1:] != ["cta_group::1", "kind::f16"] or len(instruction.operands) != 5:
            raise unknown(instruction)
        out, left, right, shape, accumulate = instruction.operands
        (d, d_offset), one = self._address(out), self._one(instruction)
        in_tensor_memory = left.startswith("[")
        a, a_offset = self._address(left) if in_tensor_memory else (self._register(left), 0)
        b, described, adds = self._register(right), self._value(shape, "u32"), self._value(accumulate, "pred")

        def multiply() -> None:
            lane = one()
            if lane is None:
                return
            bits = int(np.broadcast_to(described, self._threads)[lane])
            num_columns, num_rows = (bits >> 17 & 63) << 3, (bits >> 24 & 31) << 4
            formats = {bits >> at & 7 for at in (7, 10)}
            if bits & 15 or bits >> 4 & 3 != 1 or bits >> 13 & 3 or num_rows != ROWS or formats not in ({0}, {1}):
                raise Stopped(f"a matrix product of the kind {bits:#x}, which this machine does not know")
            decode = matrix.from_bf16 if formats == {1} else matrix.from_fp16
            reads: list[Cells] = []
            used = [matrix.described_tensor(int(b[lane]), num_columns, transposed=bool(bits >> 16 & 1))]
            y = decode(self.shared.words[2][used[0] // 2])
            if in_tensor_memory:
                column = int(a[lane]) + a_offset
                reads.append(np.s_[:, column : column + 8])
                pairs = self._tensor.words[reads[0]]
                x = decode(np.stack([pairs & 0xFFFF, pairs >> 16], axis=2)).reshape(ROWS, 16)
            else:
                used.append(matrix.described_tensor(int(a[lane]), ROWS, transposed=bool(bits >> 15 & 1)))
                x = decode(self.shared.words[2][used[1] // 2])
            add = bool(np.broadcast_to(adds, self._threads)[lane])
            where = int(d[lane]) + d_offset
            self._tensor.multiply(where, x, y.T, accumulate=add, reads=reads, used=used, epoch=self._who.epoch)

        return multiply
