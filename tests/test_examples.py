"""Every example runs as its docstring says, and what it shows is so."""

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs an example and returns its output, or its error output where it is to fail.

    In this process, since importing PyTorch and transformers takes longer than any of them.
    """

    def run_here(name: str, *arguments: str, stdin: str = "", code: int = 0) -> str:
        path, ended = EXAMPLES / f"{name}.py", 0
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        with torch.random.fork_rng():
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                ended = 1 if isinstance(end.code, str) else end.code or 0
                if isinstance(end.code, str):
                    sys.stderr.write(f"{end.code}\n")
        output, errors = capsys.readouterr()
        assert ended == code, errors
        return errors if code else output

    return run_here


def numbers(pattern: str, output: str) -> list[int]:
    found = re.search(pattern, output)
    assert found, output
    return [int(number) for number in found.groups()]


def test_quickstart_gets_the_same_tokens() -> None:
    """In a process of its own, as its readers start it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--max-new-tokens", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "same tokens: yes" in done.stdout
    assert "deprecated" not in done.stderr


def test_chat_computes_new_tokens_only(run: Run) -> None:
    output = run("chat", "--max-new-tokens", "6")
    computed, without = numbers(r"prompt tokens computed: (\d+); without a cache between turns: (\d+)", output)
    assert 0 < computed < without / 2
    assert "same replies with a fresh cache at every turn: yes" in output


def test_chat_reads_turns(run: Run) -> None:
    output = run("chat", "--interactive", "--max-new-tokens", "4", stdin="import os\ndef f(x\n\n")
    kept, new = numbers(r"turn 2: (\d+) tokens in the cache, (\d+) new ones", output)
    assert kept > 0
    assert new > 0
    assert "turn 3" not in output


def test_batch_stores_no_padding(run: Run) -> None:
    output = run("batch_generation", "--max-new-tokens", "6")
    stored, columns = numbers(r"tokens stored: (\d+) of (\d+) columns", output)
    in_use, padded = numbers(r"blocks in use: (\d+); with padding stored they would be (\d+)", output)
    assert 0 < stored < columns
    assert in_use < padded
    assert "same text one prompt at a time: yes" in output


def test_continuous_batching_pads_nothing(run: Run) -> None:
    output = run("continuous_batching", "--max-new-tokens", "6")
    tokens, padded = numbers(r"prompt tokens: (\d+) \(padded: (\d+)\)", output)
    assert 0 < tokens < padded / 2
    assert "same tokens one request at a time: yes" in output


def test_beams_share_blocks(run: Run) -> None:
    output = run("beam_search", "--max-new-tokens", "12")
    (separate,) = numbers(r"blocks as separate copies: +(\d+)", output)
    (in_use,) = numbers(r"blocks in use: +(\d+)", output)
    assert in_use < separate / 2
    (ours,) = numbers(r"tokens copied by them: +(\d+)", output)
    (dense,) = numbers(r"tokens a dense cache copies: +(\d+)", output)
    assert ours < dense / 4
    assert "same text as with transformers' default cache: yes" in output


def test_window_is_applied(run: Run) -> None:
    output = run("sliding_window", "--length", "60", "--window", "12")

    def value(label: str) -> float:
        return float(re.search(rf"{label}: +(\S+)", output)[1])

    limit = 2e-5 * value("largest logit")
    assert value("largest difference of fastattn's prefill to eager") < limit
    assert value("largest difference of fastattn's decoding to eager") < limit
    assert value("for comparison, seeing half a window instead") > 100 * limit


def test_lm_eval_generates_over_a_paged_cache(run: Run) -> None:
    pytest.importorskip("lm_eval")
    output = run("lm_eval_fastattn", "--tasks", "py_complete_line", "--limit", "8")
    assert "|py_complete_line|" in output
    assert numbers(r"batches generated over a PagedCache: (\d+)", output) == [1]


def test_unknown_model_gets_a_sentence(run: Run) -> None:
    errors = run("batch_generation", "--model", "no/such-model", code=1)
    assert "cannot load the model 'no/such-model'" in errors
    assert "Traceback" not in errors


def test_a_shared_prompt_is_computed_once(run: Run, tmp_path: Path) -> None:
    output = run("shared_prompt", "--max-new-tokens", "6", "--picture", str(tmp_path / "blocks.png"))
    separate, forked, stored = numbers(r"computed: (\d+) separately, (\d+) with a fork, (\d+) one by one", output)
    assert forked < separate / 2
    assert stored < separate / 2
    assert "same text: yes" in output
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    assert "expected a text file as --system" in run("shared_prompt", "--system", "/no/such/file", code=1)
