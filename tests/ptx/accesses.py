"""Instructions that access memory."""

from typing import Any

import numpy as np

from .operands import TYPES, Operands, Step, Stopped, unknown
from .program import Instruction


class Accesses(Operands):
    """Builds the steps of loads, stores, atomics and asynchronous copies."""

    _issued: list[Any]
    _groups: list[list[Any]]

    def _build_ld(self, instruction: Instruction, kinds: list[str]) -> Step:
        if kinds[0] == "param":
            return self._build_parameter(instruction)
        targets = [self._register(name) for name in self._vector(instruction.operands[0])]
        base, offset = self._address(instruction.operands[1])
        lanes_of, size = self._lanes(instruction), np.dtype(TYPES[kinds[-1]]).itemsize
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
        word = np.dtype(TYPES[kinds[-1]])
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
            raise unknown(instruction)
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
