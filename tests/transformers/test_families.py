"""generate() over a PagedCache, by family and way of decoding: tokens and logits as in eager."""

import pytest
import torch
from models import FAMILIES, SCENARIOS, expected, paged, prompt, shared, under

EVERY_SCENARIO = ("llama", "mistral", "gemma2", "gpt_oss")


def _cases():
    """Yield all scenarios for four families and, for the others, three that rotate; left padding and beams for all."""
    names = [name for name in SCENARIOS if name not in ("left_padded", "beams")]
    others = [family for family in FAMILIES if family not in EVERY_SCENARIO]
    for family in EVERY_SCENARIO:
        yield from ((family, name) for name in SCENARIOS)
    for i, family in enumerate(others):
        rotating = {names[(2 * i + j) % len(names)] for j in range(2)}
        yield from ((family, name) for name in SCENARIOS if name in {"left_padded", "beams"} | rotating)


@pytest.mark.parametrize(("family", "scenario"), list(_cases()))
def test_generate_over_paged_cache_equals_eager(family, scenario):
    model, wanted = shared(family), expected(family, scenario)
    with under(model):
        wanted.check(SCENARIOS[scenario](model, paged))


def test_rotation_covers_every_scenario():
    assert {name for family, name in _cases() if family not in EVERY_SCENARIO} == set(SCENARIOS)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_the_test_models_is_sharp(family):
    """One key takes at least twice what it would in a uniform row, on average; else these tests could not fail."""
    model = shared(family)
    with under(model, "eager"), torch.no_grad():
        attentions = model(prompt(), output_attentions=True).attentions
    for weights in attentions:
        rows = weights[:, :, 5:]  # rows that see at least six keys
        uniform = 1.0 / (rows > 0).sum(-1)
        assert (rows.amax(-1) / uniform).mean() > 2.5
        assert rows.amax(-1).mean() > 0.35


@pytest.mark.parametrize("scenario", ["left_padded", "holes"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_is_never_stored(family, scenario):
    """Without a window a row holds its real tokens only; with one, everything from its first real token on."""
    model = shared(family)
    with under(model):
        cache = paged(model)
        [out] = SCENARIOS[scenario](model, lambda _: cache)
    columns = cache.get_seq_length()
    assert columns == out.sequences.shape[1] - 1
    hidden = {"left_padded": {"llama": [5, 0], "gemma2": [5, 0]}, "holes": {"llama": [4, 3], "gemma2": [0, 2]}}
    assert [columns - stored for stored in cache.state.tables.lens] == hidden[scenario][family]
