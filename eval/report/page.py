"""The summary people read: a table for the terminal, and report.html, one page with everything in it for all runs."""

import base64
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.measure.result import Result, finished, latest
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.report.columns import Column, columns, floor_columns, written
from residual_saes.eval.report.pictures import short_labels
from residual_saes.shared.files import locked, publish_file
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.temporaries import remove_leftovers
from residual_saes.shared.units import format_count, format_layers


def trained_on(result: Result, whole: str) -> str:
    return whole if result.final else f"{result.snapshot} of {whole}, unfinished"


def text_table(runs: list[Run], results: dict[str, list[Result]]) -> str:
    """For a terminal: the latest SAE of each layer of every run, columns aligned; one that is not finished says so."""
    shown, lines = columns("terminal"), []
    for run in runs:
        whole = format_count(run.config.train.tokens)
        rows = [[c.title for c in shown] + ["trained on"]]
        rows += [[c.text(r) for c in shown] + [trained_on(r, whole)] for r in latest(results[run.name])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"\n{run.name}")
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


# --- the page ---

CAPTIONS = {
    "1_training_curves": "Training curves: on training batches, by layer.",
    "2_metrics_heatmap": "Metrics of each layer's latest SAE.",
    "3_sparsity_fidelity": "Sparsity against fidelity, every layer of every run.",
    "4_snapshots": "Metrics of each layer's snapshots.",
    "5_feature_density": "How often features fire: how density is spread over features, and shares by class.",
    "6_feature_importance": "Importance E[z²] of features by rank, and the share of it that the first of them hold.",
    "7_capacity": "F, α, g and d*, which predicted floors rest on, by layer.",
    "8_loss_floor_predictions": "Predicted floors beside measured ones.",
}
_OF_ALL = ("3_sparsity_fidelity", "7_capacity", "8_loss_floor_predictions")


@dataclass(kw_only=True, frozen=True, slots=True)
class Cell:
    text: str
    value: str  # what it is sorted by: a number or a word, "" where there is none
    href: str | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class Table:
    heads: list[str]
    rows: list[list[Cell]]
    unfinished: list[list[Cell]]


def templates(package: str, *, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader(package), autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True
    )


def write_report(
    folder: Path, runs: list[Run], results: dict[str, list[Result]], measured: Experiment | None, skipped: Skipped
) -> Path:
    """One page beside the run folders, with tables and pictures inside it, linking to results and feature pages."""
    labels = short_labels([run.name for run in runs])
    page = (
        templates("residual_saes.eval.report", autoescape=True)
        .get_template("report.html.j2")
        .render(
            runs=[
                _section(folder, run, label, results[run.name], number)
                for number, (run, label) in enumerate(zip(runs, labels, strict=True))
            ],
            warnings=warnings(runs, results, skipped),
            overview=_overview(runs, labels, results),
            pictures=_pictures(runs[0], _OF_ALL) if runs else [],
            measured=measured and _measured(measured),
        )
    )
    path = folder / "report.html"
    remove_leftovers(folder)
    with locked(folder):
        publish_file(path, page.encode())
    return path


def _section(folder: Path, run: Run, label: str, results: list[Result], number: int) -> dict[str, Any]:
    prefix = "" if run.path == folder else f"{quote(run.name)}/"
    whole = format_count(run.config.train.tokens)
    pages = _feature_pages(folder, run, results)
    links = [{"href": next(iter(pages.values())), "text": "feature pages"}] if pages else []
    links += [
        {"href": prefix + quote(str(path.relative_to(run.path))), "text": text}
        for path, text in (
            (run.path / "results" / "metrics.csv", "all snapshots and metrics (CSV)"),
            (run.path / "results" / "metrics.json", "all snapshots and metrics (JSON)"),
            (run.path / "README.md", "model card"),
            (run.path / "config.json", "configuration"),
        )
        if path.exists()
    ]
    return {
        "anchor": f"run-{number}",
        "name": run.name,
        "label": label,
        "table": _table(columns("page"), results, whole, pages),
        "floors": _table((*columns("page")[:1], *floor_columns(results)), results, whole, {}),
        "links": links,
        "pictures": _pictures(run, [name for name in CAPTIONS if name not in _OF_ALL]),
        "facts": settings(run.config) + provenance(run.config),
    }


