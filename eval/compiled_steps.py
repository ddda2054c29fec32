"""What became of a decode step: was it compiled and captured, and which kernels does it consist of?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria

from hf_fastattn import compile_policy

SKIPPED_STEPS = 3
SHOWN_KERNELS = 25


class Compilation:
    """What dynamo compiled since this was made; with it, nothing is left of what was compiled before."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        counters.clear()

    def state(self) -> dict[str, int]:
        """Return the graphs made so far, and how many of them inductor left out of CUDA graphs."""
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "graphs_not_captured": counters["inductor"]["cudagraph_skips"],
        }

    @contextmanager
    def watched(self, row: dict[str, Any]) -> Iterator[None]:
        """Note in a row what is compiled inside."""
        before = self.state()
        try:
            yield
        finally:
            row.update({name: count - before[name] for name, count in self.state().items()})

    def verdict(self, model: nn.Module, row: dict[str, Any]) -> str:
        """Return the status of a row whose steps were to be compiled: "ok", or that they run eagerly."""
        if compile_policy.gave_up(model):
            return "failed: the decode step could not be compiled"
        if row["graphs_not_captured"]:
            return "failed: the decode step was compiled, but not captured as a CUDA graph"
        return "ok" if self.state()["graphs"] else "failed: the decode step was not compiled"


class StepProfiler(StoppingCriteria):
    """Never stops generate(), but profiles some of its decode steps: on a GPU its kernels, on a CPU the operations."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps, self.seen = device, steps, 0
        self.profiler: Any = None

    def _switch(self, on: bool) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if on:
            self.profiler = profile(activities=[_activity(self.device)])
            self.profiler.start()
        else:
            self.profiler.stop()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Count the token; stop nothing."""
        self.seen += 1
        if self.seen in (SKIPPED_STEPS, SKIPPED_STEPS + self.steps):
            self._switch(on=self.seen == SKIPPED_STEPS)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def result(self) -> dict[str, Any]:
        """Return the microseconds of a step's kernels in all, and those of each that takes longest.

        Raises:
            ValueError: generate() ended before the steps were done.
        """
        if self.seen < SKIPPED_STEPS + self.steps:
            raise ValueError(f"expected {SKIPPED_STEPS + self.steps} tokens to profile, got {self.seen}")
        gpu = self.device.type == "cuda"
        times = {
            event.key: (event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
            for event in self.profiler.key_averages()
            if not gpu or event.device_type == torch.autograd.DeviceType.CUDA
        }
        whole = sum(us for _, us in times.values())
        if not whole:
            raise ValueError("the profiler saw no kernel")
        longest = sorted(times.items(), key=lambda item: -item[1][1])[:SHOWN_KERNELS]
        kernels = [
            {"kernel": name[:100], "calls": count / self.steps, "us": us / self.steps, "share": f"{us / whole:.1%}"}
            for name, (count, us) in longest
        ]
        calls = sum(count for count, us in times.values() if us) / self.steps
        return {"steps": self.steps, "kernels_us": whole / self.steps, "launches": calls, "kernels": kernels}


def prepare_profiler(device: torch.device) -> None:
    """Load what the profiler needs: before a CUDA graph is captured, which it could not look into otherwise."""
    with profile(activities=[_activity(device)]):
        torch.ones(8, device=device).sum().item()


def _activity(device: torch.device) -> ProfilerActivity:
    return ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
