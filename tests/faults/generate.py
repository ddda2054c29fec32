"""Seeded faults in the decoding loop, the compile policy and warmup, and which tests have to catch each."""

from .faults import Fault

GENERATE = "hf_fastattn/generate.py"
POLICY = "hf_fastattn/compile_policy.py"
STATE = "hf_fastattn/paged_state.py"
AUTO = "hf_fastattn/auto.py"
WARMUP = "hf_fastattn/warmup.py"
LOOP_TESTS = "tests/transformers/test_generate.py"
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
        _test(LOOP_TESTS, "test_rows_that_end_early", "test_second_turn_over_a_returned_cache"),
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
        _test(LOOP_TESTS, "test_random_numbers_are_used_as_before", "test_processors_and_criteria_see_the_same"),
    ),
    Fault(
        "streamer loses tokens that wait",
        GENERATE,
        "self.streamer.put(self.copy.clone())",
        "pass",
        _test(LOOP_TESTS, "test_streamer_gets_every_token_once"),
    ),
    Fault(
        "full pool fails a call that is finished",
        GENERATE,
        "                    if not notice.wait():\n                        raise\n                    break",
        "                    raise",
        _test(LOOP_TESTS, "test_full_fixed_pool_is_an_error_only_if_the_token_is_wanted"),
    ),
    Fault(
        "others get ids that are not contiguous",
        GENERATE,
        "return ids.contiguous() if self.foreign else ids",
        "return ids",
        _test(LOOP_TESTS, "test_processors_and_criteria_see_the_same"),
    ),
    Fault(
        "capacity of compiled steps unwatched",
        GENERATE,
        "            self.cache.mask_sizes(1)",
        "            pass",
        _test(LOOP_TESTS, "test_compiled_steps"),
    ),
    Fault(
        "prefill that was cut begins its positions anew",
        GENERATE,
        "kwargs[name] = kwargs[name][:, :end]",
        "kwargs[name] = kwargs[name][:, : end - start]",
        _test(LOOP_TESTS, "test_prefill_that_runs_out_of_memory_is_cut"),
    ),
    Fault(
        "streamer lost beside custom_generate",
        AUTO,
        "        if custom_generate is generate:\n            custom_generate = None\n",
        "",
        _test(LOOP_TESTS, "test_streamer_gets_every_token_once"),
    ),
    Fault(
        "first call of a bucket is compiled",
        POLICY,
        "return length if again and",
        "return length if",
        _test(POLICY_TESTS, "test_bucket_is_rows_length_and_dtype"),
    ),
    Fault(
        "bucket without rows",
        POLICY,
        "bucket = (rows, length, model.dtype, model.device)",
        "bucket = (length, model.dtype, model.device)",
        _test(POLICY_TESTS, "test_bucket_is_rows_length_and_dtype"),
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
        STATE,
        "        kept[rows, width, device] = tables\n",
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
        AUTO,
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
]
