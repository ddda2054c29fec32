"""How fast is generate()? Prefill and decode tokens/s, time to first token and latency per step, side by side.

    python -m eval.throughput --model llama-20m --cells 1x512 1x8192 4x4096 --combos sdpa/dynamic fastattn/paged

Every combination is one attention implementation with one cache. Each is checked before it is timed: its logits over
given tokens may be at most twice as far from a reference in higher precision as eager attention's own logits in the
timed dtype. A combination that is further off is reported as wrong and not timed.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_fastattn import CACHE_NAME, PagedCache, paged, unpaged

from . import common

COMBOS = {
    "eager/dynamic": ("eager", "dynamic", False),
    "sdpa/dynamic": ("sdpa", "dynamic", False),
    "sdpa/static": ("sdpa", "static", False),
    "sdpa/static+compile": ("sdpa", "static", True),
    "flex/dynamic": ("flex_attention", "dynamic", False),
    "fastattn/dynamic": ("fastattn", "dynamic", False),
    "fastattn/static": ("fastattn", "static", False),
    "fastattn/paged": ("fastattn", "paged", False),
    "fastattn/paged+compile": ("fastattn", "paged-sized", True),
}
BASELINE = "sdpa/dynamic"
"""What transformers does by itself, against which speeds are compared."""

CHECKED_STEPS = 4
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
    """

    batch: int
    prompt: int
    new_tokens: int
    beams: int = 1
    padding: float = 0.0
    samples: int = 1

    @property
    def name(self) -> str:
        """Short name for tables."""
        extra = f" {self.beams} beams" if self.beams > 1 else ""
        extra += f" {self.samples} samples" if self.samples > 1 else ""
        extra += f" pad {self.padding:.0%}" if self.padding else ""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}{extra}"


class Clock(StoppingCriteria):
    """Never stops generate(), but notes when each token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time; stop nothing."""
        common.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def make_inputs(model: PreTrainedModel, cell: Cell) -> dict[str, Tensor]:
    """Return random prompts; with padding, row i is left-padded by a share that grows with i."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (cell.batch, cell.prompt), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(cell.batch):
        share = cell.padding * (row + 1) / cell.batch
        mask[row, : min(int(2 * share * cell.prompt), cell.prompt - 1)] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def make_cache(model: PreTrainedModel, kind: str, cell: Cell) -> Any:
    """Return an empty cache with room for a cell."""
    length = cell.prompt + cell.new_tokens
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    sized = length if kind == "paged-sized" else None
    sequences = max(cell.beams, cell.samples)
    return PagedCache(model.config, max_length=sized, sequences_per_prompt=sequences)  # as generate() makes it


def forced_logits(
    model: PreTrainedModel, implementation: str, cache: str, cell: Cell, inputs: dict[str, Tensor], given: Tensor
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


def reference_logits(reference: PreTrainedModel, cell: Cell, inputs: dict[str, Tensor], given: Tensor) -> Tensor:
    """Return the same logits from eager attention, row by row without padding (at which eager in float64 gives NaN)."""
    rows = []
    for ids, mask, row_given in zip(inputs["input_ids"], inputs["attention_mask"], given, strict=True):
        row = ids[mask.bool()][None]
        alone = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        rows.append(forced_logits(reference, "eager", "dynamic", cell, alone, row_given[None]))
    return torch.cat(rows)


def check(
    model: PreTrainedModel, reference: PreTrainedModel, implementation: str, cache: str, cell: Cell
) -> tuple[bool, dict[str, float]]:
    """Compare a combination with the reference; return whether it is right, and the errors."""
    cell = replace(cell, prompt=min(cell.prompt, CHECKED_PROMPT), beams=1, samples=1)
    inputs = make_inputs(model, cell)
    steps = min(CHECKED_STEPS, cell.new_tokens)
    given = make_inputs(model, Cell(cell.batch, steps, 0))["input_ids"]
    exact = reference_logits(reference, cell, inputs, given)
    eager = (forced_logits(model, "eager", "dynamic", cell, inputs, given) - exact).abs().max().item()
    own = (forced_logits(model, implementation, cache, cell, inputs, given) - exact).abs().max().item()
    rounding = 8 * torch.finfo(model.dtype).eps * exact.abs().max().item()
    return own <= 2 * eager + rounding, {"error": own, "eager_error": eager}


class Caches:
    """The caches of a cell. A combination keeps its own: captured graphs are replayed where they were recorded only.

    A DynamicCache is new for each call, since it keeps no memory.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def take(self, model: PreTrainedModel, combo: str, cell: Cell) -> Any:
        """Return a combination's cache, empty."""
        kind = COMBOS[combo][1]
        if kind == "dynamic":
            return make_cache(model, kind, cell)
        if combo in self.kept:
            self.kept[combo].reset()
        else:
            self.kept[combo] = make_cache(model, kind, cell)
        return self.kept[combo]


