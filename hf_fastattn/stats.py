"""What a paged cache's memory is used for: figures and a picture."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .block_pool import NO_BLOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .cache import PagedCache
    from .paged_state import PagedState


@dataclass(frozen=True)
class CacheStats:
    """Memory of one cache; :meth:`hf_fastattn.PagedCache.stats` makes it.

    Attributes:
        num_blocks: blocks of the pool. free_blocks: those without an owner; caches on the same pool own the others.
        used_blocks: blocks of this cache. shared_blocks: those that several sequences, or other caches, use too.
        block_size: tokens per block.
        tokens: tokens of all sequences together.
        stored_tokens: tokens that the used blocks hold; a shared one counts once.
        used_bytes: bytes of the used blocks. pool_bytes: bytes of the pool.
        host_bytes: those of the pool that offloading keeps in the host's memory; 0 without it.
        device_bytes: bytes where attention reads: the pool's, or, with offloading, those of the two layers there.
        waste: share of the used bytes that hold no token.
        saved: share of the blocks that sharing saves, against blocks of their own for every sequence.
        hit_rate: share of the tokens that a prefix store had when the cache was made; None without a store.
    """

    num_blocks: int
    free_blocks: int
    used_blocks: int
    shared_blocks: int
    block_size: int
    tokens: int
    stored_tokens: int
    used_bytes: int
    pool_bytes: int
    host_bytes: int
    device_bytes: int
    waste: float
    saved: float
    hit_rate: float | None

    def __str__(self) -> str:
        moved = f", {self.device_bytes / 2**20:.1f} MiB of it on the device" if self.host_bytes else ""
        hits = "" if self.hit_rate is None else f", {self.hit_rate:.0%} of the prompt from the prefix store"
        return (
            f"{self.tokens} tokens in {self.used_blocks} of {self.num_blocks} blocks ({self.shared_blocks} shared, "
            f"{self.free_blocks} free), {self.used_bytes / 2**20:.1f} of {self.pool_bytes / 2**20:.1f} MiB{moved}, "
            f"{self.waste:.1%} of it waste, {self.saved:.0%} saved by sharing{hits}"
        )


def cache_stats(state: "PagedState") -> CacheStats:
    """Return the figures of a cache between forward passes."""
    state.sync()
    size, pool = state.block_size, state.pool
    filled: dict[int, int] = {}
    for row, seq_len in zip(state.tables.rows, state.tables.lens, strict=True):
        for i, block in enumerate(row):
            if block == NO_BLOCK:
                continue
            filled[block] = max(filled.get(block, 0), min(max(seq_len - i * size, 0), size))
    stored, per_block = sum(filled.values()), state.memory.bytes_per_block
    separate = sum(map(len, state.block_rows()))
    prompt, reused = state.prefix_hits
    pool_bytes = pool.num_blocks * per_block
    return CacheStats(
        num_blocks=pool.num_blocks,
        free_blocks=pool.num_free,
        used_blocks=len(filled),
        shared_blocks=sum(pool.num_owners(block) > 1 for block in filled),
        block_size=size,
        tokens=sum(state.tables.lens),
        stored_tokens=stored,
        used_bytes=len(filled) * per_block,
        pool_bytes=pool_bytes,
        host_bytes=pool_bytes if state.memory.offload else 0,
        device_bytes=state.memory.device_bytes,
        waste=1 - stored / (len(filled) * size) if filled else 0.0,
        saved=1 - len(filled) / separate if separate else 0.0,
        hit_rate=reused / prompt if prompt else None,
    )


def plot_blocks(cache: "PagedCache", *, columns: int = 32) -> "Figure":
    """Draw who owns which block of a cache's pool: one square per block, in the order of memory.

    A square has its sequence's color as far as it is filled; shared ones are black with the number of their owners,
    blocks of other caches on the same pool are gray, free ones white.

    Args:
        cache: any paged cache, between forward passes.
        columns: squares per line.

    Returns:
        A figure of matplotlib, to show or ``savefig``.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    state = cache.state
    state.sync()
    size, pool = state.block_size, state.pool
    rows = max(-(-pool.num_blocks // columns), 1)
    figure = Figure(figsize=(0.3 * columns + 1, 0.3 * rows + 1.4), layout="constrained")
    axes = figure.add_subplot()
    owner: dict[int, tuple[int, float]] = {}
    owners: Counter[int] = Counter()
    for seq, (row, seq_len) in enumerate(zip(state.tables.rows, state.tables.lens, strict=True)):
        for i, block in enumerate(row):
            owner[block] = seq, min(max(seq_len - i * size, 0), size) / size
            owners[block] += 1
    for block in range(pool.num_blocks):
        x, y = block % columns, block // columns
        square: dict[str, Any] = {"xy": (x, y), "height": 0.9}
        axes.add_patch(Rectangle(width=0.9, facecolor="white", edgecolor="0.75", linewidth=0.6, **square))
        if owners[block] > 1:
            axes.add_patch(Rectangle(width=0.9, facecolor="0.15", **square))
            axes.text(x + 0.45, y + 0.47, str(owners[block]), color="white", fontsize=7, ha="center", va="center")
        elif block in owner:
            seq, share = owner[block]
            axes.add_patch(Rectangle(width=0.9, facecolor=f"C{seq % 10}", alpha=0.25, **square))
            axes.add_patch(Rectangle(width=0.9 * share, facecolor=f"C{seq % 10}", **square))
        elif not pool.is_free(block):
            axes.add_patch(Rectangle(width=0.9, facecolor="0.7", **square))
    axes.set(xlim=(-0.1, columns), ylim=(rows, -0.1), xticks=[], yticks=[], aspect="equal", frame_on=False)
    axes.set_title(str(cache_stats(state)), fontsize=9)
    legend = [Patch(facecolor=f"C{seq % 10}", label=f"sequence {seq}") for seq in range(min(state.num_seqs, 10))]
    legend.append(Patch(facecolor="0.15", label="shared (owners)"))
    legend.append(Patch(facecolor="white", edgecolor="0.75", label="free"))
    figure.legend(handles=legend, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return figure
