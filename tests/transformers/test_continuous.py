"""Continuous batching: generate_batch over the ops gives each request what eager attention gives it alone."""

import copy
import threading
from itertools import chain
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import CLIPVisionConfig, CompileConfig, DynamicCache, LlamaConfig, LlavaConfig
from transformers.generation.continuous_batching import PagedAttentionCache, initialization

from hf_fastattn import PagedCache, ops, paged
from hf_fastattn import packed as packed_rows
from hf_fastattn.continuous import CONTINUOUS, TAKES_PREFIX, _as_flash
from hf_fastattn.fallback import AttentionOptions
from hf_fastattn.generate import CACHE_NAME
from tests.op_calls import Call
from tests.transformers.continuous_calls import BLOCK_SIZE, NEW, TOLERANCE, check, greedy, prompts, run, sizes
from tests.transformers.models import FAMILIES, WINDOW, build


@pytest.fixture
def paths(monkeypatch):
    """Count the layers that read blocks by table and those that read packed states."""
    counts = {"blocks": 0, "packed": 0}
    for name, function in (("blocks", packed_rows._attend_blocks), ("packed", packed_rows._attend_packed)):

        def count(*args, name=name, function=function):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(packed_rows, function.__name__, count)
    return counts


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])  # not in transformers yet
def test_requests_get_what_they_get_alone(family, paths):
    model = paged(build(family, "fastattn"))
    requests = prompts()
    results = run(model, requests)
    assert paths["packed"] > 0
    slides = getattr(model.config, "sliding_window", None) == WINDOW
    assert (paths["blocks"] == 0) == slides  # transformers keeps windows in rings, which no table describes
    assert model.config._attn_implementation == "fastattn"
    check(model, results, requests)


@pytest.fixture
def model():
    return paged(build("llama", "fastattn"))


def test_decode_steps_read_blocks_by_table_and_share_a_schedule(model, paths, monkeypatch):
    made = []
    schedule = ops.decode_schedule
    monkeypatch.setattr(ops, "decode_schedule", lambda *a, **k: made.append(1) or schedule(*a, **k))
    run(model, prompts((20, 7)), sizes(max_batch_tokens=64))
    layers = model.config.num_hidden_layers
    assert paths == {"packed": layers, "blocks": layers * (NEW - 1)}
    assert len(made) == NEW - 1 if BLOCK_SIZE == "page_size" else len(made) % (NEW - 1) == 0  # 5.17 groups layers


def test_requests_share_the_blocks_of_equal_prompts(model, monkeypatch):
    matches = []
    search = PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        PagedAttentionCache, "search_prefix_match", lambda *args: matches.append(search(*args)) or matches[-1]
    )
    [long], [short] = prompts((37,)), prompts((4,), seed=3)
    with model.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=sizes()
    ) as manager:
        results = []
        for batch in ([long], [short, long]):
            manager.add_requests(batch)
            results += [manager.get_result(timeout=60) for _ in batch]
    assert sorted(matches) == [0, 0, 32]  # two full blocks of the second long one were there
    check(model, results, [result.prompt_ids for result in results])


def test_several_sequences_of_a_prompt(model):
    requests = prompts((21, 6))
    results = run(model, requests, do_sample=True, top_k=0, num_return_sequences=2)
    assert len(results) == 4 or BLOCK_SIZE == "block_size"  # 5.17 returns one of each
    check(model, results, [result.prompt_ids for result in results], sampled=True)


@pytest.mark.parametrize("block_size", [24, 512])
def test_blocks_that_the_kernels_do_not_take_are_read_by_index(model, paths, block_size):
    requests = prompts()
    results = run(model, requests, sizes(**{BLOCK_SIZE: block_size}))
    assert paths["blocks"] == 0
    check(model, results, requests)


def test_contexts_beyond_the_block_table_are_read_by_index(model, paths):
    requests = prompts((40, 30))
    results = run(model, requests, sizes(max_blocks_per_request=2))
    assert paths["blocks"] == 0
    check(model, results, requests)


def test_block_tables_can_be_turned_off(model, paths):
    requests = prompts((20, 30))
    results = run(model, requests, sizes(max_blocks_per_request=0))
    assert paths["blocks"] == 0
    check(model, results, requests)


def test_padded_and_compiled_batches(model, paths):
    """As with CUDA graphs, sizes are padded: by tokens and requests that do not exist."""
    requests = prompts((5, 20, 3))
    eager = CompileConfig(backend="eager", mode=None, fullgraph=False)
    config = sizes(decode_compile_config=eager, varlen_compile_config=eager)
    results = run(model, requests, config)
    assert paths["blocks"] > 0
    check(model, results, requests)


