"""Everything for one machine: run the measurements, draw them, and write what READMEs show of the result files.

    python -m eval.report                     # this machine; at most --budget seconds (600)
    python -m eval.report --resume            # what that budget was too small for
    python -m eval.report --list              # what there is to measure, with the seconds that each may take
    python -m eval.report --render-only       # only pictures and README, from the committed files

Result files go to <results>/<device>-<date>/, whose README.md shows them all; the project's README shows a summary.
What the measurements print goes to report.log beside them. The first are those that decide most. Each runs in a process
of its own and within seconds of its own, so that one that hangs or fails costs no other: it is named at the end, with
what it printed last, and what it had measured is kept, also after Ctrl-C.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import common
from .attempts import LOST

SECONDS_TO_STOP = 10
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
    "kernels": ["op", "cell", "us", "rate", "unit", "fraction", "x_best_rival", "x_sdpa_flash", "status"],
}
"""Columns of a folder's tables, in the order of its sections; None for all. The files hold more."""

OURS = {
    "fastattn/paged": "PagedCache",
    "fastattn/paged+compile": "PagedCache, compiled",
    "fastattn/default": "plain generate()",
    "fastattn/default+loop": "our loop",
    "fastattn/default+loop+linears": "our loop and linear layers",
}
"""Ways of generating that the project's README shows, and what it calls them."""

COLORS = {"eager": "#999999", "sdpa": "#4477aa", "flex": "#66ccee", "fastattn": "#cc6677"}


@dataclass(frozen=True)
class Measurement:
    """One command of the report.

    Attributes:
        name: of its result file.
        module: to run.
        arguments: of the command line.
        seconds: after which it is stopped.
        least_gib: memory that the device must have.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float
    least_gib: float = 0.0


def plan(device: torch.device) -> list[Measurement]:
    """Return what to measure on a device, the first first."""
    return gpu_plan() if device.type == "cuda" else cpu_plan()


def gpu_plan() -> list[Measurement]:
    """Return what there is to measure on a GPU: first what decides about the project's goals, then the surveys."""

    def throughput(cell: str, new_tokens: int, rounds: int, *arguments: str) -> tuple[str, ...]:
        shape = ("--model", "llama-3-8b", "--cells", cell, "--new-tokens", str(new_tokens), "--rounds", str(rounds))
        return (*shape, *arguments)

    goals = [
        "prefill 1x16k h32/8 d128 contiguous",
        "decode 1x1k h32/8 d128 block 64",
        "decode 8x32k h32/8 d128 block 64",
        "decode ragged",
        "decode shared 64x(32k",
    ]
    ours = ("fastattn/default", "fastattn/default+loop", "fastattn/default+loop+linears")
    sized = ("--combos", "sdpa/dynamic", "sdpa/static+compile", "fastattn/paged+compile")
    short = throughput("1x128", 128, 3, "--profile", "--combos", "sdpa/dynamic", "sdpa/static+compile", *ours)
    long = throughput("8x32768", 64, 1, "--combos", "sdpa/dynamic", "fastattn/paged+compile")
    reserved = throughput("1x8192", 64, 2, "--reserve", "32768", *sized)
    padded = throughput("64x128", 128, 2, "--padding", "0.3", *sized)
    kinds = [f"fastattn/paged{kind}" for kind in ("", "+compile", "+cudagraphs", "+combo_kernels")]
    compilers = throughput("1x128", 128, 2, "--combos", "sdpa/dynamic", *kinds)
    continuous = ("--model", "qwen3-0.6b", "--cells", "64x512", "32x2048", "--new-tokens", "64", "--rounds", "3")
    return [
        Measurement("kernels_goals", "eval.kernels", ("--no-flex", "--no-variants", "--match", *goals), 150),
        Measurement("throughput_1x128", "eval.throughput", short, 330),
        Measurement("throughput_reserved", "eval.throughput", reserved, 240),
        Measurement("throughput_8x32k", "eval.throughput", long, 280, least_gib=120),
        Measurement("cold_start", "eval.cold_start", ("--model", "llama-3-8b", "--layers", "4", "--rounds", "1"), 150),
        Measurement("throughput_compilers", "eval.throughput", compilers, 330),
        Measurement("generate_loop", "eval.generate_loop", ("--models", "qwen3-0.6b", "--rounds", "3"), 100),
        Measurement("perplexity", "eval.perplexity", ("--limit", "20000"), 60),
        Measurement("memory", "eval.memory", ("--model", "qwen3-0.6b", "--cells", "4x1024"), 60),
        Measurement("kernels", "eval.kernels", ("--no-flex", "--resume", "--budget", "200"), 240),
        Measurement("linears", "eval.linears", (), 150),
        Measurement("throughput_64x128", "eval.throughput", padded, 280),
        Measurement("throughput_8x8192", "eval.throughput", throughput("8x8192", 64, 2, *sized), 280, least_gib=75),
        Measurement("continuous", "eval.continuous", continuous, 150),
    ]


