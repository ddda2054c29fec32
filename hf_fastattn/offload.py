"""Blocks in host memory, of which two layers at a time are on the device: contexts that the device does not hold.

Attention needs all tokens of a layer, but of one layer at a time. So the blocks of every layer are kept in the host's
memory (pinned, under CUDA), and the device has room for two layers: the one that attends, and the next one, which is
copied meanwhile on a stream of its own. A block has one number in both places, so that ops read the copies by the
same block tables. The one decision: a copy serves one forward pass and is made anew in the next; so whatever happens
to a cache in between (crop, beams, forks, growth) is done to the host's blocks alone and no copy can be out of date.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .columns import Step
from .kv_pool import LayerBlocks, allocate_blocks, persistent
from .paged_state import PagedState

Pair = tuple[Tensor, Tensor]
Runs = list[tuple[int, int]]
Key = tuple[int | None, tuple[object, ...]]


class CopyQueue:
    """Copies between the host and one device, in the order in which they are asked for; here each is done at once."""

    asynchronous = False

    def copy(self, source: Pair, target: Pair, runs: Runs) -> Any:
        """Copy runs of blocks, after what the device was told to compute so far; return a mark for :meth:`join`."""
        for old, new in zip(source, target, strict=True):
            for start, end in runs:
                new[start:end].copy_(old[start:end], non_blocking=self.asynchronous)

    def join(self, mark: Any) -> None:
        """Let what the device is told to compute from now on wait for the copies up to a mark."""

    def finish(self) -> None:
        """Wait for all copies."""

    def uses(self, tensor: Tensor) -> None:
        """Keep a tensor's memory from being handed out again before the copies that concern it are done."""


class StreamQueue(CopyQueue):
    """Copies on a CUDA stream of their own."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, source: Pair, target: Pair, runs: Runs) -> Any:
        """Enqueue the copies."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            super().copy(source, target, runs)
            return self.stream.record_event()

    def join(self, mark: Any) -> None:
        """Let the device's current stream wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """Let the host wait for the stream."""
        self.stream.synchronize()

    def uses(self, tensor: Tensor) -> None:
        """Tell the allocator of the second stream."""
        tensor.record_stream(self.stream)


def make_queue(device: torch.device) -> CopyQueue:
    """Return the queue for a device's copies."""
    return StreamQueue(device) if device.type == "cuda" else CopyQueue()


@dataclass
class Slot:
    """Room for one layer on a device.

    Attributes:
        caches: keys and values, like those of LayerBlocks; blocks that were not copied hold anything.
        layer: index of the layer whose blocks it has, -1 for none.
        step: the forward pass that they were copied for.
        ready: the copy's mark in its queue.
    """

    caches: Pair
    layer: int = -1
    step: Step | None = None
    ready: Any = None


