"""Matrix instructions: what comes from where; their layouts are in matrix.py."""

from collections.abc import Callable

import numpy as np

from . import matrix
from .operands import Operands, Step, Stopped, known, unknown
from .program import Instruction


class Products(Operands):
    """Builds the steps of ldmatrix, stmatrix, mma and wgmma."""

    _products: list[list[np.ndarray]]

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
            raise unknown(instruction)
        sources = [self._register(name) for name in self._vector(instruction.operands[1])]
        rows = self._rows_of_matrices(instruction.operands[0], len(sources))
        thread = np.arange(self._threads)

        def store() -> None:
            for source, where in zip(sources, rows(), strict=True):
                self.shared.store(where + thread % 4 * 4, source[:, None], self._warp)

        return store

    def _build_mma(self, instruction: Instruction, kinds: list[str]) -> Step:
        element = known(kinds[-2], ("bf16", "f16"), instruction)
        if kinds[:5] != ["sync", "aligned", "m16n8k16", "row", "col"] or kinds[5] != "f32":
            raise unknown(instruction)
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
        element = known(kinds[-1], ("bf16", "f16"), instruction)
        decode = matrix.from_bf16 if element == "bf16" else matrix.from_fp16
        columns = int(kinds[3].partition("n")[2].partition("k")[0])
        out, left, right, scale, *options = instruction.operands
        registers = [int(name[2:]) for name in self._vector(out)]
        transposed = [bool(int(option)) for option in options[2:]]  # behind the signs of A and B
        if options[:2] != ["1", "1"]:
            raise unknown(instruction)
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
