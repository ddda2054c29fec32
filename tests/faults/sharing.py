"""Seeded faults in what sequences share: groups, forks, prefixes, pools, and which tests have to catch each."""

from .faults import Fault

BLOCKS, POOL = "hf_fastattn/block_pool.py", "hf_fastattn/kv_pool.py"
STATE, CACHE, STORE = "hf_fastattn/paged_state.py", "hf_fastattn/cache.py", "hf_fastattn/prefix_store.py"
PIECES, VIEWS, TORCH = "hf_fastattn/ops/_pieces.py", "hf_fastattn/ops/_views.py", "hf_fastattn/ops/_torch.py"
TEST_SHARING, TEST_STORE, TEST_PIECES = (f"tests/test_{name}.py" for name in ("sharing", "prefix_store", "pieces"))


def _in(file: str, tests: tuple[str, ...], *faults: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name, file, old, new, tests) for name, old, new in faults]


SHARING_FAULTS = [
    *_in(
        STORE,
        ("tests/test_prefix_machine.py",),
        (
            "a block's beginning is taken for all of it",
            "            count += _common(best.tokens, part)\n",
            "            count += len(best.tokens)\n",
        ),
        (
            "evicted blocks are not freed",
            "            del parent.children[node.key]\n        self.pool.ids.free([node.block])\n",
            "            del parent.children[node.key]\n",
        ),
    ),
    *_in(
        STATE,
        ("tests/test_threads.py::test_growth_does_not_come_between_the_counts_of_a_pass",),
        (
            "a pass ends without the lock, unseen",
            "    @locked\n    def _commit_planned(self, may_repeat: bool) -> None:\n",
            "    def _commit_planned(self, may_repeat: bool) -> None:\n        self.thread = None\n",
        ),
    ),
    *_in(
        BLOCKS,
        ("tests/test_block_pool.py",),
        ("followers own nothing", "                self.pool.share(shared)\n", "                pass\n"),
        ("duplicates are not counted", "for _ in range(kept[i] - 1):", "for _ in range(0):"),
        ("owners elsewhere are not seen", "if self.pool.num_owners(block) > count}", "if False}"),
    ),
    *_in(
        POOL,
        (TEST_SHARING, "-k", "fork or pool or memory or parts or group"),
        (
            "growth forgets to move the blocks",
            "    new[target.to(cache.device)] = cache",
            "    new[target] = 0 * cache",
        ),
        ("copies are not made", "                cache[target.to(cache.device)] = cache", "                _ = cache"),
        ("caches on the pool are not told of its growth", "            user.renumber(moved)\n", "            break\n"),
        (
            "what has moved does not go back",
            "                blocks[source.to(blocks.device)] = blocks",
            "                _ = blocks",
        ),
        ("a longer tensor stays behind", "setattr(layer, name, blocks[: self.ids.num_blocks])", "pass"),
        (
            "shared blocks lose owners when they move",
            "        pool.share(moved[block] for block in set(row)",
            "        list(moved[block] for block in set(row)",
        ),
    ),
    *_in(
        POOL,
        ("tests/transformers/test_leases.py", "-k", "dtype"),
        (
            "blocks of another dtype are taken",
            "(blocks.dtype, self.layers[layer].device) == (states.dtype, states.device)",
            "True",
        ),
    ),
    *_in(
        STATE,
        (TEST_SHARING, "-k", "group or prompt or fork or common or chunks"),
        (
            "sequences of a group never part",
            "                self._end_sharing()\n            step.group",
            "                pass\n            step.group",
        ),
        ("a sized cache's groups do not part", "        if self.sharing and self.reserved:", "        if False:"),
        (
            "chunks of a prompt are not shared",
            "columns + query_len > self.prompt_columns)",
            "columns + query_len > 0)",
        ),
        (
            "a fork owns nothing",
            "            self.pool.share(row)\n        self.sharing",
            "            pass\n        self.sharing",
        ),
        (
            "a fork writes into its parent's block",
            "            self.memory.copy(self._growing(self.tables.make_tails_private))\n            self._reserve",
            "            self._reserve",
        ),
        (
            "a fork forgets what is hidden",
            "        twin.padding.seen, twin.padding.stored = self.padding.seen, self.padding.stored\n",
            "",
        ),
        (
            "blocks of a fork that is gone stay taken",
            "weakref.finalize(self, _give_back, self.lock, self.tables).atexit = False",
            "pass",
        ),
        (
            "crops of a growing pool find no room",
            "            try:\n                self.memory.make_room(",
            "            raise\n            try:\n                self.memory.make_room(",
        ),
    ),
    *_in(
        "hf_fastattn/columns.py",
        (TEST_SHARING, "-k", "group or prompt"),
        ("masks of a group are not compared", "if group > 1 and not bool(", "if False and not bool("),
    ),
    *_in(
        "hf_fastattn/device_tables.py",
        (TEST_SHARING, "-k", "group or prompt or fork or common or chunks"),
        ("a prefix reaches into the last block", "[n // self.block_size for n", "[-(-n // self.block_size) for n"),
        ("freed blocks are taken for shared", "if count and one[count - 1] == NO_BLOCK:", "if False:"),
        ("inner levels are forgotten", "                todo.append((begin, stop, shared))\n", ""),
    ),
    *_in(
        CACHE,
        (TEST_SHARING, "-k", "group or prompt"),
        ("every sequence of a group stores", "        if step.group > 1:", "        if False:"),
        ("the second of a group stores", "(x[:: step.group] for x in (k, v,", "(x[1 :: step.group] for x in (k, v,"),
        ("only the first group stores", "(x[:: step.group] for x in (k, v,", "(x[:1] for x in (k, v,"),
    ),
    *_in(
        CACHE,
        (f"{TEST_STORE}::test_keep_prefix_cuts_a_stale_cache",),
        ("a stale column is kept", "kept = int(same.cumprod(0).sum())", "kept = int(same.sum())"),
        (
            "nothing is left to compute",
            "shared = max(min(columns, new_ids.shape[1] - 1), 0)",
            "shared = min(columns, new_ids.shape[1])",
        ),
    ),
    *_in(
        "hf_fastattn/attention.py",
        (f"{TEST_SHARING}::test_decoding_gets_what_is_shared_and_one_schedule_per_step",),
        ("shared blocks are read by each", "tables.shared_prefixes if tables.key_mask is None else None", "None"),
        ("a schedule per layer", "if kind not in step.schedules:", "if True:"),
    ),
    *_in(
        STORE,
        (TEST_STORE,),
        ("tokens are not compared", "if child is None or child.tokens != part:", "if child is None:"),
        ("roots are not compared", "if root is None or known != identity:", "if root is None:"),
        ("salts are ignored", 'return salt.replace("\\0", "\\\\0") + "\\0" +', 'return "\\0" +'),
        ("weights are ignored", "version = 0 if tensor.is_inference() else tensor._version", "version = 0"),
        (
            "adapters are ignored",
            "parts.append((name, str(layer.active_adapters), str(layer.disable_adapters)))",
            "pass",
        ),
        (
            "blocks in use are given up",
            "            if self.pool.ids.num_owners(node.block) > 1:\n                continue\n",
            "",
        ),
        ("the latest goes first", "leaves = [(node.used, id(node), node)", "leaves = [(-node.used, id(node), node)"),
        ("a block's beginning is not used", "if best is not None and _common(best.tokens, part):", "if False:"),
        ("the whole prompt is taken from the store", "self._match(root, tokens[:-1])", "self._match(root, tokens)"),
        ("columns of the longest match", "end = min(ends, default=0)", "end = max(ends, default=0)"),
        (
            "holes are taken for stored",
            "            if columns and cache.state.padding.keep_hidden:",
            "            if False:",
        ),
        (
            "growth is not followed",
            "            node.block = moved.get(node.block, node.block)\n",
            "            pass\n",
        ),
        ("old weights are kept", "        if not self._is_current(root):\n            return 0\n", ""),
    ),
    *_in(
        PIECES,
        (TEST_PIECES,),
        (
            "partial results are added",
            "weight = torch.exp(maximum[rows] - new), torch.exp(lse - new)",
            "weight = torch.exp(maximum[rows] - new), torch.ones_like(lse)",
        ),
        ("a shared prefix is seen again", "            begin[first : first + count] = [end_block] * count\n", ""),
        (
            "any length is stacked",
            "if own and own[-1].tokens == tokens < MIN_RUN and tokens:",
            "if own and tokens < MIN_RUN:",
        ),
        (
            "runs are cut one block late",
            "if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:",
            "if i == len(blocks) or (i > 1 and blocks[i - 1] != blocks[i - 2] + 1):",
        ),
    ),
    *_in(
        VIEWS,
        ("tests/test_ops.py", TEST_PIECES),
        ("any blocks taken for a run", "blocks == list(range(blocks[0], blocks[0] + len(blocks)))", "True"),
        ("any rows taken for even runs", "if row != list(range(start, start + num_blocks)):", "if row[0] != start:"),
        (
            "distance of the sequences ignored",
            "(distance * block, head, slot, dim)",
            "(0, head, slot, dim)",
        ),
        ("the end of the last block is seen", ".flatten(1, 2)[:, :tokens]", ".flatten(1, 2)"),
    ),
    *_in(
        TORCH,
        (f"{TEST_PIECES}::test_long_sequences_stream_their_keys",),
        ("streamed scores are not scaled", "q = (q * softmax_scale).view(", "q = q.view("),
        (
            "streamed keys in the wrong order",
            "scores.softmax(-1), v_i, out=out_i)",
            "scores.softmax(-1), v_i.flip(0), out=out_i)",
        ),
    ),
]
