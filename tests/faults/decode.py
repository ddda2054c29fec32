"""Seeded faults in the decoding algorithm, and which tests have to catch each."""

from .faults import Fault

ATTENTION = "hf_fastattn/kernels/decode_attention.py"
TILES = "hf_fastattn/kernels/_decode_tiles.py"
COMBINE = "hf_fastattn/kernels/_decode_combine.py"
SCHEDULE = "hf_fastattn/kernels/decode_schedule.py"
SOFTMAX = "hf_fastattn/kernels/_softmax.py"
LOADS = "hf_fastattn/kernels/_loads.py"
PLAN = "hf_fastattn/kernels/_decode_plan.py"
LIBRARY = "hf_fastattn/ops/_library.py"
LAUNCH = "hf_fastattn/kernels/_launch.py"

ALGORITHM = "tests/interpret/test_decode_algorithm.py"
CUTS = (ALGORITHM, "-k", "ranges_cut and lazy")
TREES = (ALGORITHM, "-k", "two_levels or tile_sizes or under_a_window")
LAYERS = (ALGORITHM, "-k", "many_layers or aborted")
LOGITS = (ALGORITHM, "-k", "logits_of_any_size or do_not_fit or wrong_for_the_model")
INVARIANT = (ALGORITHM, "-k", "batch_invariance")
PADDING = (ALGORITHM, "-k", "padded")
KEPT = ("tests/compile/test_kept_launches.py",)
LISTS = ("tests/interpret/test_decode_schedule.py",)


def _faults(file: str, tests: tuple[str, ...], *changes: tuple[str, str, str]) -> list[Fault]:
    return [Fault(f"decode: {name}", file, old, new, tests) for name, old, new in changes]


