"""What to know of runs before their numbers are believed."""

import math
from collections import Counter, defaultdict
from typing import Any

from residual_saes.eval.measure.result import Result, latest
from residual_saes.eval.measure.runs import Skipped
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import Site, format_sites

_FLATTERED = 2.0  # times that FVU grows outside the largest directions
_MOSTLY_DEAD = 0.5


def trained_on(result: Result, whole: str) -> str:
    return whole if result.final else f"{result.snapshot} of {whole}, unfinished"


def warnings(runs: list[Run], results: dict[str, list[Result]], skipped: Skipped | None) -> list[str]:
    """One line each, for people."""
    lines = [f"Left out of this evaluation: {message}" for message in skipped.reasons] if skipped else []
    commonest = Counter(r.basis for run in runs for r in results[run.name]).most_common(1)
    everywhere = defaultdict[str, set[Site]](set)  # by what is read and written
    for run in runs:
        everywhere[run.config.train.target].update(r.site for r in results[run.name])
    for run in runs:
        usual = commonest[0][0] if commonest else ()
        lines += [f"{run.name}: {line}" for line in _of_run(run, results[run.name], usual, everywhere[run.config.train.target])]
    return lines


def _of_run(run: Run, results: list[Result], usual: tuple[Any, ...], everywhere: set[Site]) -> list[str]:
    config, shown, lines = run.config, latest(results), []
    whole = config.train.amount
    lines += [f"layer {r.site} is {trained_on(r, whole)}" for r in shown if not r.final]
    if config.train.step.decoder == "random":
        lines.append("the decoder's directions are as they were drawn: a baseline for other runs, and no SAEs to use")
    if without := config.train.left_out:
        lines.append(f"trained and measured without {without}: not to be compared with runs on all rows")
    if absent := sorted(everywhere - {r.site for r in shown}):
        lines.append(f"no SAE of layers {format_sites(absent)}, which other runs have, has been evaluated")
    if other := [r.site for r in shown if r.basis != usual]:
        lines.append(f"layers {format_sites(other)} are measured on other text or by other definitions than the rest")
    names = ("fvu",) if not config.cache.spec.has_model else ("fvu", "ce_recovered", "kl_div_score")
    missing = {name for r in shown for name in names if getattr(r, name) is None}
    if missing:
        lines.append(f"{', '.join(sorted(missing))} of some layers is no number")
    if dead := [r.site for r in shown if (r.dead_share or 0) > _MOSTLY_DEAD]:
        lines.append(f"more than half of the features of layers {format_sites(dead)} are dead")
    ratios = [(r.fvu_without_top3 / r.fvu, r.site) for r in shown if r.fvu and r.fvu_without_top3]
    if ratios and max(ratios)[0] > _FLATTERED:
        most, site = max(ratios)
        lines.append(
            f"FVU is flattered by a few directions: outside the three largest it is up to {most:.1f} times (layer {site})"
        )
    if dense := [r.site for r in shown if r.alpha is not None and r.alpha < 1 - 1 / math.e]:
        lines.append(f"features of layers {format_sites(dense)} are too dense for the formula of predicted floors")
    return lines
