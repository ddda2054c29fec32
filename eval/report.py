"""Everything for one machine: run the measurements, draw them, and write what READMEs show of the result files.

    python -m eval.report                     # this machine; at most --budget seconds (600)
    python -m eval.report --render-only       # only pictures and README, from the committed files

Result files go to eval/results/<device>-<date>/, whose README.md shows them all; the project's README shows a summary.
A smaller budget picks fewer cells, never fewer checks. A measurement that fails or runs out of time is named at the end
and does not stop the others; Ctrl-C keeps what is done.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import common

README = common.ROOT / "README.md"
BEGIN, END = "<!-- measured: written by python -m eval.report -->", "<!-- measured: end -->"
COLUMNS = {
    "throughput": None,
    "continuous": [
        "cell",
        "combo",
        "seconds",
        "serving_s",
        "new_tokens_per_s",
        "all_tokens_per_s",
        "vs",
        "serving_vs",
        "peak_mib",
        "equal_requests",
        "status",
    ],
    "perplexity": ["path", "implementation", "tokens", "perplexity", "difference"],
    "memory": [
        "cell",
        "cache",
        "sequence_tokens",
        "reserved_mib",
        "waste",
        "blocks_used_mib",
        "prefilled_tokens",
        "saved",
        "peak_mib",
    ],
    "kernels": ["op", "cell", "us", "rate", "unit", "fraction", "x_best_rival", "status"],
}
"""Columns of a folder's tables, in the order of its sections; None for all. The files hold more."""

COLORS = {"eager": "#999999", "sdpa": "#4477aa", "flex": "#66ccee", "fastattn": "#cc6677"}


@dataclass(frozen=True)
class Measurement:
    """One command of the report and its share of the budget."""

    name: str
    module: str
    arguments: tuple[str, ...]
    share: float


def plan(device: torch.device, budget: float) -> list[Measurement]:
    """Return what to measure on a device within a budget of seconds."""
    short = budget < 300
    if device.type == "cuda":
        cells = ["1x128", "8x8192"] if short else ["1x128", "1x8192", "8x8192", "64x128", "8x32768"]
        throughput = ("--model", "llama-3-8b", "--cells", *cells, "--new-tokens", "64", "--rounds", "3")
        requests = ["64x512"] if short else ["64x512", "32x2048"]
        continuous = ("--model", "qwen3-0.6b", "--cells", *requests, "--new-tokens", "64", "--rounds", "3")
        memory = ("--model", "qwen3-0.6b", "--cells", "4x1024")
    else:
        cells = ["1x512"] if short else ["1x512", "1x8192", "4x4096"]
        combos = ("sdpa/dynamic", "fastattn/dynamic", "fastattn/paged")
        size = ("--model", "llama-20m", "--layers", "4", "--threads", "2")
        throughput = (*size, "--cells", *cells, "--new-tokens", "48", "--rounds", "5", "--combos", *combos)
        requests = ["8x512"] if short else ["8x512", "16x1024"]
        continuous = (*size, "--cells", *requests, "--new-tokens", "32", "--rounds", "3" if short else "5")
        memory = ("--model", "tiny", "--cells", "4x512", "--new-tokens", "64")
    return [
        Measurement("throughput", "eval.throughput", throughput, 0.45),
        Measurement("continuous", "eval.continuous", continuous, 0.1),
        Measurement("perplexity", "eval.perplexity", ("--limit", "6000" if short else "20000"), 0.15),
        Measurement("memory", "eval.memory", memory, 0.1),
        Measurement("kernels", "eval.kernels", ("--budget", str(int(budget * 0.2))), 0.2),
    ]