class Staging:
    """The slots of all devices and the queues of the copies.

    Each thread that runs forward passes has two slots for each shape of layer on a device.
    """

    def __init__(self) -> None:
        self.slots: dict[Key, list[Slot]] = {}  # by thread and kind of layer
        self._queues: dict[torch.device, CopyQueue] = {}
        self._plan: tuple[Step | None, list[list[int]], Runs, Runs] = (None, [], [], [])

    def queue(self, device: torch.device) -> CopyQueue:
        """Return the queue of a device."""
        found = self._queues.get(device)
        return found if found is not None else self._queues.setdefault(device, make_queue(device))

    def finish(self) -> None:
        """Wait until no copy is under way: the host may read and write its blocks."""
        for queue in list(self._queues.values()):
            queue.finish()

    def copied(self, blocks: "OffloadedBlocks", step: Step | None) -> Slot | None:
        """Return the slot that has a layer's blocks for a forward pass, None if there is none."""
        slots = self.slots.get(_key(blocks), [])
        return next((s for s in slots if step is not None and s.layer == blocks.index and s.step is step), None)

    def copy(self, blocks: "OffloadedBlocks", state: PagedState, step: Step | None, keep: Slot | None) -> Slot:
        """Begin to copy what a layer had stored before a forward pass into a slot other than ``keep``; return it."""
        slots, queue = self.slots.setdefault(_key(blocks), []), self.queue(blocks.place)
        slot = next((slot for slot in slots if slot is not keep), None)
        if slot is None:
            self._drop_ended_threads()
            slot = Slot(_like(blocks.host, blocks.place))
            slots.append(slot)
            for tensor in slot.caches:
                queue.uses(tensor)
        slot.layer, slot.step = blocks.index, step
        slot.ready = queue.copy(blocks.host, slot.caches, self.runs(state, step)[0])
        return slot

    def runs(self, state: PagedState, step: Step | None) -> tuple[Runs, Runs]:
        """Return the blocks that hold tokens of before a forward pass, and those that its tokens go to."""
        known, rows, past, new = self._plan
        if step is None or known is not step or rows is not state.tables.rows:
            rows, begins, count = state.tables.rows, state.tables.lens, state.tables.blocks_for
            ends = begins if step is None else step.lens
            past = _runs(row[: count(begin)] for row, begin in zip(rows, begins, strict=True))
            new = _runs(
                row[begin // state.block_size : count(end)] for row, begin, end in zip(rows, begins, ends, strict=True)
            )
            self._plan = step, rows, past, new
        return past, new

    def _drop_ended_threads(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        for key in list(self.slots):
            if key[0] not in alive:
                self.slots.pop(key, None)


class OffloadedBlocks(LayerBlocks):
    """Blocks of one layer in the host's memory, copied to the device while the layer attends.

    ``k_cache`` and ``v_cache`` are the host's tensors; asking for them waits for the copies that are under way.

    Args:
        index: the layer. staging: where it is copied to. following: the layer that attends after it, None for the last.
    """

    offloaded = True

    def __init__(self, index: int, staging: Staging, following: "OffloadedBlocks | None") -> None:
        self.index, self.staging, self.following = index, staging, following
        self._host: list[Tensor | None] = [None, None]
        super().__init__()

    @property
    def host(self) -> Pair:
        """The host's keys and values, which copies may be under way from and to."""
        k_cache, v_cache = self._host
        assert k_cache is not None and v_cache is not None
        return k_cache, v_cache

    @property
    def place(self) -> torch.device:
        """The device that the layer attends on."""
        assert self.device is not None
        return self.device

    @property
    def kind(self) -> tuple[object, ...]:
        """What layers have in common that use the same slots."""
        return (self.place, *((host.dtype, host.shape) for host in self.host))

    @property
    def k_cache(self) -> Tensor | None:  # type: ignore[override]
        """The host's keys."""
        return self._get(0)

    @k_cache.setter
    def k_cache(self, new: Tensor | None) -> None:
        self._set(0, new)

    @property
    def v_cache(self) -> Tensor | None:  # type: ignore[override]
        """The host's values."""
        return self._get(1)

    @v_cache.setter
    def v_cache(self, new: Tensor | None) -> None:
        self._set(1, new)

    @torch.compiler.disable
    def fetch(self, state: PagedState, step: Step | None) -> Pair:
        """Return the layer's blocks on its device, and begin to copy those of the next layer there."""
        staging = self.staging
        slot = staging.copied(self, step) or staging.copy(self, state, step, None)
        staging.queue(self.place).join(slot.ready)
        following = self.following if step is not None else None
        if following is not None and following.is_allocated and staging.copied(following, step) is None:
            staging.copy(following, state, step, slot)
        return slot.caches

    @torch.compiler.disable
    def written(self, state: PagedState, step: Step) -> None:
        """Copy the blocks with new tokens to the host."""
        slot = self.staging.copied(self, step)
        assert slot is not None, "fetch() comes before written()"
        self.staging.queue(self.place).copy(slot.caches, self.host, self.staging.runs(state, step)[1])

    def new_tensor(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return uninitialized blocks in the host's memory, laid out as on the device that they are copied to.

        Raises:
            MemoryError: the host's memory is full.
        """
        num_bytes = torch.Size(shape).numel() * like.element_size()
        try:
            if self.place.type == "cpu":
                return allocate_blocks(like, shape)
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=self.place.type == "cuda")
        except RuntimeError as error:
            raise MemoryError(f"{num_bytes} bytes for the blocks of a layer do not fit the host's memory") from error

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of keys and values, without waiting for copies."""
        k_cache, v_cache = self.host
        return k_cache.dtype, v_cache.dtype

    @property
    def resident(self) -> list[Tensor]:
        """The copies of all layers that there are."""
        return [t for slots in list(self.staging.slots.values()) for slot in slots for t in slot.caches]

    @property
    def is_allocated(self) -> bool:
        """Whether the layer has blocks."""
        return all(host is not None for host in self._host)

    def _get(self, side: int) -> Tensor | None:
        self.staging.finish()
        return self._host[side]

    def _set(self, side: int, new: Tensor | None) -> None:
        old = self._host[side]
        if old is not None and old is not new:
            self.staging.slots.clear()  # the blocks have other numbers or places from now on
        self._host[side] = new


def offloaded_layers(count: int) -> list[LayerBlocks]:
    """Return so many layers of a model without blocks yet, which take turns on their devices."""
    staging, layers = Staging(), []
    following = None
    for index in reversed(range(count)):
        following = OffloadedBlocks(index, staging, following)
        layers.append(following)
    return list(reversed(layers))


def _key(blocks: OffloadedBlocks) -> Key:
    """Return which slots a layer uses when the current thread attends to it."""
    return threading.current_thread().ident, blocks.kind


@persistent
def _like(host: Pair, device: torch.device) -> Pair:
    """Return uninitialized blocks like the host's on a device."""
    k_cache, v_cache = (allocate_blocks(x.new_empty(0, device=device), x.shape) for x in host)
    return k_cache, v_cache


def _runs(rows: Iterable[Sequence[int]]) -> Runs:
    """Return the blocks of all rows, each once, as runs (start, end); negative numbers stand for no block."""
    runs: list[list[int]] = []
    for block in sorted({block for row in rows for block in row if block >= 0}):
        if runs and runs[-1][1] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, block + 1])
    return [(start, end) for start, end in runs]