def cpu_plan() -> list[Measurement]:
    """Return what to measure on a CPU."""
    combos = ("sdpa/dynamic", "fastattn/dynamic", "fastattn/paged")
    size = ("--model", "llama-20m", "--layers", "4", "--threads", "2")
    cells = ("--cells", "1x512", "1x8192", "4x4096", "--new-tokens", "48", "--rounds", "5")
    requests = ("--cells", "8x512", "16x1024", "--new-tokens", "32", "--rounds", "5")
    return [
        Measurement("throughput", "eval.throughput", (*size, *cells, "--combos", *combos), 270),
        Measurement("continuous", "eval.continuous", (*size, *requests), 60),
        Measurement("perplexity", "eval.perplexity", ("--limit", "20000"), 90),
        Measurement("memory", "eval.memory", ("--model", "tiny", "--cells", "4x512", "--new-tokens", "64"), 60),
        Measurement("kernels", "eval.kernels", ("--budget", "110"), 130),
    ]


def run(measurements: Sequence[Measurement], folder: Path, device: torch.device, budget: float) -> list[str]:
    """Run each measurement in a process of its own; return a sentence per failure."""
    failures = []
    deadline = time.monotonic() + budget
    folder.mkdir(parents=True, exist_ok=True)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
    for item in common.bar(measurements, "report"):
        left = deadline - time.monotonic()
        if left <= 0:
            failures.append(f"{item.name}: not started, the budget of {budget:.0f} s was spent")
        elif item.least_gib * 2**30 > memory:
            failures.append(f"{item.name}: not started, it needs a device of {item.least_gib:.0f} GiB")
        else:
            common.say(f"{item.name}: at most {min(left, item.seconds):.0f} s")
            try:
                failures += run_one(item, folder, device, time.monotonic() + min(left, item.seconds))
            except KeyboardInterrupt:
                failures.append(f"{item.name}: interrupted; what was done is kept")
                break
    return failures


def run_one(item: Measurement, folder: Path, device: torch.device, deadline: float) -> list[str]:
    """Run one measurement, in a new process again if it loses its GPU and can resume; return its failures."""
    command = [sys.executable, "-m", item.module, *item.arguments, "--device", device.type]
    start = time.monotonic()
    with (folder / "report.log").open("a") as log:
        while True:
            log.write(f"\n{item.name}: {shlex.join(command[1:])}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                [*command, "--out", str(folder / f"{item.name}.json")],
                cwd=common.ROOT,
                stdout=log,
                stderr=log,
                preexec_fn=_take_interrupts,
            )
            try:
                code = process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                stop(process)
                return [f"{item.name}: stopped after {time.monotonic() - start:.0f} s; what was done is kept"]
            except BaseException:
                stop(process)
                raise
            if code == 0:
                return []
            if code != LOST or "--resume" not in command:
                log.seek(begin)
                last = Path(log.name).read_text()[begin:].strip().splitlines()
                return [f"{item.name}: exit code {code}: {last[-1] if last else ''}"]


