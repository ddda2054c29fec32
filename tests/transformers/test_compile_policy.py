"""When the cache that generate() makes is sized, so that its decode step is compiled; and what if that fails."""

import copy
import gc
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from models import NEW_TOKENS, build, check_logits, generate, in_float64, left_padded, paged, prompt, run_eager
from test_compiled import Graphs, _compiled
from transformers import StoppingCriteriaList

import hf_fastattn
from hf_fastattn import PagedCache, compile_policy

OURS = {"custom_generate": hf_fastattn.generate}


@pytest.fixture
def model():
    return hf_fastattn.paged(build("llama", "fastattn"))


@pytest.fixture(autouse=True)
def any_call_pays(monkeypatch):
    """Compile from the second call on, however short; tests of the threshold set their own."""
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 1)


@pytest.fixture
def captures(monkeypatch):
    """Treat a CPU like a GPU, whose compiled steps become CUDA graphs."""
    monkeypatch.setattr(compile_policy, "_captures", lambda device: True)


def in_thread(action):
    """Run an action in a thread of its own; return what it returned."""
    results = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def where(cache):
    """Return the addresses that a captured step would read and write."""
    [tables] = cache.state.devices.values()
    of_tables = (tables.block_table, tables.past_lens, tables.seq_lens, tables.columns)
    return [t.data_ptr() for layer in cache.paged_layers for t in layer.blocks.tensors] + [
        t.data_ptr() for t in of_tables
    ]


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_second_call_of_a_bucket_is_compiled_at_the_same_addresses(model, how):
    """Five calls of one bucket: other prompts, paddings and lengths; the first is eager, the others share one graph."""
    graphs, places, exact = Graphs(), [], in_float64(build("llama"))
    eager = build("llama")
    for i, (length, pads, new) in enumerate([(9, 0, 12), (9, 3, 12), (30, 7, 40), (14, 0, 200), (5, 2, 12)]):
        inputs, steps = left_padded(prompt(2, length, seed=i), pads, 0), {"max_new_tokens": new}
        out = generate(model, **steps, **inputs, **_compiled(graphs), **how)
        wanted, wide = generate(eager, **steps, **inputs), generate(exact, **steps, **inputs)
        assert torch.equal(out.sequences, wanted.sequences)
        check_logits(*(torch.stack(result.logits) for result in (out, wanted, wide)))
        cache = out.past_key_values
        assert cache.is_compileable == (i > 0)
        assert graphs.count == (i > 0)
        if i:
            assert cache.get_max_length() == 256
            places.append(where(cache))
        del out, cache
    assert all(place == places[0] for place in places)


def test_one_graph_at_batch_one(model):
    """A row of positions that keeps the prompt's stride would bring a graph per prompt length."""
    graphs, exact, eager = Graphs(), in_float64(build("llama")), build("llama")
    for length in (9, 9, 14, 30):
        inputs = left_padded(prompt(1, length, seed=length))
        out = generate(model, **inputs, **_compiled(graphs), **OURS)
        wanted, wide = generate(eager, **inputs), generate(exact, **inputs)
        check_logits(*(torch.stack(result.logits) for result in (out, wanted, wide)))
    assert graphs.count == 1


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_pieces_of_a_prompt_are_not_compiled(model, how, chunk):
    """Each would be a graph of its own: only the decode step is one, over a cache made for the call or by the user."""
    graphs, exact, eager = Graphs(), in_float64(build("llama")), build("llama")
    for length, cache in ((9, None), (9, None), (14, None), (30, PagedCache(model.config, max_length=256))):
        inputs = left_padded(prompt(2, length, seed=length), 3, 0)
        out = generate(model, cache, prefill_chunk_size=chunk, **inputs, **_compiled(graphs), **how)
        wanted, wide = generate(eager, **inputs), generate(exact, **inputs)
        check_logits(*(torch.stack(result.logits) for result in (out, wanted, wide)))
        del out
    assert graphs.count == 1


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_few_steps_do_not_pay(model, how, monkeypatch):
    """Steps that were run and those that a call may bring count together; what is compiled is used from then on."""
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 40)
    graphs = Graphs()

    def sized(**options):
        out = generate(model, input_ids=prompt(), **options, **_compiled(graphs), **how)
        return out.past_key_values.is_compileable

    assert [sized() for _ in range(4)] == [False, False, False, True]  # 12 steps each: 36 + 12 are enough
    assert sized(max_new_tokens=2)
    assert graphs.count == 1


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_steps_that_were_not_run_do_not_count(model, how, monkeypatch):
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 40)
    tokens = generate(model, input_ids=prompt(1)).sequences[0, 14:].tolist()
    steps = next(i + 1 for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])

    def sized(new_tokens):
        end = {"eos_token_id": tokens[steps - 1], "max_new_tokens": new_tokens}
        out = generate(model, input_ids=prompt(1), **end, **_compiled(Graphs()), **how)
        assert out.sequences.shape[1] == 14 + steps
        return out.past_key_values.is_compileable

    assert not sized(200)  # the first call of a bucket, however long
    assert not sized(39 - steps)
    assert sized(40 - 2 * steps)
    assert 4 * steps < 40
    assert sized(steps)  # as much too short as the second call, but now everything is compiled


