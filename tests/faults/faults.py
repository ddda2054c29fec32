"""The list of seeded faults, and which tests have to catch each."""

from dataclasses import dataclass

OPS = ("tests/test_ops.py", "tests/test_op_arguments.py", "-k", "not any_")
BLOCKS = ("tests/test_block_pool.py",)
VIEWS = ("tests/test_run_views.py",)
CACHE = (
    *(f"tests/test_{name}.py" for name in ("paged_cache", "cache_operations", "cache_failures", "cache_modes")),
    *("-k", "not compiled and not export"),
)
MACHINE = ("tests/test_cache_machine.py", "-m", "not soak")
DECODE_KERNEL = (
    "tests/interpret/test_decode_attention.py",
    "-k",
    "several_queries or ragged or share_keys or test_window or test_key_mask or nan_in or stride",
)
PREFILL_KERNEL = (
    "tests/interpret/test_prefill_attention.py",
    "-k",
    "boundaries or test_window or sinks or positions or paged_everything or strides",
)
STORE_KERNEL = ("tests/interpret/test_store_kv.py",)


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        name: what is wrong.
        file: the file it is made in.
        old, new: the text that is replaced, which occurs once in the file, and by what.
        tests: pytest arguments of the tests that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def interpreted(self) -> bool:
        """Whether the tests run Triton kernels, in Triton's interpreter."""
        return self.tests[0].startswith("tests/interpret/")


_GRAD = "if torch.is_grad_enabled():"


def _in(file: str, tests: tuple[str, ...], *faults: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name, f"hf_fastattn/{file}", old, new, tests) for name, old, new in faults]


