"""A decode call with its float64 oracle, for the tests that interpret the decode kernels."""

import torch

from hf_fastattn import reference
from hf_fastattn.kernels import decode_attention as kernel
from hf_fastattn.kernels import decode_schedule
from hf_fastattn.kernels._decode_plan import DecodeConfig
from hf_fastattn.ops.shapes import NO_WINDOW

NAN = float("nan")


class Call:
    """The arguments of one decode call, over blocks (block_size) or dense, with NaN in slots that no sequence owns."""

    def __init__(
        self,
        lens=(37, 16),
        *,
        heads=2,
        kv_heads=1,
        query_len=1,
        dim=16,
        v_dim=None,
        block_size=16,
        dtype=torch.float32,
        sharpness=1.0,
        seed=0,
    ):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        v_dim = dim if v_dim is None else v_dim
        self.q = normal(len(lens), heads, query_len, dim)
        self.options = {"softmax_scale": sharpness * dim**-0.5, "window": NO_WINDOW, "softcap": 0.0}
        self.key_mask = self.sinks = self.block_table = self.seq_lens = self.shared_prefixes = None
        self.batch_invariant = False
        if block_size is None:
            assert len(set(lens)) == 1
            self.k = normal(len(lens), kv_heads, lens[0], dim)
            self.v = normal(len(lens), kv_heads, lens[0], v_dim)
            return
        num_blocks = sum(-(-seq_len // block_size) for seq_len in lens) + 3
        order = torch.randperm(num_blocks, generator=random).tolist()
        self.k = torch.full((num_blocks, block_size, kv_heads, dim), NAN, dtype=dtype)
        self.v = torch.full((num_blocks, block_size, kv_heads, v_dim), NAN, dtype=dtype)
        self.block_table = torch.full((len(lens), max(-(-max(lens) // block_size), 1) + 1), -1, dtype=torch.int32)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        for seq, seq_len in enumerate(lens):
            for i, start in enumerate(range(0, seq_len, block_size)):
                block, count = order.pop(), min(block_size, seq_len - start)
                self.block_table[seq, i] = block
                self.k[block, :count] = normal(count, kv_heads, dim)
                self.v[block, :count] = normal(count, kv_heads, v_dim)

    def share(self, *entries):
        """Give sequences the blocks of the first of them, as [first_row, num_rows, first_block, end_block] says."""
        for first, count, begin, end in entries:
            if count > 0:
                self.block_table[first : first + count, begin:end] = self.block_table[first, begin:end].clone()
        self.shared_prefixes = torch.tensor(entries, dtype=torch.int32)
        return self

    def config(self, block_n=16, block_m=None, softmax="lazy", phi=0.0):
        """Return a config for the interpreter: small tiles."""
        rows = self.q.shape[1] // self.k.shape[1 if self.block_table is None else 2] * self.q.shape[2]
        rows *= 1 if self.shared_prefixes is None else len(self.q)
        block_m = block_m or min(max(4, 1 << (rows - 1).bit_length()), 16)
        return DecodeConfig(block_m, block_n, 4, 3, softmax=softmax, phi=phi)

    def run(self, num_programs=None, config=None, schedule=None):
        return kernel.launch(
            self.q,
            self.k,
            self.v,
            self.block_table,
            self.seq_lens,
            self.key_mask,
            self.sinks,
            *self.options.values(),
            self.shared_prefixes,
            schedule,
            self.batch_invariant,
            config=config,
            num_programs=num_programs,
        )

    def schedule(self, num_programs, config):
        return decode_schedule.launch(
            self.q,
            self.k,
            self.v,
            self.block_table,
            self.seq_lens,
            self.shared_prefixes,
            self.options["window"],
            self.batch_invariant,
            config=config,
            num_programs=num_programs,
        )

    def expected(self, dtype):
        q, k, v = (tensor.to(dtype) for tensor in (self.q, self.k, self.v))
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        paged = {"block_table": self.block_table, "seq_lens": self.seq_lens}
        return reference.decode_attention(q, k, v, key_mask=self.key_mask, sinks=sinks, **paged, **self.options)

    def check(self, num_programs=None, block_n=16, largest_logit=0.0, default_config=False, **shape):
        """Compare with float64: at most twice the error of the formula in the call's dtype, plus rounding.

        largest_logit: where fp32 logits are so large that their own rounding decides.
        """
        config = None if default_config else self.config(block_n, **shape)
        out, exact = self.run(num_programs, config), self.expected(torch.float64)
        assert out.shape == exact.shape
        assert out.is_contiguous()
        assert out.dtype == self.q.dtype
        assert not exact.isnan().any()
        logit_rounding = torch.finfo(torch.float32).eps * largest_logit * self.v.nan_to_num().abs().max().item()
        rounding = 4 * (torch.finfo(out.dtype).eps * exact.abs().max().item() + logit_rounding)
        plain = (self.expected(out.dtype).double() - exact).abs().max().item()
        error = (out.double() - exact).abs().max().item()
        assert error <= 2 * plain + rounding  # false for NaN
        return out


def poisoned_new_empty(new_empty):
    """Return a new_empty whose memory is garbage: NaN, or numbers that no counter and no table may hold."""

    def poisoned(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        if tensor.dtype == torch.int32:
            return tensor.fill_(1_000_003)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    return poisoned