def _feature_pages(folder: Path, run: Run, results: list[Result]) -> dict[Site, str]:
    """{site: address of the page of its features}, as eval/pages/write.py leaves them in <runs>/pages."""
    pages, address = folder / "pages", f"pages/index.html#{quote(run.name, safe='')}"
    shown = [r for r in latest(results) if any((pages / run.name).glob(f"layer{r.site.key}_{r.snapshot}.*"))]
    return {r.site: f"{address}/{r.snapshot}/{r.site}" for r in shown if (pages / "index.html").exists()}


def _table(shown: Sequence[Column], results: list[Result], whole: str, pages: dict[Site, str]) -> Table:
    def row(r: Result) -> list[Cell]:
        layer, *cells = (_cell(c.value(r), c.form) for c in shown)
        layer = dataclasses.replace(layer, href=pages.get(r.site))
        return [layer, Cell(text=trained_on(r, whole), value=str(r.trained_tokens)), *cells]

    return Table(
        heads=[shown[0].title, "trained on", *(c.title for c in shown[1:])],
        rows=[row(r) for r in latest(results) if r.final],
        unfinished=[row(r) for r in latest(results) if not r.final],
    )


def _cell(value: Any, form: str) -> Cell:
    return Cell(text=written(value, form), value="" if value is None else str(value))


def _word(text: str) -> Cell:
    return Cell(text=text, value=text)


def _overview(runs: list[Run], labels: list[str], results: dict[str, list[Result]]) -> Table:
    shown, rows = columns("means"), []
    for run, label in zip(runs, labels, strict=True):
        done, n_layers = finished(results[run.name]), run.config.cache.spec.n_layers
        layers = Cell(text=f"{len(done)} of {n_layers}", value=str(len(done)))
        rows.append([_word(label), layers, *(_cell(_mean(map(c.value, done)), c.form) for c in shown)])
    return Table(heads=["run", "finished layers", *(c.title for c in shown)], rows=rows, unfinished=[])