def _take_interrupts() -> None:
    """Let a new process take SIGINT, which a shell makes its background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process as Ctrl-C does, so that it keeps what it has; after some seconds without asking."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
        shown = [results[name]] if name in results else [each for key, each in results.items() if kind_of(key) == name]
        rows = [row for each in shown for row in each["rows"] if isinstance(row.get(value), int | float)]
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
        figure.suptitle(f"{title}\n{shown[0]['device']}, {shown[0]['date']}", fontsize=9)
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
        rows = [row for row in rows if kind_of(name) != "kernels" or row["implementation"] == "fastattn"]
        present = list(dict.fromkeys(key for row in rows for key in row))
        columns = [key for key in wanted or present if key in present]
        versions = ", ".join(f"{key} {result['versions'][key]}" for key in ("torch", "transformers", "triton"))
        lines += [f"## {name}", "", f"`{result['command']}`", ""]
        lines += [
            f"{result['date']}, commit {result['commit']}, {versions}. All figures: [{name}.json]({name}.json).",
            "",
        ]
        lines += [common.table(rows, columns), ""]
        for row in result["rows"]:
            if isinstance(row.get("profile"), dict):
                lines += profile_lines(row)
        for picture in (name, *(["blocks"] if name == "memory" else [])):
            if (folder / f"{picture}.png").exists():
                lines += [f"![{picture}]({picture}.png)", ""]
    others = [f"[{path.name}]({path.name})" for path in sorted(folder.glob("*.json")) if path.stem not in results]
    if others:
        lines += ["## Other measurements", "", ", ".join(others), ""]
    return "\n".join(lines)


def profile_lines(row: dict[str, Any]) -> list[str]:
    """Return the Markdown of what a decode step of a throughput row consists of."""
    found = row["profile"]
    step, kernels = 1e3 * row["step_ms"]["median"], found["kernels_us"]
    return [
        f"A decode step of {row['combo']}, {row['cell']}: {step:.0f} us, of which {found['launches']:.0f} kernels take "
        f"{kernels:.0f} us; nothing ran for the other {step - kernels:.0f} us.",
        "",
        common.table(found["kernels"], ["kernel", "calls", "us", "share"]),
        "",
    ]


def decode_speeds(folder: Path) -> list[dict[str, Any]]:
    """Return what ours makes of sdpa's decode speed: a row per model, cell and way, of the file with most rounds."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    rounds: dict[tuple[str, str, str], int] = {}
    for name, result in load(folder).items():
        if kind_of(name) != "throughput":
            continue
        speeds = {(row["prompts + new tokens"], row["implementation/cache"]): row for row in speedups(result["rows"])}
        for (cell, combo), row in speeds.items():
            key, count = (result["settings"]["model"], cell, combo), result["settings"].get("rounds", 1)
            if combo not in OURS or "decode vs sdpa" not in row or count < rounds.get(key, 0):
                continue
            rounds[key] = count
            found[key] = {
                "device": result["device"],
                "model": key[0],
                "prompts + new tokens": cell,
                "sdpa, DynamicCache": speeds[cell, "sdpa/dynamic"]["decode tokens/s"],
                "sdpa, StaticCache compiled": speeds.get((cell, "sdpa/static+compile"), {}).get("decode tokens/s"),
                "fastattn": row["decode tokens/s"],
                "with": OURS[combo],
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
            columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
            lines += [f"{title}:", "", common.table(rows, columns), ""]
    for name in ("throughput", "memory", "blocks"):
        picture = folders[0] / f"{name}.png"
        if picture.exists():
            lines += [f"![{name}]({picture.relative_to(common.ROOT)})", ""]
    lines += [f"All tables, with versions, commands and dates: {', '.join(links)}."]
    body = "\n".join(lines)
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    README.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n\n{body}\n\n{END}", text, flags=re.DOTALL))


def folder_name(device: torch.device) -> str:
    """Return the name of the folder for what is measured on a device today."""
    slug = re.sub(r"[^a-z0-9]+", "-", common.device_name(device).split(",")[0].lower()).strip("-")
    return f"{slug}-{datetime.now(UTC):%Y-%m-%d}"


def newest(folders: Sequence[Path]) -> list[Path]:
    """Return the last folder of each machine, the last of all first; their names end with a date."""
    last = {folder.name.rsplit("-", 3)[0]: folder for folder in sorted(folders)}.values()
    return sorted(last, key=lambda folder: (folder.name[-len("2026-01-01") :], folder.name), reverse=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--device", default=None)
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="measurements, by the names of --list")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="where the machine's folder is made")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="leave out what has a result file of today")
    mode.add_argument("--list", action="store_true", help="show what there is to measure")
    mode.add_argument("--render-only", action="store_true", help="measure nothing")
    parser.add_argument("--measure-only", action="store_true", help="draw nothing and leave READMEs alone")
    args = parser.parse_args(argv)
    failures: list[str] = []
    if not args.render_only:
        device = common.pick_device(args.device)
        wanted = plan(device)
        if args.only is not None:
            unknown = set(args.only) - {item.name for item in wanted}
            if unknown:
                common.fail(f"no measurement {', '.join(sorted(unknown))} on this device: --list names them")
            wanted = [item for item in wanted if item.name in args.only]
        if args.list:
            for item in wanted:
                print(f"{item.name:22} {item.seconds:4.0f} s  python -m {item.module} {shlex.join(item.arguments)}")
            return 0
        folder = args.results / folder_name(device)
        if args.resume:
            wanted = [item for item in wanted if not (folder / f"{item.name}.json").exists()]
        failures = run(wanted, folder.resolve(), device, args.budget)
    if not args.measure_only:
        folders = newest([path for path in sorted(args.results.glob("*/")) if load(path)])
        if not folders:
            common.fail(f"{args.results} holds no results of {', '.join(COLUMNS)}")
        for folder in folders:
            draw(folder)
        rewrite_readme(folders)
    for failure in failures:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
