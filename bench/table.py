"""The tables in docs/findings, from the results and nothing else.

speed.md gets the lines that decide, and the goals; speed-details.md every line, the notes, and whatever GPUs were measured;
quality.md the comparison at equal L0.
"""

import json
import statistics
from pathlib import Path

from bench import project, quality
from bench.goals import goals
from bench.harness import Comparison, Entry
from bench.report import RESULTS, Results, format_rate, markdown, read
from residual_saes.fleet.hours import RATES

ROOT = RESULTS.parent.parent
FINDINGS = ROOT / "docs" / "findings"
MARKERS = "<!-- {}:begin -->", "<!-- {}:end -->"
DECIDING = (  # comparison, role, key: the lines for speed.md
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
DECIDING_ON_GPUS = (
    ("training", "ours", "uneven"),
    ("training", "peer", "sparsify"),
    ("settings", "ours", "dense"),
    ("settings", "ours", "sparse"),
    ("settings", "ours", "mixed"),
    ("reading", "ours", "memory"),
    ("harvest", "ours", "disk"),
    ("harvest", "ours", "memory"),
)


def publish(
    results: Path = RESULTS,
    speed: Path = FINDINGS / "speed.md",
    compared: Path = FINDINGS / "quality.md",
    details_file: Path = FINDINGS / "speed-details.md",
    rates_file: Path = RATES,
) -> None:
    """Write all of it again from every result there is. The first two pages need the marker comments."""
    machines = read(results)
    gpus, cpus = ([one for one in machines if (one.machine.gpu is not None) == gpu] for gpu in (True, False))
    short = [summary(one) for one in (*gpus[-1:], *cpus)]
    speed.write_text(_between(speed.read_text(), "bench", short))
    if (path := results / quality.NAME).exists():
        raw = json.loads(path.read_text())
        table = markdown(quality.HEAD, quality.SIDES, quality.rows(raw["points"]))
        parts = [quality.about(raw), table, "![FVU against L0](../images/quality.png)"]
        compared.write_text(_between(compared.read_text(), "quality", parts))
    title, source = "# Findings: speed, line by line", "Written by `python -m bench tables` from `bench/results/`."
    long = [title, source, *(details(one) for one in reversed(machines))]
    details_file.write_text("\n\n".join(long) + "\n")
    project.write_rates(results, rates_file)


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
    for key, role, which in DECIDING + DECIDING_ON_GPUS * (results.machine.gpu is not None):
        comparison = results.path(key)
        entry = comparison.find(role, which) if comparison is not None else None
        if comparison is not None and entry is not None:
            name, rate, beside, _ = _cells(comparison, entry)
            lines.append((f"{comparison.name.partition(',')[0]}: {name}", rate, beside))
    shown = markdown(("", "rate", "ours beside it"), "-rr", lines)
    return "\n\n".join([about(results), shown, _goals(results), "Every line, with notes: [details](speed-details.md)."])


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
    rate = format_rate(entry.rate, comparison.unit)
    if flop := entry.figures.get("flop"):
        rate += f", {flop * entry.rate / entry.work / 1e12:.2f} TFLOP/s"
    return name, rate, _beside(comparison, entry), f"{entry.spread:.0%}"


def _beside(comparison: Comparison, entry: Entry) -> str:
    """Ours against a limit in percent, against a peer in multiples, against a base in cost; each of ours by its label."""
    if entry.role == "ours":
        shown = {"idle": "{:.2%} outside steps", "peak GPU bytes": "{:,.0f} bytes of GPU memory at the peak"}
        return ", ".join(text.format(entry.figures[name]) for name, text in shown.items() if name in entry.figures)
    return ", ".join(f"{ours.key} {_standing(ours, entry)}".strip() for ours in comparison.rivals(entry))


def _standing(ours: Entry, other: Entry) -> str:
    if other.role == "base":
        return f"costs {statistics.median(other.ratios(ours)):.3f} ×"
    ratio = statistics.median(ours.ratios(other))
    return f"{ratio:.0%}" if other.role == "limit" else f"{ratio:.2f} ×"


def _notes(comparison: Comparison) -> list[str]:
    parts = [comparison.note, *(f"{entry.name}: {entry.note}" for entry in comparison.entries if entry.note)]
    shown = "; ".join(filter(None, parts))
    return [f"- {comparison.name}. {shown}."] if shown else []
