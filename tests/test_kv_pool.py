"""Growth of a pool when memory is short: what is wanted fits or fails, and nothing is lost."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastattn import BlockPoolExhausted, kv_pool
from hf_fastattn.kv_pool import KVPool, LayerBlocks

LAYERS = 2
SHAPE = (16, 2, 8)  # block_size, num_kv_heads, head_dim


class User:
    """A cache's state, as a pool sees it."""

    def __init__(self, rows):
        self.rows = rows

    def block_rows(self):
        return self.rows

    def renumber(self, moved):
        self.rows = [[moved.get(block, block) for block in row] for row in self.rows]

    def reclaim(self, count):
        pass

    def pass_thread(self):
        return None


def make_pool(num_blocks, device="cpu"):
    """Return a pool whose blocks are all in use, and its user."""
    layers = [LayerBlocks(*torch.randn(2, num_blocks, *SHAPE, device=device).unbind()) for _ in range(LAYERS)]
    pool = KVPool(16, None, layers)
    user = User([pool.ids.allocate(num_blocks)])
    pool.users.add(user)
    return pool, user


def contents(pool, user):
    return [tensor[user.rows[0]].clone() for layer in pool.layers for tensor in layer.tensors]


@pytest.fixture
def limit(monkeypatch):
    """Let memory hold so many blocks per tensor; note what was asked for."""
    move, asked = kv_pool.move_blocks, []

    def limited(error, most):
        def limited_move(cache, num_blocks, *args):
            asked.append(num_blocks)
            if num_blocks > most:
                raise error
            return move(cache, num_blocks, *args)

        monkeypatch.setattr(kv_pool, "move_blocks", limited_move)
        return asked

    return limited


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_growth_is_as_small_as_needed_if_memory_is_short(limit, error):
    pool, user = make_pool(10)
    before, asked = contents(pool, user), limit(error, 12)
    pool.make_room(2)
    assert asked == [15] + 2 * LAYERS * [12]
    assert (pool.ids.num_blocks, pool.ids.num_free) == (12, 2)
    assert all(torch.equal(a, b) for a, b in zip(contents(pool, user), before, strict=True))


@pytest.mark.parametrize(
    ("error", "raised"),
    [(torch.OutOfMemoryError("full"), torch.OutOfMemoryError), (MemoryError("full"), BlockPoolExhausted)],
)
def test_no_room_even_for_what_is_needed(limit, error, raised):
    pool, user = make_pool(10)
    before, asked = contents(pool, user), limit(error, 12)
    with pytest.raises(raised):
        pool.make_room(3)
    assert asked == [15, 13]
    with pytest.raises(raised):
        pool.make_room(7)
    assert asked == [15, 13, 17]  # more than half as many again: once
    assert pool.ids.num_blocks == 10
    assert all(torch.equal(a, b) for a, b in zip(contents(pool, user), before, strict=True))


class Ops(TorchDispatchMode):
    """Notes the operations that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_going_back_allocates_nothing_where_blocks_keep_their_numbers(monkeypatch, device):
    """Off the CPU memory is full at that moment; a CPU has put the blocks elsewhere and moves them back."""
    pool, user = make_pool(10, device)
    user.rows = [user.rows[0][5:], user.rows[0][:5]]
    move, calls, ops = kv_pool.move_blocks, [], Ops()

    def fail_at_the_last(*args):
        calls.append(1)
        if len(calls) < 2 * LAYERS:
            return move(*args)
        ops.__enter__()
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kv_pool, "move_blocks", fail_at_the_last)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            pool.resize(14)
    finally:
        ops.__exit__(None, None, None)
    assert set(ops.names) == ({"slice"} if device == "meta" else {"slice", "index", "index_put_"})
    assert pool.ids.num_blocks == 10
    assert {len(tensor) for layer in pool.layers for tensor in layer.tensors} == {10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (1, 0, 16, 8)])
def test_what_was_never_written_is_zero(dtype, shape):
    zeros = kv_pool._zero_pages.__wrapped__(shape, dtype)
    assert (zeros.shape, zeros.dtype) == (shape, dtype)
    assert zeros.is_contiguous()
    assert not zeros.any()
    zeros.fill_(1)  # it may be written to
    assert zeros.all()


def test_no_memory_for_blocks_is_a_memory_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(kv_pool.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="no room for 64 bytes of keys or values"):
        kv_pool._zero_pages.__wrapped__((1, 1, 2, 8), torch.float32)
