"""All runs beside each other: means over the layers that they share, and which of them no other is better than."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from residual_saes.eval.measure.result import Result
from residual_saes.eval.report.columns import columns, written
from residual_saes.eval.report.figures import RunData, common_sites, mean
from residual_saes.shared.sites import Site

_Means = dict[str | int, float | None]  # {key of a column: mean}
_THIRD = {"CE recovered": "ce_recovered", "F1": "f1"}  # judges beside L0 and FVU: of a language model, of a world


@dataclass(kw_only=True, frozen=True, slots=True)
class Overview:
    """What the page's first table needs, there and when other runs or layers are chosen."""

    sites: list[Site]  # that all runs have finished
    means: list[_Means]  # of each run over these
    data: dict[str, Any]  # for the page's script: how columns are written, and of each run {site: values}


def overview(runs: Sequence[RunData]) -> Overview:
    sites = common_sites([data.results for data in runs])
    shown = columns("means", (r for data in runs for r in data.results))

    def values(r: Result) -> list[float | None]:
        return [c.value(r) for c in shown]

    return Overview(
        sites=sites,
        means=[means([r for r in data.latest if r.final and r.site in sites]) for data in runs],
        data={
            "forms": [c.form.strip("{:}") for c in shown],
            "runs": [{str(r.site): values(r) for r in data.latest if r.final} for data in runs],
        },
    )


def means(results: Sequence[Result]) -> _Means:
    return {c.key: mean(map(c.value, results)) for c in columns("means")}


def verdict(names: Sequence[str], of: Sequence[_Means]) -> list[str]:
    """Which runs are worth taking, a sentence each: those that no other beats, and of the others which one does."""
    title, third = next(((t, k) for t, k in _THIRD.items() if any(m[k] is not None for m in of)), ("", "l0"))
    known = [(n, m) for n, m in zip(names, of, strict=True) if None not in (m["l0"], m["fvu"], m[third])]
    if len(known) < 2 or not title:
        return []
    lines = []
    for name, mine in known:
        better = [other for other, theirs in known if _beats(theirs, mine, third)]
        numbers = f"FVU {written(mine['fvu'], '{:.3f}')}, {title} {written(mine[third], '{:.3f}')}"
        worth = "no other is as sparse and loses less" if not better else f"{better[0]} is as sparse and loses less"
        lines.append(f"{name}: {numbers} at L0 {written(mine['l0'], '{:.0f}')}; {worth}")
    return sorted(lines, key=lambda line: "no other" not in line)


def _beats(one: _Means, other: _Means, third: str) -> bool:
    """Whether it is as sparse and as faithful by both measures, and better by one of the three."""
    pairs = [(one["l0"], other["l0"]), (one["fvu"], other["fvu"]), (other[third], one[third])]
    return all(a is not None and b is not None and a <= b for a, b in pairs) and any(a != b for a, b in pairs)
