"""How long until the first token? Fresh processes with an empty Triton cache, then with a warm one.

    python -m eval.cold_start --model tiny --rounds 3

Reported in seconds: importing torch and transformers, importing hf_fastattn, loading the model, the first token, and
the second and third call of generate() (on a GPU the second compiles the decode step: inductor's time). What the empty
cache adds to the first token is the time of our own kernels' compilation; on a CPU there is none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hf_fastattn import compile_policy

from . import common

STAGES = ("import_torch_s", "import_s", "load_s", "first_token_s", "second_call_s", "third_call_s")
PROMPT = 64
NEW_TOKENS = 16


def child(model_name: str, device_name: str, dtype_name: str, layers: str) -> dict[str, float]:
    """Go through the stages in this process; return the seconds of each. layers: of a named shape; "" for all."""
    device, times, last = torch.device(device_name), {}, time.perf_counter()
    few = int(layers) if layers else None

    def note(stage: str) -> None:
        nonlocal last
        common.synchronize(device)
        now = time.perf_counter()
        times[stage], last = now - last, now

    model: Any = common.load_model(model_name, device, getattr(torch, dtype_name), layers=few)
    model.set_attn_implementation("fastattn")
    common.hf_fastattn.paged(model)
    note("load_s")
    ids = torch.ones(1, PROMPT, dtype=torch.long, device=device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=1, **options)
    note("first_token_s")
    with compile_policy.compiling_at_once(model):  # few steps, so that the second call's time is that of compiling
        for stage in ("second_call_s", "third_call_s"):
            model.generate(ids, max_new_tokens=NEW_TOKENS, **options)
            note(stage)
    return times


PREPARE = """
import sys, torch, transformers
torch.zeros(1, device=sys.argv[1])
"""
"""Reads the libraries from the disk once, which is not what is measured."""

CHILD = """
import json, sys, time
start = time.perf_counter()
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
middle = time.perf_counter()
import hf_fastattn
end = time.perf_counter()
from eval import cold_start
times = {"import_torch_s": middle - start, "import_s": end - middle} | cold_start.child(*sys.argv[1:])
print(json.dumps(times))
"""


def run_child(arguments: list[str], cache: str) -> dict[str, float]:
    """Run the stages in a fresh process whose Triton and inductor caches lie in a folder; arguments are child()'s."""
    folders = {"TRITON_CACHE_DIR": f"{cache}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=common.ROOT,
        env=os.environ | folders,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        common.fail(f"a measured process failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(arguments: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure rounds of a cold and a warm process each; one row for cold, one for warm."""
    runs: dict[str, list[dict[str, float]]] = {"empty": [], "warm": []}
    subprocess.run([sys.executable, "-c", PREPARE, arguments[1]], capture_output=True, check=False)
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in runs:
                common.say(f"a process with {kind} caches")
                runs[kind].append(run_child(arguments, cache))
    rows: list[dict[str, Any]] = []
    for kind, times in runs.items():
        row: dict[str, Any] = {"cache": kind}
        row |= {stage: common.Spread.of([one[stage] for one in times]).median for stage in STAGES}
        row["to_first_token_s"] = common.Spread.of([sum(one[s] for s in STAGES[:4]) for one in times]).median
        rows.append(row)
    for row in rows:
        row["own_jit_s"] = row["first_token_s"] - rows[1]["first_token_s"]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.cold_start", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"hub name, folder, tiny, {', '.join(common.SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers of a named shape")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    device = common.pick_device(args.device)
    dtype = str(common.pick_dtype(args.dtype, device)).removeprefix("torch.")
    rows = measure([args.model, str(device), dtype, str(args.layers or "")], args.rounds)
    if args.out:
        common.write_result(args.out, "cold_start", device, vars(args), rows)
    print(common.table(rows, ["cache", *STAGES, "to_first_token_s", "own_jit_s"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
