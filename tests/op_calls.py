"""Calls of the ops with random arguments, checked against the float64 oracle in hf_fastattn.reference.

The tolerance is computed: at most twice the error that the oracle's formula makes in the call's own dtype, plus four
roundings of the output and one of the float32 scores (a score off by x changes a probability by the factor exp(x)).
"""

import torch

from hf_fastattn import ops, reference
from hf_fastattn.ops import NO_WINDOW

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Call:
    """The arguments of an attention call, over blocks (block_size) or dense; ``unowned`` where nobody owns a slot."""

    def __init__(
        self,
        lens=(37, 16),
        *,
        heads=4,
        kv_heads=2,
        query_len=1,
        dim=32,
        v_dim=None,
        block_size=16,
        dtype=torch.float32,
        sharpness=3.0,
        blocks="permuted",
        unowned=NAN,
        seed=0,
    ):
        self.unowned = unowned
        self.random = torch.Generator().manual_seed(seed)
        self.dtype, self.block_size = dtype, block_size
        v_dim = dim if v_dim is None else v_dim
        self.q = self.normal(len(lens), query_len, heads, dim).transpose(1, 2)
        self.options = {"softmax_scale": sharpness * dim**-0.5, "window": NO_WINDOW, "softcap": 0.0}
        self.causal = True
        self.key_mask = self.sinks = self.block_table = self.seq_lens = self.query_positions = None
        if block_size is None:
            assert len(set(lens)) == 1
            self.k = self.normal(len(lens), kv_heads, lens[0], dim)
            self.v = self.normal(len(lens), lens[0], kv_heads, v_dim).transpose(1, 2)
            return
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        width = max(-(-max(lens, default=0) // block_size), 1) + 1
        num_blocks = len(lens) * width + 3
        order = torch.arange(num_blocks) if blocks == "runs" else torch.randperm(num_blocks, generator=self.random)
        self.block_table = torch.full((len(lens), width), -1, dtype=torch.int32)
        self.k = self.cache(num_blocks, kv_heads, dim)
        self.v = self.cache(num_blocks, kv_heads, v_dim).transpose(1, 2).contiguous().transpose(1, 2)
        for seq, seq_len in enumerate(lens):
            for i, start in enumerate(range(0, seq_len, block_size)):
                block, count = order[seq * width + i], min(block_size, seq_len - start)
                self.block_table[seq, i] = block
                self.k[block, :count] = self.normal(count, kv_heads, dim)
                self.v[block, :count] = self.normal(count, kv_heads, v_dim)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def cache(self, num_blocks, kv_heads, dim):
        return torch.full((num_blocks, self.block_size, kv_heads, dim), self.unowned, dtype=self.dtype)

    def hide_keys(self, share):
        columns = self.k.shape[2] if self.block_table is None else self.block_table.shape[1] * self.block_size
        self.key_mask = (torch.rand(self.q.shape[0], columns, generator=self.random) >= share).to(torch.int8)

    def place_queries(self, gaps=False):
        """Give the queries positions of their own: rising, some padding, the last tokens or (gaps) any tokens."""
        num_seqs, _, query_len, _ = self.q.shape
        self.query_positions = torch.full((num_seqs, query_len), -1, dtype=torch.int32)
        for seq, seq_len in enumerate(self.seq_lens.tolist()):
            count = int(torch.randint(0, min(query_len, seq_len) + 1, (), generator=self.random))
            places = torch.randperm(query_len, generator=self.random)[:count].sort().values
            positions = torch.arange(seq_len - count, seq_len)
            if gaps:
                positions = torch.randperm(seq_len, generator=self.random)[:count].sort().values
            self.query_positions[seq, places] = positions.int()

    def largest_score(self):
        """Return a bound of the scaled scores."""
        longest = [t.double().nan_to_num().norm(dim=-1).max().item() for t in (self.q, self.k)]
        return longest[0] * longest[1] * abs(self.options["softmax_scale"])

    def run(self, module, name, dtype=None):
        q, k, v = ((t if dtype is None else t.to(dtype)) for t in (self.q, self.k, self.v))
        sinks = self.sinks if dtype is None or self.sinks is None else self.sinks.to(dtype)
        given = {"block_table": self.block_table, "seq_lens": self.seq_lens, "key_mask": self.key_mask, "sinks": sinks}
        if name == "prefill_attention":
            given |= {"causal": self.causal, "query_positions": self.query_positions}
        return getattr(module, name)(q, k, v, **given, **self.options)

    def check(self, name="prefill_attention"):
        return self.compare(self.run(ops, name), name)

    def compare(self, out, name="decode_attention"):
        """Compare a result with the oracle's."""
        exact = self.run(reference, name, torch.float64)
        assert out.shape == exact.shape
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        assert not exact.isnan().any()
        if out.numel():
            roundings = 4 * torch.finfo(self.dtype).eps + torch.finfo(torch.float32).eps * self.largest_score()
            rounding = roundings * exact.abs().max().item()
            plain = (self.run(reference, name).double() - exact).abs().max().item()
            error = (out.double() - exact).abs().max().item()
            assert error <= 2 * plain + rounding, f"off by {error}, allowed {2 * plain + rounding}"  # false for NaN
        return out

    def check_both(self):
        """Check the op that fits; decode_attention too if it takes the call."""
        out = self.check()
        if self.causal and self.query_positions is None and self.q.shape[2] <= ops.MAX_DECODE_QUERY_LEN:
            assert torch.equal(self.check("decode_attention"), out)
        return out


class Store:
    """The arguments of store_kv: sequences of past_lens tokens get query_len new ones; the caches are NaN."""

    def __init__(self, past_lens=(0, 5, 30), query_len=3, *, block_size=16, dim=8, v_dim=8, layout="token", seed=0):
        random = torch.Generator().manual_seed(seed)
        num_seqs = len(past_lens)
        self.k = torch.randn(num_seqs, query_len, 2, dim, generator=random).transpose(1, 2)
        self.v = torch.randn(num_seqs, 2, query_len, v_dim, generator=random)
        width = -(-(max(past_lens) + query_len) // block_size)
        order = torch.randperm(num_seqs * width + 2, generator=random)
        self.block_table = order[: num_seqs * width].view(num_seqs, width).int()
        self.past_lens = torch.tensor(past_lens, dtype=torch.int32)
        self.positions = None
        self.caches = [torch.full((len(order), block_size, 2, d), NAN) for d in (dim, v_dim)]
        if layout == "head":
            self.caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in self.caches]

    def run(self, module):
        caches = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype).copy_(c) for c in self.caches]
        module.store_kv(self.k, self.v, *caches, self.block_table, self.past_lens, positions=self.positions)
        return caches

    def check(self):
        for got, want in zip(self.run(ops), self.run(reference), strict=True):
            assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7))
