"""Seeded faults in the decoding loop, the compile policy and warmup, and which tests have to catch each."""

from .faults import Fault

GENERATE = "hf_fastattn/generate.py"
POLICY = "hf_fastattn/compile_policy.py"
STATE = "hf_fastattn/paged_state.py"
COPIES = "hf_fastattn/prompt_copies.py"
GENERATION = "hf_fastattn/paged_generation.py"
WARMUP = "hf_fastattn/warmup.py"
LOOP_TESTS = "tests/transformers/test_generate.py"
CALLBACK_TESTS = "tests/transformers/test_generate_callbacks.py"
MEMORY_TESTS = "tests/transformers/test_generate_memory.py"
FINISHED_TESTS = "tests/test_generate_finished.py"
RANDOM_TESTS = "tests/transformers/test_generate_random.py"
POLICY_TESTS = "tests/transformers/test_compile_policy.py"
WARMUP_TESTS = "tests/test_warmup.py"


def _test(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{file}::{name}" for name in names)


GENERATE_FAULTS = [
    Fault(
        "the pass too many stays in the cache",
        GENERATE,
        "                    cache.crop(-1)\n",
        "",
        _test(LOOP_TESTS, "test_rows_that_end_early") + _test(MEMORY_TESTS, "test_second_turn_over_a_returned_cache"),
    ),
    Fault(
        "positions stand still",
        GENERATE,
        "self.positions.add_(1)",
        "self.positions.add_(0)",
        _test(LOOP_TESTS, "test_everything_returned_is_equal"),
    ),
    Fault(
        "mask does not grow",
        GENERATE,
        "            self.columns += 1\n",
        "",
        _test(LOOP_TESTS, "test_another_attention_and_no_mask_at_all"),
    ),
    Fault(
        "finished rows go on",
        GENERATE,
        "token = torch.where(self.finished[:, None], self.pad, token)",
        "pass",
        _test(LOOP_TESTS, "test_rows_that_end_early"),
    ),
    Fault(
        "sampling before the end of the last step is known",
        GENERATE,
        "                if notice.wait():\n",
        "                self._choose(outputs) if notice.pending else None\n                if notice.wait():\n",
        _test(LOOP_TESTS, "test_random_numbers_are_used_as_before")
        + _test(CALLBACK_TESTS, "test_processors_and_criteria_see_the_same"),
    ),
    Fault(
        "streamer loses tokens that wait",
        GENERATE,
        "self.streamer.put(self.copy.clone())",
        "pass",
        _test(CALLBACK_TESTS, "test_streamer_gets_every_token_once"),
    ),
    Fault(
        "full pool fails a call that is finished",
        GENERATE,
        "                    if not notice.wait():\n                        raise\n                    break",
        "                    raise",
        _test(MEMORY_TESTS, "test_full_fixed_pool_is_an_error_only_if_the_token_is_wanted"),
    ),
    Fault(
        "others get ids that are not contiguous",
        GENERATE,
        "self.foreign = any(",
        "self.foreign = False and any(",
        _test(CALLBACK_TESTS, "test_processors_and_criteria_see_the_same"),
    ),
    Fault(
        "what others made of the last token is not what the model gets",
        GENERATE,
        "self.token.copy_(self.ids[:, -1:])",
        "pass",
        _test(CALLBACK_TESTS, "test_ids_that_others_edit_or_keep"),
    ),
    Fault(
        "ids are changed under those who kept them",
        GENERATE,
        "            self.ids = torch.cat([self.ids, token], 1)\n",
        "            self.ids = torch.cat([self.ids, token], 1, out=self.ids.new_empty(0).long())\n"
        "            self.ids[:, 0] = 0\n",
        _test(CALLBACK_TESTS, "test_ids_that_others_edit_or_keep"),
    ),
    Fault(
        "verdicts must be of type bool",
        GENERATE,
        'self.records["scores"]).bool()',
        'self.records["scores"])',
        _test(CALLBACK_TESTS, "test_integer_verdicts_end_rows"),
    ),
    Fault(
        "ids keep the type of the prompt",
        GENERATE,
        "torch.empty(len(old), width, dtype=torch.long",
        "torch.empty(len(old), width, dtype=old.dtype",
        _test(LOOP_TESTS, "test_32_bit_ids"),
    ),
    Fault(
        "ids for the whole limit at once",
        GENERATE,
        ", self.num_columns + max(self.num_columns, ROOM))",
        ", 10**15)",
        _test(LOOP_TESTS, "test_room_for_ids_and_mask_grows"),
    ),
    Fault(
        "room for the mask follows from the ids",
        GENERATE,
        "mask.shape[1] + ROOM)",
        "ids.shape[1] + ROOM)",
        _test(LOOP_TESTS, "test_mask_that_is_much_longer_than_the_ids"),
    ),
    Fault(
        "a pass too many beyond the model's positions",
        GENERATE,
        "at_once=beyond",
        "at_once=False",
        _test(LOOP_TESTS, "test_beyond_the_positions_of_a_model"),
    ),
    Fault(
        "no warning for a prompt that is too long",
        GENERATE,
        "self.num_columns > longest",
        "self.num_columns - 1 == longest",
        _test(LOOP_TESTS, "test_beyond_the_positions_of_a_model"),
    ),
    Fault(
        "methods replaced on the object unseen",
        GENERATE,
        "return name in vars(model) or",
        "return",
        _test(LOOP_TESTS, "test_methods_replaced_on_the_object_are_heeded", "test_prefix_tuning"),
    ),
    Fault(
        "no memory for a pass that nobody wants fails the call",
        GENERATE,
        "except (BlockPoolExhausted, torch.OutOfMemoryError):",
        "except BlockPoolExhausted:",
        _test(MEMORY_TESTS, "test_memory_that_runs_out_is_an_error_only_if_the_token_is_wanted"),
    ),
    Fault(
        "prefill is cut though its hidden states are wanted",
        GENERATE,
        " or config.output_hidden_states or config.output_attentions",
        "",
        _test(MEMORY_TESTS, "test_prefill_that_runs_out_of_memory_is_cut"),
    ),
    Fault(
        "prefill is cut whatever there is to it",
        GENERATE,
        "whole = whole or any(",
        "whole = whole and any(",
        _test(MEMORY_TESTS, "test_prefill_that_runs_out_of_memory_is_cut"),
    ),
    Fault(
        "streamer gets a tensor that changes",
        GENERATE,
        'self.streamer.put(self.token[:, 0].to("cpu", copy=True))',
        "self.streamer.put(self.token[:, 0].cpu())",
        _test(CALLBACK_TESTS, "test_streamer_gets_every_token_once"),
    ),
    Fault(
        "nobody tells the cache who has finished",
        GENERATE,
        "            self.cache.state.finish(flags)\n",
        "            pass\n",
        _test(FINISHED_TESTS, "test_finished_rows_give_their_blocks_back"),
    ),
    Fault(
        "the cache is told with every token",
        GENERATE,
        " and flags != self.told:",
        ":",
        _test(FINISHED_TESTS, "test_finished_rows_give_their_blocks_back"),
    ),
    Fault(
        "every cache is told who has finished",
        GENERATE,
        "outputs.get(CACHE_NAME, cache)\n",
        "outputs.get(CACHE_NAME, cache)\n        self.told = cache\n",
        _test(FINISHED_TESTS, "test_nothing_rests_where_somebody_may_look"),
    ),
    Fault(
        "a random argument changes the result",
        GENERATE,
        "records[name] = record + (",
        'records[name] = record + (outputs.logits[:, -1] if name == "logits" else ',
        _test(RANDOM_TESTS, "test_random_calls"),
    ),
    Fault(
        "capacity of compiled steps unwatched",
        GENERATE,
        "            self.cache.mask_sizes(1)",
        "            pass",
        _test(MEMORY_TESTS, "test_compiled_steps"),
    ),
    Fault(
        "prefill that was cut begins its positions anew",
        GENERATE,
        "kwargs[name] = kwargs[name][:, :end]",
        "kwargs[name] = kwargs[name][:, : end - start]",
        _test(MEMORY_TESTS, "test_prefill_that_runs_out_of_memory_is_cut"),
    ),
    Fault(
        "streamer lost beside custom_generate",
        GENERATION,
        "        if custom_generate is generate:\n            custom_generate = None\n",
        "",
        _test(CALLBACK_TESTS, "test_streamer_gets_every_token_once"),
    ),
    Fault(
        "first call of a bucket is compiled",
        POLICY,
        "sized = bucket.calls > 1 and (",
        "sized = (",
        _test(POLICY_TESTS, "test_steps_that_were_not_run_do_not_count"),
    ),
    Fault(
        "bucket without rows",
        POLICY,
        "(rows, length, model.dtype, model.device)",
        "(length, model.dtype, model.device)",
        _test(POLICY_TESTS, "test_bucket_is_rows_length_and_dtype"),
    ),
    Fault(
        "short calls are compiled",
        POLICY,
        "self.steps + new_tokens >= BREAK_EVEN_STEPS",
        "True",
        _test(POLICY_TESTS, "test_few_steps_do_not_pay"),
    ),
    Fault(
        "what was compiled is not used by short calls",
        POLICY,
        "    bucket.compiled = True\n",
        "",
        _test(POLICY_TESTS, "test_steps_that_were_not_run_do_not_count"),
    ),
    Fault(
        "transformers' loop counts no steps",
        GENERATION,
        "            self.bucket.steps += 1\n",
        "            pass\n",
        _test(POLICY_TESTS, "test_few_steps_do_not_pay"),
    ),
    Fault(
        "our loop counts no steps",
        GENERATE,
        "            self.bucket.steps += 1\n",
        "            pass\n",
        _test(POLICY_TESTS, "test_few_steps_do_not_pay"),
    ),
    Fault(
        "new tokens are the whole length",
        GENERATION,
        "return max_cache_length + 1 - prompt_columns",
        "return max_cache_length + 1",
        _test(POLICY_TESTS, "test_a_long_call_pays_at_once"),
    ),
    Fault(
        "other threads compile",
        POLICY,
        "threading.current_thread() is not threading.main_thread() or not",
        "not",
        _test(POLICY_TESTS, "test_other_threads_do_not_compile"),
    ),
    Fault(
        "no storage for graphs fails the call",
        POLICY,
        'return _raised_in(error) == "torch._inductor.cudagraph_trees"',
        "return False",
        _test(POLICY_TESTS, "test_no_storage_for_graphs_is_a_failure_to_compile"),
    ),
    Fault(
        "hidden states of replays are returned",
        POLICY,
        "options.output_hidden_states or options.output_attentions",
        "False",
        _test(POLICY_TESTS, "test_states_that_are_returned_are_not_compiled"),
    ),
    Fault(
        "models on several devices are compiled",
        POLICY,
        ".values())) > 1:",
        ".values())) > 99:",
        _test(POLICY_TESTS, "test_a_model_on_several_devices_is_not_compiled"),
    ),
    Fault(
        "what kernels refuse is captured",
        POLICY,
        " or not kernels_serve(model)",
        "",
        _test(POLICY_TESTS, "test_shapes_that_kernels_refuse_are_not_compiled"),
    ),
    Fault(
        "head sizes of values unseen",
        POLICY,
        '"global_head_dim", "v_head_dim", "qk_head_dim"',
        '"global_head_dim", "qk_head_dim"',
        _test(POLICY_TESTS, "test_what_kernels_serve"),
    ),
    Fault(
        "positions keep the prompt's stride",
        GENERATE,
        "clone(memory_format=torch.contiguous_format)\n        self.prepared",
        "clone()\n        self.prepared",
        _test(POLICY_TESTS, "test_one_graph_at_batch_one"),
    ),
    Fault(
        "failure to compile fails the call",
        POLICY,
        "            if not _is_failure_to_compile(error):\n                raise\n",
        "            raise\n",
        _test(POLICY_TESTS, "test_failure_to_compile_costs_a_warning"),
    ),
    Fault(
        "tables of a bucket move",
        "hf_fastattn/device_tables.py",
        "        kept[len(tables.block_table), tables.width, device] = tables\n",
        "        pass\n",
        _test(POLICY_TESTS, "test_second_call_of_a_bucket_is_compiled_at_the_same_addresses"),
    ),
    Fault(
        "pool of the compiled call is lost",
        POLICY,
        "        _collect_traces()\n",
        "        pass\n",
        _test(POLICY_TESTS, "test_second_call_of_a_bucket_is_compiled_at_the_same_addresses"),
    ),
    Fault(
        "our size is a limit of a returned cache",
        GENERATION,
        "            given.state.stretch()  # if it was an earlier call that sized it\n",
        "            pass\n",
        _test(POLICY_TESTS, "test_a_returned_cache_that_was_sized_still_grows"),
    ),
    Fault(
        "our size is a limit of forward passes",
        STATE,
        "            if not self.elastic:\n                raise self.too_long(max(lens))\n",
        "            raise self.too_long(max(lens))\n",
        _test(POLICY_TESTS, "test_forward_passes_beyond_the_size_are_no_error"),
    ),
    Fault(
        "warmup without padding",
        WARMUP,
        "mask[0, : PROMPT // 2] = 0",
        "pass",
        _test(WARMUP_TESTS, "test_every_way_through_the_ops_is_taken"),
    ),
    Fault(
        "warmup for one number of candidates",
        WARMUP,
        "for queries in range(2, candidates + 2):",
        "for queries in range(candidates + 1, candidates + 2):",
        _test(WARMUP_TESTS, "test_every_way_through_the_ops_is_taken"),
    ),
    *[
        Fault(name, file, old, new, ("tests/transformers/test_prompt_copies.py", "-k", tests))
        for name, file, old, new, tests in (
            ("copies under dropout", COPIES, "and value > 0", "and False", "dropout"),
            ("padding is not compared", COPIES, "            per_row.append(value[::known])\n", "", "padding_or"),
            ("tensors that nobody knows are cut", COPIES, "PER_ROW.get(name, ())", "range(9)", "other_arguments"),
            ("lists are passed on", COPIES, "elif value is not cache and", "elif False and", "other_arguments"),
            ("states of first rows only", COPIES, " or generation_config.output_hidden_states", "", "somebody_sees"),
            ("runs of any lengths", COPIES, "math.gcd(rows, *begins)", "rows // len(begins)", "equal_neighbours"),
            ("a full cache is a new prompt", COPIES, " or cache.get_seq_length():", ":", "second_turn"),
            ("room for one row of each prompt", STATE, "(group * self.copies - 1)", "(group - 1)", "room_is_made_once"),
            (
                "tables of all rows move",
                STATE,
                "                    keep_tables(self.memory.kept_tables, {device: old})\n",
                "                    pass\n",
                "compiled",
            ),
            ("rows lost if a prefill fails", STATE, "self.num_seqs if self.columns else 0", "0", "goes_on or go_on"),
            (
                "blocks kept where copies found no room",
                STATE,
                "range(copies)])\n        except BlockPoolExhausted:\n            self.release()\n",
                "range(copies)])\n        except BlockPoolExhausted:\n",
                "without_room",
            ),
        )
    ],
    Fault(
        "a user's loop ends rows by asking",
        GENERATION,
        "if steps and rows > 1 and unseen and not foreign:",
        "if steps and rows > 1 and unseen:",
        ("tests/test_finished.py", "-k", "loop_of_the_users"),
    ),
    Fault(
        "rows of a user's loop share the prompt",
        GENERATION,
        "1 if foreign else sequences",
        "sequences",
        ("tests/test_finished.py", "-k", "tells_apart and function"),
    ),
    Fault(
        "a user's method is ours",
        GENERATION,
        '_call.is_foreign or is_replaced(self, "_sample")',
        "_call.is_foreign",
        ("tests/test_finished.py", "-k", "tells_apart and method"),
    ),
    Fault(
        "rows share what hooks make differ",
        COPIES,
        "if module is not model and any(",
        "if False and any(",
        ("tests/transformers/test_prompt_copies.py", "-k", "hooks_inside or adapters"),
    ),
    Fault(
        "checkpointing ends sharing",
        COPIES,
        "not in HARMLESS_HOOKS",
        "not in ()",
        ("tests/transformers/test_prompt_copies.py", "-k", "harmless"),
    ),
    Fault(
        "the last layer need not attend",
        GENERATION,
        "    if _attends(layers[promised - 1])",
        "    if True",
        ("tests/transformers/test_other_models.py", "-k", "last_layer_without"),
    ),
]
