"""Seeded faults in packed rows and continuous batching, and which tests have to catch each."""

from .faults import Fault

GLUE = "hf_fastattn/continuous.py"
PACKED = "hf_fastattn/packed.py"
ATTENTION = "hf_fastattn/attention.py"
OP = "hf_fastattn/ops/packed_attention.py"
KERNEL = "hf_fastattn/kernels/prefill_attention.py"
LAUNCHER = "hf_fastattn/kernels/packed_attention.py"

TESTS = "tests/transformers/test_continuous.py"
OP_TESTS = ("tests/test_packed.py", "-k", "ragged or beyond or belong or nothing")
KERNEL_TESTS = ("tests/interpret/test_packed_attention.py", "-k", "ragged or stride or nothing")
KEPT = ("tests/compile/test_kept_launches.py", "-k", "packed")

CONTINUOUS_FAULTS = [
    Fault("a longer sequence is cut off", OP, "longest > max_query_len:", "longest > max_query_len + 1:", OP_TESTS),
    Fault("starts may fall", OP, "any(a > b for a, b in", "any(a > b + 99 for a, b in", OP_TESTS),
    Fault("starts beyond the rows", OP, "edges[-1] > size", "edges[-1] > size + 999", OP_TESTS),
    Fault(
        "the last sequence is forgotten",
        OP,
        "for rows, columns in zip(queries, keys, strict=True)",
        "for rows, columns in zip(queries[:-2], keys[:-2], strict=True)",
        OP_TESTS,
    ),
    Fault(
        "kernel: values of another sequence",
        KERNEL,
        "v_ptr += key_start.to(tl.int64)",
        "v_ptr += query_start.to(tl.int64)",
        KERNEL_TESTS,
    ),
    Fault(
        "kernel: results of another sequence",
        KERNEL,
        "out_ptr += query_start.to(tl.int64)",
        "out_ptr += key_start.to(tl.int64)",
        KERNEL_TESTS,
    ),
    Fault(
        "kernel: keys of the next sequence too",
        KERNEL,
        "seq_len = tl.load(key_starts_ptr + seq + 1) - key_start",
        "seq_len = tl.load(key_starts_ptr + seq + 1) - key_start + 1",
        KERNEL_TESTS,
    ),
    Fault(
        "kernel: sinks of any stride (packed)",
        LAUNCHER,
        "None if sinks is None else sinks.contiguous(), *starts)",
        "sinks, *starts)",
        ("tests/interpret/test_packed_attention.py", "-k", "options"),
    ),
    Fault(
        "kernel: starts of any stride",
        LAUNCHER,
        "starts = (query_starts.contiguous(), key_starts.contiguous())",
        "starts = (query_starts, key_starts)",
        KERNEL_TESTS,
    ),
    Fault(
        "a launch is kept for other numbers of sequences",
        LAUNCHER,
        "num_seqs, query_len, *options)\n    call",
        "query_len, *options)\n    call",
        KEPT,
    ),
    Fault(
        "a launch is kept for longer sequences",
        LAUNCHER,
        "num_seqs, query_len, *options)\n    call",
        "num_seqs, *options)\n    call",
        KEPT,
    ),
    Fault(
        "few queries take tiles for many",
        LAUNCHER,
        "few = query_len <= FEW",
        "few = False",
        ("tests/interpret/test_packed_attention.py", "-k", "few_rows"),
    ),
    Fault("a launch per number of rows", LAUNCHER, "x.shape[1:], x.stride()", "x.shape, x.stride()", KEPT),
    Fault(
        "new tokens a slot too late",
        PACKED,
        "self.seq_lens[:, None] - 1",
        "self.seq_lens[:, None]",
        (f"{TESTS}::test_requests_get_what_they_get_alone[llama]",),
    ),
    Fault(
        "a captured step keeps the lengths of the step before",
        PACKED,
        "module.layer_idx <= _step.layer or",
        "False or",
        (f"{TESTS}::test_a_step_that_is_captured_takes_its_lengths_from_the_device_again",),
    ),
    Fault(
        "a step behind one that failed takes its lengths",
        PACKED,
        "module.layer_idx <= _step.layer or _step.source() is not",
        "module.layer_idx < _step.layer - 9 or _step.source() is",
        (f"{TESTS}::test_a_step_behind_one_that_failed",),
    ),
    Fault(
        "layers with other blocks share a schedule",
        PACKED,
        "kind = (block_table.data_ptr(), *query.shape",
        "kind = (*query.shape",
        (f"{TESTS}::test_a_step_that_is_captured_takes_its_lengths_from_the_device_again",),
    ),
    Fault(
        "each layer makes a schedule of its own (continuous)",
        PACKED,
        "if kind not in _step.schedules:",
        "if True:",
        (f"{TESTS}::test_decode_steps_read_blocks_by_table_and_share_a_schedule",),
    ),
    Fault(
        "any block size is for the kernels",
        GLUE,
        "if size not in KERNEL_BLOCK_SIZES:",
        "if size < 0:",
        (TESTS, "-k", "kernels_do_not_take"),
    ),
    Fault(
        "a model that could not get its manager is lost",
        GLUE,
        "    finally:\n        _name(config, IMPLEMENTATION)\n",
        "    finally:\n        pass\n",
        (f"{TESTS}::test_a_manager_that_cannot_be_made_leaves_the_model_alone",),
    ),
    Fault(
        "the second manager of a model gets no table",
        GLUE,
        "not in (IMPLEMENTATION, CONTINUOUS):",
        "!= IMPLEMENTATION or model.__dict__.setdefault('_once', []).append(1) or len(model._once) > 1:",
        (f"{TESTS}::test_two_managers_of_a_model",),
    ),
    Fault(
        "managers are taken for those of an attention with masks",
        GLUE,
        "    _name(config, CONTINUOUS)\n    try:",
        "    try:",
        (f"{TESTS}::test_two_managers_of_a_model",),
    ),
    Fault(
        "blocks are read as if nothing were stored",
        PACKED,
        'if given.get("block_table") is not None:',
        "if False:",
        (f"{TESTS}::test_a_manager_that_goes_on_when_it_was_told_to_stop",),
    ),
    Fault(
        "hidden rows get something where gradients are needed",
        "hf_fastattn/fallback.py",
        "weights = weights.masked_fill(~bias, 0.0)",
        "pass",
        (TESTS, "-k", "rows_of_no_sequence"),
    ),
    Fault(
        "the user's config is changed",
        GLUE,
        "config = copy.deepcopy(continuous_batching_config) or",
        "config = continuous_batching_config or",
        (f"{TESTS}::test_the_users_config_is_not_changed",),
    ),
    Fault(
        "the user's way to compile is forgotten",
        GLUE,
        "resolved.decode_compile_config = blocks, compiled",
        "resolved.decode_compile_config = blocks, None",
        (f"{TESTS}::test_the_users_config_is_not_changed",),
    ),
    Fault(
        "other implementations too",
        GLUE,
        "if model.config._attn_implementation not in (IMPLEMENTATION, CONTINUOUS):",
        "if False:",
        (f"{TESTS}::test_other_implementations_are_transformers_own",),
    ),
    Fault(
        "others lose their masks while a manager is made",
        "hf_fastattn/__init__.py",
        "if not TAKES_PREFIX:",
        "if TAKES_PREFIX:",
        (f"{TESTS}::test_others_call_the_model_while_a_manager_is_made",),
    ),
    Fault(
        "the masks of another attention's manager are not read",
        ATTENTION,
        "(attention_mask is None or not attention_mask.is_floating_point())",
        "True",
        (f"{TESTS}::test_a_manager_that_was_made_under_another_attention",),
    ),
    Fault(
        "a cache that only inference mode may write",
        GLUE,
        "with torch.inference_mode(False):",
        "if True:",
        (f"{TESTS}::test_a_manager_that_is_made_in_inference_mode",),
    ),
    Fault(
        "all parts of a model are renamed",
        GLUE,
        'each._attn_implementation = {"": name}',
        "each._attn_implementation = name",
        (f"{TESTS}::test_parts_of_a_model_keep_their_attention",),
    ),
    Fault(
        "anything is taken for a config of continuous batching",
        GLUE,
        "found if isinstance(found, ContinuousBatchingConfig) else None",
        "found",
        (f"{TESTS}::test_a_config_that_is_no_config_is_passed_over",),
    ),
    Fault(
        "several packed rows",
        PACKED,
        "if query.shape[0] != 1:",
        "if False:",
        (f"{TESTS}::test_packed_rows_and_caches_that_refuse_them",),
    ),
    Fault(
        "training leaks between packed sequences",
        PACKED,
        "visible = (owners[0][:, None] == owners[1]) &",
        "visible = (owners[0][:, None] >= owners[1]) &",
        (TESTS, "-k", "flattened and True"),
    ),
    Fault(
        "training forgets the window of packed sequences",
        PACKED,
        "visible &= (distance >= 0) & (distance < options.window)",
        "visible &= distance >= 0",
        (TESTS, "-k", "flattened and True and mistral"),
    ),
    Fault(
        "one packed query sees every sequence",
        ATTENTION,
        "isinstance(value, Tensor) and not packed:",
        "isinstance(value, Tensor):",
        (f"{TESTS}::test_later_queries_of_packed_sequences",),
    ),
    Fault(
        "packed rows are mixed up",
        ATTENTION,
        "packed = is_packed(kwargs)",
        "packed = False",
        (f"{TESTS}::test_the_starts_are_believed_without_positions_that_restart",),
    ),
    Fault(
        "packed rows go into a PagedCache",
        ATTENTION,
        "        if isinstance(key, Handle) or isinstance(value, Handle):\n            raise ValueError(\n",
        "        if isinstance(key, Handle) or isinstance(value, Handle):\n            raise KeyError(\n",
        (f"{TESTS}::test_packed_rows_and_caches_that_refuse_them",),
    ),
]
