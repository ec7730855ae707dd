"""The summary people read: a table for the terminal, report.html with everything of all runs in it, and floors.html."""

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.measure.probed import Compared, compared
from residual_saes.eval.measure.result import Result, finished, latest
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.report.columns import Column, columns, floor_columns, written
from residual_saes.eval.report.figures import RunData
from residual_saes.eval.report.overview import overview, verdict
from residual_saes.eval.report.pictures import run_data, short_labels
from residual_saes.eval.report.settings import command, differences, provenance, rate, settings
from residual_saes.eval.report.svg import inline
from residual_saes.eval.report.warnings import trained_on, warnings
from residual_saes.shared.files import locked, publish_text
from residual_saes.shared.runs.run import Run
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.temporaries import remove_leftovers


def text_table(runs: list[Run], results: dict[str, list[Result]], which: str = "terminal") -> str:
    """For a terminal: the latest SAE of each layer of every run, columns aligned; one that is not finished says so. `which`
    columns: "terminal", or "truth"."""
    shown, lines = columns(which, [r for run in runs for r in results[run.name]]), []
    for run in runs:
        whole = run.config.train.amount
        rows = [[c.title for c in shown] + ["trained on"]]
        rows += [[c.text(r) for c in shown] + [trained_on(r, whole)] for r in latest(results[run.name])]
        lines += [f"\n{run.name}", *_aligned(rows)]
    return "\n".join(lines)


def probes_table(rows: Sequence[Compared]) -> str:
    """For a terminal: what probes make of each dictionary, by layer."""
    table = probes(rows)
    return "\n".join(_aligned([[head.title for head in table.heads], *([cell.text for cell in row] for row in table.rows)]))


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


# --- the page ---

CAPTIONS = {
    "1_training_curves": "Training curves: on training batches, by layer.",
    "2_metrics_heatmap": "Metrics of each layer's latest SAE; colours are merit.",
    "3_sparsity_fidelity": "Sparsity against fidelity: a line a kind of setting, means over the layers that all runs have.",
    "4_snapshots": "Metrics of each layer's snapshots.",
    "5_feature_density": "How often features fire: shares by class, and how density is spread over features.",
    "6_feature_importance": "Importance E[z²] of features by rank, and the share of it that the first of them hold.",
    "7_capacity": "g(α) and d*, which predicted floors rest on, by layer.",
    "8_loss_floor_predictions": "Predicted floors beside measured ones.",
}
OF_SOME = {
    "9_feature_layers": "Where features live: by the layer with the largest share of their squared decoder norm, every layer's "
    "mean share, and over how many layers they spread.",
}
_OF_ALL, _OF_FLOORS = ("3_sparsity_fidelity",), ("7_capacity", "8_loss_floor_predictions")
_SEEN, _FOLDED = ("9_feature_layers", "5_feature_density"), ("1_training_curves", "4_snapshots", "6_feature_importance")


@dataclass(kw_only=True, frozen=True, slots=True)
class Cell:
    text: str
    value: str  # what it is sorted by: a number or a word, "" where there is none
    href: str | None = None
    merit: float | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class Head:
    title: str
    group: str = ""  # said above the first of its columns
    more: bool = False  # folded at first


@dataclass(kw_only=True, frozen=True, slots=True)
class Table:
    heads: list[Head]
    rows: list[list[Cell]]
    unfinished: list[list[Cell]] = dataclasses.field(default_factory=list)

    @property
    def folds(self) -> bool:
        return any(head.more for head in self.heads)


def templates(package: str, *, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader(package), autoescape=autoescape, undefined=StrictUndefined, keep_trailing_newline=True
    )


