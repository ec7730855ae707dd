"""The model card of a run, its README.md, and its entry in SAELens' registry.

Whatever comes from outside (names of models, texts and runs) is escaped on its way into Markdown unless a filter has made it
YAML or Python, so that no name can end a table, a code block or the front matter.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from residual_saes.eval.floors.measured import Experiment
from residual_saes.eval.measure.result import Result, finished, latest
from residual_saes.eval.pages.example import example
from residual_saes.eval.report.columns import Column, columns, floor_columns, written
from residual_saes.eval.report.page import CAPTIONS, FIT_HEADS, OF_SOME, fit_rows, measured_words, templates
from residual_saes.eval.report.settings import place, provenance, settings
from residual_saes.eval.report.warnings import trained_on, warnings
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import locked, publish_text
from residual_saes.shared.identity import unpin
from residual_saes.shared.lm import family_of, known_model
from residual_saes.shared.progress import say
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.target import SHARED
from residual_saes.shared.sites import HOOKS, RESID_POST, Site, format_sites, lens_name

REGISTRY = "pretrained_saes.yaml"
MARKER = "<!-- written by `rsae eval`; remove this line to keep your own changes -->"
_LICENSE = "apache-2.0"
_GLANCE = ("l0", "fvu", "ce_recovered", "f1")
_HOSTILE = re.compile(r"([\\`*_\[\]<>|~$&])")


class Safe(str):
    """Text that is Markdown already."""

    __slots__ = ()


def markdown(value: Any) -> Safe:
    """A value as plain text in Markdown, also inside a table: one line, nothing in it means anything."""
    if isinstance(value, Safe):
        return value
    return Safe(_HOSTILE.sub(r"\\\1", " ".join(str(value).split())).replace("\\<", "&lt;").replace("\\>", "&gt;"))


def _literal(value: Any) -> Safe:
    """JSON: a string of YAML and of Python, with nothing in it that ends a line or a code block."""
    text = json.dumps(value, ensure_ascii=False)  # YAML knows no surrogates
    return Safe(re.sub(r"[`\x7f-\x9f\u2028\u2029\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text))


@dataclass(kw_only=True, frozen=True, slots=True)
class Table:
    heads: list[str]
    rows: list[list[str]]


@dataclass(kw_only=True, frozen=True, slots=True)
class Publication:
    """What a run is published as."""

    owner: str = "your-name"  # on the hub: a user or an organisation
    name: str | None = None  # of the repository; None: the run's
    license: str = _LICENSE

    def repository(self, run: Run) -> str:
        return f"{self.owner}/{self.name or repository_name(run.name)}"


def repository_name(name: str) -> str:
    """A run's name as the hub takes it: letters, digits, single - and ., at most 96, none of these at an end."""
    return re.sub(r"([.-])[.-]+", r"\1", re.sub(r"[^A-Za-z0-9_.-]+", "-", name)).strip("-.")[:96].rstrip("-.") or "saes"


def write_card(
    run: Run, results: list[Result], measured: Experiment | None, sisters: list[Run], publication: Publication | None = None
) -> None:
    """README.md of a run, unless somebody has written his own there, and the entry for SAELens' registry. Raises UserError."""
    path, publication = run.path / "README.md", publication or Publication()
    with locked(run.path):
        if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
            say(f"note: {path} is your own and stays as it is; move it away to have one written", err=True)
        else:
            publish_text(path, card(run, results, measured, sisters, publication))
        if exported(run.config):
            publish_text(run.path / REGISTRY, registry_entry(run, results, publication))


def exported(config: RunConfig) -> bool:
    """Whether there is a folder a layer in SAELens' form, which has no crosscoders."""
    form = config.train.target
    return not form or ">" in form or form.startswith(SHARED)


