"""Models that touch the keys themselves, gradients, inference mode, export and compiled forward passes."""

import pytest
import torch
from transformers import DynamicCache

from hf_fastattn.handles import Handle
from tests.test_cache_machine import check_state
from tests.tiny import assert_logits, eager, feed, left_padding, make_pair, tokens

pytestmark = pytest.mark.usefixtures("no_grad")


def handles(pair, query_len=3):
    """Return a cache with 4 columns and the handles of layer 0 for query_len more, beside their dense tensors."""
    cache = pair.cache()
    pair.fast(tokens(2, 4), past_key_values=cache)
    k, v = torch.randn(2, 2, query_len, 8), torch.randn(2, 2, query_len, 8)
    dense = [torch.cat([old, new], 2) for old, new in ((cache.layers[0].keys, k), (cache.layers[0].values, v))]
    return cache, cache.update(k, v, 0), dense


def test_a_handle_tells_its_shape_without_being_touched(llama):
    cache, (key, value), dense = handles(llama)
    assert isinstance(key, Handle)
    assert isinstance(value, Handle)
    for handle in (key, value):
        assert handle.shape == handle.size() == dense[0].shape
        assert (handle.size(2), handle.dim(), handle.dtype, handle.device.type) == (7, 4, torch.float32, "cpu")
        assert handle.to("cpu") is handle
        assert "(2, 2, 3, 8)" in repr(handle)
    assert not cache.made_dense


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h * 2,
        lambda h: 2 * h,
        lambda h: h[:, :, -1:],
        lambda h: h.transpose(1, 2),
        lambda h: h.repeat_interleave(2, 1),
        lambda h: torch.cat([h, h], 1),
        lambda h: torch.matmul(h, h.transpose(2, 3)),
        lambda h: h @ h.mT,
        lambda h: -h + h,
        lambda h: h.to(torch.float64),
    ],
)
@pytest.mark.filterwarnings("ignore:a model computes with cached keys")
def test_whoever_touches_a_handle_gets_the_dense_tensor(llama, use):
    cache, pair, dense = handles(llama)
    for handle, tensor in zip(pair, dense, strict=True):
        assert torch.equal(use(handle), use(tensor))
    assert cache.made_dense
    assert cache.get_mask_sizes(1, 0) == (5, 0)
    cache.reset()
    assert not cache.made_dense


def test_touching_a_handle_warns_once(llama):
    _, (key, value), _ = handles(llama)
    with pytest.warns(RuntimeWarning, match="a model computes with cached keys or values itself"):
        key.sum()
    value.sum()  # and not again: pytest would list it


@pytest.mark.parametrize("touched", [0, 1])
def test_a_layer_may_touch_one_handle_and_pass_on_the_other(touched, sizes):
    pair = make_pair()
    cache, ids = pair.cache(**sizes), tokens(2, 30)

    def touching(update):
        def wrapped(*args, **kwargs):
            out = list(update(*args, **kwargs))
            out[touched] = out[touched] * 1.0
            return out

        return wrapped

    cache.update = touching(cache.update)
    with pytest.warns(RuntimeWarning, match="computes with cached"):
        got = feed(pair.fast, ids, cache, steps=[20, 1, 9])
    assert_logits(got, eager(pair, ids))


@pytest.mark.parametrize("steps", [[1, 9], [10]], ids=str)
def test_gradients_after_a_padded_prompt(steps, sizes):
    """The first step that needs gradients turns the cache dense: its padding columns must stay hidden."""
    pair, ids, mask = make_pair(), tokens(2, 30), left_padding([30, 12])
    cache = pair.cache(**sizes)
    feed(pair.fast, ids[:, :20], cache, mask, [20])
    pair.fast.requires_grad_(True)
    with torch.enable_grad():
        got = feed(pair.fast, ids[:, 20:], cache, mask, steps)
    assert_logits(got.detach(), eager(pair, ids, mask)[:, 20:])


def test_gradients_flow_through_the_keys_and_values_of_the_pass():
    gradients = []
    for implementation in ("fastattn", "eager"):
        pair, ids = make_pair(), tokens(2, 20)
        model = pair.fast if implementation == "fastattn" else pair.eager
        cache = pair.cache() if implementation == "fastattn" else DynamicCache()
        model(ids[:, :9], past_key_values=cache)
        model.requires_grad_(True)
        with torch.enable_grad():
            model(ids[:, 9:], past_key_values=cache).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not any(layer.keys.requires_grad for layer in cache.layers) or implementation == "eager"
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    "modes",
    [
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.inference_mode),
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_inference_mode_may_come_and_go(request, name, modes, sizes):
    pair, ids, mask = request.getfixturevalue(name), tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :5], mask[1, 8:11] = 0, 0
    cache, got = pair.cache(**sizes), []
    for mode, stop, steps in ((modes[0], 30, [20, 1, 9]), (modes[1], 50, [1, 1, 18])):
        with mode():
            got.append(feed(pair.fast, ids[:, cache.get_seq_length() : stop], cache, mask, steps))
            cache.reorder_cache(torch.tensor([0, 0]))
            cache.batch_select_indices(torch.tensor([0]))
            cache.batch_repeat_interleave(2)
        ids, mask = ids[[0, 0]], mask[[0, 0]]
    assert_logits(torch.cat(got, 1)[:1], eager(pair, ids, mask)[:1], mask[:1])


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused(llama, strict):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama.fast

        def forward(self, ids):
            return self.model(ids, past_key_values=llama.cache(max_length=32)).logits

    # strict export wraps the sentence in an error of its own
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=r"cannot be exported|Observed exception"):
        torch.export.export(Wrapper(), (tokens(1, 5),), strict=strict)


def test_update_says_why_it_cannot_be_exported(llama, monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    with pytest.raises(RuntimeError, match="a PagedCache cannot be exported: its block tables change on the host"):
        llama.fast(tokens(1, 3), past_key_values=llama.cache())


@pytest.mark.parametrize("sizes", [{}, {"max_length": 48}], ids=str)
def test_a_compiled_model_fills_the_same_cache(llama, sizes):
    """Every step of a compiled forward, padded prefill included; the host's counts keep up."""
    ids, mask = tokens(2, 30), left_padding([30, 23])
    torch._dynamo.reset()
    compiled = torch.compile(llama.fast, backend="eager")
    cache = llama.cache(**sizes)
    got = [feed(compiled, ids[:, :25], cache, mask, [20] + [1] * 5)]
    assert cache.get_seq_length() == 25
    check_state(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    got.append(feed(llama.fast, ids[:, 25:], cache, mask, [1, 4]))
    assert_logits(torch.cat(got, 1), eager(llama, ids, mask), mask)
    check_state(cache)
