"""What each benchmark cell must move and compute, and how long a machine needs for that at least.

    python -m eval.roofline --gpu H200

Counted is what the result needs, not what an implementation does: every key and value that a query can see is read
once, every query read and every output written once, and a masked score costs nothing. The bound is the larger of
bytes / bandwidth and flops / peak.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import common

Row = dict[str, Any]


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most: bytes moved and floating-point operations, per second."""

    name: str
    bytes_per_s: float
    flops_per_s: float


GPUS = {
    # NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM: 2,039 GB/s; BF16 312 TFLOPS dense.
    "A100-80GB": Ceilings("A100-80GB", 2.039e12, 312e12),
    # NVIDIA H100 Tensor Core GPU datasheet, H100 SXM: 3.35 TB/s; BF16 1,979 TFLOPS with sparsity, half of it dense.
    "H100-SXM": Ceilings("H100-SXM", 3.35e12, 989.5e12),
    # NVIDIA H200 Tensor Core GPU datasheet, H200 SXM: 4.8 TB/s; BF16 as on the H100.
    "H200": Ceilings("H200", 4.8e12, 989.5e12),
    # NVIDIA DGX B200 datasheet: 64 TB/s and 36 PFLOPS BF16 with sparsity over 8 GPUs, half of the flops dense.
    "B200": Ceilings("B200", 8.0e12, 2250e12),
}
"""Datasheet numbers: dense bf16 matrix products and memory bandwidth. Nobody reaches either."""


@dataclass(frozen=True)
class Bound:
    """The least time for a cell, in seconds, and which ceiling sets it."""

    seconds: float
    limited_by: str


