"""Offloading on a GPU: pinned blocks, copies on a stream of their own, the logits of a cache without it."""

import pytest
import torch
import torch.nn.functional as F

from hf_fastattn.offload import StreamQueue
from tests.tiny import assert_logits, left_padding, make_pair, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pair():
    made = make_pair(num_hidden_layers=6, hidden_size=128, num_attention_heads=8, head_dim=16)
    made.fast.cuda()
    made.eager.cuda()
    return made


def slow_copies(monkeypatch):
    """Let every copy come some milliseconds late."""
    copy = StreamQueue.copy

    def late(self, source, target, runs):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(2_000_000)
        return copy(self, source, target, runs)

    monkeypatch.setattr(StreamQueue, "copy", late)


@pytest.mark.parametrize("late", [False, True])
def test_logits(pair, monkeypatch, late):
    if late:
        slow_copies(monkeypatch)
    ids, mask = tokens(3, 120).cuda(), torch.cat([left_padding([9, 40, 31]), torch.ones(3, 80).long()], 1).cuda()
    caches = pair.cache(), pair.cache(offload=True)
    start = 0
    for end in [40, 41, 42, 90, 91, *range(92, 121)]:
        want, got = (
            pair.fast(ids[:, start:end], past_key_values=cache, attention_mask=mask[:, :end]).logits for cache in caches
        )
        assert_logits(got.cpu(), want.cpu(), mask[:, start:end].cpu())
        if end % 20 == 0:  # the host copies blocks, too
            for cache in caches:
                cache.reorder_cache(torch.tensor([0, 1, 1]))
            ids[2], mask[2] = ids[1], mask[1]
        start = end
    blocks = caches[1].layers[0].blocks
    assert all(host.is_pinned() for host in blocks.host)
    assert all(copy.is_cuda for copy in blocks.resident)
    assert caches[1].stats().device_bytes * 3 == caches[1].stats().host_bytes


def test_beams_and_memory(pair):
    ids = tokens(2, 50).cuda()
    given = {"num_beams": 4, "max_new_tokens": 40, "return_dict_in_generate": True, "output_scores": True}
    one, two = (
        pair.fast.generate(ids, past_key_values=pair.cache(offload=offload), **given) for offload in (False, True)
    )
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.sequences_scores, two.sequences_scores, rtol=1e-4, atol=1e-5)


def test_the_device_holds_two_layers(pair):
    sizes = {"num_blocks": 4096}
    cache = pair.cache(offload=True, **sizes)
    x = torch.ones(64, 64, device="cuda")
    F.linear(x @ x, x, x[0])  # the library's workspace comes from the same allocator and stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for length in (300, 1, 1):
        pair.fast(tokens(1, length).cuda(), past_key_values=cache)
    stats = cache.stats()
    assert stats.pool_bytes == 6 * stats.device_bytes // 2
    assert torch.cuda.memory_allocated() - before < stats.device_bytes * 1.2