def run(measurements: Sequence[Measurement], folder: Path, device: torch.device, budget: float) -> list[str]:
    """Run each measurement in a process of its own; return a sentence per failure."""
    failures = []
    deadline = time.monotonic() + budget
    for item in tqdm(measurements, desc="report", disable=None):
        command = [sys.executable, "-m", item.module, *item.arguments, "--device", device.type]
        left = deadline - time.monotonic()
        if left <= 0:
            failures.append(f"{item.name}: not started, the budget of {budget:.0f} s was spent")
            continue
        try:
            done = subprocess.run(
                [*command, "--out", str(folder / f"{item.name}.json")],
                cwd=common.ROOT,
                timeout=left,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{item.name}: stopped after {left:.0f} s; the cells that were done are kept")
            continue
        except KeyboardInterrupt:
            failures.append(f"{item.name}: interrupted; what was done is kept")
            break
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()
            failures.append(f"{item.name}: exit code {done.returncode}: {last[-1] if last else ''}")
    return failures


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the result files of a folder by name, those that its README shows."""
    files = [path for path in sorted(folder.glob("*.json")) if kind_of(path.stem) in COLUMNS]
    return {path.stem: json.loads(path.read_text()) for path in files}


def kind_of(name: str) -> str:
    """Return what a result file measures: its name up to an underscore (``throughput_4x4096``)."""
    return name.split("_")[0]


def draw(folder: Path) -> None:
    """Draw the decode speeds and the cache sizes of a folder's results beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = load(folder)
    charts = {
        "throughput": ("combo", "decode_tokens_per_s", "decode, tokens/s (higher is better)"),
        "memory": ("cache", "reserved_mib", "KV cache reserved, MiB (lower is better)"),
    }
    for name, (series, value, title) in charts.items():
        rows = [row for row in results.get(name, {}).get("rows", []) if isinstance(row.get(value), int | float)]
        if not rows:
            continue
        cells, kinds = list(dict.fromkeys(r["cell"] for r in rows)), list(dict.fromkeys(r[series] for r in rows))
        figure, axes = pyplot.subplots(1, len(cells), figsize=(1.6 + 2.2 * len(cells), 3.2), squeeze=False)
        for axis, cell in zip(axes[0], cells, strict=True):
            values = {row[series]: row[value] for row in rows if row["cell"] == cell}
            bars = axis.bar(range(len(kinds)), [values.get(kind, 0) for kind in kinds])
            for bar, kind in zip(bars, kinds, strict=True):
                bar.set_color(COLORS.get(kind.split("/")[0], "#cc6677" if kind.startswith("Paged") else "#4477aa"))
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
            axis.set_title(cell, fontsize=9)
            axis.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.15)
        figure.suptitle(f"{title}\n{results[name]['device']}, {results[name]['date']}", fontsize=9)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return throughput rows with their ratio to sdpa over DynamicCache, if that was measured on the same cell.

    The median of the ratios of each round where the file has them (older ones have not), else that of the medians.
    """
    base = {row["cell"]: row for row in rows if row["combo"] == "sdpa/dynamic"}
    table = []
    for row in rows:
        other = base.get(row["cell"], {})
        entry = {"prompts + new tokens": row["cell"], "implementation/cache": row["combo"], "status": row["status"]}
        for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
            entry[f"{name} tokens/s"] = row.get(key)
            by_round = row.get(f"{name}_vs_sdpa")
            if by_round or (row.get(key) and other.get(key)):
                ratio = by_round["median"] if by_round else row[key] / other[key]
                entry[f"{name} vs sdpa"] = f"{ratio:.2f}x"
        table.append(entry)
    return table


def render(folder: Path) -> str:
    """Return the Markdown of one machine's results, with links as of a file in the folder."""
    results = load(folder)
    lines = [f"# {next(iter(results.values()))['device']}", ""]
    for name in sorted(results, key=lambda name: (list(COLUMNS).index(kind_of(name)), name)):
        wanted, result = COLUMNS[kind_of(name)], results[name]
        rows = speedups(result["rows"]) if kind_of(name) == "throughput" else result["rows"]
        rows = [row for row in rows if name != "kernels" or row["implementation"] == "fastattn"]
        present = list(dict.fromkeys(key for row in rows for key in row))
        columns = [key for key in wanted or present if key in present]
        versions = ", ".join(f"{key} {result['versions'][key]}" for key in ("torch", "transformers", "triton"))
        lines += [f"## {name}", "", f"`{result['command']}`", ""]
        lines += [
            f"{result['date']}, commit {result['commit']}, {versions}. All figures: [{name}.json]({name}.json).",
            "",
        ]
        lines += [common.table(rows, columns), ""]
        for picture in (name, *(["blocks"] if name == "memory" else [])):
            if (folder / f"{picture}.png").exists():
                lines += [f"![{picture}]({picture}.png)", ""]
    others = [f"[{path.name}]({path.name})" for path in sorted(folder.glob("*.json")) if path.stem not in results]
    if others:
        lines += ["## Other measurements", "", ", ".join(others), ""]
    return "\n".join(lines)


