"""Make every seeded fault in a copy of the repository and demand that the tests named for it fail.

    python -m tests.faults [--list] [--workers 2] [WORD ...]     # only faults whose name or file holds a word

Exits with 1 and a list if a fault went unnoticed, no longer applies, or the tests fail without any fault. Runs are
forked from one process that has imported torch and transformers, which takes longer than most of them.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from tqdm import tqdm

from .auto import AUTO_FAULTS
from .continuous import CONTINUOUS_FAULTS
from .decode import DECODE_FAULTS
from .faults import FAULTS, Fault
from .generate import GENERATE_FAULTS
from .glue import GLUE_FAULTS
from .linear import LINEAR_FAULTS
from .offload import OFFLOAD_FAULTS
from .ptx import PTX_FAULTS
from .sharing import SHARING_FAULTS
from .windows import WINDOW_FAULTS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
"""Seconds for one run of tests. A fault that makes them hang has not been caught."""

NOT_COPIED = shutil.ignore_patterns("__pycache__", ".hypothesis", "results")
TESTS_FAILED = 1  # pytest's exit status; others say that it was interrupted, misused or found no tests
PRELOAD = ("torch", "torch._dynamo", "transformers.models.llama.modeling_llama", "hypothesis.stateful", "pytest")


@dataclass
class Run:
    """One run of a selection of tests in a copy of the repository, with a fault or (None) without."""

    tests: tuple[str, ...]
    interpreted: bool
    fault: Fault | None = None
    folder: tempfile.TemporaryDirectory = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="fault-"))
    process: multiprocessing.Process | None = None
    deadline: float = 0.0

    @property
    def name(self) -> str:
        """What a report calls it."""
        return " ".join(self.tests) if self.fault is None else f"{self.fault.file}: {self.fault.name}"

    def start(self) -> str | None:
        """Copy the repository, make the fault and start the tests; return why they can't be, None if they were."""
        folder, fault = Path(self.folder.name), self.fault
        for name in ("hf_fastattn", "tests", "eval"):
            shutil.copytree(ROOT / name, folder / name, ignore=NOT_COPIED)
        if fault is not None:
            text = (folder / fault.file).read_text(encoding="utf-8")
            if text.count(fault.old) != 1:
                return f"does not apply: its text occurs {text.count(fault.old)} times"
            (folder / fault.file).write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(start_method)
        self.process = context.Process(target=run_pytest, args=(str(folder), self.tests, self.interpreted))
        self.process.start()
        self.deadline = time.monotonic() + TIMEOUT
        return None

    def verdict(self) -> str | None:
        """Return what is wrong now that the run is over, None if nothing is."""
        status = self.process.exitcode
        if status == (0 if self.fault is None else TESTS_FAILED):
            return None
        if status == 0:
            return f"not caught by {' '.join(self.tests)}"
        output = (Path(self.folder.name) / "output").read_text(encoding="utf-8", errors="replace").splitlines()
        problem = "fails without a fault" if self.fault is None else "the tests did not run"
        return "\n".join([f"{problem} (status {status})", *output[-12:]])


def run_pytest(folder: str, tests: tuple[str, ...], interpreted: bool) -> None:
    """Run a selection of tests inside a copy of the repository, in this process, and exit with pytest's status."""
    output = os.open(os.path.join(folder, "output"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ["TRITON_INTERPRET"] = "1" if interpreted else "0"
    if tests[0].startswith("tests/transformers"):  # these run both ways, see `make test-oldest`
        os.environ["FASTATTN_TEST_BY_TABLE"] = "1"
    sys.dont_write_bytecode = True
    again = {"tests", "hf_fastattn", "eval"}
    if interpreted:  # Triton was imported for compiling
        again.add("triton")
    for name in [name for name in sys.modules if name.split(".")[0] in again and not name.startswith("triton._C")]:
        del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    pytest = importlib.import_module("pytest")
    status = pytest.main(["-x", "-q", "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider", *tests])
    loaded = Path(sys.modules["hf_fastattn"].__file__).resolve() if "hf_fastattn" in sys.modules else None
    if status == 0 and (loaded is None or Path(folder).resolve() not in loaded.parents):
        sys.stdout.write(f"the tests used {loaded}, not the copy\n")
        status = 99
    sys.stdout.flush()
    os._exit(int(status))


def run_all(runs: list[Run], workers: int) -> list[str]:
    """Run everything, so many at a time; return the problems."""
    problems, waiting, running = [], list(reversed(runs)), []
    with tqdm(total=len(runs), desc="faults", unit="run") as bar:

        def finish(run: Run, problem: str | None) -> None:
            run.folder.cleanup()
            bar.update()
            if problem is not None:
                problems.append(f"{run.name}: {problem}")
                tqdm.write(problems[-1], file=sys.stderr)

        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop()
                problem = run.start()
                if problem is None:
                    running.append(run)
                else:
                    finish(run, problem)
            wait([run.process.sentinel for run in running], timeout=1.0)
            for run in list(running):
                late = time.monotonic() > run.deadline
                if late:
                    run.process.kill()
                if late or run.process.exitcode is not None:
                    run.process.join()
                    running.remove(run)
                    finish(run, f"no end after {TIMEOUT} seconds" if late else run.verdict())
    return problems


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose name or file holds one of these")
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    options = parser.parse_args()
    known = FAULTS + DECODE_FAULTS + GLUE_FAULTS + AUTO_FAULTS + LINEAR_FAULTS + OFFLOAD_FAULTS + SHARING_FAULTS
    known += WINDOW_FAULTS + GENERATE_FAULTS + CONTINUOUS_FAULTS + PTX_FAULTS
    chosen = [f for f in known if not options.words or any(w in f.name or w in f.file for w in options.words)]
    if importlib.util.find_spec("triton") is None:
        chosen = [fault for fault in chosen if not fault.interpreted]
    if options.list or not chosen:
        sys.stdout.writelines(f"{fault.file}: {fault.name}\n" for fault in chosen)
        return 0 if chosen else 2
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOAD:
        importlib.import_module(name)
    selections = dict.fromkeys((fault.tests, fault.interpreted) for fault in chosen)
    runs = [Run(*selection) for selection in selections] + [Run(f.tests, f.interpreted, f) for f in chosen]
    problems = run_all(runs, options.workers)
    if problems:
        sys.stdout.write("\n".join([f"{len(problems)} problems:", *sorted(problems), ""]))
        return 1
    sys.stdout.write(f"all {len(chosen)} faults were caught\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
