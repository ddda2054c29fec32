"""What does continuous batching gain over our ops? generate_batch() over transformers' attention and over fastattn.

    python -m eval.continuous --model llama-20m --cells 16x1024 8x512 --new-tokens 32

A cell BATCHxPROMPT is a batch of requests whose prompts have from a quarter of PROMPT tokens to all of them. A
combination is an attention and a call: generate_batch(), or generate() over the same prompts, left-padded and never
compiled. Whole calls are timed; of them, serving begins when generate_batch() takes the requests (before: memory, CUDA
graphs) and ends with the last of them. Each is checked first, on a smaller cell: log probabilities of its tokens may be
at most twice as far from a reference in higher precision as those of eager attention. In float32 and float64 its tokens
must also be the baseline's; in 16 bits rounding decides between close ones. What is wrong is not timed.
"""

import argparse
import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, GenerationConfig

import hf_fastattn

from . import common
from .attempts import attempt
from .common import Model
from .throughput import CHECKED_PROMPT, CHECKED_STEPS

BASELINE, EAGER = "sdpa/generate_batch", "eager/generate_batch"
COMBOS = [BASELINE, "fastattn/generate_batch", "fastattn/generate", EAGER, "sdpa/generate"]
CHECKED_REQUESTS = 8
MAX_BATCH_TOKENS = 2048
SPARE = 1.25
"""Blocks per block needed: with less than 15% of them free, the scheduler takes no further request."""

SWITCHES_BY_CONFIG = "auto_switch_to_flash" in {field.name for field in fields(ContinuousBatchingConfig)}
"""How transformers is kept from a flash-attn of the hub: by the config, and in 5.17 by a name with "paged|" in it."""


@dataclass(frozen=True)
class Cell:
    """One workload: requests, tokens of the longest prompt, new tokens."""

    batch: int
    prompt: int
    new_tokens: int

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"{self.batch}x{self.prompt}+{self.new_tokens}"

    @property
    def lengths(self) -> list[int]:
        """Lengths of the prompts, spread evenly from a quarter of the longest."""
        shares = torch.linspace(0.25, 1, self.batch) if self.batch > 1 else torch.ones(1)
        return [max(round(share * self.prompt), 1) for share in shares.tolist()]


@dataclass
class Run:
    """One call: seconds, those that went into the requests, tokens (batch, new tokens) and their log probabilities."""

    seconds: float
    serving: float
    tokens: Tensor
    logprobs: Tensor | None = None