def card(run: Run, results: list[Result], measured: Experiment | None, sisters: list[Run], publication: Publication) -> str:
    """The whole text. It says nothing that differs between two runs of the same training, such as times."""
    config = run.config
    train, spec, form = config.train, config.cache.spec, config.train.target
    whole, done = train.amount, finished(results)
    others = [r for r in latest(results) if not r.final]
    floors = (*columns("floors"), *floor_columns(results))
    base_model, dataset = _on_hub(config)
    family = family_of(known_model(spec.model, spec.model_commit or None))
    environment = templates("residual_saes.eval.publish", autoescape=False)
    environment.finalize = markdown
    environment.filters |= {"yaml": _literal, "python": _literal}
    shown = columns("card", results)
    heads = [c.card_title or c.title for c in shown]
    glance = [c for c in shown if c.key in _GLANCE]
    others_load = exported(config)
    kind = f"Transcoders {form}" if ">" in form else "A crosscoder" if not others_load else "One SAE that all of them share,"
    return environment.get_template("card.md.j2").render(
        license=publication.license,
        marker=Safe(MARKER),
        base_model=base_model,
        dataset=dataset,
        name=run.name,
        repo=publication.repository(run),
        model=place(spec.model),
        model_name=base_model or place(spec.model),
        revision=spec.model_commit or "main",
        text=place(spec.dataset),
        d_model=spec.d_model,
        features=round(train.expansion * spec.d_model),
        world=not spec.has_model,
        imported=spec.imported is not None,
        form=form,
        kind=kind,
        exported=others_load,
        transcodes=">" in form,
        skip=train.skip,
        one=len({s.site for s in run.snapshots()}) == 1,
        glance=Table(
            heads=[*["folder"] * others_load, "hook", *(c.title for c in glance)],
            rows=[_glance(r, family, glance)[not others_load :] for r in done],
        ),
        shown=_feature(run, done),
        tokens=train.tokens,
        source=train.source,
        layers=format_sites({site for s in run.snapshots() for site in config.target_at(s.site).outputs}) or "none yet",
        sparsity=config.reading,
        bos=spec.bos,
        warnings=[line.removeprefix(f"{run.name}: ") for line in warnings([run], {run.name: results}, None)],
        **_example(done[len(done) // 2].site if done else Site(0), family),
        snapshots=[Safe(label) for label in run.labels if label != FINAL],
        measured_on=_counts(r.tokens for r in latest(results)),
        ce_on=_counts(r.ce_tokens for r in latest(results)),
        probed=_counts(r.probe_sets for r in done if r.probe_sets) if any(r.probe_sets for r in done) else None,
        metrics=Table(heads=heads, rows=[_row(r, shown) for r in done]),
        unfinished=Table(heads=[*heads, "trained on"], rows=[[*_row(r, shown), trained_on(r, whole)] for r in others]),
        pictures=[
            (Safe(f"plots/{name}.png"), caption) for name, caption in (CAPTIONS | OF_SOME).items() if _has_picture(run, name)
        ],
        floors=Table(heads=[c.title for c in floors], rows=[[c.text(r) for c in floors] for r in done]),
        measured=measured and _measured(measured, run),
        settings=settings(config),
        provenance=provenance(config),
        sisters=_sisters(sisters, publication),
    )


def _example(site: Site, family: str | None) -> dict[str, Any]:
    """A site as the card's code reads it: the module in a block by the model's family, or by each that might be."""
    plain, rows = site.hook == RESID_POST, HOOKS[site.hook]
    modules = {name: place.module for name, place in rows.items() if not plain and family in (name, None)}
    return {
        "example": site,
        "folder": f"layer_{site}",
        "hook": Safe("" if plain else f".{site.hook}"),
        "modules": modules,
        "reads": any(place.side == "input" for place in rows.values()),
    }


def _feature(run: Run, done: list[Result]) -> dict[str, Any] | None:
    """A feature of the first finished layer whose feature pages lie beside the runs."""
    finals = {s.site: s for s in run.snapshots() if s.label == FINAL}
    for site in [r.site for r in done if r.site in finals]:
        if (feature := example(run, finals[site], run.path.parent / "pages")) is not None:
            return {"site": site, "percent": f"{100 * feature.density:.2g}", "of": feature}
    return None


def _counts(numbers: Iterable[int]) -> str:
    return " or ".join(f"{n:,}" for n in sorted(set(numbers))) or "no"


def _row(r: Result, shown: Sequence[Column]) -> list[str]:
    return [written(c.value(r), c.card_form or c.form) for c in shown]


def _glance(r: Result, family: str | None, shown: Sequence[Column]) -> list[str]:
    """What the user of another tool looks for first."""
    return [f"layer_{r.site}", lens_name(r.site, family), *(c.text(r) for c in shown)]


def _has_picture(run: Run, name: str) -> bool:
    return (run.path / "plots" / f"{name}.png").exists()


def _on_hub(config: RunConfig) -> tuple[str | None, str | None]:
    """Names of language model and text that others find on the hub; None for what lay in a folder."""
    spec = config.cache.spec
    return spec.model if spec.model_commit else None, spec.dataset if unpin(spec.dataset_revision) else None


def _measured(experiment: Experiment, run: Run) -> dict[str, Any]:
    """Floors of students, and how well this run's SAEs predict them."""
    words = measured_words(experiment)
    fits = [[cell.text for cell in cells] for name, *cells in fit_rows(experiment) if name.text == run.name]
    floors = [
        [str(f.width), str(f.seeds), *(written(nats, "{:.4f}") for nats in (f.floor, f.spread, f.kl, f.ce))]
        for f in experiment.floors
    ]
    return words | {
        "floors": Table(heads=["width", "seeds", "floor, nats a token", "± seeds", "KL", "CE"], rows=floors),
        "fits": Table(heads=FIT_HEADS[1:], rows=fits),
    }


def _sisters(sisters: list[Run], publication: Publication) -> list[dict[str, Any]]:
    if publication.name is not None:  # then the others' names on the hub are not known
        return [{"name": run.name, "url": None} for run in sisters]
    url = "https://huggingface.co/"
    return [{"name": run.name, "url": Safe(url + quote(publication.repository(run)))} for run in sisters]


def registry_entry(run: Run, results: list[Result], publication: Publication) -> str:
    """An entry of SAELens' sae_lens/pretrained_saes.yaml, of all layers that are finished."""
    config = run.config
    base_model = _on_hub(config)[0]
    repository = publication.repository(run)
    lines = [f"{_literal(repository_name(run.name))}:", "  conversion_func: null"]
    if base_model:
        lines += ["  links:", f"    model: {_literal(f'https://huggingface.co/{base_model}')}"]
    lines += [
        f"  model: {_literal(base_model or place(config.cache.spec.model))}",
        f"  repo_id: {_literal(repository)}",
    ]
    lines.append("  saes:" if finished(results) else "  saes: []")
    for r in finished(results):
        lines += [f"  - id: blocks.{r.site.layer}.hook_{r.site.hook}", f"    path: layer_{r.site}"]
        numbers = {"l0": r.l0, "variance_explained": r.explained_variance}
        lines += [f"    {name}: {value:.5g}" for name, value in numbers.items() if value is not None]
    return "\n".join(lines) + "\n"


def sister_runs(run: Run) -> list[Run]:
    """The other runs beside it that were trained on the same cache."""
    digest, folder = run.config.cache.digest, run.path.resolve()
    beside = [path for path in sorted(folder.parent.glob("*/config.json")) if path.parent != folder]
    return [other for path in beside if _cache_digest(other := Run(path.parent)) == digest]


def _cache_digest(run: Run) -> str | None:
    try:
        return run.config.cache.digest
    except UserError:  # somebody else's config.json
        return None