FAULTS = [
    *_in(
        "ops/_torch.py",
        OPS,
        (
            "top-left causal",
            "positions = torch.arange(seq_len - query_len, seq_len, device=q.device) if",
            "positions = torch.arange(query_len, device=q.device) if",
        ),
        ("window one too wide", "(columns > rows[:, None] - window)", "(columns >= rows[:, None] - window)"),
        (
            "window of one query one too narrow",
            "k, v = k[:, :, -window:], v[:, :, -window:]",
            "k, v = k[:, :, 1 - window :], v[:, :, 1 - window :]",
        ),
        ("key mask dropped", "key_mask = key_mask[:, :seq_len]", "key_mask = torch.ones_like(key_mask[:, :seq_len])"),
        ("key mask not cut with the window", "else key_mask[:, -window:]", "else key_mask[:, :window]"),
        (
            "key mask not cut with the tile",
            "keys = key_mask[:, None, first:last].bool()",
            "keys = key_mask[:, None, : k[:, :, first:last].shape[2]].bool()",
        ),
        ("softcap dropped", "        scores = torch.tanh(scores / softcap) * softcap\n", "        pass\n"),
        ("sinks dropped", "        total = total + torch.exp(logits - peak)\n", "        pass\n"),
        (
            "rows without a key divide by zero",
            "weights = weights / total.clamp(min=torch.finfo(torch.float32).tiny)",
            "weights = weights / total",
        ),
        (
            "wrong key head",
            "packed = q.reshape(num_seqs, num_kv_heads, group * query_len, head_dim)",
            "packed = q.roll(1, 1).reshape(num_seqs, num_kv_heads, group * query_len, head_dim)",
        ),
        (
            "mask of packed queries in the wrong order",
            "mask = mask.repeat(1, 1, group, 1)",
            "mask = mask.repeat_interleave(group, 2)",
        ),
        (
            "length beyond the table accepted",
            "    check_lens(lens, block_table, k_cache.shape[1])\n",
            "",
        ),
        ("query positions as if without gaps", "if causal and last - int(positions[real[0]]) == count:", "if causal:"),
    ),
    *_in(
        "ops/store_kv.py",
        OPS,
        (
            "stored one slot too late",
            "slots = blocks * block_size + positions % block_size",
            "slots = blocks * block_size + (positions + 1) % block_size",
        ),
        (
            "values stored as keys",
            "    _write(v_cache, slots.long(), new_v)\n",
            "    _write(v_cache, slots.long(), new_k)\n",
        ),
        (
            "padding stored",
            "        stored = positions >= 0\n",
            "        stored = torch.ones_like(positions, dtype=torch.bool)\n",
        ),
        ("missing block not noticed", "if blocks.numel() and int(blocks.min()) < 0:", "if False:"),
        (
            "position beyond the table clamped",
            "if int(index.max()) >= block_table.shape[1]:",
            "index = index.clamp(max=block_table.shape[1] - 1)\n    if False:",
        ),
    ),
    *_in(
        "block_pool.py",
        BLOCKS,
        (
            "free forgets a block",
            "            if self._owners[block] == 0:\n                self._add_run",
            "            if self._owners[block] == 0 and block % 7 != 6:\n                self._add_run",
        ),
        ("sharing counts nothing", "            self._owners[block] += 1\n", "            pass\n"),
        ("runs are not merged", "if index and sum(self._runs[index - 1]) == start:", "if False:"),
        ("no copy on write", "                    copies.append((row[i], block))\n", "                    pass\n"),
        (
            "tails stay shared",
            "                if self.pool.num_owners(row[i]) == 1:\n",
            "                if self.pool.num_owners(row[i]) >= 1:\n",
        ),
        (
            "old rows are not freed when selecting",
            "            self.pool.free(row)\n        self.rows, self.lens = rows, lens\n",
            "            pass\n        self.rows, self.lens = rows, lens\n",
        ),
        (
            "room for private tails not checked",
            "        if wanted > free:\n            raise BlockPoolExhausted(wanted, free",
            "        if False:\n            raise BlockPoolExhausted(wanted, free",
        ),
        ("a reservation takes what there is", "        if missing > self.pool.num_free:\n", "        if False:\n"),
        ("uneven rows are runs", "if row[freed:] != list(range(first, first + length))", "if False"),
        ("runs may overlap", "or distance < length:", "or distance < 0:"),
    ),
    *_in(
        "paged_state.py",
        CACHE,
        (
            "commit at the beginning",
            "        self.step, self.thread = step, me\n",
            "        self.step, self.thread, self.tables.lens = step, me, step.lens\n",
        ),
        (
            "crop one token too few",
            "columns = max(self.columns - tokens, 0)",
            "columns = max(self.columns - tokens + 1, 0)",
        ),
        (
            "selection forgets the key mask",
            "            tables.key_mask = tables.selected_key_mask(index)\n",
            "            pass\n",
        ),
        ("a failed first pass fixes the batch", "if columns == 0 and num_seqs != self.num_seqs:", "if False:"),
        ("max_length not enforced", "if self.max_length is not None and max(lens) > self.max_length:", "if False:"),
        ("runs of yesterday", "        self._runs, self.steady = False, None\n", "        self.steady = None\n"),
        ("sequences of several lengths are viewed as one", "or min(lens) != max(lens):", "or False:"),
        ("hidden keys are viewed", "if not tables.on_host or tables.key_mask is not None:", "if not tables.on_host:"),
    ),
    *_in(
        "device_tables.py",
        CACHE,
        ("commit forgets the lengths", "        self.past_lens.copy_(self.seq_lens)\n", "        pass\n"),
        (
            "stale seq_lens",
            "torch.add(self.past_lens, step.query_len, out=self.seq_lens)",
            "self.seq_lens.copy_(self.past_lens)",
        ),
        (
            "hidden columns of a window seen",
            "seen = None if step.positions is None or step.mask is None else",
            "seen = None if True else",
        ),
        ("counts of a CPU stand still", "                self._past[row] = seq_len\n", "                pass\n"),
        ("columns of a CPU stand still", "self._columns[0] = columns + step.query_len", "pass"),
    ),
    *_in(
        "cache.py",
        VIEWS,
        ("views end at the first block", "range(tokens, room + 1)", "range(tokens, state.block_size + 1)"),
        ("views of blocks that nobody owns", "range(tokens, room + 1)", "range(tokens, room + 9)"),
    ),
    *_in(
        "ops/_library.py",
        ("tests/test_op_registration.py", "-k", "gradients"),
        ("kernels drop gradients", "if torch.is_grad_enabled() and any(", "if False and any("),
    ),
    *_in(
        "paged_state.py",
        VIEWS,
        ("views of yesterday", "        self.views.clear()\n", ""),
        ("steps repeated over other tables", "self._runs, self.steady = False, None", "self._runs = False"),
        ("steps repeated after a reset", "= None, None, False, 0, False", "= None, self.steady, False, 0, False"),
        ("steps repeated on more devices", "        self.steady = None\n        self.devices", "        self.devices"),
        ("steps repeated behind the device", "if last is None or self.behind or", "if last is None or"),
        ("steps repeated with other layers", "or last.last_layer != num_layers - 1:", "or False:"),
        ("steps repeated with another batch", "if num_seqs != len(last.lens) or", "if"),
        ("steps repeated beyond the blocks", "or tokens > self._room():", "or False:"),
        ("a capacity is no limit", "return blocks if self.max_length is None else min(", "return blocks or min("),
        ("windows are not looked at", "unpadded and self.window is None", "unpadded"),
        (
            "padding is viewed as tokens",
            "step.runs is not None and step.lens[0] == self.columns",
            "step.runs is not None",
        ),
        ("columns of repeated steps stand still", "views or (may_repeat", "views and (may_repeat"),
    ),
    *_in(
        "paged_layer.py",
        VIEWS,
        ("views under gradients", "if torch.is_grad_enabled() or torch.compiler", "if torch.compiler"),
        ("a failed step goes on", "elif not step.views or self.layer_idx <= step.first_layer:", "elif not step.views:"),
        ("repeated steps never end", "        if self.layer_idx == step.last_layer:\n", "        if False:\n"),
    ),
    *_in(
        "attention.py",
        VIEWS,
        ("shared keys end no pass", "own = layer.layer_idx == current.last_layer", "own = True"),
        ("masks over views are dropped", "if attention_mask is None and isinstance(key, T", "if isinstance(key, T"),
    ),
    *_in(
        "ops/decode_attention.py",
        ("tests/test_ops.py", "-k", "at_once"),
        ("at once under gradients", "if torch.is_grad_enabled() or torch.is_autocast", "if torch.is_autocast"),
        ("at once under autocast", 'if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):', _GRAD),
        ("at once in several dtypes", "and q.dtype == k.dtype == v.dtype and", "and"),
        ("at once for several queries", " and q.shape[2] == 1):\n        return None", "):\n        return None"),
    ),
    *_in(
        "ops/_library.py",
        ("tests/test_ops.py", "-k", "at_once"),
        ("straight past dispatch modes", "return tensor.is_cpu and is_plain(tensor) and", "return tensor.is_cpu and"),
        ("straight past another implementation", ' and DIRECT[name]["cpu"] is _DEFINED[name]', ""),
        ("straight on any device", "return tensor.is_cpu and is_plain(tensor)", "return is_plain(tensor)"),
    ),
    *_in(
        "run_views.py",
        VIEWS,
        ("new keys overwrite the oldest", "[(count - query_len, query_len) for", "[(0, query_len) for"),
        ("views of an earlier step", "return views[tokens - first]", "return views[0]"),
    ),
    *_in(
        "ops/_torch.py",
        OPS,
        (
            "query heads packed across key heads",
            "q = q.reshape(num_seqs, num_kv_heads, group, head_dim)",
            "q = q.reshape(num_seqs, group, num_kv_heads, head_dim).transpose(1, 2)",
        ),
    ),
    *_in(
        "columns.py",
        CACHE,
        (
            "crop forgets hidden columns",
            "return (stored.sum(1) + columns - stored.shape[1]).tolist()",
            "return [min(n, columns) for n in lens]",
        ),
        (
            "padding stored",
            "step.positions = torch.where(stored, step.queries, -1)",
            "step.positions = (past[:, None] + torch.arange(step.query_len)).to(torch.int32)",
        ),
        ("holes compacted under a window", "stored = new if not self.keep_hidden else", "stored = new if True else"),
        (
            "a changed mask goes unnoticed",
            "if mask_known and step.query_len > 1 and not torch.equal(before, old):",
            "if False:",
        ),
        (
            "commit loses the mask",
            "        self.count += step.query_len\n        self.seen, self.stored = step.seen, step.stored\n",
            "        self.count += step.query_len\n",
        ),
    ),
    *_in(
        "cache.py",
        CACHE,
        ("reorder does nothing", "        self._select(beam_idx.tolist())\n", "        pass\n"),
        (
            "repeat in the wrong order",
            "for i in range(self.state.num_seqs) for _ in range(repeats)]",
            "for _ in range(repeats) for i in range(self.state.num_seqs)]",
        ),
        ("reset keeps the blocks", "        self.state.release()\n        self.made_dense", "        self.made_dense"),
        (
            "deepcopy copies the config",
            "twin.__setstate__(self.__getstate__())",
            "twin.__setstate__(__import__('copy').deepcopy(self.__getstate__()))",
        ),
        (
            "a failed forward pass goes on",
            "if step is None or layer.layer_idx <= step.first_layer:\n            if torch",
            "if step is None:\n            if torch",
        ),
        (
            "gradients lost in the blocks",
            "if torch.is_grad_enabled() and (new.k.requires_grad or new.v.requires_grad):",
            "if False:",
        ),
    ),
    *_in(
        "dense_reading.py",
        CACHE,
        (
            "dense columns out of order",
            "positions = (stored.cumsum(1) - 1).clamp(min=0)",
            "positions = torch.arange(columns, device=device).expand_as(stored)",
        ),
    ),
    *_in(
        "attention.py",
        CACHE,
        (
            "scale 3% too large",
            "scale = scaling if scaling is not None else",
            "scale = 1.03 * scaling if scaling is not None else",
        ),
        (
            "key mask ignored over blocks",
            "k_cache, v_cache, key_mask=tables.key_mask, schedule",
            "k_cache, v_cache, key_mask=None, schedule",
        ),
        ("old keys ignored", "        if step.fresh:\n", "        if True:\n"),
        (
            "query positions ignored",
            "query_positions=None if positions is None else positions.to(query.device)",
            "query_positions=None",
        ),
        (
            "padding columns seen when a cache turns dense",
            "            mask = column_mask(cache.state)\n",
            "            pass\n",
        ),
        ("window dropped", "window=sliding_window or ops.NO_WINDOW,", "window=ops.NO_WINDOW,"),
    ),
    *_in(
        "masks.py",
        CACHE,
        (
            "padding mask dropped",
            "            return None if attention_mask is None else _key_padding(attention_mask)\n",
            "            return None\n",
        ),
    ),
    *_in(
        "kernels/_decode_tiles.py",
        DECODE_KERNEL,
        ("kernel: window one too wide", "(behind < window)", "(behind <= window)"),
        (
            "kernel: key mask dropped",
            "inside &= load_ahead(mask_ptr + known * stride_mask_key, ASM) != 0",
            "inside &= known >= 0",
        ),
        (
            "kernel: K addressed with V's strides",
            "k_ptrs = k_ptr + block * stride_k_block",
            "k_ptrs = k_ptr + block * stride_v_block",
        ),
        ("kernel: wrong slot", "slot = key % KV_BLOCK_SIZE", "slot = (key + 1) % KV_BLOCK_SIZE"),
        ("kernel: hidden values read", "v_mask = inside[:, None]", "v_mask = (key < key_end)[:, None]"),
    ),
    *_in(
        "kernels/decode_attention.py",
        DECODE_KERNEL,
        ("kernel: top-left causal", "position = seq_len - query_len + row", "position = row"),
        (
            "kernel: wrong key head",
            "head_k_ptr = k_ptr + kv_head.to(tl.int64) * stride_k_head",
            "head_k_ptr = k_ptr + (num_kv_heads - 1 - kv_head).to(tl.int64) * stride_k_head",
        ),
    ),
    *_in(
        "kernels/_prefill_tiles.py",
        PREFILL_KERNEL,
        (
            "kernel: window one too wide (prefill)",
            "(keys[None, :] > query_pos[:, None] - window)",
            "(keys[None, :] >= query_pos[:, None] - window)",
        ),
    ),
    *_in(
        "kernels/prefill_attention.py",
        PREFILL_KERNEL,
        (
            "kernel: top-left causal (prefill)",
            "        first_pos = seq_len - query_len + first_row\n",
            "        first_pos = first_row\n",
        ),
        (
            "kernel: a tile too many without a mask",
            "all_end = tl.maximum(tl.minimum(seq_len, first_pos + 1), 0)",
            "all_end = tl.maximum(tl.minimum(seq_len, first_pos + BLOCK_N), 0)",
        ),
        ("kernel: padding queries get something", "out = tl.where((query_pos >= 0)[:, None], out, 0.0)", "out += 1.0"),
        ("kernel: sinks left out of the sum", "        l_i += 1.0\n", "        l_i += 0.0\n"),
        (
            "kernel: sinks read as if they were contiguous (prefill)",
            "sinks = None if sinks is None else sinks.contiguous()",
            "pass",
        ),
    ),
    *_in(
        "kernels/store_kv.py",
        STORE_KERNEL,
        ("kernel: missing block stored to", "    stored &= block >= 0\n", "    block = tl.maximum(block, 0)\n"),
        ("kernel: beyond the table", "& (entry < max_blocks)", "& (entry < max_blocks + 1)"),
        ("kernel: wrong slot (store)", "slot = (position % KV_BLOCK_SIZE)", "slot = ((position + 1) % KV_BLOCK_SIZE)"),
    ),
]
