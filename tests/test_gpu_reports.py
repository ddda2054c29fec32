"""What tests/gpu/conftest.py makes of a failing test: here with tests that need no GPU."""

from pathlib import Path

import pytest
import torch

pytest_plugins = "pytester"

GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.mark.parametrize("lost", [False, True])
def test_failures_are_noted_at_once_and_a_lost_gpu_ends_the_process(pytester, monkeypatch, lost):
    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("__init__.py", "conftest.py"):
        path = pytester.path / "gpu" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((GPU_TESTS / name).read_text())
    (pytester.path / "gpu" / "test_it.py").write_text(
        "def test_a():\n    assert 1 + 1 == 3\ndef test_b():\n    assert False\ndef test_c(): pass\n"
    )
    log = pytester.path / "failures"
    monkeypatch.setenv("FASTATTN_TEST_LOG", str(log))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    noted = log.read_text()
    assert "gpu/test_it.py::test_a (call)" in noted and "assert (1 + 1) == 3" in noted
    assert ("THE GPU WAS LOST" in noted) == lost
    assert ("test_b" in noted) == (not lost)
    if lost:
        result.stdout.fnmatch_lines("*the GPU was lost in gpu/test_it.py::test_a*")
    else:
        result.assert_outcomes(passed=1, failed=2)