def test_a_manager_that_persists(model):
    requests = prompts()
    for _ in range(2):
        results = list(
            model.generate_batch(
                requests,
                generation_config=greedy(),
                continuous_batching_config=sizes(),
                persistent_manager=True,
            ).values()
        )
        assert model.config._attn_implementation == "fastattn"
        check(model, results, requests)
    model.destroy_cached_continuous_batching_manager()


def test_generate_with_a_paged_cache_implementation(model, paths):
    """generate(cache_implementation="paged") is transformers' other way into continuous batching."""
    ids, outs = torch.tensor(prompts((12, 12))), []
    for implementation in ("sdpa", "fastattn"):
        model.set_attn_implementation(implementation)
        options = {"continuous_batching_config": sizes(), "cache_implementation": "paged"}
        outs.append(model.generate(ids, generation_config=greedy(), **options))
    assert paths["packed"] > 0
    assert torch.equal(*outs)


def test_who_else_calls_the_model_meanwhile(model):
    """Padding is seen, or the call refused: transformers 5.17 would not tell of it."""
    ids = torch.tensor(prompts((7, 7)))
    calls = {
        "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
        "cached": {CACHE_NAME: DynamicCache(config=model.config)},
        "paged": {CACHE_NAME: PagedCache(model.config)},
    }
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = {name: model(ids, attention_mask=given.get("attention_mask")).logits for name, given in calls.items()}
        model.set_attn_implementation("fastattn")
        manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
        assert model.config._attn_implementation == (CONTINUOUS if TAKES_PREFIX else "fastattn")
        if TAKES_PREFIX:
            with pytest.raises(
                RuntimeError, match=r"stop the manager first, or call model.set_attn_implementation\('f"
            ):
                model(ids)
        else:
            for name, given in calls.items():
                got, seen = model(ids, **given).logits, given.get("attention_mask", torch.ones_like(ids)).bool()
                error = (got - wanted[name])[seen].abs().max()
                assert error <= TOLERANCE * wanted[name].abs().max(), name
        manager.start()
        manager.stop()
        assert model.config._attn_implementation == "fastattn"
        model(ids)


def test_a_manager_that_cannot_be_made_leaves_the_model_alone(model):
    with pytest.raises(AttributeError, match="eos_token_id"):
        model.init_continuous_batching(generation_config=object(), continuous_batching_config=sizes())
    assert model.config._attn_implementation == "fastattn"


def collect(manager, count):
    results = [manager.get_result(timeout=60) for _ in range(count)]
    return sorted(results, key=lambda result: result.request_id)


def test_a_manager_that_goes_on_when_it_was_told_to_stop(model):
    """Stopping does not wait, and the model has its own attention again, while requests are finished."""
    requests = prompts()
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
    manager.start()
    manager.add_requests(requests)
    manager.stop(block=False, keep_for_next_session=True)  # else transformers may lose its blocks at once
    assert model.config._attn_implementation == "fastattn"
    results = collect(manager, len(requests))
    manager.join(0)
    check(model, results, requests)
    model.destroy_cached_continuous_batching_manager()


def test_two_managers_of_a_model(model, paths):
    requests = prompts()
    managers = [
        model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes()) for _ in range(2)
    ]
    assert len({manager.continuous_batching_config.max_blocks_per_request for manager in managers}) == 1
    for manager in managers:
        manager.start()
    for manager in managers:  # the second goes on when the first has stopped
        paths["blocks"] = 0
        manager.add_requests(requests)
        results = collect(manager, len(requests))
        assert paths["blocks"] > 0
        manager.stop()
        check(copy.deepcopy(model), results, requests)
    assert model.config._attn_implementation == "fastattn"


@pytest.mark.skipif(TAKES_PREFIX, reason="transformers 5.17 tells nobody of masks meanwhile")
def test_others_call_the_model_while_a_manager_is_made(model, monkeypatch):
    ids, mask = torch.tensor(prompts((7, 7))), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    seen = []

    def make(*args, **kwargs):
        with torch.no_grad():
            seen.append((model.config._attn_implementation, model(ids, attention_mask=mask).logits))
        raise KeyError

    monkeypatch.setattr(initialization, "resolve_compile_configs", make)
    with pytest.raises(KeyError):
        model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
    [(name, logits)] = seen
    assert name == CONTINUOUS
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
    assert torch.equal(logits[mask.bool()], wanted[mask.bool()])


