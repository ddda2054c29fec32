"""Beams and returned sequences: the prompt is computed once, and the rows are what eager makes of its copies."""

from contextlib import contextmanager

import pytest
import torch
from models import BLOCK, NEW_TOKENS, build, left_padded, prompt
from test_compiled import Graphs, _compiled

import hf_fastattn
from hf_fastattn import CACHE_NAME, BlockPoolExhausted, PagedCache, compile_policy

WAYS = {
    "beams": {"num_beams": 4},
    "samples": {"num_return_sequences": 3, "do_sample": True},
    "beam samples": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "ours": {"num_return_sequences": 3, "do_sample": True, "custom_generate": hf_fastattn.generate},
    "pieces": {"num_beams": 2, "prefill_chunk_size": 5},
}


@pytest.fixture
def model():
    return hf_fastattn.paged(build("llama", "fastattn"))


@pytest.fixture
def eager():
    return build("llama")


@contextmanager
def shapes(model, fails_at=None):
    """List the (rows, columns) of each forward pass; fails_at: the one before which an error is raised."""
    seen = []

    def note(module, args, kwargs):
        given = kwargs.get("input_ids")
        seen.append(tuple((kwargs["inputs_embeds"] if given is None else given).shape[:2]))
        if len(seen) - 1 == fails_at:
            raise ZeroDivisionError

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def run(model, ids, **options):
    torch.manual_seed(7)
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0, **ids, **options}
    with torch.no_grad():
        return model.generate(**options)


def native(options):
    return {name: value for name, value in options.items() if name != "custom_generate"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [False, True], ids=["own cache", "given cache"])
def test_a_prompt_is_computed_once(model, eager, way, given):
    inputs, options = left_padded(prompt(2, 14), 5, 0), WAYS[way]
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    cache = PagedCache(model.config, block_size=BLOCK, sequences_per_prompt=rows) if given else None
    with shapes(model) as seen:
        out = run(model, inputs, **options, **({CACHE_NAME: cache} if given else {}))
    prefill = [(2, 14)] if way != "pieces" else [(2, 5), (2, 5), (2, 4)]
    assert seen == prefill + [(2 * rows, 1)] * (NEW_TOKENS - 1)
    assert torch.equal(out, run(eager, inputs, **native(options)))