def make_prompts(model: Model, cell: Cell) -> list[list[int]]:
    """Return random prompts."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in cell.lengths]


def batching_config(cell: Cell, logprobs: bool) -> ContinuousBatchingConfig:
    """Return a config with room for all requests."""
    config = ContinuousBatchingConfig(max_batch_tokens=MAX_BATCH_TOKENS, return_logprobs=logprobs)
    if SWITCHES_BY_CONFIG:
        config.auto_switch_to_flash = False
    block_size: Any = getattr(config, "page_size", None) or config.block_size  # the latter until 5.17
    blocks = [math.ceil((length + cell.new_tokens) / block_size) for length in cell.lengths]
    config.num_blocks = math.ceil(SPARE * sum(blocks)) + 1
    return config


def generate_batch(model: Any, attention: str, cell: Cell, prompts: list[list[int]], *, logprobs: bool = False) -> Run:
    """Call generate_batch() once, greedily and without an end."""
    stays = SWITCHES_BY_CONFIG or attention == "fastattn"
    model.set_attn_implementation(attention if stays else f"paged|{attention}")
    options = GenerationConfig(max_new_tokens=cell.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = batching_config(cell, logprobs)
    out: list[Any] = []
    seconds = common.seconds(lambda: out.extend(model.generate_batch(prompts, options, config).values()), model.device)
    errors = [request.error for request in out if request.error]
    if errors or len(out) < len(prompts):
        raise RuntimeError(errors[0] if errors else f"{len(out)} of {len(prompts)} requests came back")
    serving = max(request.lifespan[1] for request in out) - min(request.created_time for request in out)
    tokens, chosen = ([getattr(request, name) for request in out] for name in ("generated_tokens", "logprobs"))
    return Run(seconds, serving, torch.tensor(tokens), torch.tensor(chosen))


def generate(model: Any, attention: str, cell: Cell, prompts: list[list[int]], *, logprobs: bool = False) -> Run:
    """Call generate() once on the left-padded prompts, greedily and without an end."""
    model.set_attn_implementation(attention)
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(cell.lengths)[:, None]).long()
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "disable_compile": True}
    options = {"max_new_tokens": cell.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    returned = {"return_dict_in_generate": True, "output_logits": True} if logprobs else {}
    out: list[Any] = []
    seconds = common.seconds(lambda: out.append(model.generate(**given, **options, **returned)), model.device)
    tokens, chosen = (out[0].sequences if logprobs else out[0])[:, ids.shape[1] :], None
    if logprobs:
        logits = torch.stack(out[0].logits, 1).float().log_softmax(-1)
        chosen = logits.gather(2, tokens[..., None])[..., 0].cpu()
    return Run(seconds, seconds, tokens.cpu(), chosen)


def call(model: Any, combo: str, cell: Cell, prompts: list[list[int]], **options: bool) -> Run:
    """Run a combination once."""
    attention, method = combo.split("/")
    return {"generate": generate, "generate_batch": generate_batch}[method](model, attention, cell, prompts, **options)


@torch.no_grad()
def error_of(reference: Model, prompts: list[list[int]], run: Run) -> tuple[float, float]:
    """Return how far a run's log probabilities and choices are from a reference's, and its largest logit."""
    assert run.logprobs is not None
    reference.set_attn_implementation("eager")
    errors, largest = [], 0.0
    for prompt, tokens, logprobs in zip(prompts, run.tokens, run.logprobs, strict=True):
        ids = torch.tensor([prompt + tokens[:-1].tolist()], device=reference.device)
        logits = reference(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].double().cpu()
        exact = logits.log_softmax(-1)
        chosen = exact.gather(1, tokens[:, None])[:, 0]
        missed = (exact.max(1).values - chosen) / 2  # logits that are off by an error may change places within twice it
        errors += [(logprobs - chosen).abs(), missed]
        largest = max(largest, logits.abs().max().item())
    return torch.cat(errors).max().item(), largest


def check(
    model: Model, reference: Model, combo: str, cell: Cell, known: dict[str, tuple[float, float]]
) -> tuple[bool, dict[str, float]]:
    """Compare a combination with the reference on a smaller cell; return whether it is right, and the errors.

    known: what :func:`error_of` returned for other combinations of the cell.
    """
    cell = Cell(
        *map(min, (cell.batch, cell.prompt, cell.new_tokens), (CHECKED_REQUESTS, CHECKED_PROMPT, CHECKED_STEPS))
    )
    prompts = make_prompts(model, cell)
    for name in (EAGER, combo):
        if name not in known:
            known[name] = error_of(reference, prompts, call(model, name, cell, prompts, logprobs=True))
    (eager, largest), (own, _) = known[EAGER], known[combo]
    rounding = 8 * torch.finfo(model.dtype).eps * largest
    return own <= 2 * eager + rounding, {"error": own, "eager_error": eager}


def compare(row: dict[str, Any], run: Run, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Note in a row how a run's tokens compare with the baseline's; where they are comparable, others are wrong."""
    if expected is None:
        row["tokens"] = "not compared, the baseline has none"
        return
    unequal = run.tokens != expected
    row["equal_requests"] = (~unequal.any(1)).double().mean().item()
    row["first_difference"] = next(iter(unequal.any(0).nonzero().flatten().tolist()), None)
    if unequal.any() and dtype in (torch.float32, torch.float64):
        row["status"] = "WRONG tokens"


def first_call(row: dict[str, Any], model: Model, combo: str, cell: Cell, prompts: list[list[int]]) -> Run:
    """Generate without memory of earlier calls, and note the most that this one takes on a GPU."""
    hf_fastattn.release(model)
    row["peak_mib"] = None
    if model.device.type != "cuda":
        return call(model, combo, cell, prompts)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    run = call(model, combo, cell, prompts)
    row["peak_mib"] = (torch.cuda.max_memory_allocated(model.device) - before) / 2**20
    return run