def write_report(
    folder: Path, runs: list[Run], results: dict[str, list[Result]], measured: Experiment | None, skipped: Skipped
) -> Path:
    """Two pages beside the run folders, with tables and pictures inside them, linking to results and feature pages."""
    labels = short_labels([run.name for run in runs])
    datas = [run_data(run, label, results[run.name]) for run, label in zip(runs, labels, strict=True)]
    of_all = overview(datas)
    report: dict[str, Any] = {
        "probes": None,
        "runs": [_section(folder, data, number, skipped) for number, data in enumerate(datas)],
        "warnings": warnings(runs, results, skipped),
        "verdict": verdict(labels, of_all.means),
        "overview": _overview(datas, of_all.means, skipped),
        "data": of_all.data,
        "common": format_sites(of_all.sites) or "none",
        "sites": sorted({r.site for data in datas for r in finished(data.results)}),
        "differences": _differences(datas),
        "pictures": _pictures(runs[0], _OF_ALL) if runs else [],
    }
    with skipped.leaving_out():
        if runs and (rows := compared(folder, runs, runs[0].config.cache.digest)):
            report["probes"] = probes(rows)
    floors = {
        "pictures": _pictures(runs[0], _OF_FLOORS) if runs else [],
        "measured": measured and _measured(measured),
        "predicted": [(data.run.name, _predicted(data)) for data in datas],
    }
    remove_leftovers(folder)
    with locked(folder):
        for name, facts in (("floors", floors), ("report", report)):
            publish_text(folder / f"{name}.html", _rendered(name, facts))
    return folder / "report.html"


def _rendered(name: str, facts: dict[str, Any]) -> str:
    """A page whose own script runs and no other, whatever a picture in somebody's folder holds."""
    environment = templates("residual_saes.eval.report", autoescape=True)
    script = Markup(environment.get_template("report.js").render())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(f"{name}.html.j2").render(script=script, script_digest=digest, **facts)


def _section(folder: Path, data: RunData, number: int, skipped: Skipped) -> dict[str, Any]:
    run, results = data.run, data.results
    prefix = "" if run.path == folder else f"{quote(run.name)}/"
    pages, config = _feature_pages(folder, run, results), run.config
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
        "label": data.label,
        "setting": data.setting,
        "tokens": config.train.amount,
        "command": command(config.stored["train"], {s.site for s in run.snapshots()}),
        "table": _table(columns("page", results), results, config.train.amount, pages, fold=True),
        "links": links,
        "pictures": _pictures(run, _SEEN),
        "folded": _pictures(run, _FOLDED),
        "facts": settings(config) + provenance(config),
    }


def _predicted(data: RunData) -> Table:
    shown = (*columns("floors"), *floor_columns(data.results))
    return _table(shown, data.results, data.run.config.train.amount)


def _feature_pages(folder: Path, run: Run, results: list[Result]) -> dict[Site, str]:
    """{site: address of the page of its features}, as eval/pages/write.py leaves them in <runs>/pages."""
    pages, address = folder / "pages", f"pages/index.html#{quote(run.name, safe='')}"
    shown = [r for r in latest(results) if any((pages / run.name).glob(f"layer{r.site.key}_{r.snapshot}.*"))]
    return {r.site: f"{address}/{r.snapshot}/{r.site}" for r in shown if (pages / "index.html").exists()}


def _table(
    shown: Sequence[Column], results: list[Result], whole: str, pages: dict[Site, str] | None = None, *, fold: bool = False
) -> Table:
    """A row a layer; how far each was trained stands there where not all are finished."""
    told = any(not r.final for r in latest(results))

    def row(r: Result) -> list[Cell]:
        layer, *cells = (_cell(value := c.value(r), c.form, c.merit(value)) for c in shown)
        layer = dataclasses.replace(layer, href=(pages or {}).get(r.site))
        return [layer, *([Cell(text=trained_on(r, whole), value=str(r.trained_tokens))] if told else []), *cells]

    heads = [Head(title=c.title, group=c.group, more=c.folded and fold) for c in shown]
    return Table(
        heads=[heads[0], *([Head(title="trained on")] if told else []), *heads[1:]],
        rows=[row(r) for r in latest(results) if r.final],
        unfinished=[row(r) for r in latest(results) if not r.final],
    )


def _cell(value: Any, form: str, merit: float | None = None) -> Cell:
    return Cell(text=written(value, form), value="" if value is None else str(value), merit=merit)


