"""How fast is generate()? Prefill and decode tokens/s, time to first token and latency per step, side by side.

    python -m eval.throughput --model llama-20m --cells 1x512 1x8192 4x4096 --combos sdpa/dynamic fastattn/paged
    python -m eval.throughput --model llama-3-8b --cells 1x128 --profile --combos sdpa/dynamic fastattn/default

Every combination is one attention implementation with one cache, and perhaps our decoding loop and linear layers. Each
is checked before it is timed: its logits over given tokens may be at most twice as far from a reference in higher
precision as eager attention's own logits in the timed dtype. A combination that is further off is reported as wrong and
not timed. What was timed is checked again by its tokens, which covers compiled steps: each must be one that the model
prefers, as far as rounding lets it say. One that should have been compiled and was not is reported as that.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import hf_fastattn
from hf_fastattn import CACHE_NAME, PagedCache, compile_policy, optimize_linears, paged, restore_linears, unpaged

from . import common
from .attempts import LOST, DeviceLost, attempt
from .common import Model
from .compiled_steps import SKIPPED_STEPS, Compilation, StepProfiler, prepare_profiler


@dataclass(frozen=True)
class Combo:
    """What is measured.

    Attributes:
        implementation: of attention.
        cache: that is passed; "default": none, generate() makes its own.
        compiled: decode steps, on a GPU.
        loop: ours instead of transformers'.
        linears: ours, at decode.
        compile_config: what compiling is asked for instead of transformers' default, inductor's "reduce-overhead".
    """

    implementation: str
    cache: str
    compiled: bool = False
    loop: bool = False
    linears: bool = False
    compile_config: CompileConfig | None = None


NO_MODE: Any = None  # of inductor's; CompileConfig's types know of none
GRAPHS_ONLY = CompileConfig(backend="cudagraphs", mode=NO_MODE)
COMBO_KERNELS = CompileConfig(mode=NO_MODE, options={"triton.cudagraphs": True, "combo_kernels": True})
COMBOS = {
    "eager/dynamic": Combo("eager", "dynamic"),
    "sdpa/dynamic": Combo("sdpa", "dynamic"),
    "sdpa/static": Combo("sdpa", "static"),
    "sdpa/static+compile": Combo("sdpa", "static", compiled=True),
    "flex/dynamic": Combo("flex_attention", "dynamic"),
    "fastattn/dynamic": Combo("fastattn", "dynamic"),
    "fastattn/static": Combo("fastattn", "static"),
    "fastattn/paged": Combo("fastattn", "paged"),
    "fastattn/paged+compile": Combo("fastattn", "paged-sized", compiled=True),
    "fastattn/paged+cudagraphs": Combo("fastattn", "paged-sized", compiled=True, compile_config=GRAPHS_ONLY),
    "fastattn/paged+combo_kernels": Combo("fastattn", "paged-sized", compiled=True, compile_config=COMBO_KERNELS),
    "fastattn/default": Combo("fastattn", "default", compiled=True),
    "fastattn/default+loop": Combo("fastattn", "default", compiled=True, loop=True),
    "fastattn/default+loop+linears": Combo("fastattn", "default", compiled=True, loop=True, linears=True),
}
BASELINE = "sdpa/dynamic"
"""What transformers does by itself, against which speeds are compared."""

CHECKED_STEPS = 4
PROFILED_STEPS = 10
CHECKED_PROMPT = 768
"""Most prompt tokens of the check: eager attention's memory grows with their square."""


@dataclass(frozen=True)
class Cell:
    """One workload.

    Attributes:
        batch: prompts.
        prompt: tokens of each.
        new_tokens: that follow.
        beams: that a prompt is continued by; the best one counts.
        padding: mean share of the prompts that is padding.
        samples: sequences that are drawn for each prompt.
        reserved: columns that caches of a fixed size have; 0 for those that the cell fills.
    """

    batch: int
    prompt: int
    new_tokens: int
    beams: int = 1
    padding: float = 0.0
    samples: int = 1
    reserved: int = 0

    @property
    def name(self) -> str:
        """Short name for tables."""
        extra = f" {self.beams} beams" if self.beams > 1 else ""
        extra += f" {self.samples} samples" if self.samples > 1 else ""
        extra += f" pad {self.padding:.0%}" if self.padding else ""
        extra += f" of {self.reserved} reserved" if self.reserved else ""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}{extra}"

    @property
    def columns(self) -> int:
        """Columns of the caches of a fixed size."""
        return max(self.reserved, self.prompt + self.new_tokens)