def generate_once(
    model: PreTrainedModel, combo: str, cell: Cell, inputs: dict[str, Tensor], caches: Caches
) -> dict[str, Any]:
    """Run generate() once, under "fastattn" as a model that is paged by default; return times and tokens."""
    implementation, _, compiled = COMBOS[combo]
    model.set_attn_implementation(implementation)
    (paged if implementation == "fastattn" else unpaged)(model)
    clock = Clock(model.device)
    torch.manual_seed(1)
    common.synchronize(model.device)
    start = time.perf_counter()
    tokens = model.generate(
        **inputs,
        **{CACHE_NAME: caches.take(model, combo, cell)},
        max_new_tokens=cell.new_tokens,
        num_beams=cell.beams,
        num_return_sequences=cell.samples,
        do_sample=cell.samples > 1,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=not compiled,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    steps = [b - a for a, b in zip([start, *clock.times], clock.times, strict=False)]
    return {"first": steps[0], "steps": steps[1:], "tokens": tokens[:, inputs["input_ids"].shape[1] :].cpu()}


def attempt(row: dict[str, Any], action: Callable[[], Any]) -> Any:
    """Return what an action returns; a failure is noted in its row, not the end of the run."""
    try:
        return action()
    except Exception as error:
        row["status"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if torch.cuda.is_available():  # not while the error holds what it could not finish
        torch.cuda.empty_cache()
    return None


def expected_tokens(model: PreTrainedModel, cell: Cell, inputs: dict[str, Tensor]) -> Tensor:
    """Return the tokens of the baseline: eager attention, or sdpa where eager's score matrix would be too large."""
    baseline = "eager/dynamic" if cell.prompt <= CHECKED_PROMPT else "sdpa/dynamic"
    return generate_once(model, baseline, cell, inputs, Caches())["tokens"]


def measure_cell(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    combos: list[str],
    cell: Cell,
    rounds: int,
    *,
    checker: Callable[..., tuple[bool, dict[str, float]]] = check,
) -> list[dict[str, Any]]:
    """Check and time every combination on one cell; one row each."""
    inputs, caches = make_inputs(model, cell), Caches()
    rows: dict[str, dict[str, Any]] = {}
    torch._dynamo.reset()  # what was compiled for other cells is no part of this one
    for combo in combos:
        row = rows[combo] = {"cell": cell.name, "combo": combo, **asdict(cell), "status": "ok"}
        checked = attempt(row, lambda c=combo: checker(model, reference, *COMBOS[c][:2], cell))
        if checked is not None:
            row.update(checked[1], status="ok" if checked[0] else "WRONG")

    def run(combo: str) -> Any:
        if rows[combo]["status"] != "ok":
            return None
        result = attempt(rows[combo], lambda: generate_once(model, combo, cell, inputs, caches))
        if result is None:
            caches.kept.pop(combo, None)
        return result

    for combo in combos:  # compilation is warm-up: counted and shown apart; the second call records what is left to
        first_call_s = common.seconds(lambda c=combo: run(c), model.device)
        if run(combo) is not None:
            rows[combo]["first_call_s"] = first_call_s
    cases = {combo: lambda c=combo: run(c) for combo in combos if rows[combo]["status"] == "ok"}
    runs = common.alternate(cases, rounds, warmup=0, label=cell.name)
    timed = [combo for combo in cases if rows[combo]["status"] == "ok"]
    caches.kept.clear()
    baseline: dict[str, Any] = {}
    expected = attempt(baseline, lambda: expected_tokens(model, cell, inputs)) if timed else None
    for combo in timed:
        first = common.Spread.of([run["first"] for run in runs[combo]])
        step = common.Spread.of([sorted(run["steps"])[len(run["steps"]) // 2] for run in runs[combo]])
        decode_s = [sum(run["steps"]) for run in runs[combo]]
        tokens = runs[combo][-1]["tokens"]
        unequal = [] if expected is None else (tokens != expected).any(0).nonzero().flatten().tolist()
        rows[combo].update(
            prefill_tokens_per_s=cell.batch * cell.prompt / first.median,
            decode_tokens_per_s=cell.batch * cell.samples * (cell.new_tokens - 1) / common.Spread.of(decode_s).median,
            first_token_s=asdict(first),
            step_ms=asdict(common.Spread(*(1e3 * x for x in (step.median, step.low, step.high)), step.count)),
            first_difference=unequal[0] if unequal else None,
        )
        if expected is None:
            rows[combo]["tokens"] = f"not compared, the baseline {baseline['status']}"
        if unequal and model.dtype in (torch.float32, torch.float64):
            rows[combo]["status"] = "WRONG tokens"
    if BASELINE in timed:
        for combo in timed:
            rows[combo].update(versus(runs[BASELINE], runs[combo]))
    return list(rows.values())


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
        cells.append(Cell(batch, prompt, args.new_tokens, args.beams, args.padding, args.samples))
    return cells


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if any combination was wrong."""
    parser = argparse.ArgumentParser(prog="python -m eval.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"hub name, folder, tiny, {', '.join(common.SHAPES)}")
    parser.add_argument("--combos", nargs="+", choices=list(COMBOS), default=None)
    parser.add_argument("--cells", nargs="+", default=["1x512"], metavar="BATCHxPROMPT")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--samples", type=int, default=1, help="sequences drawn for each prompt")
    parser.add_argument("--padding", type=float, default=0.0, help="mean share of left padding, 0 to 0.5")
    parser.add_argument("--rounds", type=int, default=5)
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
    if args.threads:
        torch.set_num_threads(args.threads)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    combos = args.combos or [name for name in COMBOS if "compile" not in name or device.type == "cuda"]
    cells = parse_cells(args)
    model = common.load_model(args.model, device, dtype, layers=args.layers)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    reference = common.load_model(args.model, device, dtype, layers=args.layers).to(exact)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        tokens = cell.batch * max(cell.beams, cell.samples) * (cell.prompt + cell.new_tokens)
        copies = 3 + sum(COMBOS[combo][1] != "dynamic" for combo in combos)  # what is kept, and a DynamicCache growing
        wanted = copies * common.kv_bytes(model.config, tokens, dtype)
        if wanted > common.free_memory(device):
            rows.append({"cell": cell.name, "combo": "-", "status": f"skipped: needs about {wanted / 2**30:.1f} GiB"})
            continue
        try:
            rows += measure_cell(model, reference, combos, cell, args.rounds)
        except KeyboardInterrupt:
            print("interrupted: what is done is kept")
            break
        if args.out:
            common.write_result(args.out, "throughput", device, vars(args), rows)
    columns = [
        "cell",
        "combo",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "decode_vs_sdpa",
        "error",
        "eager_error",
        "first_difference",
    ]
    print(common.table(rows, [*columns, "status"]))
    return int(any("WRONG" in row["status"] or "failed" in row["status"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