def measure_cell(model: Model, reference: Model, combos: list[str], cell: Cell, rounds: int) -> list[dict[str, Any]]:
    """Check and time combinations on one cell, the baseline always; one row each. The model is paged by default."""
    prompts, expected = make_prompts(model, cell), None
    rows: dict[str, dict[str, Any]] = {}
    errors: dict[str, tuple[float, float]] = {}
    for combo in common.bar(list(dict.fromkeys([BASELINE, *combos])), f"{cell.name}: checks"):
        row = rows[combo] = {"cell": cell.name, "combo": combo, **asdict(cell), "status": "ok"}
        checked = attempt(row, partial(check, model, reference, combo, cell, errors))
        if checked is not None:
            row.update(checked[1], status="ok" if checked[0] else "WRONG")
        if row["status"] != "ok":
            continue
        first = attempt(row, partial(first_call, row, model, combo, cell, prompts))
        if first is not None:
            expected = first.tokens if combo == BASELINE else expected
            compare(row, first, expected, model.dtype)

    def run(combo: str) -> Run | None:
        row = rows[combo]
        return attempt(row, partial(call, model, combo, cell, prompts)) if row["status"] == "ok" else None

    cases = {combo: partial(run, combo) for combo, row in rows.items() if row["status"] == "ok"}
    runs = common.alternate(cases, rounds, warmup=0, label=cell.name)
    timed = {combo: runs[combo] for combo in cases if rows[combo]["status"] == "ok"}
    new_tokens = cell.batch * cell.new_tokens
    for combo, own in timed.items():
        row, whole, serving = rows[combo], [run.seconds for run in own], [run.serving for run in own]
        row.update(
            seconds=asdict(common.Spread.of(whole)),
            serving_s=asdict(common.Spread.of(serving)),
            new_tokens_per_s=new_tokens / common.Spread.of(whole).median,
            all_tokens_per_s=(new_tokens + sum(cell.lengths)) / common.Spread.of(whole).median,
        )
        if BASELINE in timed:
            base = timed[BASELINE]
            row["vs"] = asdict(common.speedup([run.seconds for run in base], whole))
            row["serving_vs"] = asdict(common.speedup([run.serving for run in base], serving))
        compare(row, own[-1], expected, model.dtype)
    hf_fastattn.release(model)
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if any combination was wrong."""
    parser = argparse.ArgumentParser(prog="python -m eval.continuous", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help=f"hub name, folder, tiny, {', '.join(common.SHAPES)}")
    parser.add_argument("--combos", nargs="+", choices=COMBOS, default=COMBOS[:3], help=f"{BASELINE} is always there")
    parser.add_argument("--cells", nargs="+", default=["8x512"], metavar="BATCHxPROMPT")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=None, help="fewer layers of a named shape")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="result file (JSON)")
    args = parser.parse_args(argv)
    if args.new_tokens < 1 or args.rounds < 1:
        common.fail(f"expected at least one new token and round, got {args.new_tokens} and {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = common.pick_device(args.device)
    dtype = common.pick_dtype(args.dtype, device)
    cells = [Cell(*common.parse_cell(text), args.new_tokens) for text in args.cells]
    model: Any = common.load_model(args.model, device, dtype, layers=args.layers)
    model.set_attn_implementation("fastattn")
    hf_fastattn.paged(model)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    reference: Any = common.load_model(args.model, device, dtype, layers=args.layers)
    reference.to(exact)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        try:
            rows += measure_cell(model, reference, args.combos, cell, args.rounds)
        except KeyboardInterrupt:
            print("interrupted: what is done is kept")
            break
        if args.out:
            common.write_result(args.out, "continuous", device, vars(args), rows)
    columns = ["cell", "combo", "seconds", "serving_s", "new_tokens_per_s", "all_tokens_per_s", "vs", "serving_vs"]
    columns += ["peak_mib", "error", "eager_error", "equal_requests", "first_difference", "status"]
    print(common.table(rows, columns))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