def test_a_manager_that_was_made_under_another_attention(model):
    """It sends masks, which are obeyed."""
    requests = prompts()
    model.set_attn_implementation("sdpa")
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
    manager.warmup()
    model.set_attn_implementation("fastattn")
    if TAKES_PREFIX:
        pytest.skip("transformers 5.17 leaves it to the attention to update its cache")
    manager.start()
    manager.add_requests(requests)
    results = collect(manager, len(requests))
    manager.stop()
    check(model, results, requests)


def test_a_manager_that_is_made_in_inference_mode(model):
    requests = prompts()
    with torch.inference_mode():
        manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
    manager.start()
    manager.add_requests(requests)
    results = collect(manager, len(requests))
    manager.stop()
    check(model, results, requests)


def test_parts_of_a_model_keep_their_attention():
    text = LlamaConfig(attn_implementation="fastattn")
    whole = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig())
    whole._attn_implementation = {"": "fastattn", "text_config": "fastattn", "vision_config": "sdpa"}
    with _as_flash(whole):
        assert whole._attn_implementation == whole.text_config._attn_implementation == CONTINUOUS
        assert whole.vision_config._attn_implementation == "sdpa"
    assert whole._attn_implementation == whole.text_config._attn_implementation == "fastattn"
    assert whole.vision_config._attn_implementation == "sdpa"


def test_a_config_that_is_no_config_is_passed_over(model, monkeypatch):
    memory = psutil.Process().memory_info().rss + 2**26  # of which a manager without a config takes most
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory, available=2**26))
    generation = greedy()
    generation.continuous_batching_config = {"max_batch_tokens": 24}
    manager = model.init_continuous_batching(generation_config=generation, workload_hints=None)
    assert manager.continuous_batching_config.max_batch_tokens != 24


@pytest.mark.skipif(TAKES_PREFIX, reason="with transformers 5.17 a manager that never starts keeps the model")
def test_a_manager_that_never_starts_changes_nothing(model):
    model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=sizes())
    with pytest.raises(ValueError, match="max_batch_tokens"):
        run(model, prompts(), sizes(max_batch_tokens=-5))
    assert model.config._attn_implementation == "fastattn"


def test_other_implementations_are_transformers_own(model, paths):
    model.set_attn_implementation("sdpa")
    requests = prompts()
    results = run(model, requests)
    assert paths == {"packed": 0, "blocks": 0}
    assert model.config._attn_implementation == "sdpa"
    check(model, results, requests)


def test_the_users_config_is_not_changed(model):
    config = sizes(max_blocks_per_request=7, decode_compile_config=CompileConfig(backend="eager", mode=None))
    before = repr(config)
    manager = model.init_continuous_batching(generation_config=greedy(), continuous_batching_config=config)
    assert repr(config) == before
    resolved = manager.continuous_batching_config
    assert (resolved.max_blocks_per_request, resolved.decode_compile_config) == (7, config.decode_compile_config)


def test_steps_of_two_models_in_one_thread_do_not_mix(model):
    """What layers share belongs to one step: the next one begins with its first layer, or with other lengths."""
    other = paged(build("llama", "fastattn", num_hidden_layers=1))
    requests = prompts()
    results = {}

    def generate():
        for name, one in (("model", model), ("other", other), ("again", model)):
            results[name] = run(one, requests)

    worker = threading.Thread(target=generate)
    worker.start()
    worker.join()
    check(model, results["model"], requests)
    check(other, results["other"], requests)
    check(model, results["again"], requests)


OPTIONS = AttentionOptions(softmax_scale=32**-0.5, causal=True, window=ops.NO_WINDOW, softcap=0.0)


