"""The markdown of README.md and docs/bench.md, from the results and nothing else.

README gets the lines that decide, and the goals; docs/bench.md gets every line, the notes, and whatever GPUs were measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import project, quality
from bench.clock import Timing
from bench.goals import goals
from bench.lab import Row
from bench.report import RESULTS, Comparison, Entry, Results, read
from fleet.hours import RATES

ROOT = RESULTS.parent.parent
MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"
DECIDING = (  # comparison, role, key: the lines for README
    ("forward", "ours", ""),
    ("forward", "peer", ""),
    ("training", "ours", "dense"),
    ("training", "ours", "sparse"),
    ("training", "limit", ""),
    ("training", "peer", "autograd_bf16"),
    ("training", "peer", "sae_lens"),
    ("stream", "ours", "dense"),
    ("writing", "ours", ""),
    ("reading", "ours", ""),
)

GPU_STEPS = {  # figures of `python -m bench gpu`, and what README calls them
    "dense step": "SAE step, dense",
    "three dense settings": "three dense SAEs on one batch",
    "sparse step": "SAE step, sparse, L0 150, all features equally frequent",
    "sparse step, uneven": "SAE step, sparse, L0 150, as uneven as trained SAEs are",
    "three sparse settings": "three sparse SAEs on one batch",
    "three settings, one dense at L0 1000, two sparse": "the same, one of them dense at L0 1,000",
}
GPU_PEERS = {
    "autograd_bf16": "all-bf16 autograd, fused Adam",
    "sae_lens": "SAELens, standard SAE",
    "sparsify": "sparsify, TopK-128, its Triton kernels",
}
GPU_STREAMS = {  # figure: what it is called, what it stands beside
    "harvest to disk, tokens/s": ("harvest, 24 layers to disk", "harvest to disk, bytes/s", ""),
    "harvest to disk, bytes/s": ("the same in bytes", "raw write bytes/s", "raw write {}"),
    "harvest to memory, tokens/s": ("harvest, 24 layers to memory", "forward tokens/s", "forward alone {}"),
    "loader from disk, bytes/s": ("loader, from disk", "raw read bytes/s", "raw read {}"),
    "loader from memory, bytes/s": ("loader, from memory", "", ""),
}


def publish(
    results: Path = RESULTS,
    readme: Path = ROOT / "README.md",
    details_file: Path = ROOT / "docs" / "bench.md",
    scale_file: Path = ROOT / "docs" / "scale.md",
    rates_file: Path = RATES,
) -> None:
    """Write all of it again from every result there is. README and the page of scale need the marker comments."""
    machines, gpus = read(results)
    short = [gpu_summary(one) for one in gpus[-1:]] + [summary(one) for one in machines[-1:]]
    text = _between(readme.read_text(), "bench", short)
    if (results / quality.RESULTS.name).exists():
        raw = json.loads((results / quality.RESULTS.name).read_text())
        head, lines = quality.rows(quality.longest(raw["points"]))
        table = markdown(head, "r" * len(head), lines)
        text = _between(text, "quality", [quality.about(raw), table, "![FVU against L0](docs/quality.png)"])
    readme.write_text(text)
    from bench import scale  # here, because it needs the harvest, and a plan of a job does not

    if (path := results / scale.RESULTS.name).exists():
        page = _between(scale_file.read_text(), "scale", scale.tables(json.loads(path.read_text()), scale.read(path)))
        scale_file.write_text(page)
    title = "# How fast, line by line\n\nWritten by `python -m bench tables` from `bench/results/`; README has the short of it."
    long = [title, *(details(one) for one in reversed(machines)), *(gpu_details(one) for one in reversed(gpus))]
    details_file.write_text("\n\n".join(long) + "\n")
    project.write_rates(machines, gpus, rates_file)


def _between(text: str, name: str, parts: list[str]) -> str:
    """The text with these parts between the two markers of that name. Raises ValueError where they are not."""
    begin, end = (marker.format(name) for marker in MARKERS)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file needs one {begin} and, after it, one {end}")
    before, _, rest = text.partition(begin)
    return "\n\n".join([f"{before}{begin}", *parts, f"{end}{rest.partition(end)[2]}"])


# ---------------------------------------------------------------------------------------------------- python -m bench


def about(results: Results) -> str:
    machine = results.machine
    hardware = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:.0f} GiB" + (f", {machine.gpu}" * bool(machine.gpu))
    flags = ", ".join(flag for flag in machine.flags if "bf16" in flag) or "no bf16 instructions"
    busy = f" **Other work held {results.busy:.0%} of the processors.**" if results.busy > 0.1 else ""
    return (
        f"Measured on {hardware} ({flags}), torch {machine.torch}, {results.date}: rates are medians of interleaved rounds, "
        "ratios medians of the rounds' own ratios. Ratios carry over to other machines better than rates do." + busy
    )


def summary(results: Results) -> str:
    """The lines that decide, and the goals."""
    lines = []
    for key, role, which in DECIDING:
        comparison = results.path(key)
        entry = comparison.find(role, which) if comparison is not None else None
        if comparison is not None and entry is not None:
            name, rate, beside, _ = _cells(comparison, entry)
            lines.append((f"{comparison.name.partition(',')[0]}: {name}", rate, beside))
    shown = markdown(("", "rate", "ours beside it"), "-rr", lines)
    return "\n\n".join([about(results), shown, _goals(results), "Every line, with notes: [docs/bench.md](docs/bench.md)."])


def details(results: Results) -> str:
    """Every line, the goals and the notes."""
    lines: list[tuple[str, ...]] = []
    for comparison in results.comparisons:
        lines.append((f"**{comparison.name}**", "", "", ""))
        lines += [_cells(comparison, entry) for entry in comparison.entries]
    notes = "\n".join(note for comparison in results.comparisons for note in _notes(comparison))
    title = f"## {results.machine.gpu or results.machine.cpu}"
    shown = markdown(("", "rate", "ours beside it", "spread"), "-rrr", lines)
    return "\n\n".join(part for part in (title, about(results), shown, _goals(results), notes) if part)


def _goals(results: Results) -> str:
    rows = ((f"{goal.name} {goal.wanted}", goal.measured, goal.verdict) for goal in goals(results))
    return markdown(("goal", "measured", ""), "-r-", rows)


def _cells(comparison: Comparison, entry: Entry) -> tuple[str, str, str, str]:
    name = f"_{entry.name}_ (limit)" if entry.role == "limit" else entry.name
    if entry.rate is None:
        return name, f"no figure: {entry.failure or 'not run'}", "", ""
    rate = _rate(entry.rate, comparison.unit)
    if flop := entry.figures.get("flop"):
        rate += f", {flop * entry.rate / entry.work / 1e12:.2f} TFLOP/s"
    return name, rate, _beside(comparison, entry), f"{Timing(seconds=entry.seconds).spread:.0%}"


def _beside(comparison: Comparison, entry: Entry) -> str:
    """Ours against a limit in percent, against a peer in multiples, against a base in cost; each of ours by its label."""
    if entry.role == "ours":
        return f"{entry.figures['idle']:.2%} outside steps" if "idle" in entry.figures else ""
    return ", ".join(f"{ours.key} {_standing(ours, entry)}".strip() for ours in comparison.rivals(entry))


def _standing(ours: Entry, other: Entry) -> str:
    if other.role == "base":
        return f"costs {statistics.median(other.ratios(ours)):.3f} ×"
    ratio = statistics.median(ours.ratios(other))
    return f"{ratio:.0%}" if other.role == "limit" else f"{ratio:.2f} ×"


def _notes(comparison: Comparison) -> list[str]:
    said = [f"{entry.name}: {entry.note}" for entry in comparison.entries if entry.note]
    parts = [part for part in (comparison.note, *said) if part]
    return [f"- {comparison.name}. {'; '.join(parts)}."] if parts else []


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 1e9:.2f} GB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"


# ------------------------------------------------------------------------------------------------ python -m bench gpu


def gpu_about(raw: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {raw['versions'][name]}" for name in ("torch", "triton"))
    s = raw["sizes"]
    return (
        f"Measured on one {raw['machine']['gpu']}, {raw['machine']['cores']} cores, {versions}, {raw['date']}, in one call of "
        f"{raw['seconds']:.0f} s: d {s['d']}, F {s['features']:,}, {s['tokens']:,} tokens a step, all random. "
        "Shares of the matrix rate count the dense arithmetic, of which sparse steps do a part."
    )


def gpu_summary(raw: Mapping[str, Any]) -> str:
    """Rates of the steps beside the matrix rate and the peers, of harvest and loader; and the goals."""
    found: Mapping[str, float] = raw["figures"]
    matrix = f"of {found['bf16 FLOP/s'] / 1e12:.0f} TFLOP/s" if "bf16 FLOP/s" in found else ""
    rows = []
    for key, name in GPU_STEPS.items():
        if seconds := found.get(f"{key}, seconds"):
            share = found.get(f"{key}, share of the matrix rate", math.nan)
            rows.append((name, _rate(found[f"{key}, tokens/s"], "tokens"), f"{1e3 * seconds:.1f} ms, {share:.0%} {matrix}"))
    for key, name in GPU_PEERS.items():
        if rate := found.get(f"peer {key}, tokens/s"):
            both = ((way, found.get(f"{way} step, tokens/s", math.nan)) for way in ("dense", "sparse"))
            ours = (f"{way} {mine / rate:.2f} ×" for way, mine in both)
            rows.append((name, _rate(rate, "tokens"), f"ours {', '.join(ours)}"))
    for key, (name, beside, note) in GPU_STREAMS.items():
        if rate := found.get(key):
            unit = "bytes" if key.endswith("bytes/s") else "tokens"
            rows.append((name, _rate(rate, unit), note.format(_rate(found[beside], unit)) if beside in found else ""))
    if peak := found.get("peak GPU bytes"):
        rows.append(("memory at its peak, three dense settings", f"{peak / 1e9:.1f} GB", "the loader's windows included"))
    goals = markdown(("goal", "", "measured", ""), "-lr-", ((g["name"], *_goal(g)) for g in raw["goals"]))
    return "\n\n".join([gpu_about(raw), markdown(("", "rate", ""), "-r-", rows), goals])


def _goal(raw: Mapping[str, Any]) -> tuple[str, str, str]:
    row = Row(**raw)
    return row.note.partition(";")[0].removeprefix("goal "), row.figure, row.verdict


def gpu_details(raw: Mapping[str, Any]) -> str:
    parts = [
        f"**{part['title']}**: {part['status']}, {part['seconds']:.0f} s\n\n{_rows(part['rows'])}" for part in raw["parts"]
    ]
    return "\n\n".join([f"## {raw['machine']['gpu']}", gpu_about(raw), *parts])


def _rows(raws: Iterable[Mapping[str, Any]]) -> str:
    rows = [Row(**raw) for raw in raws]
    return markdown(("", "", "", ""), "-r--", ((row.name, row.figure, row.verdict, row.note) for row in rows)) if rows else ""


def markdown(head: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; `sides` has an r for each column that stands to the right."""
    lines = [head, ["---:" if side == "r" else "---" for side in sides], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