class Clock(StoppingCriteria):
    """Never stops generate(), but notes when each token is there: on a GPU in its own time, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = [self._now()]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time; stop nothing."""
        self.marks.append(self._now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> list[float]:
        """Return the seconds to the first token and from each to the next."""
        common.synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def make_inputs(model: Model, cell: Cell) -> dict[str, Tensor]:
    """Return random prompts; with padding, row i is left-padded by a share that grows with i."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (cell.batch, cell.prompt), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(cell.batch):
        share = cell.padding * (row + 1) / cell.batch
        mask[row, : min(int(2 * share * cell.prompt), cell.prompt - 1)] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def make_cache(model: Model, kind: str, cell: Cell) -> Any:
    """Return an empty cache with room for a cell."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=cell.columns)
    sized = cell.columns if kind == "paged-sized" else None
    sequences = max(cell.beams, cell.samples)
    return PagedCache(model.config, max_length=sized, sequences_per_prompt=sequences)  # as generate() makes it


def forced_logits(
    model: Model, implementation: str, cache: str, cell: Cell, inputs: dict[str, Tensor], given: Tensor
) -> Tensor:
    """Return the logits of the last prompt token and of the given tokens after it, (batch, steps, vocab), float64."""
    model.set_attn_implementation(implementation)
    state = make_cache(model, cache, cell)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    with torch.no_grad():
        for step in range(given.shape[1]):
            out = model(ids, attention_mask=mask, position_ids=positions, **{CACHE_NAME: state}, logits_to_keep=1)
            logits.append(out.logits[:, -1].double().cpu())
            ids = given[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
    return torch.stack(logits, 1)


def reference_logits(reference: Model, cell: Cell, inputs: dict[str, Tensor], given: Tensor) -> Tensor:
    """Return the same logits from eager attention, row by row without padding (at which eager in float64 gives NaN)."""
    rows = []
    for ids, mask, row_given in zip(inputs["input_ids"], inputs["attention_mask"], given, strict=True):
        row = ids[mask.bool()][None]
        alone = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        rows.append(forced_logits(reference, "eager", "dynamic", cell, alone, row_given[None]))
    return torch.cat(rows)


class Checker:
    """Compares combinations with a reference on one cell; what they share is computed once.

    Args:
        model: to be measured.
        reference: the same one in higher precision.
        cell: of which the prompts are cut to CHECKED_PROMPT tokens, without beams and samples.
    """

    def __init__(self, model: Model, reference: Model, cell: Cell) -> None:
        self.model = model
        self.cell = replace(cell, prompt=min(cell.prompt, CHECKED_PROMPT), beams=1, samples=1, reserved=0)
        self.inputs = make_inputs(model, self.cell)
        self.given = make_inputs(model, Cell(cell.batch, min(CHECKED_STEPS, cell.new_tokens), 0))["input_ids"]
        self.exact = reference_logits(reference, self.cell, self.inputs, self.given)
        self.eager_error = self._error(COMBOS["eager/dynamic"])
        rounding = 8 * torch.finfo(model.dtype).eps * self.exact.abs().max().item()
        self.allowed = 2 * self.eager_error + rounding

    def _error(self, combo: Combo) -> float:
        (optimize_linears if combo.linears else restore_linears)(self.model)
        logits = forced_logits(self.model, combo.implementation, combo.cache, self.cell, self.inputs, self.given)
        return (logits - self.exact).abs().max().item()

    def __call__(self, combo: Combo) -> dict[str, Any]:
        """Return what a combination's row says of its errors, in logits, and whether they are allowed."""
        error = self._error(combo)
        found = {"error": error, "eager_error": self.eager_error, "allowed_error": self.allowed}
        return {"status": "ok" if error <= self.allowed else "WRONG", **found}


def check_cell(
    model: Model,
    reference: Model,
    combos: list[str],
    cell: Cell,
    *,
    checker: Callable[..., Callable[[Combo], dict[str, Any]]] = Checker,
) -> list[dict[str, Any]]:
    """Check every combination on one cell; one row each, to be completed by :func:`measure_cell`."""
    rows: list[dict[str, Any]] = [{"cell": cell.name, "combo": name, **asdict(cell)} for name in combos]
    made: dict[str, Any] = {}
    check = attempt(made, partial(checker, model, reference, cell))
    for row in rows:
        found = made if check is None else attempt(row, partial(check, COMBOS[row["combo"]]))
        row.update(found or {})
    restore_linears(model)
    return rows


class Caches:
    """The caches of a cell. A combination keeps its own: captured graphs are replayed where they were recorded only.

    A DynamicCache is new for each call, since it keeps no memory, and generate() keeps what it makes by default.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def take(self, model: Model, combo: str, cell: Cell) -> Any:
        """Return a combination's cache, empty; None if generate() is to make one."""
        kind = COMBOS[combo].cache
        if kind == "default":
            return None
        if kind == "dynamic":
            return make_cache(model, kind, cell)
        if combo in self.kept:
            self.kept[combo].reset()
        else:
            self.kept[combo] = make_cache(model, kind, cell)
        return self.kept[combo]


def generate_once(
    model: Model,
    name: str,
    cell: Cell,
    inputs: dict[str, Tensor],
    caches: Caches,
    profiler: StepProfiler | None = None,
) -> dict[str, Any]:
    """Run generate() once, under "fastattn" as a model that is paged by default; return times and tokens, or a profile.

    Our own loop would wait in each step for a clock that it does not know: its decoding takes as long as a call takes
    longer than one of a single token.
    """
    combo = COMBOS[name]
    model.set_attn_implementation(combo.implementation)
    (paged if combo.implementation == "fastattn" else unpaged)(model)
    (optimize_linears if combo.linears else restore_linears)(model)

    def run(new_tokens: int, watcher: StoppingCriteria | None) -> Tensor:
        cache = caches.take(model, name, cell)
        torch.manual_seed(1)
        return model.generate(
            **inputs,
            **({} if cache is None else {CACHE_NAME: cache}),
            **({"custom_generate": hf_fastattn.generate} if combo.loop else {}),
            **({"stopping_criteria": StoppingCriteriaList([watcher])} if watcher is not None else {}),
            max_new_tokens=new_tokens,
            num_beams=cell.beams,
            num_return_sequences=cell.samples,
            do_sample=cell.samples > 1,
            eos_token_id=None,
            pad_token_id=0,
            disable_compile=not combo.compiled,
            **({"compile_config": combo.compile_config} if combo.compile_config is not None else {}),
        )[:, inputs["input_ids"].shape[1] :]

    common.synchronize(model.device)
    with compile_policy.compiling_at_once(model):  # as a service does that sees the same sizes again and again
        if profiler is not None:
            run(cell.new_tokens, profiler)
            return profiler.result()
        if combo.loop:
            first = common.seconds(lambda: run(1, None), model.device)
            tokens: list[Tensor] = []
            decode = common.seconds(lambda: tokens.append(run(cell.new_tokens, None)), model.device) - first
            steps = [decode / (cell.new_tokens - 1)] * (cell.new_tokens - 1)
            return {"first": first, "steps": steps, "tokens": tokens[0].cpu()}
        clock = Clock(model.device)
        found = run(cell.new_tokens, clock)
        first, *steps = clock.seconds()
    return {"first": first, "steps": steps, "tokens": found.cpu()}


def expected_tokens(model: Model, cell: Cell, inputs: dict[str, Tensor]) -> Tensor:
    """Return the tokens of the baseline: eager attention, or sdpa where eager's score matrix would be too large."""
    baseline = "eager/dynamic" if cell.prompt <= CHECKED_PROMPT else "sdpa/dynamic"
    return generate_once(model, baseline, cell, inputs, Caches())["tokens"]


def regret(model: Model, cell: Cell, inputs: dict[str, Tensor], tokens: Tensor) -> float:
    """Return by how much at most the model prefers another token than one that was chosen, in logits, of two rows.

    The model runs in one pass under sdpa, so that nothing of the measured path is in it.
    """
    model.set_attn_implementation("sdpa")
    restore_linears(unpaged(model))
    worst = 0.0
    for row in {0, cell.batch - 1}:
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        chosen = tokens[row].to(ids.device)
        with torch.no_grad():
            whole = torch.cat([ids, chosen[:-1]])[None]
            logits = model(whole, use_cache=False, logits_to_keep=len(chosen)).logits[0].double()
        found = logits.gather(1, chosen[:, None])[:, 0]
        worst = max(worst, (logits.amax(1) - found).max().item())
    return worst


def measure_cell(
    model: Model,
    cell: Cell,
    rows: list[dict[str, Any]],
    rounds: int,
    *,
    budget_s: float = float("inf"),
    profile: bool = False,
    save: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Time every combination on one cell that passed its check, and complete the rows.

    Args:
        model: to be measured.
        cell: the workload.
        rows: of :func:`check_cell`.
        rounds: in which all combinations take turns.
        budget_s: seconds after which no combination and no round is started, but the first round.
        profile: say for each compiled combination which kernels a decode step consists of.
        save: called whenever rows have changed.

    Returns:
        the rows.
    """
    deadline = time.monotonic() + budget_s
    inputs, caches = make_inputs(model, cell), Caches()
    by_name = {row["combo"]: row for row in rows}
    combos = skip_what_does_not_fit(model, cell, by_name)

    def run(name: str) -> Any:
        if by_name[name]["status"] != "ok":
            return None
        result = attempt(by_name[name], lambda: generate_once(model, name, cell, inputs, caches))
        if result is None:
            caches.kept.pop(name, None)
        return result

    compilation = Compilation()  # what was compiled for other cells is no part of this one
    for name in combos:
        if time.monotonic() > deadline:
            by_name[name]["status"] = "not reached"
            continue
        common.say(f"{cell.name} {name}: first calls")
        with compilation.watched(row := by_name[name]):  # compilation is warm-up, counted and shown apart
            for key in ("first_call_s", "second_call_s"):  # the second compiles where generate() makes the cache
                row[key] = common.seconds(partial(run, name), model.device)
        if row["status"] == "ok" and COMBOS[name].compiled and model.device.type == "cuda":
            row["status"] = compilation.verdict(model, row)
        save()
    cases = {name: partial(run, name) for name in combos if by_name[name]["status"] == "ok"}
    runs = common.alternate(cases, rounds, warmup=0, label=cell.name, budget_s=deadline - time.monotonic())
    timed = [name for name in cases if by_name[name]["status"] == "ok"]
    for name in timed:
        by_name[name].update(summary(cell, runs[name]))
        if BASELINE in timed:
            by_name[name].update(versus(runs[BASELINE], runs[name]))
    save()
    if profile:
        for name in timed:
            if COMBOS[name].compiled:
                common.say(f"{cell.name} {name}: profile")
                profiler = StepProfiler(model.device, min(PROFILED_STEPS, cell.new_tokens - SKIPPED_STEPS))
                call = partial(generate_once, model, name, cell, inputs, caches, profiler)
                failed: dict[str, Any] = {}
                by_name[name]["profile"] = attempt(failed, call) or failed["status"]
    caches.kept.clear()
    hf_fastattn.release()
    judge_tokens(model, cell, inputs, {name: runs[name][-1]["tokens"] for name in timed}, by_name)
    save()
    return rows


def summary(cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speeds of one combination's rounds."""
    first = common.Spread.of([run["first"] for run in runs])
    step = common.Spread.of([1e3 * sorted(run["steps"])[len(run["steps"]) // 2] for run in runs])
    decode_s = common.Spread.of([sum(run["steps"]) for run in runs])
    return {
        "prefill_tokens_per_s": cell.batch * cell.prompt / first.median,
        "decode_tokens_per_s": cell.batch * cell.samples * (cell.new_tokens - 1) / decode_s.median,
        "first_token_s": asdict(first),
        "step_ms": asdict(step),
    }


def judge_tokens(
    model: Model,
    cell: Cell,
    inputs: dict[str, Tensor],
    tokens: dict[str, Tensor],
    rows: dict[str, dict[str, Any]],
) -> None:
    """Compare the tokens of each combination with the baseline's, and with what the model prefers."""
    if not tokens:
        return
    baseline: dict[str, Any] = {}
    expected = tokens.get(BASELINE)
    if expected is None:
        expected = attempt(baseline, lambda: expected_tokens(model, cell, inputs))
    for name, found in tokens.items():
        row = rows[name]
        if expected is None:
            row["tokens"] = f"not compared, the baseline {baseline['status']}"
        else:
            unequal = (found != expected).any(0).nonzero().flatten().tolist()
            row["first_difference"] = unequal[0] if unequal else None
            if unequal and model.dtype in (torch.float32, torch.float64):
                row["status"] = "WRONG tokens"
        if cell.beams == cell.samples == 1 and "allowed_error" in row:  # else tokens are not the preferred ones
            judged: dict[str, Any] = {}
            row["regret"] = attempt(judged, partial(regret, model, cell, inputs, found))
            if row["regret"] is None:
                row["tokens"] = f"not judged: {judged['status']}"
            elif row["regret"] > 2 * row["allowed_error"]:  # two logits, here and there: four errors of half of that
                row["status"] = "WRONG tokens"


def skip_what_does_not_fit(model: Model, cell: Cell, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the combinations that passed their check and for which, one after the other, there is memory.

    Caches of a fixed size stay until the cell is done. A growing one is there beside them, in a call, with a layer's
    copy; so are the activations of a prompt: at most three of the MLP's width and six of the model's.
    """
    common.empty_caches(model.device)
    config, itemsize = model.config.get_text_config(decoder=True), model.dtype.itemsize
    sequences = cell.batch * max(cell.beams, cell.samples)
    free, kept, left = common.free_memory(model.device), 0.0, []
    for name, row in rows.items():
        if row["status"] != "ok":
            continue
        combo = COMBOS[name]
        wide = 3 * getattr(config, "intermediate_size", 4 * config.hidden_size) + 6 * config.hidden_size
        needed = float(itemsize * cell.batch * cell.prompt * wide)
        if combo.implementation == "eager":  # scores, their softmax in float32 and its copy
            needed += cell.batch * config.num_attention_heads * cell.prompt**2 * (2 * itemsize + 4)
        growing = (1 + 2 / config.num_hidden_layers) * common.kv_bytes(
            config, sequences * (cell.prompt + cell.new_tokens), model.dtype
        )
        sized = common.kv_bytes(config, sequences * cell.columns, model.dtype)
        if combo.cache == "dynamic":
            needed += growing
        else:
            kept += sized
        if kept + needed > free:
            row["status"] = f"skipped: needs about {(kept + needed) / 2**30:.1f} GiB, free are {free / 2**30:.1f}"
            kept -= 0 if combo.cache == "dynamic" else sized
            continue
        left.append(name)
    return left


def versus(baseline: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many times as fast prefill and decoding were as the baseline's, round by round."""

    def ratio(seconds: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return asdict(common.speedup([seconds(run) for run in baseline], [seconds(run) for run in runs]))

    return {
        "prefill_vs_sdpa": ratio(lambda run: run["first"]),
        "decode_vs_sdpa": ratio(lambda run: sum(run["steps"])),
    }


def parse_cells(args: argparse.Namespace) -> list[Cell]:
    """Return the cells of the command line, or end with a sentence."""
    cells = []
    for text in args.cells:
        batch, prompt = common.parse_cell(text)
        cells.append(Cell(batch, prompt, args.new_tokens, args.beams, args.padding, args.samples, args.reserve))
    return cells


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; end with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"hub name, folder, tiny, {', '.join(common.SHAPES)}")
    parser.add_argument("--combos", nargs="+", choices=list(COMBOS), default=None)
    parser.add_argument("--cells", nargs="+", default=["1x512"], metavar="BATCHxPROMPT")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1, help="sequences drawn for each prompt")
    parser.add_argument("--padding", type=float, default=0.0, help="mean share of left padding, 0 to 0.5")
    parser.add_argument("--reserve", type=int, default=0, help="columns of caches of a fixed size, if more than needed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start nothing after it")
    parser.add_argument("--profile", action="store_true", help="which kernels a compiled decode step consists of")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers of a named shape")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    if args.new_tokens < 2:
        common.fail(f"decoding is measured over at least 2 new tokens, got --new-tokens {args.new_tokens}")
    if args.beams > 1 and args.samples > 1:
        common.fail("either --beams or --samples is measured at a time")
    if args.profile and args.new_tokens <= SKIPPED_STEPS:
        common.fail(f"a profile needs more than {SKIPPED_STEPS} new tokens, got --new-tokens {args.new_tokens}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if any combination was wrong."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    combos = args.combos or [name for name, combo in COMBOS.items() if not combo.compiled or device.type == "cuda"]
    cells = parse_cells(args)
    model = common.load_model(args.model, device, dtype, layers=args.layers)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    reference: Any = common.load_model(args.model, device, dtype, layers=args.layers).to(exact)
    if args.profile:
        prepare_profiler(device)
    start, status = time.monotonic(), 0
    rows: list[dict[str, Any]] = []
    checked: dict[str, list[dict[str, Any]]] = {}

    def save() -> None:
        if args.out:
            common.write_result(args.out, "throughput", device, vars(args), rows)

    try:
        for cell in cells:
            common.say(f"{cell.name}: checks")
            checked[cell.name] = check_cell(model, reference, combos, cell)
            rows += checked[cell.name]
        del reference  # its memory is for the caches
        for cell in cells:
            budget_s = start + args.budget - time.monotonic()
            measure_cell(
                model, cell, checked[cell.name], args.rounds, budget_s=budget_s, profile=args.profile, save=save
            )
    except KeyboardInterrupt:
        print("interrupted: what is done is kept")
    except DeviceLost as error:
        print(error)
        status = LOST
    save()
    columns = [
        "cell",
        "combo",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "decode_vs_sdpa",
        "error",
        "eager_error",
        "first_difference",
        "regret",
    ]
    print(common.table(rows, [*columns, "status"]))
    for row in rows:
        if isinstance(row.get("profile"), dict):
            print(f"\n{row['cell']} {row['combo']}, a decode step:\n")
            print(common.table(row["profile"]["kernels"], ["kernel", "calls", "us", "share"]))
    return status or int(any("WRONG" in row["status"] or "failed" in row["status"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