@pytest.mark.parametrize("way", ["beams", "ours"])
def test_what_is_returned_has_all_rows(model, eager, way):
    """Logits of the first step too; and the cache goes on with all rows."""
    inputs, asked = left_padded(prompt(2, 14), 0, 0), {"return_dict_in_generate": True, "output_logits": True}
    out = run(model, inputs, **asked, **WAYS[way])
    wanted = run(eager, inputs, **asked, **native(WAYS[way]))
    for got, want in zip(out.logits, wanted.logits, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    cache, rows = out[CACHE_NAME], out.logits[0].shape[0]
    assert cache.batch_size == rows
    assert len({row[0] for row in cache.state.tables.rows}) == rows  # 14 tokens fill no block
    token, pasts = prompt(rows, 1), (out[CACHE_NAME], wanted[CACHE_NAME])
    with torch.no_grad():
        got, want = (m(token, **{CACHE_NAME: past}).logits for m, past in zip((model, eager), pasts, strict=True))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_full_blocks_are_shared_and_room_is_made_once(model, monkeypatch):
    sizes = []
    resize = hf_fastattn.kv_pool.KVPool.resize
    monkeypatch.setattr(hf_fastattn.kv_pool.KVPool, "resize", lambda pool, n: sizes.append(n) or resize(pool, n))
    cache = PagedCache(model.config, block_size=BLOCK, sequences_per_prompt=4)
    options = {"num_return_sequences": 4, "do_sample": True, "max_new_tokens": 120, CACHE_NAME: cache}
    run(model, left_padded(prompt(2, 3 * BLOCK + 5), 0, 0), **options)
    assert len(sizes) == 1
    assert cache.state.pool.num_used == 2 * (3 + 4 * 8)  # of each prompt three full blocks, and eight more of each row


@pytest.mark.parametrize(
    "options",
    [
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
)
@pytest.mark.filterwarnings("ignore:fastattn never computes attention weights:RuntimeWarning")
def test_rows_that_somebody_sees_are_computed(model, options):
    with shapes(model) as seen:
        run(model, left_padded(prompt(2, 14), 5, 0), num_return_sequences=3, do_sample=True, **options)
    assert seen[0] == (6, 14)


def test_rows_with_other_arguments_are_computed(model):
    """What a tensor means that we do not know cannot be told; lists may name something for each row."""
    inputs = left_padded(prompt(2, 14), 5, 0)
    forward = type(model).forward

    class Told(type(model)):
        def forward(self, input_ids=None, told=None, **kwargs):
            return forward(self, input_ids, **kwargs)

    model.__class__ = Told
    for told in (torch.zeros(2, 14), ["a"]):
        with shapes(model) as seen:
            run(model, inputs, num_return_sequences=3, do_sample=True, told=told)
        assert seen[0] == (6, 14)


@pytest.mark.parametrize(
    ("order", "pads", "computed"),
    [
        ([0, 0, 0, 1, 1, 1], (0,) * 6, 2),
        ([0, 0, 1, 1, 1, 1], (0,) * 6, 3),
        ([0, 0, 0, 0, 1, 1, 1, 1], (0, 0, 0, 0, 3, 3, 3, 3), 2),
        ([0, 0, 0], (0, 0, 0), 1),
        ([0, 1, 0, 1], (0,) * 4, 4),
        ([0, 0, 0, 1], (0,) * 4, 4),
        ([0, 0, 1, 1], (0, 3, 0, 0), 4),
    ],
)
@pytest.mark.parametrize("embeds", [False, True])
def test_equal_neighbours_are_computed_once(model, eager, order, pads, computed, embeds):
    """As they come from a sampler of rollouts: each prompt as often as there are to be answers."""
    inputs = left_padded(prompt(2, 14)[order], *pads)
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    for options in ({"do_sample": True}, {"num_beams": 2}):
        with shapes(model) as seen:
            out = run(model, inputs, **options)
        assert seen[0] == (computed, 14)
        assert torch.equal(out, run(eager, inputs, **options))


def test_rows_that_differ_in_padding_or_positions_are_no_copies(model, eager):
    inputs = left_padded(prompt(1, 14).repeat(2, 1))
    mask, positions = inputs["attention_mask"].clone(), torch.arange(14).repeat(2, 1)
    mask[1, :4], positions[1] = 0, positions[1] + 3
    for given in ({"attention_mask": mask}, {"position_ids": positions}):
        with shapes(model) as seen:
            out = run(model, inputs | given, num_beams=2)
        assert seen[0] == (2, 14)
        assert torch.equal(out, run(eager, inputs | given, num_beams=2))
    with shapes(model) as seen:
        run(model, inputs | {"position_ids": positions[:1].repeat(2, 1)}, num_beams=2)
    assert seen[0] == (1, 14)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_dropout_makes_rows_differ(rate):
    """Training mode alone does not: rollouts are often drawn in it."""
    model = hf_fastattn.paged(build("llama", "fastattn", attention_dropout=rate)).train()
    with shapes(model) as seen:
        run(model, left_padded(prompt(1, 14).repeat(3, 1)), num_return_sequences=2, do_sample=True)
    assert seen[0] == ((6, 14) if rate else (1, 14))


def test_hooks_inside_may_treat_rows_differently(model, eager):
    """A steering vector for each returned sequence: neither states nor blocks are shared."""
    strength = torch.tensor([0.0, 2.0, -2.0])[:, None, None]
    outs = []
    for each in (model, eager):
        hook = each.model.layers[0].register_forward_hook(lambda *args: args[2] + strength)
        outs.append(run(each, left_padded(prompt(1, 20)), num_return_sequences=3, do_sample=True, top_k=1))
        hook.remove()
    assert torch.equal(*outs)
    assert not torch.equal(outs[0][0], outs[0][1])


def test_hooks_for_checkpointing_are_harmless(model):
    model.enable_input_require_grads()
    with shapes(model) as seen:
        run(model, left_padded(prompt(1, 14)), num_return_sequences=3, do_sample=True)
    assert seen[0] == (1, 14)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_for_each_row():
    peft = pytest.importorskip("peft")
    outs = []
    for implementation in ("fastattn", "eager"):
        base = build("llama", implementation)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name="x")
        model.add_adapter("y", peft.LoraConfig(**options))
        if implementation == "fastattn":
            hf_fastattn.paged(model)
        for name, weights in model.named_parameters():
            if "lora" in name:
                weights.data.normal_()
        names = ["x", "y", "__base__"]
        inputs = left_padded(prompt(1, 20))
        outs.append(run(model.eval(), inputs, adapter_names=names, num_return_sequences=3, do_sample=True, top_k=1))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0][0], outs[0][1])


