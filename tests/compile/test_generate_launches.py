"""What generate() launches on the way of a GPU's tensors, without one: which kernels, how often, with what shapes."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_fastattn import PagedCache, generate, optimize_linears, paged
from tests.tiny import left_padding, make_pair, tokens
from tests.transformers import continuous_calls

pytestmark = pytest.mark.compile

LAYERS, NEW = 3, 5

STORE, SCHEDULE, DECODE, PREFILL = (
    "store_kv_kernel",
    "_schedule_kernel",
    "_decode_kernel",
    "prefill_attention_kernel",
)


def model_of(kind="llama", **changes):
    model = make_pair(kind, num_hidden_layers=LAYERS, **changes).fast
    return paged(model)


def count(log):
    """Launches by kernel."""
    return Counter(key.split()[0] for key, _, _ in log)


def run(model, ids, **options):
    """Generate NEW tokens, none of which can be the last."""
    arguments = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    with torch.no_grad():
        return model.generate(ids, **arguments)


@pytest.mark.parametrize("loop", [None, generate], ids=["theirs", "ours"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_step_is_a_store_and_an_attention_per_layer_and_one_schedule(gpu_way, kind, padded, loop):
    log, asked = gpu_way
    changes = {"sliding_window": 8} if kind == "mistral" else {}
    model = model_of(kind, **changes)
    options = {"custom_generate": loop} if loop is not None else {}
    if padded:
        options["attention_mask"] = left_padding([20, 9])
    run(model, tokens(2, 20), **options)
    steps = NEW - 1
    assert count(log) == {
        PREFILL: LAYERS,
        STORE: LAYERS * NEW,
        SCHEDULE: steps,
        DECODE: LAYERS * steps,
    }
    kernels = Counter(kernel.__name__ for kernel in asked)
    assert kernels[DECODE] == 1  # all others were kept
    assert kernels[STORE] == 2  # of the prompt, and of a token


def test_beams_share_the_prompt_and_tell_the_kernel(gpu_way):
    log, _ = gpu_way
    model = model_of()
    run(model, tokens(1, 70), num_beams=3)
    assert count(log)[DECODE] == LAYERS * (NEW - 1)
    tables = {args[7][1] for key, _, args in log if key.startswith(DECODE)}
    assert {shape[0] for shape in tables} == {3}
    stored = [args[0][1][0] for key, _, args in log if key.startswith(STORE)]
    assert stored[:LAYERS] == [1] * LAYERS  # the first beam's states only
    assert set(stored[LAYERS:]) == {3}
    shared = [args[2] for key, _, args in log if key.startswith(SCHEDULE)]
    assert all(entry[1][1] == 4 for entry in shared)  # (num_shared, 4)


def test_speculative_checks_go_to_the_decode_kernel(gpu_way):
    log, _ = gpu_way
    model = model_of()
    ids = tokens(1, 12).repeat(1, 3)
    run(model, ids, prompt_lookup_num_tokens=4)
    queries = {args[0][1][2] for key, _, args in log if key.startswith(DECODE)}
    assert max(queries) > 1
    assert count(log)[PREFILL] == LAYERS


def test_a_longer_chunk_is_a_prefill_over_blocks(gpu_way):
    log, _ = gpu_way
    model = model_of()
    cache = PagedCache(model.config)
    with torch.no_grad():
        for length in (40, 33, 32):
            log.clear()
            model(tokens(1, length), past_key_values=cache)
            assert count(log)[PREFILL if length > 32 else DECODE] == LAYERS


def test_a_sized_cache_takes_the_same_launches(gpu_way):
    log, _ = gpu_way
    model = model_of()
    run(model, tokens(2, 20), past_key_values=PagedCache(model.config, max_length=64), disable_compile=True)
    assert count(log)[DECODE] == LAYERS * (NEW - 1)
    widths = {args[7][1] for key, _, args in log if key.startswith(DECODE)}
    assert widths == {torch.Size([2, 1])}


def test_dense_caches_take_the_kernels_without_a_table(gpu_way):
    log, _ = gpu_way
    pair = make_pair(num_hidden_layers=LAYERS)
    run(pair.fast, tokens(2, 20), past_key_values=DynamicCache(config=pair.fast.config))
    counted = count(log)
    assert counted[DECODE] == LAYERS * (NEW - 1)
    assert counted[SCHEDULE] == NEW - 1
    assert counted[PREFILL] == LAYERS
    assert counted[STORE] == 0
    assert all(args[7] == (type(None), None) for key, _, args in log if key.startswith(DECODE))


def test_small_linears_stay_with_the_library(gpu_way):
    log, _ = gpu_way
    model = optimize_linears(model_of())
    run(model, tokens(2, 20))
    assert not any("linear" in key for key, _, _ in log)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    window=st.sampled_from([None, 4, 24]),
    beams=st.sampled_from([1, 1, 2]),
    loop=st.booleans(),
    chunk=st.sampled_from([None, 16]),
)
def test_no_call_fails_on_the_host(gpu_way, lengths, window, beams, loop, chunk):
    """Whatever the batch: tables wide enough for every length, and one decode launch per layer and step."""
    log, _ = gpu_way
    model = model_of("llama" if window is None else "mistral", **({} if window is None else {"sliding_window": window}))
    mask = left_padding(lengths)
    log.clear()
    options = {"custom_generate": generate} if loop else {}
    options |= {} if chunk is None else {"prefill_chunk_size": chunk}
    out = run(model, tokens(*mask.shape), attention_mask=mask, num_beams=beams, **options)
    assert out.shape == (len(lengths), max(lengths) + NEW)
    steps = [args for key, _, args in log if key.startswith(DECODE) and args[0][1][2] == 1]
    assert len(steps) >= LAYERS * (NEW - 1)
    for args in steps[-LAYERS * (NEW - 1) :]:  # a last piece of the prompt may have one column, and no beams yet
        q, k, _, out, _, _, _, table = (arg[1] for arg in args[:8])
        assert q[0] == table[0] == out[0] == len(lengths) * beams
        assert table[1] * k[1] >= max(lengths)


def test_continuous_batching_packs_prompts_and_decodes_by_table(gpu_way):
    log, asked = gpu_way
    model = model_of()
    requests = continuous_calls.prompts((20, 7, 33))
    config = continuous_calls.sizes(max_batch_tokens=64)
    results = model.generate_batch(
        requests, generation_config=continuous_calls.greedy(), continuous_batching_config=config
    )
    assert [result.error for result in results.values()] == [None] * 3
    steps = continuous_calls.NEW - 1
    assert count(log) == {PREFILL: LAYERS, STORE: LAYERS * steps, SCHEDULE: steps, DECODE: LAYERS * steps}
    [(_, grid, _)] = {launch for launch in log if launch[0].startswith(PREFILL)}
    assert grid == (4 * (256 // 32 + 3), 1, 1)  # 4 heads, tiles of 32 float32 queries, 3 requests
    assert Counter(kernel.__name__ for kernel in asked) == {PREFILL: 1, STORE: 1, SCHEDULE: 1, DECODE: 1}
