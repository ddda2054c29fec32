"""Several devices: tensor parallelism over gloo processes, and layers that lie on different devices.

What a CPU can show: each rank's pool has its share of the heads and generates the tokens of one process; every device
that layers lie on has tables of its own, which advance together. Not run here: NCCL, two real GPUs, CUDA graphs there.
"""

import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, check_logits, generate, in_float64, left_padded, prompt

from hf_fastattn.kv_pool import KVPool, LayerBlocks
from hf_fastattn.paged_state import PagedState

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import hf_fastattn

folder, ids, mask = sys.argv[1], *torch.load(sys.argv[2])
split = DistributedConfig(tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split, attn_implementation="fastattn")
results = []
for how in ({}, {"custom_generate": hf_fastattn.generate}):
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
                         pad_token_id=0, output_logits=True, return_dict_in_generate=True, **how)
    cache = out.past_key_values
    shapes = {tuple(layer.k_cache.shape[1:]) for layer in cache.layers} | {layer.keys.shape for layer in cache.layers}
    results.append((type(cache).__name__, shapes, out.sequences, torch.stack(out.logits)))
torch.save(results, f"{sys.argv[3]}.{dist.get_rank()}")
dist.destroy_process_group()
"""


def run_ranks(script, arguments, size=2):
    """Run a script in so many processes that know of each other, as torchrun does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *script, *map(str, arguments)],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        done = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in done]


@pytest.mark.slow
def test_tensor_parallel_equals_one_process(tmp_path):
    model, inputs = build("llama"), left_padded(prompt(2), 4, 0)
    wanted, exact = generate(model, **inputs), generate(in_float64(model), **inputs)
    model.save_pretrained(tmp_path / "model")
    torch.save((inputs["input_ids"], inputs["attention_mask"]), tmp_path / "inputs")
    run_ranks(["-c", WORKER], [tmp_path / "model", tmp_path / "inputs", tmp_path / "out"])
    heads, head_dim = model.config.num_key_value_heads, model.config.head_dim
    for rank in range(2):
        for kind, shapes, tokens, logits in torch.load(tmp_path / f"out.{rank}"):
            assert kind == "PagedCache"
            assert shapes == {(64, heads // 2, head_dim), (2, heads // 2, 25, head_dim)}
            assert torch.equal(tokens, wanted.sequences)
            check_logits(logits, torch.stack(wanted.logits), torch.stack(exact.logits))


@pytest.mark.slow
def test_example_says_what_each_process_has():
    first, second = run_ranks([str(ROOT / "examples" / "tensor_parallel.py")], ["--max-new-tokens", "4"])
    assert "2 processes, 1 of 2 key/value heads in the cache of each" in first
    assert second == ""


def test_example_without_torchrun_says_how_to_start_it(monkeypatch):
    path = ROOT / "examples" / "tensor_parallel.py"
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit, match=r"^start me with torchrun: torchrun --nproc-per-node 2 examples/tensor_para"):
        runpy.run_path(str(path), run_name="__main__")


def test_every_device_has_tables_that_advance_together():
    """Two devices as far as a CPU has them: layer 0 on the CPU, layer 1 on meta, where only shapes are known."""
    pool = KVPool(16, None, [LayerBlocks(), LayerBlocks()])
    state = PagedState(pool, max_length=64, keep_hidden=False)
    states = {device: torch.zeros(2, 2, 20, 8, device=device) for device in ("cpu", "meta")}
    state.add_batch(2, 20)
    for layer, (device, new) in enumerate(states.items()):
        pool.allocate(layer, new, new)
        assert pool.layers[layer].k_cache.device.type == device
        tables = state.on(torch.device(device))
        for tensor in (tables.block_table, tables.past_lens, tables.seq_lens, tables.columns):
            assert tensor.device.type == device
    assert pool.layers[0].k_cache.shape == pool.layers[1].k_cache.shape == (8, 16, 2, 8)
    cpu, meta = (state.on(torch.device(device)) for device in states)
    assert cpu.block_table.shape == meta.block_table.shape == (2, 4)
    versions = [meta.seq_lens._version, meta.past_lens._version, meta.columns._version]
    state.begin(0, states["cpu"])
    assert cpu.seq_lens.tolist() == [20, 20]
    state.commit()
    assert cpu.past_lens.tolist() == [20, 20]
    assert int(cpu.columns) == state.columns == 20
    after = [meta.seq_lens._version, meta.past_lens._version, meta.columns._version]
    assert all(now > before for now, before in zip(after, versions, strict=True))  # the other device's were written too


def test_a_compiled_step_counts_on_every_device():
    state = PagedState(KVPool(16, None, [LayerBlocks()]), max_length=64, keep_hidden=False)
    state.add_batch(2, 20)
    first, second = (state.on(torch.device("cpu", index)) for index in (0, 1))
    state.begin(0, torch.zeros(2, 2, 20, 8), traced=True)
    state.commit()
    for expected in (21, 22):
        step = state.begin_compiled(0, 1)
        assert not step.lens
        state.commit()
        for tables in (first, second):
            assert tables.past_lens.tolist() == [expected] * 2
            assert int(tables.columns) == expected