def _mean(values: Iterable[float | None]) -> float | None:
    """Over what is a number; None if nothing is."""
    numbers = [v for v in values if v is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def _pictures(run: Run, names: Iterable[str]) -> list[dict[str, str]]:
    paths = [(run.path / "plots" / f"{name}.png", CAPTIONS[name]) for name in names]
    return [
        {"data": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", "caption": caption}
        for path, caption in paths
        if path.exists()
    ]


def _measured(experiment: Experiment) -> dict[str, Any]:
    """An experiment of eval/floors as the page shows it."""
    floors = [
        [_cell(f.width, "{:d}"), _cell(f.seeds, "{:d}"), *(_cell(nats, "{:.4f}") for nats in (f.floor, f.spread, f.kl, f.ce))]
        for f in experiment.floors
    ]
    return measured_words(experiment) | {
        "floors": Table(heads=["width", "seeds", "floor, nats", "± seeds", "KL", "CE"], rows=floors, unfinished=[]),
        "fits": Table(heads=FIT_HEADS, rows=fit_rows(experiment), unfinished=[]),
    }


FIT_HEADS = ["run", "layer", "d*", "C", "± C", "B", "± B", "R²", "R² left out", "R² naive", "R² ln width", "error near d*"]


def fit_rows(experiment: Experiment) -> list[list[Cell]]:
    """How well each SAE's predicted floors explain the measured ones: a row of cells under FIT_HEADS for each."""
    return [
        [
            _word(p.run),
            _cell(p.layer, "{}"),
            _cell(p.critical_width, "{:.1f}"),
            *(_cell(value, "{:.3g}") for value in (fit.C, fit.C_se, fit.B, fit.B_se)),
            *(_cell(value, "{:.3f}") for value in (fit.r2, fit.left_out_r2)),
            *(_cell(other.left_out_r2 if other else None, "{:.3f}") for other in (p.fits["naive"], p.fits["log_width"])),
            _cell(fit.near_critical.error if fit.near_critical else None, "{:+.1%}"),
        ]
        for p in experiment.predictions
        if (fit := p.fits["predicted"])
    ]


def measured_words(experiment: Experiment) -> dict[str, Any]:
    return {
        "model": experiment.model,
        "setting": ", ".join(f"{name} {value}" for name, value in experiment.setting.items()),
        "teacher": written(experiment.teacher and experiment.teacher.ce, "{:.4f}"),
    }


def settings(config: RunConfig) -> list[tuple[str, str]]:
    """What the SAEs were trained with, as pairs of name and value."""
    pairs = []
    for name, value in config.stored["train"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        pairs += [(f"{name} {part}".strip(), "–" if v is None else str(v)) for part, v in parts]
    return pairs


def provenance(config: RunConfig) -> list[tuple[str, str]]:
    """What the SAEs were trained on, and by what."""
    spec = config.cache.spec
    return [
        ("language model", place(spec.model)),
        ("model commit", spec.model_commit or "–"),
        ("model content", spec.model_revision),
        ("text", place(spec.dataset)),
        ("text revision", spec.dataset_revision),
        ("split, column", f"{spec.split}, {spec.text_column}"),
        ("context", f"{spec.context} tokens, {'with' if spec.bos else 'without'} BOS"),
        ("forward pass", spec.precision),
        ("cached tokens", f"{spec.train_tokens:,} to train on, {spec.holdout_tokens:,} held out"),
        ("cache", config.cache.digest),
        ("run", config.digest),
        ("machine", ", ".join(f"{name} {value}" for name, value in config.machine.items())),
    ]


def place(name: str) -> str:
    """A name on the hub as it is; of a path on somebody's disk the last part."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


# --- what to know before the numbers are believed ---

_FLATTERED = 2.0  # times that FVU grows outside the largest directions
_MOSTLY_DEAD = 0.5


def warnings(runs: list[Run], results: dict[str, list[Result]], skipped: Skipped | None) -> list[str]:
    """One line each, for people."""
    lines = [f"Left out of this evaluation: {message}" for message in skipped.reasons] if skipped else []
    commonest = Counter(r.basis for run in runs for r in results[run.name]).most_common(1)
    for run in runs:
        lines += [f"{run.name}: {line}" for line in _of_run(run, results[run.name], commonest[0][0] if commonest else ())]
    return lines


def _of_run(run: Run, results: list[Result], usual: tuple[Any, ...]) -> list[str]:
    config, shown, lines = run.config, latest(results), []
    whole, n_layers = format_count(config.train.tokens), config.cache.spec.n_layers
    lines += [f"layer {r.site} is {trained_on(r, whole)}" for r in shown if not r.final]
    if config.train.step.decoder == "random":
        lines.append("the decoder's directions are as they were drawn: a baseline for other runs, and no SAEs to use")
    if without := config.train.left_out:
        lines.append(f"trained and measured without {without}: not to be compared with runs on all rows")
    if absent := sorted(set(range(n_layers)) - {r.site.layer for r in shown}):
        lines.append(f"no SAE of layers {format_layers(absent)} has been evaluated; the model has {n_layers}")
    if other := [r.site for r in shown if r.basis != usual]:
        lines.append(f"layers {format_sites(other)} are measured on other text or by other definitions than the rest")
    missing = {name for r in shown for name in ("fvu", "ce_recovered", "kl_div_score") if getattr(r, name) is None}
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
