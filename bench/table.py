"""The markdown that README shows, from results and nothing else: the table, the goals, and the notes below."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.goals import goals
from bench.report import Comparison, Entry, Results, Timing

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def publish(results: Results, readme: Path) -> None:
    """Put the table between the two marker comments, which must be there."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs one {BEGIN} and, after it, one {END}")
    before, _, rest = text.partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{rest.partition(END)[2]}")


def markdown(results: Results) -> str:
    about = results.machine
    hardware = f"{about.cpu}, {about.cores} cores, {about.memory_gib:.0f} GiB" + (f", {about.gpu}" if about.gpu else "")
    flags = ", ".join(flag for flag in about.flags if "bf16" in flag) or "no bf16 instructions"
    busy = f" **Other work held {results.busy:.0%} of the processors.**" if results.busy > 0.1 else ""
    lines = [
        f"Measured on {hardware} ({flags}), torch {about.torch}, {results.date}: rates are medians of interleaved rounds, "
        "ratios medians of the rounds' own ratios. Ratios carry over to other machines better than rates do." + busy,
        "",
        "| | rate | ours beside it | spread |",
        "| --- | ---: | ---: | ---: |",
    ]
    for comparison in results.comparisons:
        lines.append(f"| **{comparison.name}** | | | |")
        lines += [_line(comparison, entry) for entry in comparison.entries]
    lines += ["", "| goal | measured | |", "| --- | ---: | --- |"]
    lines += [f"| {goal.name} {goal.wanted} | {goal.measured} | {goal.verdict} |" for goal in goals(results)]
    notes = [note for comparison in results.comparisons for note in _notes(comparison)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _line(comparison: Comparison, entry: Entry) -> str:
    name = f"_{entry.name}_ (limit)" if entry.role == "limit" else entry.name
    if entry.rate is None:
        return f"| {name} | no figure: {_cell(entry.failure or 'not run')} | | |"
    rate = _rate(entry.rate, comparison.unit)
    if flop := entry.figures.get("flop"):
        rate += f", {flop * entry.rate / entry.work / 1e12:.2f} TFLOP/s"
    return f"| {name} | {rate} | {_beside(comparison, entry)} | {Timing(seconds=entry.seconds).spread:.0%} |"


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


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