def _word(text: str) -> Cell:
    return Cell(text=text, value=text)


def _overview(datas: list[RunData], means: Sequence[dict[Any, Any]], skipped: Skipped) -> Table:
    shown, rows = columns("means", (r for data in datas for r in data.results)), []
    for data, of in zip(datas, means, strict=True):
        done, n_layers = finished(data.results), data.run.config.cache.spec.n_layers
        layers = Cell(text=f"{len(done)} of {n_layers}", value=str(len(done)))
        took = ("–", "–")
        with skipped.leaving_out():
            took = rate({r.site: data.run.metrics(r.site) for r in data.latest})
        cells = [_cell(of[c.key], c.form, c.merit(of[c.key])) for c in shown]
        rows.append([_word(data.label), _word(data.setting), layers, *cells, *map(_word, took)])
    heads = ["run", "setting", "finished layers", *(c.title for c in shown), "time a layer", "rate"]
    if all(row[-1].text == "–" for row in rows):  # curves of earlier versions do not tell
        heads, rows = heads[:-2], [row[:-2] for row in rows]
    return Table(heads=_heads(*heads), rows=rows)


def probes(rows: Sequence[Compared]) -> Table:
    """Mean AUC of each dictionary beside the others of its layer."""
    ks = list(dict.fromkeys(k for row in rows for k in row.auc))
    return Table(
        heads=_heads("layer", "dictionary", "features", "sets", *(f"AUC, k = {k}" for k in ks)),
        rows=[
            [_cell(r.site, "{}"), _word(r.name), _cell(r.features, "{:,}"), _cell(r.sets, "{}")]
            + [_cell(r.auc.get(k), "{:.3f}") for k in ks]
            for r in rows
        ],
    )


def _heads(*titles: str) -> list[Head]:
    return [Head(title=title) for title in titles]


def _differences(datas: list[RunData]) -> Table | None:
    """What was not the same in all runs, beside the setting."""
    unlike = differences([data.run.config for data in datas])
    if not unlike or not unlike[0]:
        return None
    rows = [[_word(data.label), *map(_word, of.values())] for data, of in zip(datas, unlike, strict=True)]
    return Table(heads=_heads("run", *unlike[0]), rows=rows)


def _pictures(run: Run, names: Iterable[str]) -> list[dict[str, Any]]:
    paths, captions = [(run.path / "plots" / f"{name}.svg", name) for name in names], CAPTIONS | OF_SOME
    digest = hashlib.sha256(run.name.encode(errors="replace")).hexdigest()
    return [
        {"svg": inline(path, f"p{name[0]}{digest[:6]}", captions[name]),
         "caption": captions[name]}
        for path, name in paths
        if path.exists()
    ]  # fmt: skip


def _measured(experiment: Experiment) -> dict[str, Any]:
    """An experiment of eval/floors as the page shows it."""
    floors = [
        [_cell(f.width, "{:d}"), _cell(f.seeds, "{:d}"), *(_cell(nats, "{:.4f}") for nats in (f.floor, f.spread, f.kl, f.ce))]
        for f in experiment.floors
    ]
    return measured_words(experiment) | {
        "floors": Table(heads=_heads("width", "seeds", "floor, nats", "± seeds", "KL", "CE"), rows=floors),
        "fits": Table(heads=_heads(*FIT_HEADS), rows=fit_rows(experiment)),
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
            *(_cell(other.left_out_r2 if other else None, "{:.3f}") for other in (p.fits.naive, p.fits.log_width)),
            _cell(fit.near_critical.error if fit.near_critical else None, "{:+.1%}"),
        ]
        for p in experiment.predictions
        if (fit := p.fits.predicted)
    ]


def measured_words(experiment: Experiment) -> dict[str, Any]:
    return {
        "model": experiment.model,
        "setting": ", ".join(f"{name} {value}" for name, value in experiment.setting.items()),
        "teacher": written(experiment.teacher and experiment.teacher.ce, "{:.4f}"),
    }