def test_a_second_turn_computes_every_row(model, eager):
    """The rows have parted: what follows is no copy."""
    inputs, outs = left_padded(prompt(2, 14), 0, 0), []
    for each in (model, eager):
        first = run(each, inputs, num_return_sequences=3, do_sample=True, return_dict_in_generate=True)
        said = torch.cat([first.sequences, prompt(6, 5, seed=1)], 1)
        with shapes(each) as seen:
            outs.append(run(each, {"input_ids": said}, **{CACHE_NAME: first[CACHE_NAME]}))
        assert seen[0][0] == 6
    assert torch.equal(*outs)


@pytest.mark.parametrize(("chunk", "fails_at"), [(None, 0), (5, 0), (5, 1)])
def test_a_prefill_that_fails_leaves_a_cache_to_go_on_with(model, eager, chunk, fails_at):
    inputs = left_padded(prompt(2, 14), 5, 0)
    options = {"num_return_sequences": 3, "do_sample": True}
    cache = PagedCache(model.config, block_size=BLOCK, sequences_per_prompt=3)
    with shapes(model, fails_at), pytest.raises(ZeroDivisionError):
        run(model, inputs, prefill_chunk_size=chunk, **options, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 5 * fails_at
    assert cache.batch_size == (6 if fails_at else -1)
    cache.reset()
    with shapes(model) as seen:
        out = run(model, inputs, **options, **{CACHE_NAME: cache})
    assert seen[0] == (2, 14)
    assert torch.equal(out, run(eager, inputs, **options))


def test_copies_without_room_leave_an_empty_cache(model, eager):
    """Three blocks hold two prompts, but not six rows of their own."""
    inputs = left_padded(prompt(2, 14), 0, 0)
    cache = PagedCache(model.config, block_size=BLOCK, num_blocks=3, sequences_per_prompt=3)
    with pytest.raises(BlockPoolExhausted, match="a larger num_blocks to PagedCache"):
        run(model, inputs, num_return_sequences=3, do_sample=True, **{CACHE_NAME: cache})
    assert (cache.batch_size, cache.get_seq_length(), cache.state.pool.num_used) == (-1, 0, 0)
    with pytest.raises(BlockPoolExhausted) as full:  # in the prompt's own pass
        run(model, left_padded(prompt(2, 40), 0, 0), num_return_sequences=3, do_sample=True, **{CACHE_NAME: cache})
    assert str(full.value).count("The cache is as it was before the call") == 1
    short = {"input_ids": prompt(1, 5)}
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 4}
    assert torch.equal(run(model, short, **options, **{CACHE_NAME: cache}), run(eager, short, **options))


@pytest.mark.parametrize("given", [False, True], ids=["own cache", "given cache"])
def test_compiled_steps_follow(model, eager, monkeypatch, given):
    """The tables of all rows are where they were in the call before: one graph."""
    sizes = {"block_size": BLOCK, "max_length": 64, "sequences_per_prompt": 3}
    cache = {CACHE_NAME: PagedCache(model.config, **sizes)} if given else {}
    monkeypatch.setattr(compile_policy, "BREAK_EVEN_STEPS", 1)
    graphs, places = Graphs(), []
    options = {"num_return_sequences": 3, "do_sample": True, "return_dict_in_generate": True}
    for i in range(4):
        inputs = left_padded(prompt(2, 10 + i, seed=i), i, 0)
        out = run(model, inputs, **options, **cache, **_compiled(graphs))
        assert torch.equal(out.sequences, run(eager, inputs, **options).sequences)
        [tables] = out[CACHE_NAME].state.devices.values()
        places.append(tables.block_table.data_ptr())
        assert graphs.count == (given or i > 0)
        del out, tables
        for each in cache.values():
            each.reset()
    assert len(set(places[1:])) == 1