@pytest.mark.parametrize("longer", [{"max_new_tokens": 80}, {"max_new_tokens": None, "max_length": 14 + 80}])
def test_a_long_call_pays_at_once(model, longer, monkeypatch):
    """Whichever way says how long it may become: 12 + 80 steps are too few for 93 and enough for 92."""
    for threshold in (93, 92):
        monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", threshold)
        compile_policy._seen.pop(model, None)
        for options, expected in (({}, False), (longer, threshold == 92)):
            out = generate(model, **left_padded(prompt()), **options, **_compiled(Graphs()))
            assert out.past_key_values.is_compileable == expected


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: _Wrapper(model)], ids=["model", "peft"])
def test_many_calls_that_are_expected(model, wrap, monkeypatch):
    """Who warms up a model asks for few tokens; what is compiled then is used later."""
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 10_000)

    def sized():
        return generate(model, input_ids=prompt(), **_compiled(Graphs())).past_key_values.is_compileable

    assert [sized(), sized()] == [False, False]
    with compile_policy.compiling_at_once(wrap(model)):
        assert sized()
        assert not generate(model, input_ids=prompt(1), **_compiled(Graphs())).past_key_values.is_compileable
    assert sized()
    generate(model, input_ids=prompt(1))
    assert not generate(model, input_ids=prompt(1), **_compiled(Graphs())).past_key_values.is_compileable


