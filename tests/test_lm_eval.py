"""lm-eval scores a model the same with fastattn as with sdpa: every kind of request, sample by sample."""

import functools
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_fastattn import PagedCache

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-llama"
TASKS = ROOT / "eval" / "tasks"
LIMITS = {"py_next_line": 4, "py_text": 4, "py_complete_line": 12}
"""Questions of each task: four texts have all lengths, twelve prompts make a full and a partial batch of eight."""

pytestmark = pytest.mark.slow


def module_from(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def model(implementation: str):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=implementation)


@functools.cache
def evaluate(task: str, implementation: str, batch_size: int, *, cache: str | None = None):
    """Return the harness's results and how many caches of which type it filled; None lets the model choose them."""
    lm = HFLM(model(implementation), tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=batch_size)
    assert lm.model.config._attn_implementation == implementation
    lm.model.generation_config.cache_implementation = cache
    caches = module_from(ROOT / "examples" / "lm_eval_fastattn.py").CacheCounter(lm.model)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    logging.disable(logging.WARNING)
    try:
        found = simple_evaluate(lm, tasks=[task], limit=LIMITS[task], task_manager=manager, bootstrap_iters=0)
    finally:
        logging.disable(logging.NOTSET)
        lm.model.generation_config.cache_implementation = None
    return found, dict(caches.counts)


def responses(task: str, implementation: str, batch_size: int, **options) -> list:
    """Return what the model answered to each question, in order."""
    found, _ = evaluate(task, implementation, batch_size, **options)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == LIMITS[task]
    return [sample["resps"] for sample in samples]


def numbers(results: dict, task: str) -> dict[str, float]:
    """Return a task's scores, their standard errors left out."""
    metrics = results["results"][task]
    return {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}


# On a CPU, prefill computes through PyTorch's own attention, so that only eager attention is another computation.
@pytest.mark.parametrize(("reference", "batch_size"), [("sdpa", 1), ("sdpa", 8), ("eager", 8)])
def test_choices_get_the_same_loglikelihoods(reference: str, batch_size: int) -> None:
    ours = responses("py_next_line", "fastattn", batch_size)
    theirs = responses("py_next_line", reference, batch_size)
    for got, want in zip(ours, theirs, strict=True):
        assert len(got) == len(want) == 4
        for [(score, greedy)], [(wanted, wanted_greedy)] in zip(got, want, strict=True):
            assert score == pytest.approx(wanted, rel=0, abs=1e-4)
            assert greedy == wanted_greedy


@pytest.mark.parametrize(("reference", "batch_size"), [("sdpa", 1), ("sdpa", 8), ("eager", 8)])
def test_texts_get_the_same_rolling_loglikelihoods(reference: str, batch_size: int) -> None:
    """Texts longer than the context among them; lm-eval sums in float32, which rounds 5,000 nats to 5e-4."""
    ours, theirs = (responses("py_text", name, batch_size) for name in ("fastattn", reference))
    for [[got]], [[want]] in zip(ours, theirs, strict=True):
        assert got == pytest.approx(want, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("cache", "kind"), [(None, PagedCache), ("dynamic", DynamicCache)], ids=["default", "dynamic"])
def test_generated_strings_are_the_same(batch_size: int, cache: str | None, kind: type) -> None:
    got = responses("py_complete_line", "fastattn", batch_size, cache=cache)
    assert got == responses("py_complete_line", "sdpa", batch_size)
    assert any(text for [[text]] in got)
    counts = evaluate("py_complete_line", "fastattn", batch_size, cache=cache)[1]
    assert counts == {kind: -(-LIMITS["py_complete_line"] // batch_size)}


@pytest.mark.parametrize("task", LIMITS)
def test_scores_are_the_same_in_every_batch_size(task: str) -> None:
    want = numbers(evaluate(task, "sdpa", 1)[0], task)
    assert want
    for batch_size in (1, 8):
        assert numbers(evaluate(task, "fastattn", batch_size)[0], task) == pytest.approx(want, rel=1e-5)


def test_the_model_knows_something_of_what_is_asked() -> None:
    """Scores at chance would hide differences."""
    assert numbers(evaluate("py_next_line", "sdpa", 8)[0], "py_next_line")["acc,none"] > 0.5
    assert numbers(evaluate("py_text", "sdpa", 8)[0], "py_text")["bits_per_byte,none"] < 2.5
    assert numbers(evaluate("py_complete_line", "sdpa", 8)[0], "py_complete_line")["exact_match,none"] > 0


def test_lm_eval_runs_from_the_command_line(tmp_path: Path) -> None:
    """The command in the README, offline: fastattn registered, nothing else changed."""
    arguments = f"pretrained={MODEL},attn_implementation=fastattn,dtype=float32"
    command = [sys.executable, "-m", "hf_fastattn", "run", "-m", "lm_eval", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", "py_offline", "--include_path", str(TASKS), "--device", "cpu"]
    command += ["--batch_size", "8", "--limit", "4", "--output_path", str(tmp_path / "results.json")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"|{task}" in done.stdout for task in LIMITS)
    (written,) = tmp_path.rglob("results*.json")
    got = json.loads(written.read_text(encoding="utf-8"))
    assert got["config"]["model_args"]["attn_implementation"] == "fastattn"
    want = numbers(evaluate("py_next_line", "sdpa", 8)[0], "py_next_line")
    assert numbers(got, "py_next_line") == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["next_line", "complete_line", "text"])
def test_questions_are_what_the_script_makes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module_from(TASKS / "make_data.py")
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    made = (tmp_path / f"{name}.jsonl").read_bytes()
    assert made == (TASKS / f"{name}.jsonl").read_bytes()
    assert len(made) < 60_000
