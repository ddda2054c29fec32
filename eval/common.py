"""What the measurements share: models, machines, alternating timing and result files."""

import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

import hf_fastattn

Item = TypeVar("Item")
Model: TypeAlias = Any
"""A PreTrainedModel that generates: transformers' types do not know that it does."""

ROOT = Path(__file__).parent.parent
TINY_MODEL = ROOT / "examples" / "tiny-llama"
RESULTS = ROOT / "eval" / "results"

SHAPES: dict[str, Callable[[], Any]] = {
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    "mistral-7b": lambda: MistralConfig(max_position_embeddings=131072, sliding_window=4096),
    "qwen3-0.6b": lambda: Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-100m": lambda: LlamaConfig(
        vocab_size=32000,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    ),
    "llama-20m": lambda: LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
    ),
}
"""Model shapes with random weights: nothing is downloaded. ``tiny`` is the bundled, trained model."""


def fail(message: str) -> NoReturn:
    """End the program with one line and a non-zero exit code."""
    sys.exit(f"error: {message}")


def pick_device(name: str | None) -> torch.device:
    """Return the device asked for, the GPU if there is one by default; a GPU with its number."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        fail("cuda was asked for, but PyTorch sees no GPU here: pass --device cpu")
    if device.type == "cuda" and device.index is None:  # some functions insist on a number
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype asked for; float32 on a CPU and bfloat16 on a GPU by default."""
    dtype = getattr(torch, name, None) if name else torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        fail(f"{name!r} is no floating-point dtype: pass float32, bfloat16 or float16")
    return dtype


def load_model(name: str, device: torch.device, dtype: torch.dtype, *, layers: int | None = None) -> Model:
    """Load a hub name or folder, the bundled model ("tiny") or a named shape with random weights."""
    torch.manual_seed(0)
    if name in SHAPES:
        config = SHAPES[name]()
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: Model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(default)
        return model.eval()
    path = str(TINY_MODEL) if name == "tiny" else name
    try:
        AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        fail(f"cannot load the model {name!r} ({reason}); named shapes are tiny, {', '.join(SHAPES)}")
    return model.to(device).eval()


def parse_cell(text: str) -> tuple[int, int]:
    """Return batch and prompt length of a cell written as BATCHxPROMPT, or end with a sentence."""
    try:
        batch, prompt = map(int, text.split("x"))
    except ValueError:
        fail(f"a cell is BATCHxPROMPT, for example 4x4096; got {text!r}")
    if batch < 1 or prompt < 1:
        fail(f"a cell needs at least one sequence and one token, got {text!r}")
    return batch, prompt


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def kv_bytes(config: Any, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of that many tokens."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * tokens * dtype.itemsize


def empty_caches(device: torch.device) -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bar(items: Iterable[Item], label: str) -> "tqdm[Item]":
    """Return a progress bar over items; in a log, a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(items, desc=label, leave=False, mininterval=interval)


def say(text: str) -> None:
    """Say what is going on, where no progress bar can: in a log, or between bars."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several measurements, in the unit they were taken in."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize measurements."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def speedup(baseline: Sequence[float], own: Sequence[float]) -> Spread:
    """Return how many times as fast runs were as the baseline's of the same round: a machine's drift cancels out."""
    return Spread.of([base / value for base, value in zip(baseline, own, strict=True)])


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Return how long an action takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    label: str = "",
    budget_s: float = float("inf"),
) -> dict[str, list[Any]]:
    """Run every case in every round, in turning order, and return what each returned, warm-up rounds left out.

    Drift of the machine's speed then hits all cases alike. Stops early, after a whole round, when the budget is spent.
    """
    results: dict[str, list[Any]] = {name: [] for name in cases}
    start = time.perf_counter()
    names = list(cases)
    for turn in bar(range(warmup + rounds), label):
        for name in names if turn % 2 == 0 else reversed(names):
            value = cases[name]()
            if turn >= warmup:
                results[name].append(value)
        if turn > warmup and time.perf_counter() - start > budget_s:
            break
    return results


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def environment(device: torch.device) -> dict[str, Any]:
    """Describe machine, versions, commit, date and command of a measurement."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "accelerate", "lm_eval", "hf_fastattn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = hf_fastattn.__version__ if package == "hf_fastattn" else "not installed"
    command = (
        [f"python -m {sys.modules['__main__'].__spec__.name}"] if sys.modules["__main__"].__spec__ else sys.argv[:1]
    )
    arguments = list(sys.argv[1:])
    if "--out" in arguments:  # where the file lies is not part of what was measured
        del arguments[arguments.index("--out") : arguments.index("--out") + 2]
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(command + [shlex.quote(arg) for arg in arguments]),
    }


def git_commit() -> str:
    """Return the commit of the working tree, marked if files differ from it.

    Outside a checkout: what FASTATTN_COMMIT says, or "unknown".
    """

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTATTN_COMMIT", "unknown")


def write_result(
    path: Path, kind: str, device: torch.device, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Write one result file; called after every cell, so that an interrupted run keeps what is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in settings.items() if key != "out"}
    content = {"kind": kind, **environment(device), "settings": settings, "rows": rows}
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
    scratch.replace(path)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table, numbers to three significant digits; of a :class:`Spread`, the median."""

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            value = value["median"]
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