DECODE_FAULTS = [
    *_faults(
        ATTENTION,
        (ALGORITHM, "-k", "other_heads and 3-1"),  # with 4-2 the process would end
        (
            "a schedule for other heads taken",
            'if getattr(schedule, "made_for", call.sizes) != call.sizes:',
            "if False:",
        ),
    ),
    *_faults(
        "hf_fastattn/attention.py",
        ("tests/transformers/test_other_models.py", "-k", "other_numbers"),
        ("one schedule for any heads", "*v_cache.shape[2:], options.window)", "v_cache.shape[3], options.window)"),
    ),
    *_faults(
        PLAN,
        ("tests/interpret/test_decode_attention.py", "-k", "cannot_do"),
        ("slots too far apart", "        if slots >= MOST_SLOTS:", "        if False:"),
    ),
    *_faults(
        "hf_fastattn/ops/_torch.py",
        ("tests/test_ops.py", "-k", "any_scale"),
        ("a scale below 0", "    if not softmax_scale > 0:  # is_causal", "    if False:  # is_causal"),
    ),
    *_faults(
        "hf_fastattn/fallback.py",
        ("tests/transformers/test_fallback.py", "-k", "any_scale"),
        ("a scale below 0 in the fallback", "        if not scale > 0:  # is_causal", "        if False:  # is_causal"),
    ),
    *_faults(
        "hf_fastattn/ops/shapes.py",
        ("tests/test_op_arguments.py",),
        ("an empty window taken", "    if window < 1:", "    if window < 0:"),
        ("a mask of any dtype taken", "if key_mask.dtype not in (torch.bool, torch.int8, torch.uint8):", "if False:"),
    ),
    *_faults(
        "hf_fastattn/ops/store_kv.py",
        ("tests/test_op_arguments.py",),
        ("caches in other blocks taken", "    if not same_blocks or k_cache", "    if k_cache"),
        (
            "caches of other dtypes taken",
            "    if k.dtype != k_cache.dtype or v.dtype != v_cache.dtype:",
            "    if False:",
        ),
    ),
    *_faults(
        COMBINE,
        CUTS,
        (
            "partial results joined without their maxima",
            "weight = tl.math.exp2(m_part - m_new[:, None])",
            "weight = tl.math.exp2(m_part - m_part)",
        ),
        ("one partial result left out", "total, ranges) + 1 - first", "total, ranges) - first"),
        (
            "whoever is not the first combines",
            "complete = known & (before + tiles == needed)",
            "complete = known & (before > 0)",
        ),
    ),
    *_faults(
        COMBINE,
        TREES,
        ("parents forgotten", "segment = tl.load(words + 7)", "segment = -1"),
        ("prefixes side by side share slots", "tl.load(segment_words(schedule_ptr, segment) + 8) + unit", "unit"),
        ("another member's rows combined", "member % members_per_tile * rows", "0 * rows"),
    ),
    *_faults(
        COMBINE,
        LAYERS,
        (
            "counters not reset",
            "    tl.store(counter_ptrs, tl.zeros([MEMBERS], tl.int32), mask=complete)\n",
            "    pass\n",
        ),
    ),
    *_faults(
        ATTENTION,
        TREES,
        ("a prefix alone taken for the result", "num_tiles) & (work_list == 1)", "num_tiles)"),
        (
            "shared list not dealt out backwards",
            "index = programs - 1 - program if is_shared else program",
            "index = program",
        ),
        (
            "every row takes the first member's query",
            "seq = first_seq + member_tile * members_per_tile + i // rows",
            "seq = first_seq + member_tile * members_per_tile + i * 0",
        ),
    ),
    *_faults(
        SCHEDULE,
        LISTS,
        ("parent with the nearest beginning", "tl.where(nearest > parent_end, index", "tl.where(parent < 0, index"),
        (
            "window ignored over shared blocks",
            "begin = tl.maximum(begin, oldest)",
            "begin = tl.maximum(begin, 0)",
        ),
        (
            "empty sequences not listed",
            "num_tiles = tl.maximum(tl.cdiv(seq_len, BLOCK_N) - low, 1)",
            "num_tiles = tl.maximum(tl.cdiv(seq_len, BLOCK_N) - low, 0)",
        ),
        (
            "counters not zeroed",
            "tl.store(words, tl.zeros([BLOCK], tl.int32), mask=counter < num_seqs * units)",
            "pass",
        ),
        (
            "only the first shared prefixes listed",
            "count += tl.sum(listed, 0)",
            "count = tl.sum(listed, 0)",
        ),
        (
            "prefixes without room for their results",
            "fits = (first_unit <= most_units).to(tl.int32)",
            "fits = (first_unit >= 0).to(tl.int32)",
        ),
    ),
    *_faults(
        SCHEDULE,
        INVARIANT,
        ("batch-invariant programs begin anywhere", "            item = rounded\n", "            pass\n"),
    ),
    *_faults(
        SOFTMAX,
        LOGITS,
        ("reference never moves", "    if excess > HEADROOM:", "    if excess > 1e30:"),
        ("sums keep the old reference", "        l_i *= alpha[:, None]\n", "        pass\n"),
    ),
    *_faults(
        ATTENTION,
        LOGITS,
        ("no second pass where a fixed reference fails", "if tl.sum((real & ~fits).to(tl.int32), 0) > 0:", "if False:"),
    ),
    *_faults(
        ATTENTION,
        KEPT,
        (
            "kept for any key mask",
            "layout(block_table), layout(key_mask), shared, *options)",
            "layout(block_table), shared, *options)",
        ),
        ("kept for any window", "options = (softmax_scale, window, softcap,", "options = (softmax_scale, softcap,"),
    ),
    *_faults(
        LAUNCH,
        KEPT,
        ("unaligned tensors given to the kept kernel", "if addresses % 16:", "if addresses % 16 == 1:"),
        (
            "strides left out of what is kept",
            "(tensor.dtype, tensor.shape, tensor.stride())",
            "(tensor.dtype, tensor.shape)",
        ),
        ("launches not kept", "self._compiled = compiled[self.grid]", "pass"),
    ),
    *_faults(
        "hf_fastattn/kernels/decode_linear.py",
        KEPT,
        ("kept for any plan", "key = (x.device, plan, layout(rows),", "key = (x.device, layout(rows),"),
    ),
    *_faults(LOADS, PADDING, ("padded tiles not skipped", "    return found // TILE\n", "    return first_tile\n")),
    *_faults(
        ATTENTION,
        (ALGORITHM, "-k", "dense_layers or bounded"),
        (
            "a schedule serves other windows and lengths",
            "schedule = _schedules.get((key, stream)) if stream is not None else None",
            "schedule = next(iter(_schedules.values()), None)",
        ),
        (
            "dense layers make a schedule each",
            "schedule = _schedules.get((key, stream)) if stream is not None else None",
            "schedule = None",
        ),
        ("schedules are kept without end", "schedule, MOST_SCHEDULES)", "schedule)"),
    ),
    *_faults(
        ATTENTION,
        KEPT,
        (
            "streams share counters",
            "return torch.cuda.current_stream(q.device).cuda_stream",
            "return 0",
        ),
        ("a captured graph takes what is kept", "if torch.cuda.is_current_stream_capturing():", "if False:"),
    ),
    *_faults(
        PLAN,
        (ALGORITHM, "-k", "refused"),
        (
            "schedules of other tiles fit",
            "tiles = (self.block_m.bit_length() - 1) * 8 + self.block_n.bit_length() - 1",
            "tiles = 0",
        ),
    ),
    *_faults(
        PLAN,
        ("tests/interpret/test_decode_attention.py", "-k", "refused"),
        ("a scale of nothing taken", "    if not softmax_scale > 0:", "    if False:"),
    ),
    *_faults(
        LIBRARY,
        ("tests/compile/test_launch.py", "-k", "goes_to_pytorch"),
        (
            "too little shared memory is an error",
            "return launcher.launch, (unsupported, too_large)",
            "return launcher.launch, (unsupported,)",
        ),
    ),
]
