"""The memory of a launch: global memory is that of the tensors it was given, shared memory belongs to one program.

Every access is checked: does it lie in one of the tensors, or in the shared memory that was asked for, is it aligned,
and did a barrier or an atomic come between it and what another warp or program did there?
"""

import bisect
import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from .traffic import Traffic

SEVERAL = 63
"""Stands for more than one warp, in six bits."""

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class MemoryFault(Exception):
    """A program accesses memory that is not its own, or without having waited for others."""


@dataclass(frozen=True)
class Who:
    """Whose turn it is: a program of the grid, and how many barriers it has passed."""

    program: int
    epoch: int


class GlobalMemory:
    """The tensors of a launch by address.

    What a program wrote may be read by another only once an atomic of the writer, made behind its barrier, was seen by
    an atomic of the reader (``acq_rel``), as PTX's memory model has it. What the tensors held before the launch may be
    read by all.
    """

    def __init__(self, tensors: list[torch.Tensor], traffic: Traffic | None = None) -> None:
        self._traffic = traffic
        spans = sorted(_span(tensor) for tensor in tensors if tensor.numel())
        merged: list[list[int]] = []
        for begin, end in spans:  # views of one tensor overlap
            if merged and begin < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self._parts = [_Part(begin, end) for begin, end in merged]
        self._begins = [part.begin for part in self._parts]
        self._known: dict[int, dict[int, tuple[int, int]]] = {}
        self._coming: dict[int, list[tuple[int, int, dict[int, tuple[int, int]]]]] = {}
        self._released: dict[int, dict[int, tuple[int, int]]] = {}

    def load(
        self, address: np.ndarray, size: int, count: int, warp: np.ndarray, who: Who, *, constant: bool = False
    ) -> np.ndarray:
        """Return (lanes, count) words of a size in bytes; constant: nobody may have written there in this launch."""
        if self._traffic is not None:
            self._traffic.add_global(address, size * count, warp)
        out = np.empty((len(address), count), WORDS[size])
        for part, lanes in self._parts_of(address, size * count):
            offset = address[lanes] - part.begin
            part.check_read(self, offset, size * count, warp[lanes], who, constant)
            out[lanes] = part.words[size][(offset // size)[:, None] + np.arange(count)]
        return out

    def store(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray, who: Who) -> None:
        """Write (lanes, count) words."""
        size, count = values.dtype.itemsize, values.shape[1]
        if self._traffic is not None:
            self._traffic.add_global(address, size * count, warp)
        for part, lanes in self._parts_of(address, size * count):
            offset = address[lanes] - part.begin
            index = (offset // size)[:, None] + np.arange(count)
            part.check_write(self, offset, size * count, warp[lanes], who)
            part.words[size][index] = values[lanes]
            if (part.words[size][index] != values[lanes]).any():
                raise MemoryFault("two threads write different values to one address")

    def add(self, address: int, value: int, warp: int, who: Who) -> int:
        """Add to a uint32 and return what was there (``atom.acq_rel``)."""
        ((part, _),) = self._parts_of(np.array([address]), 4)
        word = part.words[4]
        index = (address - part.begin) // 4
        before = int(word[index])
        word[index] = (before + value) % 2**32
        seen = self._released.get(address, {})
        self._coming.setdefault(who.program, []).append((who.epoch, warp, dict(seen)))
        known = self._known.get(who.program, {})
        self._released[address] = _later(_later(seen, known), {who.program: (who.epoch, warp)})
        return before

    def pass_barrier(self, who: Who) -> None:
        """Let all warps of a program know what the atomics of one of them have seen."""
        for _, _, seen in self._coming.pop(who.program, ()):
            self._known[who.program] = _later(self._known.get(who.program, {}), seen)

    def is_known(self, writer: int, epoch: int, warp: int, who: Who, by: int) -> bool:
        """Return whether warp ``by`` of a program is behind what a warp of a program wrote in an epoch."""
        if writer == who.program:
            return epoch < who.epoch or warp == by
        views = [self._known.get(who.program, {})]
        views += [seen for _, acquirer, seen in self._coming.get(who.program, ()) if acquirer == by]
        for view in views:
            until, releaser = view.get(writer, (-1, -1))
            if epoch < until or (epoch == until and warp == releaser):
                return True
        return False

    def _parts_of(self, address: np.ndarray, size: int) -> "list[tuple[_Part, np.ndarray | slice]]":
        if (address % size).any():
            raise MemoryFault(f"an address is not a multiple of the access's {size} bytes")
        if len(address) == 0:
            return []
        first = bisect.bisect_right(self._begins, int(address[0])) - 1
        part = self._parts[first]
        if part.begin <= address.min() and address.max() + size <= part.end:
            return [(part, slice(None))]
        which = np.searchsorted(self._begins, address, side="right") - 1
        ends = np.array([part.end for part in self._parts])
        outside = np.flatnonzero((which < 0) | (address + size > ends[which]))
        if len(outside):
            raise MemoryFault(self._describe(int(address[outside[0]]), size, len(outside)))
        return [(self._parts[i], np.flatnonzero(which == i)) for i in np.unique(which)]

    def _describe(self, address: int, size: int, count: int) -> str:
        nearest = min(self._parts, key=lambda part: max(part.begin - address, address - part.end))
        distance = f"{address - nearest.begin} bytes from the begin of one of {nearest.end - nearest.begin} bytes"
        return f"{count} threads access {size} bytes outside of all tensors, the first {distance}"


class _Part:
    """A stretch of addresses that tensors lie at."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        size = end - begin
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(begin), np.uint8)
        self.words = {width: data[: size - size % width].view(word) for width, word in WORDS.items()}
        self._writer: np.ndarray | None = None  # of each pair of bytes: program, epoch and warp, -1 for none

    def _slots(self, offset: np.ndarray, size: int) -> np.ndarray:
        return (offset // 2)[:, None] + np.arange(max(size // 2, 1))

    def check_read(
        self, memory: GlobalMemory, offset: np.ndarray, size: int, warp: np.ndarray, who: Who, constant: bool
    ) -> None:
        if self._writer is None:
            return
        writers = self._writer[self._slots(offset, size)]
        self._check(memory, writers, warp, who, "reads", constant)

    def check_write(self, memory: GlobalMemory, offset: np.ndarray, size: int, warp: np.ndarray, who: Who) -> None:
        if self._writer is None:
            self._writer = np.full((self.end - self.begin + 1) // 2, -1, np.int64)
        slots = self._slots(offset, size)
        self._check(memory, self._writer[slots], warp, who, "writes", False)
        self._writer[slots] = (who.program << 32) + (who.epoch << 6) + warp[:, None]

    @staticmethod
    def _check(
        memory: GlobalMemory, writers: np.ndarray, warp: np.ndarray, who: Who, verb: str, constant: bool
    ) -> None:
        lanes, slots = np.nonzero(writers >= 0)
        if len(lanes) == 0:
            return
        for found in np.unique((writers[lanes, slots] << 6) + warp[lanes]).tolist():
            writer, epoch, writing, reading = found >> 38, found >> 12 & 2**26 - 1, found >> 6 & 63, found & 63
            if constant or not memory.is_known(writer, epoch, writing, who, reading):
                raise MemoryFault(
                    f"warp {reading} of program {who.program} {verb} what warp {writing} of program {writer} wrote, "
                    f"{'through the cache of constants' if constant else 'without having waited for it'}"
                )


class SharedMemory:
    """The shared memory of one program. Bytes that nobody wrote are NaN in float32, float16 and bfloat16.

    Args:
        size: in bytes.
        unit: bytes that a program accesses at once at least; accesses are told apart by that.
    """

    def __init__(self, size: int, unit: int = 1, traffic: Traffic | None = None) -> None:
        self._traffic = traffic
        self.size, self._unit = -(-max(size, 16) // 16) * 16, unit
        self.data = np.full(self.size // 4, 0x7FC17FC1, np.uint32).view(np.uint8)
        self.words = {width: self.data.view(word) for width, word in WORDS.items()}
        self.epoch = 0  # barriers that the program has passed
        self._written = np.full(self.size // unit, -1, np.int32)  # of each unit: epoch and warp
        self._read = np.full(self.size // unit, -1, np.int32)
        self._filling = np.zeros(self.size // unit, np.bool_)  # an asynchronous copy may land there at any time
        self._in_use = np.zeros(self.size // unit, np.int16)  # asynchronous matrix products that may still read it

    def load(self, address: np.ndarray, size: int, count: int, warp: np.ndarray) -> np.ndarray:
        """Return (lanes, count) words of a size in bytes."""
        self.read(address, size * count, warp)
        return self.words[size][(address // size)[:, None] + np.arange(count)]

    def store(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        """Write (lanes, count) words."""
        size, count = values.dtype.itemsize, values.shape[1]
        self._write(self._units(address, size * count, warp), warp)
        index = (address // size)[:, None] + np.arange(count)
        self.words[size][index] = values
        if (self.words[size][index] != values).any():
            raise MemoryFault("two threads write different values to one address of shared memory")

    def read(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Check and note that warps read: (lanes,) addresses."""
        where, now = self._units(address, size, warp), (self.epoch << 6) + warp[:, None]
        if self._filling[where].any():
            raise MemoryFault("shared memory is read while an asynchronous copy to it is under way")
        self._refuse(where, self._by_others(self._written[where], now), "read after another warp wrote")
        before = self._read[where]
        self._read[where] = np.where(self._by_others(before, now), now | SEVERAL, now)
        together = where[(self._read[where] != now) & (before < now)]
        self._read[together] = self.epoch << 6 | SEVERAL  # read by several in this instruction

    def fill(self, address: np.ndarray, size: int, warp: np.ndarray) -> None:
        """Asynchronous copies to (lanes,) addresses begin."""
        where = self._units(address, size, warp)
        self._write(where, warp)
        self._filling[where] = True

    def land(self, address: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        """They have been waited for: (lanes, bytes) values."""
        where = self._units(address, values.shape[1])  # counted when it began
        self._filling[where] = False
        self._write(where, warp)
        self.data[address[:, None] + np.arange(values.shape[1])] = values

    def use(self, address: np.ndarray) -> None:
        """An asynchronous matrix product that reads the 16-bit words at these addresses begins."""
        where = address // self._unit
        if self._filling[where].any():
            raise MemoryFault("a matrix product reads shared memory to which an asynchronous copy is under way")
        self._refuse(where, self._written[where] >= self.epoch << 6, "read by a matrix product after it was written")
        self._in_use[where] += 1  # once for all words of a unit

    def finish(self, address: np.ndarray, *, several: bool) -> None:
        """It has been waited for; several: other warpgroups may still be at theirs."""
        where = address // self._unit
        self._in_use[where] -= 1
        if several:
            self._read[where] = self.epoch << 6 | SEVERAL

    def _write(self, where: np.ndarray, warp: np.ndarray) -> None:
        if self._filling[where].any() or self._in_use[where].any():
            raise MemoryFault("shared memory is written while an asynchronous copy or matrix product uses it")
        now = (self.epoch << 6) + warp[:, None]
        self._refuse(where, self._by_others(self._written[where], now), "written after another warp wrote")
        self._refuse(where, self._by_others(self._read[where], now), "written after another warp read")
        self._written[where] = now

    def _by_others(self, before: np.ndarray, now: np.ndarray) -> np.ndarray:
        return (before >= self.epoch << 6) & (before != now)

    def _units(self, address: np.ndarray, size: int, warp: np.ndarray | None = None) -> np.ndarray:
        if (address % size).any():
            raise MemoryFault(f"an address of shared memory is not a multiple of the access's {size} bytes")
        if len(address) and (address.min() < 0 or address.max() + size > self.size):
            raise MemoryFault(f"address {address.max()} of shared memory is outside of its {self.size} bytes")
        if self._traffic is not None and warp is not None:
            self._traffic.add_shared(address, size, warp)
        return (address // self._unit)[:, None] + np.arange(size // self._unit)

    def _refuse(self, where: np.ndarray, bad: np.ndarray, what: str) -> None:
        if bad.any():
            byte = where[bad][0] * self._unit
            raise MemoryFault(f"byte {byte} of shared memory is {what}, without a barrier between them")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _later(one: dict[int, tuple[int, int]], other: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Join two views of what programs had done when they last made themselves known."""
    return {program: max(one.get(program, (-1, -1)), other.get(program, (-1, -1))) for program in {*one, *other}}