@dataclass(frozen=True)
class DecodeCell:
    """The last ``query_len`` tokens of each sequence attend to their ``lens`` keys, causally.

    block_size None is contiguous K/V. The first shared_prefix tokens are the same blocks in all sequences.
    """

    lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    query_len: int = 1
    block_size: int | None = 64
    shared_prefix: int = 0
    label: str = ""
    op: str = field(default="decode", init=False)

    @property
    def name(self) -> str:
        """Short name for tables."""
        what = self.label or f"{len(self.lens)}x{_short(self.lens[0])}"
        return what + _shape(self) + (f" q{self.query_len}" if self.query_len > 1 else "")

    @property
    def unique_tokens(self) -> int:
        """Tokens stored: a shared prefix counts once."""
        return sum(self.lens) - self.shared_prefix * (len(self.lens) - 1)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees, per query head."""
        return sum(_causal_pairs(self.query_len, seq_len) for seq_len in self.lens)


@dataclass(frozen=True)
class PrefillCell:
    """``query_len`` queries of each of ``batch`` sequences attend to ``kv_len`` keys, the queries' own the last."""

    batch: int
    query_len: int
    kv_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    block_size: int | None = None
    op: str = field(default="prefill", init=False)

    @property
    def name(self) -> str:
        """Short name for tables."""
        past = self.kv_len - self.query_len
        what = f"append {self.query_len} to {_short(past)}" if past else f"{self.batch}x{_short(self.query_len)}"
        return what + _shape(self) + ("" if self.causal else " full")

    @property
    def lens(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return (self.kv_len,) * self.batch

    @property
    def unique_tokens(self) -> int:
        """Tokens stored."""
        return self.batch * self.kv_len

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees, per query head."""
        one = _causal_pairs(self.query_len, self.kv_len) if self.causal else self.query_len * self.kv_len
        return self.batch * one


@dataclass(frozen=True)
class StoreCell:
    """``query_len`` new keys and values of each of ``batch`` sequences go behind ``past_len`` stored ones."""

    batch: int
    query_len: int
    past_len: int
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    op: str = field(default="store_kv", init=False)

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{self.batch}x{_short(self.query_len)} behind {_short(self.past_len)} kv{self.num_kv_heads} " + (
            f"d{self.head_dim} block {self.block_size}"
        )

    @property
    def lens(self) -> tuple[int, ...]:
        """Tokens of each sequence after the call."""
        return (self.past_len + self.query_len,) * self.batch

    @property
    def unique_tokens(self) -> int:
        """Tokens that the blocks hold."""
        return sum(self.lens)


Cell = DecodeCell | PrefillCell | StoreCell


def moved_bytes(cell: Cell, itemsize: int) -> int:
    """Return the bytes that a cell reads and writes at least."""
    token = 2 * cell.num_kv_heads * cell.head_dim * itemsize  # a key and a value
    if isinstance(cell, StoreCell):
        first, last = cell.past_len // cell.block_size, (cell.past_len + cell.query_len - 1) // cell.block_size
        return cell.batch * (2 * cell.query_len * token + 4 * (last - first + 1) + 4)
    queries = len(cell.lens) * cell.query_len * cell.num_heads * cell.head_dim * itemsize
    tables = 0 if cell.block_size is None else sum(4 * -(-seq_len // cell.block_size) + 4 for seq_len in cell.lens)
    return cell.unique_tokens * token + 2 * queries + tables


def counted_flops(cell: Cell) -> int:
    """Return the floating-point operations of both matrix products, masked scores left out."""
    return 0 if isinstance(cell, StoreCell) else 4 * cell.head_dim * cell.num_heads * cell.pairs


def kv_cache_bytes(cell: Cell, itemsize: int) -> int:
    """Return the bytes of the keys and values that must lie in memory."""
    return 2 * cell.unique_tokens * cell.num_kv_heads * cell.head_dim * itemsize


def bound(cell: Cell, ceilings: Ceilings, itemsize: int) -> Bound:
    """Return the least time that a machine needs for a cell."""
    memory = moved_bytes(cell, itemsize) / ceilings.bytes_per_s
    compute = counted_flops(cell) / ceilings.flops_per_s
    return Bound(memory, "memory") if memory >= compute else Bound(compute, "compute")


def decode_cells() -> list[DecodeCell]:
    """Return the decode cells of the project: at most 40 GB of bf16 keys and values each."""
    batches, contexts = (1, 2, 4, 8, 16, 17, 32, 64, 128), (256, 1024, 4096, 8192, 32768, 131072)
    cells = [DecodeCell((context,) * batch) for batch in batches for context in contexts]
    for batch, context in ((1, 8192), (16, 4096)):
        lens = (context,) * batch
        cells += [DecodeCell(lens, num_kv_heads=32), DecodeCell(lens, head_dim=64), DecodeCell(lens, head_dim=256)]
    # One key head, as with multi-query attention and where tensor parallelism leaves one to a GPU.
    cells += [DecodeCell((32768,), num_heads=8, num_kv_heads=1), DecodeCell((8192,), 8, 1, 256)]
    generator = random.Random(0)
    cells += [
        DecodeCell((131072, *(1024,) * 63), label="ragged 128k+63x1k"),
        DecodeCell(tuple(max(131072 // rank, 16) for rank in range(1, 65)), label="zipf 64x128k/rank"),
        DecodeCell(tuple(generator.randint(1, 16384) for _ in range(64)), label="uniform 64x1..16k"),
    ]
    for sequences, prefix, suffix in ((4, 4096, 128), (8, 8192, 256), (64, 8192, 256), (64, 32768, 256)):
        label = f"shared {sequences}x({_short(prefix)}+{suffix})"
        cells.append(DecodeCell((prefix + suffix,) * sequences, shared_prefix=prefix, label=label))
    cells += [DecodeCell((8192,) * 8, block_size=size) for size in (16, 32, 128, 256, None)]
    cells += [DecodeCell((4096,) * 8, query_len=query_len) for query_len in range(2, 9)]
    return [cell for cell in cells if kv_cache_bytes(cell, 2) <= 40e9]


def prefill_cells() -> list[PrefillCell]:
    """Return the prefill cells of the project: 16k tokens in total, and 512 tokens behind long contexts."""
    cells = [
        PrefillCell(16384 // n, n, n, head_dim=head_dim, causal=causal)
        for causal in (True, False)
        for head_dim in (64, 128, 256)
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    cells.append(PrefillCell(4, 4096, 4096, block_size=64))
    cells += [PrefillCell(1, 512, past + 512, block_size=64) for past in (8192, 16384, 32768, 65536, 131072)]
    return cells


def store_cells() -> list[StoreCell]:
    """Return the store_kv cells: one token each for many sequences, and prompts."""
    cells = [StoreCell(batch, 1, 4096) for batch in (1, 8, 64, 128)]
    cells += [StoreCell(1, 512, 8192), StoreCell(1, 16384, 0), StoreCell(16, 1024, 0)]
    return cells + [StoreCell(64, 1, 4096, block_size=size) for size in (16, 256)]


def small_cells() -> list[Cell]:
    """Return cells of every kind that a CPU does in milliseconds."""
    small: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    return [
        DecodeCell((256,), **small),
        DecodeCell((4096,), **small),
        DecodeCell((1024,) * 8, **small),
        DecodeCell((1024,) * 8, **{**small, "num_kv_heads": 8}),
        DecodeCell((1024,) * 8, **{**small, "head_dim": 128}),
        DecodeCell((1024,) * 8, **small, block_size=16),
        DecodeCell((1024,) * 8, **small, block_size=None),
        DecodeCell((1024,) * 4, **small, query_len=4),
        DecodeCell((4096, *(128,) * 7), **small, label="ragged 4k+7x128"),
        DecodeCell((640,) * 4, **small, shared_prefix=512, label="shared 4x(512+128)"),
        PrefillCell(4, 256, 256, **small),
        PrefillCell(1, 1024, 1024, **small),
        PrefillCell(1, 1024, 1024, **small, causal=False),
        PrefillCell(1, 1024, 1024, **{**small, "head_dim": 128}),
        PrefillCell(1, 128, 2048 + 128, **small, block_size=64),
        StoreCell(1, 1, 1024, num_kv_heads=2, head_dim=64),
        StoreCell(8, 1, 1024, num_kv_heads=2, head_dim=64),
        StoreCell(1, 1024, 0, num_kv_heads=2, head_dim=64),
    ]


def all_cells(*, small: bool = False) -> list[Cell]:
    """Return every benchmark cell, GPU-sized or CPU-sized."""
    return small_cells() if small else [*decode_cells(), *prefill_cells(), *store_cells()]


def roofline_rows(cells: list[Cell], ceilings: Ceilings, itemsize: int) -> Iterator[Row]:
    """Give one row per cell: bytes, flops and the bound."""
    for cell in cells:
        least, moved, flops = bound(cell, ceilings, itemsize), moved_bytes(cell, itemsize), counted_flops(cell)
        yield {
            "op": cell.op,
            "cell": cell.name,
            "MB": moved / 1e6,
            "GFLOP": flops / 1e9,
            "flops/byte": flops / moved,
            "bound us": least.seconds * 1e6,
            "limited by": least.limited_by,
        }


def _causal_pairs(query_len: int, seq_len: int) -> int:
    """Return the pairs of bottom-right aligned causal queries and keys; queries before the first key see nothing."""
    seen = min(query_len, seq_len)
    return seen * (seq_len - seen) + seen * (seen + 1) // 2


def _short(tokens: int) -> str:
    """Write a token count as people do: 8k for 8192."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def _shape(cell: DecodeCell | PrefillCell) -> str:
    """Write heads, head size and block size, the part of a name that all attention cells have."""
    layout = "contiguous" if cell.block_size is None else f"block {cell.block_size}"
    return f" h{cell.num_heads}/{cell.num_kv_heads} d{cell.head_dim} {layout}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line: print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m eval.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200", help=f"one of {', '.join(GPUS)}")
    parser.add_argument(
        "--bandwidth", type=float, default=None, metavar="GB/s", help="measured, instead of a datasheet"
    )
    parser.add_argument("--tflops", type=float, default=None, help="measured, not the datasheet")
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of an element; 2 is bfloat16")
    parser.add_argument("--small", action="store_true", help="the CPU-sized cells")
    args = parser.parse_args(argv)
    if args.gpu not in GPUS:
        common.fail(f"no datasheet numbers for {args.gpu!r}: pass one of {', '.join(GPUS)}")
    if (args.bandwidth is None) != (args.tflops is None):
        common.fail("measured ceilings come together: pass both --bandwidth and --tflops, or neither")
    if args.itemsize not in (2, 4, 8):
        common.fail(f"an element has 2, 4 or 8 bytes, got --itemsize {args.itemsize}")
    ceilings = GPUS[args.gpu]
    if args.bandwidth is not None:
        if args.bandwidth <= 0 or args.tflops <= 0:
            common.fail(f"ceilings are positive, got --bandwidth {args.bandwidth} --tflops {args.tflops}")
        ceilings = Ceilings("measured", args.bandwidth * 1e9, args.tflops * 1e12)
    print(f"{ceilings.name}: {ceilings.bytes_per_s / 1e9:.0f} GB/s, {ceilings.flops_per_s / 1e12:g} TFLOP/s\n")
    rows = list(roofline_rows(all_cells(small=args.small), ceilings, args.itemsize))
    print(common.table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