class _Wrapper(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_base_model(self):
        return self.inner


def test_bucket_is_rows_length_and_dtype(model):
    graphs = Graphs()

    def soon(ids, scores, **kwargs):  # the length is what a call asks for, not how far it gets
        return torch.full((len(ids),), ids.shape[1] >= 18)

    def sized(rows, **kwargs):
        out = generate(
            model, input_ids=prompt(rows), **_compiled(graphs), stopping_criteria=StoppingCriteriaList([soon]), **kwargs
        )
        return out.past_key_values.state.max_length

    assert [sized(2), sized(2)] == [None, 256]
    assert [sized(3), sized(2, max_new_tokens=300)] == [None, None]
    assert sized(2, max_new_tokens=450) == 512
    assert sized(1, do_sample=True, num_return_sequences=3) == 256  # three rows again
    model.double()
    assert [sized(2), sized(2)] == [None, 256]


def test_nobody_else_is_sized(model):
    """Without a GPU, with disable_compile, with beams or an assistant: never, however often."""
    for options in ({}, {"disable_compile": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        graphs = Graphs()
        compiled = {} if not options else _compiled(graphs)
        for _ in range(3):
            out = generate(model, input_ids=prompt(1), **options, **compiled)
            assert not out.past_key_values.is_compileable
        assert graphs.count == 0


def test_no_room_for_a_sized_cache(model, monkeypatch):
    monkeypatch.setattr(compile_policy, "_free_bytes", lambda model: 100_000)  # a bucket takes 196 608 bytes
    for _ in range(2):
        out = generate(model, input_ids=prompt(2), **_compiled(Graphs()))
        assert out.past_key_values.state.max_length is None


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_a_returned_cache_that_was_sized_still_grows(model, how):
    """The size was ours: a second turn whose new tokens go beyond it, a copy and a fork are no errors."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    first = generate(model, input_ids=prompt(), **compiled, **how)
    cache = first.past_key_values
    twins = [copy.deepcopy(cache), cache.fork(1)]
    said = torch.cat([first.sequences, prompt(2, 225, seed=1)], 1)

    def cold(other, _):
        return [generate(other, input_ids=said, max_new_tokens=20)]

    wanted = run_eager(build("llama"), cold)
    assert cache.is_compileable
    for continued in (cache, *twins):
        out = generate(model, continued, input_ids=said, max_new_tokens=20, **compiled, **how)
        wanted.check([out])
        assert out.past_key_values.get_seq_length() == 26 + 225 + 19


def test_forward_passes_beyond_the_size_are_no_error(model):
    """A loop of the user's own over a returned cache."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    cache = generate(model, input_ids=prompt(), **compiled).past_key_values
    with torch.no_grad():
        model(prompt(2, 300), past_key_values=cache)
    assert cache.get_seq_length() == 25 + 300
    assert not cache.is_compileable


def test_failure_to_compile_costs_a_warning(model):
    """No compiler, an unsupported model: the call goes on, and the next does not try again."""
    tries = []

    def broken(graph, inputs):
        tries.append(1)
        raise RuntimeError("no compiler here")

    compiled, inputs = _compiled(broken), left_padded(prompt(), 3, 0)
    wanted = generate(build("llama"), **inputs)
    generate(model, **inputs, **compiled)
    with pytest.warns(RuntimeWarning, match="could not be compiled .*no compiler here.*eager mode") as caught:
        out = generate(model, **inputs, **compiled)
    assert len([w for w in caught if "compiled" in str(w.message)]) == 1
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert out.past_key_values.get_seq_length() == 25
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for how in ({}, OURS):
            again = generate(model, **inputs, **compiled, **how)
            assert again.sequences.tolist() == wanted.sequences.tolist()
            assert again.past_key_values.state.max_length is None
    assert len(tries) == 1


def test_errors_of_the_model_stay_errors(model):
    compiled = _compiled("eager")
    generate(model, input_ids=prompt(), **compiled)
    hook = model.model.layers[1].register_forward_pre_hook(_fail_at_one_token)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(ZeroDivisionError):
                generate(model, input_ids=prompt(), **compiled)
    finally:
        hook.remove()


def _fail_at_one_token(module, args):
    if args[0].shape[1] == 1:
        raise ZeroDivisionError


def test_offloaded_model_is_not_sized(model):
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    for _ in range(2):
        assert not generate(model, input_ids=prompt(), **_compiled(Graphs())).past_key_values.is_compileable


def test_a_model_on_several_devices_is_not_compiled(model):
    """accelerate's hooks break the graph in every layer."""
    graphs = Graphs()
    for devices in ({"": 0}, {"model": 0, "lm_head": 1}):
        model.hf_device_map = devices
        sized = [
            generate(model, input_ids=prompt(), **_compiled(graphs)).past_key_values.is_compileable for _ in range(2)
        ]
        generate(model, paged(model, max_length=64), input_ids=prompt(), **_compiled(graphs))
        assert sized == ([False, True] if len(devices) == 1 else [False, False])
        assert graphs.count == 2


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_that_are_returned_are_not_compiled(model, how, name):
    """Both loops keep a step's tensors as they are, and the next replay of a captured graph writes over them."""
    graphs = Graphs()
    for _ in range(2):
        out = generate(model, input_ids=prompt(), **{name: True}, **_compiled(graphs), **how)
        assert not out.past_key_values.is_compileable
    generate(model, paged(model, max_length=64), input_ids=prompt(), **{name: True}, **_compiled(graphs), **how)
    assert graphs.count == 0
    options = {name: True, "return_dict_in_generate": False, "output_logits": False}
    generate(model, paged(model, max_length=64), input_ids=prompt(), **options, **_compiled(graphs), **how)
    assert graphs.count == 1


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_other_threads_do_not_compile(model, how, captures):
    """Captured graphs live in the main thread; caches of both kinds work in every thread."""
    graphs = Graphs()
    wanted = generate(build("llama"), input_ids=prompt()).sequences

    def call(cache=None):
        out = generate(model, cache, input_ids=prompt(), **_compiled(graphs), **how)
        assert torch.equal(out.sequences, wanted)
        return out.past_key_values

    for _ in range(2):
        assert not in_thread(call).is_compileable
    cache = in_thread(lambda: call(paged(model, max_length=64)))
    assert cache.get_seq_length() == 14 + NEW_TOKENS - 1
    assert graphs.count == 0
    assert [call().is_compileable for _ in range(2)] == [False, True]
    assert graphs.count == 1
    assert not in_thread(call).is_compileable


@pytest.mark.parametrize("how", [{}, OURS], ids=["transformers", "ours"])
def test_without_cuda_graphs_every_thread_compiles(model, how):
    graphs = Graphs()
    for expected in (False, True):
        out = in_thread(lambda: generate(model, input_ids=prompt(), **_compiled(graphs), **how))
        assert out.past_key_values.is_compileable == expected
    assert graphs.count == 1


def test_two_threads_at_once_on_one_model(model, captures):
    """One compiles its steps while the other runs its own in eager mode."""
    wanted, calls, errors, done = generate(build("llama"), input_ids=prompt()).sequences, [], [], threading.Event()

    def other():
        try:
            while not done.is_set() or not calls:
                calls.append(generate(model, input_ids=prompt(), **_compiled(Graphs())).past_key_values.is_compileable)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        results = [generate(model, input_ids=prompt(), **_compiled(Graphs())) for _ in range(3)]
    finally:
        done.set()
        thread.join()
    assert not errors
    assert not any(calls)
    assert any(out.past_key_values.is_compileable for out in results)
    assert all(torch.equal(out.sequences, wanted) for out in results)


def test_no_storage_for_graphs_is_a_failure_to_compile(model):
    """The error of torch 2.11 in a thread that has none; assertions of anybody else stay errors."""

    def raising(module):
        names = {"__name__": module}
        exec("def call(*args, **kwargs):\n    assert not args, 'no storage'", names)
        return compile_policy.forgiving(model, names["call"])

    with pytest.raises(AssertionError, match="no storage"), torch.no_grad():
        raising("somewhere.else")(prompt())
    with pytest.warns(RuntimeWarning, match=r"could not be compiled \(AssertionError: no storage\)"), torch.no_grad():
        out = raising("torch._inductor.cudagraph_trees")(prompt())
    assert out.logits.shape[:2] == prompt().shape
    assert compile_policy.gave_up(model)


def test_shapes_that_kernels_refuse_are_not_compiled(captures):
    """PyTorch's operations would wait for the GPU in the middle of a capture."""
    for head_dim, expected in ((256, True), (272, False)):
        graphs, model = Graphs(), hf_fastattn.paged(build("qwen3", "fastattn", head_dim=head_dim))
        sized = [
            generate(model, input_ids=prompt(), **_compiled(graphs)).past_key_values.is_compileable for _ in range(2)
        ]
        assert sized == [False, expected]
        generate(model, paged(model, max_length=96), input_ids=prompt(), **_compiled(graphs))
        assert graphs.count == 2 * expected
    model = hf_fastattn.paged(build("llama", "fastattn")).double()
    for _ in range(2):
        assert not generate(model, input_ids=prompt(), **_compiled(Graphs())).past_key_values.is_compileable


def test_what_kernels_serve(monkeypatch):
    def serves(dtype=torch.bfloat16, **sizes):
        text = SimpleNamespace(**({"hidden_size": 512, "num_attention_heads": 4} | sizes))
        return compile_policy.kernels_serve(
            SimpleNamespace(dtype=dtype, config=SimpleNamespace(get_text_config=lambda decoder: text))
        )

    assert serves()
    assert serves(head_dim=256, v_head_dim=128, global_head_dim=None)
    assert serves(head_dim=64, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    for sizes in (
        {"head_dim": 512},
        {"hidden_size": 2048},
        {"head_dim": 256, "global_head_dim": 512},
        {"head_dim": 128, "v_head_dim": 512},
        {"head_dim": 64, "qk_nope_head_dim": 256, "qk_rope_head_dim": 64},
        {"dtype": torch.float64},
    ):
        assert not serves(**sizes), sizes
    monkeypatch.setattr(compile_policy, "has_triton", lambda: False)
    assert not serves()


def test_tables_are_kept_for_the_next_cache_only(model):
    """A cache that somebody holds keeps its own tables."""
    compiled = _compiled(Graphs())
    generate(model, input_ids=prompt(), **compiled)
    held = generate(model, input_ids=prompt(), **compiled).past_key_values
    other = generate(model, input_ids=prompt(), **compiled).past_key_values
    assert not set(where(held)) & set(where(other))
    del held
    gc.collect()
    third = generate(model, input_ids=prompt(), **compiled).past_key_values
    assert not set(where(third)) & set(where(other))


def test_lengths_are_rounded_up_by_a_quarter_at_most():
    assert [compile_policy.bucket_length(n) for n in (1, 256, 257, 5000, 8193)] == [256, 256, 512, 5120, 10240]
    for n in range(1, 40_000, 37):
        length = compile_policy.bucket_length(n)
        assert n <= length <= max(256, n + 256, 1.25 * n)
        assert compile_policy.bucket_length(length) == length
