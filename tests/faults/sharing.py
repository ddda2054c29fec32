"""Seeded faults in what sequences share: groups, forks, prefixes, pools, and which tests have to catch each."""

from .faults import Fault

BLOCKS, POOL = "hf_fastattn/block_pool.py", "hf_fastattn/kv_pool.py"
STATE, CACHE, STORE = "hf_fastattn/paged_state.py", "hf_fastattn/cache.py", "hf_fastattn/prefix_store.py"
SCHEDULE, VIEWS, TORCH = (f"hf_fastattn/ops/{name}.py" for name in ("_cpu_schedule", "_views", "_torch"))
TEST_SHARING, TEST_STORE, TEST_CPU = (f"tests/test_{name}.py" for name in ("sharing", "prefix_store", "cpu_schedule"))


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
        STATE,
        ("tests/test_cache_operations.py", "-k", "reorder"),
        (
            "beams that change places are taken for ones that stay",
            "stay = list(index) == list(range(self.num_seqs))",
            "stay = sorted(index) == list(range(self.num_seqs))",
        ),
        (
            "beams that stay where they are cost a table",
            "stay = list(index) == list(range(self.num_seqs))",
            "stay = False",
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
            "            self._end_sharing()\n        self.padding.plan",
            "            pass\n        self.padding.plan",
        ),
        ("a sized cache's groups do not part", "        if self.sharing and self.reserved:", "        if False:"),
        (
            "chunks of a prompt are not shared",
            "columns + query_len > self.prompt_columns:",
            "columns + query_len > 0:",
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
            "parts.append((name, *(str(getattr(layer, attribute, None)) for attribute in state)))",
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
        SCHEDULE,
        (TEST_CPU,),
        ("a shared prefix is read again", "                begins[first : first + count] = [end] * count\n", ""),
        ("unused entries are read", "if count and (count - 1)", "if (count - 1)"),
        ("every level is worth a call", "> 2 * CALL_BYTES:", "> 0:"),
        (
            "runs are cut one block late",
            "if blocks[i] != blocks[i - 1] + 1)",
            "if i > 1 and blocks[i - 1] != blocks[i - 2] + 1)",
        ),
        (
            "short runs are calls",
            "        if (end - begin) * self.token_bytes < (len(cuts)",
            "        if False and (len(cuts)",
        ),
        (
            "views are not held to the cache",
            " and first + (len(starts) - 1) * distance + count <= num_slots else",
            " else",
        ),
        ("views may begin before the cache", "if first >= 0 and first +", "if first +"),
        ("distances are rounded", "or distances or rest or", "or distances or"),
        ("any distances are even", "or distances or rest", "or rest"),
        (
            "what is scattered is taken for a run",
            "        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):",
            "        if not blocks:",
        ),
        ("views of windows are never too long", "            if count < COPIED * self.count:", "            if True:"),
        ("what lies behind a sequence is visible", "(place >= low) & (place < high)", "place >= low"),
        ("what lies before a window is visible", "(place >= low) & (place < high)", "place < high"),
        (
            "the distance of views is one of heads",
            "(distance * slot, head, slot, dim)",
            "(distance * head, head, slot, dim)",
        ),
        (
            "windows are not applied",
            "self.begins = [max(n - window, 0) for n in lens]",
            "self.begins = [0 for n in lens]",
        ),
        ("a batch is always one call", "        if time > needed + CALL_BYTES * len(live):", "        if False:"),
        ("a batch is never one call", "for part in alone) + joins * CALL_BYTES < time:", "for part in alone):"),
    ),
    *_in(
        TORCH,
        (TEST_CPU,),
        (
            "partial results are averaged",
            "torch.sigmoid(lse - total[rows])[..., None]",
            "torch.full_like(lse, 0.5)[..., None]",
        ),
        ("joined parts are forgotten", "total[rows] = torch.logaddexp(total[rows], lse)", "total[rows] = lse"),
        ("parts are never joined", "if schedule.disjoint:", "if True:"),
        ("nobody looks for NaN", "return None if masked and math.isnan(float(out.sum())) else out", "return out"),
        ("holes are seen", "visible = shown if visible is None else visible & shown", "visible = visible"),
        ("parts are not masked", "packed, k, v, attn_mask=reading.bias(q.dtype), scale", "packed, k, v, scale"),
        ("every processor is fast", '"GenuineIntel" in info.read(256) and', ""),
    ),
    *_in(
        "hf_fastattn/ops/decode_attention.py",
        (TEST_CPU,),
        (
            "whoever sees the op sees objects",
            "isinstance(schedule, CpuSchedule) and not is_direct(",
            "False and not is_direct(",
        ),
    ),
    *_in(
        VIEWS,
        ("tests/test_ops.py", TEST_CPU),
        ("any blocks taken for a run", "blocks == list(range(blocks[0], blocks[0] + len(blocks)))", "True"),
        ("any rows taken for even runs", "if row != list(range(start, start + num_blocks)):", "if row[0] != start:"),
        (
            "distance of the sequences ignored",
            "(distance * block, head, slot, dim)",
            "(0, head, slot, dim)",
        ),
    ),
    *_in(
        TORCH,
        (f"{TEST_CPU}::test_long_sequences_stream_their_keys",),
        ("streamed scores are not scaled", "q = (q * softmax_scale).view(", "q = q.view("),
        (
            "streamed keys in the wrong order",
            "scores.softmax(-1), v_i, out=out_i)",
            "scores.softmax(-1), v_i.flip(0), out=out_i)",
        ),
    ),
    *_in(
        STATE,
        ("tests/test_paged_cache.py", "-k", "need_a_block_soon or looking_ahead"),
        ("caches of a length look beyond it", "unlimited = self.max_length is None and ", "unlimited = "),
        ("every block at the last moment", "if growing and group == 1 and", "if False and"),
        (
            "pools of fixed size look ahead",
            "self.max_length is None and self.memory.num_blocks is None\n",
            "self.max_length is None\n",
        ),
        (
            "blocks for twice as long ahead",
            "ahead = self.block_size // LOOK_AHEAD",
            "ahead = 2 * self.block_size // LOOK_AHEAD",
        ),
    ),
    *_in(
        STATE,
        ("tests/test_run_views.py", "-k", "repeats_the_one_before"),
        (
            "the step behind a prefill is planned",
            "return unpadded and self.window",
            "return step.query_len == 1 and unpadded and self.window",
        ),
    ),
    *_in(
        POOL,
        ("tests/test_kv_pool.py", "-k", "memory_error"),
        (
            "no memory is an OSError",
            'raise MemoryError(f"no room for {size} bytes of keys or values") from error',
            "raise",
        ),
    ),
    *_in(
        STATE,
        ("tests/transformers/test_compiled.py", "-k", "grows_keeps"),
        (
            "growth forgets what compiled steps stored",
            "        self.sync()  # compiled steps are counted on the devices, whose tables are written anew\n",
            "",
        ),
    ),
    *_in(
        POOL,
        (TEST_SHARING, "-k", "left_the_blocks"),
        (
            "views of memory that a failed attempt to grow left behind",
            "            for user in users:\n                user.renumber({})\n",
            "",
        ),
    ),
    *_in(
        "hf_fastattn/device_tables.py",
        (TEST_SHARING, "-k", "bounded"),
        ("room for any number of shared prefixes", ", MOST_SHARED)", ", 1 << 30)"),
        (
            "no room for the least of shared prefixes",
            "MOST_SHARED), LEAST_SHARED)",
            "MOST_SHARED), 1)",
        ),
    ),
    *_in(
        "hf_fastattn/ops/decode_attention.py",
        ("tests/transformers/test_decode_graph.py", "-k", "static_cache"),
        (
            "a graph leaves its schedule behind",
            "if schedule is None and block_table is None and torch.compiler.is_compiling():",
            "if False:",
        ),
    ),
    *_in(
        "hf_fastattn/columns.py",
        (TEST_STORE, "-k", "later_mask"),
        (
            "what lies behind hidden keys is kept as a prefix",
            "next((i for i in range(self.count) if stored[i] and not seen[i]), self.count)",
            "self.count",
        ),
    ),
    *_in(
        STORE,
        (TEST_STORE, "-k", "changed_model or adapters or autocast or beams_the_prompt or images"),
        ("weights written through .data are not seen", "count = min(SAMPLES, tensor.numel())", "count = 0"),
        ("scales of adapters left out", '"merged_adapters", "scaling")', '"merged_adapters")'),
        ("autocast left out", 'if device_type != "meta" and torch.is_autocast_enabled(device_type):', "if False:"),
        ("sorted beams are kept", "if state.reordered else state.columns", "if False else state.columns"),
        ("images without a name", "if not salt and any(", "if False and any("),
    ),
    *_in(
        POOL,
        (TEST_STORE, "-k", "autocast"),
        (
            "blocks in use are erased",
            "        if self.ids.num_used:\n            raise ValueError",
            "        if False:\n            raise ValueError",
        ),
        (
            "kept blocks are not given up for another dtype",
            "            user.reclaim(self.ids.num_used)\n",
            "            pass\n",
        ),
    ),
    *_in(
        "hf_fastattn/saved_state.py",
        ("tests/test_cache_operations.py", "-k", "hides_nothing"),
        ("copies share a key mask", "_copy(on_device.key_mask)", "on_device.key_mask"),
    ),
    *_in(
        STATE,
        (TEST_SHARING, "-k", "second_pass_on"),
        (
            "rows part after their masks are compared",
            "        if self.sharing and columns and columns + query_len > self.prompt_columns:\n",
            "        if False:\n",
        ),
    ),
]
