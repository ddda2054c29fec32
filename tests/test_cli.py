"""``python -m hf_fastattn``: programs run as they would without it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_fastattn.__main__ import main

ROOT = Path(__file__).parent.parent


def python(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "helper.py").write_text("VALUE = 7\n")
    path = folder / "program.py"
    path.write_text(
        textwrap.dedent(
            """
            import pickle
            import sys

            import helper

            class Point:
                pass

            def crash():
                raise ValueError("as planned")

            if __name__ == "__main__":
                from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
                print(sys.argv, helper.VALUE, __file__, type(pickle.loads(pickle.dumps(Point()))) is Point)
                print("registered", "fastattn" in ALL_ATTENTION_FUNCTIONS.valid_keys())
                if "crash" in sys.argv:
                    crash()
                sys.exit(3)
            """
        )
    )
    return path


def test_script_sees_its_own_arguments_module_and_exit_code(script: Path) -> None:
    plain = python(str(script), "-m", "--flag", "value")
    ours = python("-m", "hf_fastattn", "run", str(script), "-m", "--flag", "value")
    assert ours.returncode == plain.returncode == 3
    assert ours.stderr == plain.stderr == ""
    first, registered = ours.stdout.splitlines()
    assert [first, "registered False"] == plain.stdout.splitlines()
    assert registered == "registered True"


def test_uncaught_error_gives_the_programs_own_traceback(script: Path) -> None:
    plain = python(str(script), "crash")
    ours = python("-m", "hf_fastattn", "run", str(script), "crash")
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr == plain.stderr
    assert "as planned" in ours.stderr


def test_module_runs_as_with_dash_m(script: Path) -> None:
    plain = python("-m", "program", "x", cwd=script.parent)
    ours = python("-m", "hf_fastattn", "run", "-m", "program", "x", cwd=script.parent)
    assert ours.returncode == plain.returncode == 3
    assert ours.stdout.splitlines()[0] == plain.stdout.splitlines()[0]
    assert "registered True" in ours.stdout


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["run", "missing.py"], 2, "can't open file 'missing.py'"),
        (["run", "-m", "no_such_module_here"], 1, "no module named 'no_such_module_here'"),
        (["run", "-m", "xml"], 1, "without a __main__ module"),
        (["run", "-m"], 2, "needs the name of a module"),
        (["run"], 2, "run needs a script"),
    ],
)
def test_bad_command_lines_get_one_sentence(
    args: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argv", "path"):  # which belong to the program from then on
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == code
    assert sentence in capsys.readouterr().err


def test_info_names_versions_and_registration(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    output = capsys.readouterr().out
    for word in ("hf_fastattn", "torch", "transformers", "triton", "'fastattn': registered", "cpu:"):
        assert word in output
    (paged,) = [line for line in output.splitlines() if line.startswith("paged by default: ")]
    for family in ("llama", "gemma3_text", "gpt_oss", "qwen3"):
        assert family in paged
