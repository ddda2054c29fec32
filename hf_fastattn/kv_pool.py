"""The memory behind paged caches: block ids with their owners, and the keys and values of every layer.

Several caches may lie on one pool and share blocks (forks, a prefix store). The one decision: when a pool grows on a
CPU, its blocks are renumbered so that each sequence lies in one run again, which the CPU reads without a copy; on
other devices every block keeps its number.
"""

import functools
import math
import mmap
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .block_pool import BlockPool, BlockPoolExhausted
from .pool_lock import PoolLock, locked

if TYPE_CHECKING:
    from .columns import Step
    from .device_tables import DeviceTables
    from .paged_state import PagedState

MEMORY_FULL = "; the host's memory does not hold that many"
"""Detail of a BlockPoolExhausted that no larger limit would avoid."""

P = ParamSpec("P")
T = TypeVar("T")


def persistent(make: Callable[P, T]) -> Callable[P, T]:
    """Let a function make tensors that outlive a forward pass: none that only inference mode could write to."""

    @functools.wraps(make)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return wrapped


class LayerBlocks:
    """Keys and values of one layer, (num_blocks, block_size, num_kv_heads, head_dim); None before their first use.

    Attributes:
        device: where ops read them; None before their first use.
        offloaded: the tensors are kept elsewhere, see :mod:`hf_fastattn.offload`.
    """

    offloaded = False

    def __init__(self, k_cache: Tensor | None = None, v_cache: Tensor | None = None) -> None:
        self.k_cache, self.v_cache = k_cache, v_cache
        self.device = None if k_cache is None else k_cache.device

    def fetch(self, state: "PagedState", step: "Step | None") -> tuple[Tensor, Tensor]:
        """Return the tensors for ops to read and write; they hold what the state had stored when the step began."""
        k_cache, v_cache = self.k_cache, self.v_cache
        assert k_cache is not None and v_cache is not None
        return k_cache, v_cache

    def written(self, state: "PagedState", step: "Step") -> None:
        """Take note that a step's new tokens were written into the tensors that fetch() returned."""

    def new_tensor(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Return uninitialized blocks, see :func:`allocate_blocks`."""
        return allocate_blocks(like, shape)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of keys and values, which are allocated."""
        k_cache, v_cache = self.k_cache, self.v_cache
        assert k_cache is not None and v_cache is not None
        return k_cache.dtype, v_cache.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that there are."""
        return [tensor for tensor in (self.k_cache, self.v_cache) if tensor is not None]

    @property
    def resident(self) -> list[Tensor]:
        """The tensors that ops read, which several layers may have in common."""
        return self.tensors


class PoolUser(Protocol):
    """Who holds blocks of a pool: a cache's state, a prefix store."""

    def block_rows(self) -> Sequence[Sequence[int]]:
        """Return the blocks held, each row to be kept together."""
        ...

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Replace every block id by ``moved[id]``; the tensors of the pool are new ones."""
        ...

    def reclaim(self, count: int) -> None:
        """Give up to count blocks back that are kept only in case they are wanted again."""
        ...

    def pass_thread(self) -> int | None:
        """Return the thread that has begun a forward pass over the blocks; None if none has."""
        ...


class KVPool:
    """Blocks of block_size tokens for every layer.

    Args:
        block_size: tokens per block.
        num_blocks: blocks, fixed; None lets the pool grow.
        layers: blocks that exist already and are free; one entry per layer of the model.
    """

    def __init__(self, block_size: int, num_blocks: int | None, layers: list[LayerBlocks]) -> None:
        self.block_size, self.num_blocks, self.layers = block_size, num_blocks, layers
        sizes = [len(tensor) for layer in layers for tensor in layer.tensors]
        self.ids = BlockPool(min(sizes, default=0) if num_blocks is None else num_blocks)
        self.users: weakref.WeakSet[PoolUser] = weakref.WeakSet()
        self.lock = PoolLock(self.ids.free)
        self.kept_tables: dict[tuple[int, int, torch.device], DeviceTables] = {}  # of sized caches that are gone
        self.offload = any(layer.offloaded for layer in layers)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers that are in use."""
        return sum(t[0].numel() * t.element_size() for layer in self.layers for t in layer.tensors)

    @property
    def device_bytes(self) -> int:
        """Bytes of what ops read."""
        tensors = {id(tensor): tensor for layer in self.layers for tensor in layer.resident}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @locked
    def drop_misfits(self, layer: int, k: Tensor) -> None:
        """Forget blocks that were made for states of another dtype, device or shape, if nobody uses them.

        Args:
            layer: which to look at. k: its first keys, (num_seqs, num_kv_heads, query_len, head_dim).

        Raises:
            ValueError: somebody does.
        """
        old = self.layers[layer].k_cache
        if old is None or self._fits(layer, old, k):
            return
        for user in list(self.users):
            user.reclaim(self.ids.num_used)
        if self.ids.num_used:
            raise ValueError(
                f"other caches on this pool hold keys of {old.dtype} and shape {tuple(old.shape[2:])} on {old.device}, "
                f"this forward pass brings {k.dtype} and {tuple(k.shape[1::2])} on {k.device}: give it a pool (or a "
                "prefix store) of its own, or let go of those caches first"
            )
        if self.num_blocks is None:
            for blocks in self.layers:
                blocks.k_cache = blocks.v_cache = None
            self.ids.replace(BlockPool(0))

    @locked
    @persistent
    def allocate(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Give a layer its blocks, unless it has some that fit.

        Args:
            layer: which. k, v: its first states, (num_seqs, num_kv_heads, query_len, head_dim).

        Raises:
            BlockPoolExhausted: the memory that offloaded blocks are kept in is full.
        """
        blocks, total = self.layers[layer], self.ids.num_blocks
        pairs = [(old, x) for old, x in ((blocks.k_cache, k), (blocks.v_cache, v))]
        fitting = [old if old is not None and self._fits(layer, old, states) else None for old, states in pairs]
        blocks.device = k.device
        try:
            blocks.k_cache, blocks.v_cache = (
                blocks.new_tensor(states, (total, self.block_size, *states.shape[1::2])) if old is None else old
                for old, states in zip(fitting, (k, v), strict=True)
            )
        except MemoryError as error:
            raise BlockPoolExhausted(total, 0, total, MEMORY_FULL) from error

    @locked
    def make_room(self, count: int) -> None:
        """Have at least count free blocks: the pool grows, or, if it is fixed, users give up what they keep in reserve.

        Raises:
            BlockPoolExhausted: the pool is fixed and too full, or the memory that offloaded blocks are kept in is.
            RuntimeError: another thread's forward pass over the pool does not end.
        """
        if count > self.ids.num_free and self.num_blocks is None:
            self.lock.wait_for(lambda: [t for user in self.users if (t := user.pass_thread()) is not None])
            lacking = count - self.ids.num_free
            if lacking <= 0:  # other threads have made room meanwhile
                return
            try:
                self._grow(lacking)
            except MemoryError as error:
                raise BlockPoolExhausted(count, self.ids.num_free, self.ids.num_blocks, MEMORY_FULL) from error
            return
        for user in list(self.users):
            if self.ids.num_free < count:
                user.reclaim(count - self.ids.num_free)
        if self.ids.num_free < count:
            raise BlockPoolExhausted(count, self.ids.num_free, self.ids.num_blocks)

    def _grow(self, lacking: int) -> None:
        """Add half as many blocks as there are, or only those that are lacking if memory does not hold so many."""
        total = self.ids.num_blocks
        for num_blocks in dict.fromkeys((total + max(lacking, total // 2), total + lacking)):
            try:
                self.resize(num_blocks)
                return
            except (torch.OutOfMemoryError, MemoryError):  # what it had allocated is freed before the next attempt
                if num_blocks == total + lacking:
                    raise

    @persistent
    def resize(self, num_blocks: int) -> None:
        """Move everything into num_blocks blocks; if memory runs out on the way, nothing has changed for the users."""
        users = list(self.users)
        rows = [row for user in users for row in user.block_rows()]
        if all(tensor.is_cpu for layer in self.layers for tensor in layer.tensors):
            ids, moved = _place(rows, num_blocks)
        else:
            ids, moved = None, {block: block for row in rows for block in row}
        source, target = (torch.tensor(list(x), dtype=torch.long) for x in (moved.keys(), moved.values()))
        done: list[tuple[LayerBlocks, str]] = []
        try:
            for layer in self.layers:
                for name in ("k_cache", "v_cache"):
                    old = getattr(layer, name)
                    if old is not None:
                        setattr(layer, name, move_blocks(old, num_blocks, source, target, layer.new_tensor))
                        done.append((layer, name))
        except (RuntimeError, MemoryError):  # torch's out-of-memory errors are RuntimeErrors
            for layer, name in done:  # what has moved goes back to its old place, at the beginning of the longer tensor
                blocks = getattr(layer, name)
                if ids is not None:  # else nothing was renumbered, and memory is full: there is none for a copy
                    blocks[source.to(blocks.device)] = blocks[target.to(blocks.device)]
                setattr(layer, name, blocks[: self.ids.num_blocks])
                torch._dynamo.mark_static_address(getattr(layer, name))
            for user in users:
                user.renumber({})
            raise
        if ids is None:
            self.ids.grow(num_blocks)
            moved = {}
        else:
            self.ids.replace(ids)
        for user in users:
            user.renumber(moved)

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks in every layer: (source, target) pairs."""
        pairs = list(pairs)
        if not pairs:
            return
        source, target = torch.tensor(pairs, dtype=torch.long).unbind(1)
        for layer in self.layers:
            for cache in layer.tensors:
                cache[target.to(cache.device)] = cache[source.to(cache.device)]

    def _fits(self, layer: int, blocks: Tensor, states: Tensor) -> bool:
        like = (blocks.dtype, self.layers[layer].device) == (states.dtype, states.device)
        return like and blocks.shape[2:] == states.shape[1::2] and len(blocks) >= self.ids.num_blocks


def _place(rows: Sequence[Sequence[int]], num_blocks: int) -> tuple[BlockPool, dict[int, int]]:
    """Return a new pool and where each block goes: the blocks of a row in one run, with room to grow.

    A block that several rows hold moves with the first of them.
    """
    pool = BlockPool(num_blocks)
    moved: dict[int, int] = {}
    owned = [[block for block in row if moved.setdefault(block, i) == i] for i, row in enumerate(rows)]
    for blocks, targets in zip(owned, pool.allocate_rows([len(row) for row in owned]), strict=True):
        moved.update(zip(blocks, targets, strict=True))
    for row, own in zip(rows, owned, strict=True):
        pool.share(moved[block] for block in set(row) - set(own))
    return pool, moved


@persistent
def move_blocks(
    cache: Tensor,
    num_blocks: int,
    source: Tensor,
    target: Tensor,
    new_tensor: Callable[[Tensor, Sequence[int]], Tensor],
) -> Tensor:
    """Return a cache of num_blocks, made by new_tensor, whose blocks ``target`` are the old one's ``source``."""
    new = new_tensor(cache, (num_blocks, *cache.shape[1:]))
    new[target.to(cache.device)] = cache[source.to(cache.device)]
    return new


def allocate_blocks(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return blocks to be written, (num_blocks, block_size, num_kv_heads, head_dim), with dtype and device of ``like``.

    In a CPU's memory all tokens of a head lie together, so that a run of blocks is contiguous per head, and what was
    never written is 0; on other devices a token's heads lie together.
    """
    num_blocks, block_size, num_heads, head_dim = shape
    if like.device.type == "cpu":
        blocks = _zero_pages((num_heads, num_blocks, block_size, head_dim), like.dtype).permute(1, 2, 0, 3)
    else:
        blocks = like.new_empty(num_blocks, block_size, num_heads, head_dim)
    torch._dynamo.mark_static_address(blocks)
    torch._dynamo.maybe_mark_dynamic(blocks, 0)  # a compiled step serves pools of any size
    return blocks


def _zero_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros in a CPU's memory, of which only what is touched takes time and room.

    Attention over a batch reaches behind the ends of shorter sequences (ops/_cpu_schedule.py), where NaN would cost
    time; memory that was used before may hold anything.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise MemoryError(f"no room for {size} bytes of keys or values") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