def decode_speeds(folder: Path) -> list[dict[str, Any]]:
    """Return what PagedCache makes of sdpa's decode speed: a row per model and cell, of the file with most rounds."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    rounds: dict[tuple[str, str], int] = {}
    for name, result in load(folder).items():
        if kind_of(name) != "throughput":
            continue
        speeds = {(row["prompts + new tokens"], row["implementation/cache"]): row for row in speedups(result["rows"])}
        for (cell, combo), row in speeds.items():
            key, count = (result["settings"]["model"], cell), result["settings"].get("rounds", 1)
            if combo != "fastattn/paged" or "decode vs sdpa" not in row or count < rounds.get(key, 0):
                continue
            rounds[key] = count
            found[key] = {
                "device": result["device"],
                "model": key[0],
                "prompts + new tokens": cell,
                "sdpa, DynamicCache": speeds[cell, "sdpa/dynamic"]["decode tokens/s"],
                "fastattn, PagedCache": row["decode tokens/s"],
                "rounds": count,
                "decode vs sdpa": f"**{row['decode vs sdpa']}**",
                "prefill vs sdpa": row.get("prefill vs sdpa"),
            }
    return list(found.values())


def request_speeds(folder: Path) -> list[dict[str, Any]]:
    """Return what fastattn makes of the speed of continuous batching: a row per file and cell."""
    table = []
    for name, result in load(folder).items():
        if kind_of(name) != "continuous":
            continue
        rows = {(row["cell"], row["combo"]): row for row in result["rows"]}
        for (cell, combo), row in rows.items():
            if combo != "fastattn/generate_batch" or "vs" not in row:
                continue
            entry = {"device": result["device"], "model": result["settings"]["model"], "requests + new tokens": cell}
            for other in ("sdpa/generate_batch", "fastattn/generate_batch", "fastattn/generate"):
                entry[other.replace("/", ", ")] = rows.get((cell, other), {}).get("new_tokens_per_s")
            entry |= {"rounds": row["vs"]["count"], "generate_batch vs sdpa": f"**{row['vs']['median']:.2f}x**"}
            table.append(entry)
    return table


def rewrite_readme(folders: Sequence[Path]) -> None:
    """Write the README of each folder and, into the project's, a summary of all with the pictures of the first."""
    text = README.read_text()
    if BEGIN not in text or END not in text:
        common.fail(f"the README has no {BEGIN!r} and {END!r} to write between")
    links = []
    for folder in folders:
        (folder / "README.md").write_text(render(folder))
        device = next(iter(load(folder).values()))["device"]
        links.append(f"[{device}]({(folder / 'README.md').relative_to(common.ROOT)})")
    lines = []
    tables = {
        "Decoding, tokens/s (prefill beside it)": decode_speeds,
        "Continuous batching, new tokens/s of whole calls": request_speeds,
    }
    for title, speeds in tables.items():
        rows = [row for folder in folders for row in speeds(folder)]
        if rows:
            lines += [f"{title}:", "", common.table(rows, list(rows[0])), ""]
    for name in ("throughput", "memory", "blocks"):
        picture = folders[0] / f"{name}.png"
        if picture.exists():
            lines += [f"![{name}]({picture.relative_to(common.ROOT)})", ""]
    lines += [f"All tables, with versions, commands and dates: {', '.join(links)}."]
    body = "\n".join(lines)
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    README.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n\n{body}\n\n{END}", text, flags=re.DOTALL))


def newest(folders: Sequence[Path]) -> list[Path]:
    """Return the last folder of each machine, the last of all first; their names end with a date."""
    last = {folder.name.rsplit("-", 3)[0]: folder for folder in sorted(folders)}.values()
    return sorted(last, key=lambda folder: (folder.name[-len("2026-01-01") :], folder.name), reverse=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", nargs="+", default=None, help="names of measurements")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    failures: list[str] = []
    if not args.render_only:
        device = common.pick_device(args.device)
        slug = re.sub(r"[^a-z0-9]+", "-", common.device_name(device).split(",")[0].lower()).strip("-")
        folder = common.RESULTS / f"{slug}-{datetime.now(UTC):%Y-%m-%d}"
        wanted = [item for item in plan(device, args.budget) if args.only is None or item.name in args.only]
        failures = run(wanted, folder, device, args.budget)
    folders = newest([path for path in sorted(common.RESULTS.glob("*/")) if load(path)])
    if not folders:
        common.fail(f"{common.RESULTS} holds no results of {', '.join(COLUMNS)}")
    for folder in folders:
        draw(folder)
    rewrite_readme(folders)
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
