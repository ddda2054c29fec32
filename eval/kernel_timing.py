"""Seconds per call of what is measured, and the measured roofline."""

import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import common
from .roofline import Ceilings

MIN_SAMPLE_S = {"cuda": 2e-3, "cpu": 5e-3}


@dataclass
class Prepared:
    """An implementation ready to run: one call per rotating copy, and what must be switched on around the calls."""

    calls: Sequence[Callable[[], Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_timer(prepared: Prepared, device: torch.device) -> tuple[Callable[[], float], str]:
    """Return a function that measures seconds per call over all calls, and how: "graph", "events" or "clock"."""
    how = "clock"
    run: Callable[[], None] = functools.partial(_run_all, prepared)
    with prepared.context():
        if device.type == "cuda":
            try:
                how, run = "graph", _capture(prepared)
            except Exception as error:  # an implementation that waits for the GPU cannot be captured
                how = f"events, no graph: {reason(error)}"
                torch.cuda.synchronize()
        run()
        once = common.seconds(run, device)
    repeats = max(1, math.ceil(MIN_SAMPLE_S[device.type] / max(once, 1e-9)))

    def on_cpu() -> float:
        with prepared.context():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / (repeats * len(prepared.calls))

    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with prepared.context():
            start.record()
            for _ in range(repeats):
                run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (repeats * len(prepared.calls))

    return on_cuda if device.type == "cuda" else on_cpu, how


def _run_all(prepared: Prepared) -> None:
    for call in prepared.calls:
        call()


def _capture(prepared: Prepared) -> Callable[[], None]:
    """Capture all calls in one CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and touches what must exist before capture
        _run_all(prepared)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(prepared)
    return graph.replay


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure bandwidth and the rate of a matrix product in the timed dtype (float32 on a CPU): the best of 5."""
    on_cuda = device.type == "cuda"
    count = min(2**31 if on_cuda else 2**27, common.free_memory(device) // 4)
    source = torch.ones(count // 4, device=device)
    target = torch.zeros_like(source)
    size = 8192 if on_cuda else 768
    matmul_dtype = dtype if on_cuda else torch.float32
    a, b = (torch.randn(size, size, device=device).to(matmul_dtype) for _ in range(2))
    cases = {"copy": lambda: target.copy_(source), "read": lambda: source.sum(), "matmul": lambda: a @ b}
    timers = {name: make_timer(Prepared([call]), device)[0] for name, call in cases.items()}
    times = common.alternate(timers, 5, label="ceilings")
    rates = {"copy": 2 * source.nbytes / min(times["copy"]), "read": source.nbytes / min(times["read"])}
    best = max(rates, key=lambda name: rates[name])
    name = f"measured on {common.device_name(device)}: {best}, {str(matmul_dtype).removeprefix('torch.')} matmul"
    return Ceilings(name, rates[best], 2 * size**3 / min(times["matmul"]))


def reason(error: BaseException, caught: Sequence[warnings.WarningMessage] | None = None) -> str:
    """Return an exception in a line, with the warnings before it: PyTorch says there why a backend refuses."""
    texts = [str(error) or type(error).__name__, *(str(warning.message) for warning in caught or ())]
    lines = [text.strip().splitlines()[0].split(" (Triggered internally")[0][:160] for text in texts if text.strip()]
    return "; ".join(dict.fromkeys(line for line in lines if "not used because" not in line))