class Step:
    """One decode step of continuous batching as its layers see it: sequences over blocks, one query each."""

    def __init__(self, lens=(19, 0, 40, 1)):
        self.calls = [Call(lens, heads=4, kv_heads=2, unowned=0.0, seed=layer) for layer in range(2)]
        self.given = {
            "cu_seq_lens_q": torch.arange(len(lens) + 1).int(),
            "cu_seq_lens_k": torch.tensor([0, *lens]).cumsum(0).int(),
        }
        for call in self.calls:
            call.options["softmax_scale"] = OPTIONS.softmax_scale

    def run(self):
        """Let both layers attend, as one forward pass does; the new tokens are those that the blocks hold."""
        for layer, call in enumerate(self.calls):
            lens = self.given["cu_seq_lens_k"].diff()
            call.seq_lens = lens
            new = []
            for cache in (call.k, call.v):
                states = torch.zeros(len(lens), *cache.shape[2:])
                for row, length in enumerate(lens.tolist()):
                    if length:
                        block = call.block_table[row, (length - 1) // 16]
                        states[row] = cache[block, (length - 1) % 16]
                        cache[block, (length - 1) % 16] = 7.0  # to be overwritten
                new.append(states.transpose(0, 1)[None])
            caches = {"block_table": call.block_table, "k_cache": call.k, "v_cache": call.v}
            module, query = SimpleNamespace(layer_idx=layer), call.q.permute(2, 1, 0, 3)
            out = packed_rows.attend_packed(module, query, *new, OPTIONS, caches | self.given)
            call.compare(out.transpose(0, 1).contiguous())


def test_a_step_that_is_captured_takes_its_lengths_from_the_device_again():
    """Capturing runs the same tensors twice: what the layers share must be made both times."""
    step = Step()
    step.run()
    step.given["cu_seq_lens_k"].copy_(torch.tensor([0, 18, 18, 33, 34]))
    step.run()


def test_a_step_behind_one_that_failed():
    step, longer = Step(), Step((33, 2))
    step.calls.append(None)  # a layer that fails, the third
    with pytest.raises(AttributeError):
        step.run()
    longer.run()


# Packed rows outside of continuous batching


def packed(lengths, seed=0):
    """Arguments of a forward pass over prompts that lie one behind the other."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.tensor([list(chain(*prompts(lengths, seed)))]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_flattened_batches_keep_sequences_apart(family, gradients):
    model = build(family, "fastattn")
    lengths = (13, 1, 8)
    with torch.set_grad_enabled(gradients):
        if gradients:
            with pytest.warns(RuntimeWarning, match="gradients are needed"):
                logits = model(**packed(lengths), use_cache=False).logits[0]
            logits.sum().backward()
        else:
            logits = model(**packed(lengths), use_cache=False).logits[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts(lengths)]
    wanted = torch.cat(alone)
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_rows_of_no_sequence_get_nothing_with_gradients_or_without(family):
    model = build(family, "fastattn")
    given = packed((13, 8, 5))
    given |= {name: given[name][:-1] for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    with pytest.warns(RuntimeWarning, match="gradients are needed"):
        logits = model(**given, use_cache=False).logits
    with torch.no_grad():
        wanted = model(**given, use_cache=False).logits
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def test_the_starts_are_believed_without_positions_that_restart():
    """Rotary embeddings are relative: positions may go on."""
    model = build("llama", "fastattn")
    given = packed((13, 8))
    given["position_ids"] = torch.arange(21)[None]
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits
        apart = [model(torch.tensor([ids]), use_cache=False).logits for ids in prompts((13, 8))]
    wanted = torch.cat(apart, 1)
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("longest", [None, torch.tensor(13), 1, 400], ids=str)
def test_the_longest_length_may_be_missing_or_on_the_device_or_wrong(longest):
    """It is a hint: where sequences begin is what counts."""
    model = build("llama", "fastattn")
    given = packed((13, 8))
    with torch.no_grad():
        wanted = model(**given, use_cache=False).logits
        assert torch.equal(model(**given | {"max_length_q": longest}, use_cache=False).logits, wanted)


def test_later_queries_of_packed_sequences(monkeypatch):
    """Fewer queries than keys: the queries are the last of each sequence."""
    model = build("llama", "fastattn")
    lengths = (9, 5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(**packed(lengths), use_cache=False).logits[0]
        given = packed(lengths)
        model(**given, **{CACHE_NAME: cache})
        assert cache.get_seq_length() == sum(lengths)
        tail = {
            "input_ids": given["input_ids"][:, -1:],
            "position_ids": given["position_ids"][:, -1:] + 1,
            "cu_seq_lens_q": torch.tensor([0, 0, 1]).int(),
            "cu_seq_lens_k": torch.tensor([0, 9, 15]).int(),
            "max_length_q": 1,
            "max_length_k": 9,
        }
        logits = model(**tail, **{CACHE_NAME: cache}).logits[0]
        text = [*prompts(lengths)[1], int(given["input_ids"][0, -1])]
        wanted = model(torch.tensor([text]), use_cache=False).logits[0, -1:]
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert not torch.equal(whole[-1:], logits)


def test_packed_rows_and_caches_that_refuse_them(model):
    given = packed((4, 3))
    with pytest.raises(ValueError, match="cannot go into a PagedCache: pass use_cache=False"):
        model(**given, **{CACHE_NAME: PagedCache(model.config)})
    with pytest.raises(ValueError, match=r"expected cu_seq_lens_q \(num_seqs \+ 1,\), got \(1, 3\)"):
        model(**given | {"cu_seq_lens_q": given["cu_seq_lens_q"][None]}, use_cache=False)
    given["input_ids"] = given["input_ids"].repeat(2, 1)
    with pytest.raises(ValueError, match="packed into one row, got 2 rows"):
        model(**given, use_cache=False)
