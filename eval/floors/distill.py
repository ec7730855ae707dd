"""Measured loss floors: students narrower than the model, trained from it, and what is left between them on held-out tokens.

`rsae eval distill` trains students (students.py) of several widths and seeds on the cache's training tokens, measures
each on its held-out tokens, and holds the floors beside those that eval/measure/predicted.py predicts from every SAE that
`rsae eval` has measured. All of it is in one file, <runs>/distilled.json (measured.py).
"""

import contextlib
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from residual_saes.eval.floors.fit import Fit, fit_floors, spread
from residual_saes.eval.floors.measured import (
    Experiment,
    Fits,
    Floor,
    Predicted,
    Prediction,
    StudentRecord,
    TeacherRecord,
    experiments_in,
)
from residual_saes.eval.floors.students import DistillConfig, Student, Teacher, Texts, student_config
from residual_saes.eval.measure.features import measured_features
from residual_saes.eval.measure.heldout import heldout_tokens
from residual_saes.eval.measure.metrics import finite
from residual_saes.eval.measure.predicted import ALIVE_ABOVE, Statistics, capacity, critical_width, floors, naive_floors
from residual_saes.eval.measure.runs import Skipped, find_runs
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import MINUTES, Number, option
from residual_saes.shared.device import announce, device_kind
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, refuse_links, sync_dir
from residual_saes.shared.identity import harvested_model
from residual_saes.shared.lm import load_config, load_model
from residual_saes.shared.progress import Progress
from residual_saes.shared.runs.run import Run, Snapshot
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import canonical
from residual_saes.shared.sites import format_sites
from residual_saes.shared.stop import finishing
from residual_saes.shared.temporaries import remove_leftovers
from residual_saes.shared.units import parse_count


@dataclass(kw_only=True, frozen=True, slots=True)
class DistillOptions:
    """What is to be there in the end, and how it is come by; nothing here changes a student."""

    runs: Path  # gets distilled.json, and the states of unfinished students under distilling/
    widths: tuple[int, ...]
    seeds: int = option("Students of each width.", 3, type=click.IntRange(1, 1000))
    eval_tokens: int = option("Held-out tokens to measure floors on [default: all].", type=parse_count)
    device: torch.device
    model: str | None = None  # where the language model lies, if not where the cache says
    alive_above: float = option("Density.", ALIVE_ABOVE, type=Number(0, 1))
    save_minutes: float = option("Between resume states.", 5.0, type=MINUTES)


def distill(cache: Cache, config: DistillConfig, options: DistillOptions, skipped: Skipped) -> Experiment:
    """Train and measure the students that are missing, and predict for every SAE that is there; the experiment as it is then.

    Raises UserError for what cannot be done, before anything is trained. SIGTERM and Ctrl-C are raised when the step in hand is
    done and its state saved.
    """
    spec = cache.spec
    if spec.holdout_blocks == 0:
        raise UserError(f"{cache.path} holds out nothing to measure floors on: harvest with --holdout-tokens")
    steps = config.steps(spec.context)
    if steps < 1:
        raise UserError(f"{config.tokens:,} tokens are less than one batch of {config.batch} x {spec.context}: lower --batch")
    folder = harvested_model(cache, options.model).folder
    heldout = heldout_tokens(cache, options.eval_tokens)
    setting = asdict(config) | {"heldout_tokens": heldout.numel()}
    digest = hashlib.sha256(canonical({"cache": cache.digest, "setting": setting})).hexdigest()
    _require_widths(str(folder), options.widths)
    store = _Store(make_dir(options.runs), digest, cache, setting)
    sync_dir(options.runs.absolute().parent)
    states = options.runs / "distilling" / digest[:16]
    refuse_links(states, states.parent)
    store.add(predictions=_predictions(cache, options, skipped))
    _drop_states(states, store.known)  # a kill may have come before it
    due = {s: [w for w in options.widths if (w, s) not in store.known] for s in range(options.seeds)}
    if any(due.values()):
        model = load_model(str(folder), None, spec.precision, head=True)
        teacher = Teacher(model, options.device, spec.precision, config.temperature)
        announce(options.device)
        texts = Texts(cache)
        with finishing() as asked:
            for seed, widths in due.items():
                students = [Student(teacher, w, seed, config, steps, _state(states, w, seed), digest) for w in widths]
                if asked() or not students:
                    continue
                batches = texts.batches(config, seed, min(s.step for s in students), steps)
                if _train(teacher, students, batches, options.save_minutes, asked):
                    store.add(*_measure(teacher, students, heldout))
                    _drop_states(states, store.known)
    return store.experiment


def _require_widths(model: str, widths: Iterable[int]) -> None:
    config = load_config(model, None)
    for width in widths:
        if width > config.hidden_size:  # before anything is computed of it
            raise UserError(f"a student of width {width} is wider than the model, which has {config.hidden_size}")
        student_config(config, width)


def _state(folder: Path, width: int, seed: int) -> Path:
    return folder / f"width{width:05d}_seed{seed}.safetensors"


def _drop_states(folder: Path, known: Iterable[tuple[int, int]]) -> None:
    """Take away the states of students that are measured, and what the dead left half-written."""
    remove_leftovers(folder)
    for width, seed in known:
        _state(folder, width, seed).unlink(missing_ok=True)
    for empty in (folder, folder.parent):
        with contextlib.suppress(OSError):
            empty.rmdir()


def _train(
    teacher: Teacher, students: list[Student], batches: Iterator[Tensor], save_minutes: float, asked: Callable[[], bool]
) -> bool:
    """Train students of one seed on the same batches, of which the first is due to those with the fewest steps. Whether they
    came to the end; not if `asked` to stop. Raises UserError where a loss is not finite."""
    saved, seed, steps = time.monotonic(), students[0].seed, students[0].steps
    done = [s.step for s in students]
    with Progress(f"distilling seed {seed}", len(students) * steps, "steps", start=sum(done)) as progress:
        for step, tokens in enumerate(batches, min(done)):
            due = [s for s in students if s.step == step]
            losses = teacher.train_step(due, tokens)
            if bad := [s.width for s, loss in zip(due, losses, strict=True) if not math.isfinite(loss)]:
                raise UserError(f"the student of width {bad[0]} and seed {seed} has a loss of NaN: lower --lr")
            progress.advance(len(due), "KL " + " ".join(f"{loss:.3f}" for loss in losses))
            if asked() or time.monotonic() - saved > 60 * save_minutes or step + 1 == steps:
                for student in students:
                    student.save()
                saved = time.monotonic()
            if asked():
                return False
    return True


def _measure(teacher: Teacher, students: list[Student], heldout: Tensor) -> tuple[TeacherRecord, list[StudentRecord]]:
    ce, measured = teacher.measure([s.model for s in students], heldout)
    device = device_kind(teacher.device)
    records = [
        StudentRecord(
            width=s.width, seed=s.seed, heads=s.heads, parameters=s.parameters, steps=s.step, device=device, **asdict(m)
        )
        for s, m in zip(students, measured, strict=True)
    ]
    return TeacherRecord(width=teacher.config.hidden_size, ce=ce), records


def _predictions(cache: Cache, options: DistillOptions, skipped: Skipped) -> list[Prediction]:
    """One for each run and layer, of its latest snapshot; what has not been evaluated is left out with a line."""
    predictions: list[Prediction] = []
    with skipped.leaving_out():
        for run in find_runs(options.runs, cache, skipped):
            with skipped.leaving_out():
                latest = {s.site: s for s in run.snapshots()}
                made = {site: _predict(run, snapshot, options) for site, snapshot in latest.items()}
                predictions += [prediction for prediction in made.values() if prediction is not None]
                if missing := [site for site, prediction in made.items() if prediction is None]:
                    layers = format_sites(missing)
                    raise UserError(f"layers {layers} of {run.path} have not been evaluated: run `rsae eval`, then this again")
    return predictions


def _predict(run: Run, snapshot: Snapshot, options: DistillOptions) -> Prediction | None:
    """None where this checkpoint was not evaluated. Raises UserError for a file that is damaged."""
    file = Sae.checksum(snapshot.path)
    measured = measured_features(run, snapshot.site, snapshot.label, file)
    if measured is None:
        return None
    features, tokens = measured
    statistics = Statistics.measured(features.density.double(), features.mean_square.double(), options.alive_above)
    predicted, naive = (f(statistics, options.widths) for f in (floors, naive_floors))
    return Prediction(
        run=run.name,
        run_digest=run.config.digest,
        layer=snapshot.site,
        snapshot=snapshot.label,
        file=file,
        tokens=tokens,
        alive_above=options.alive_above,
        F=statistics.features,
        alpha=statistics.alpha,
        capacity=None if statistics.alpha is None else finite(capacity(statistics.alpha)),
        critical_width=critical_width(statistics),
        widths={w: Predicted(predicted=predicted[w], naive=naive[w]) for w in options.widths},
        fits=Fits(),
    )


class _Store:
    """One experiment in <runs>/distilled.json, which may hold others."""

    def __init__(self, folder: Path, digest: str, cache: Cache, setting: dict[str, float]) -> None:
        """Raises UserError for a file that is not as it was written; it is left as it is."""
        remove_leftovers(folder)
        self._file = experiments_in(folder)
        new = Experiment(digest=digest, cache=cache.digest, model=Path(cache.spec.model).name, setting=setting)
        self.experiment = self._in(self._file.read(), new)

    @staticmethod
    def _in(experiments: list[Experiment], wanted: Experiment) -> Experiment:
        """The experiment of the same digest, or else `wanted` itself."""
        return next((e for e in experiments if e.digest == wanted.digest), wanted)

    @property
    def known(self) -> set[tuple[int, int]]:
        """(width, seed) of the students that are measured."""
        return {s.key for s in self.experiment.students}

    def add(
        self,
        teacher: TeacherRecord | None = None,
        students: Iterable[StudentRecord] = (),
        predictions: Iterable[Prediction] = (),
    ) -> None:
        """Add to what is on disk by now: another process may have added its own. This experiment becomes the first."""

        def change(experiments: list[Experiment]) -> list[Experiment]:
            old = self._in(experiments, self.experiment)
            measured = {s.key: s for s in [*students, *old.students]}  # a student that is there already stays
            predicted = {p.key: p for p in old.predictions}
            for p in predictions:
                widths = predicted[p.key].widths | p.widths if p.key in predicted else p.widths
                predicted[p.key] = replace(p, widths=dict(sorted(widths.items())))
            by_width = _by_width(measured.values())
            new = replace(
                old,
                teacher=old.teacher or teacher,
                students=tuple(itertools.chain.from_iterable(by_width.values())),
                floors=tuple(map(_floor, by_width.values())),
                predictions=tuple(replace(p, fits=_fits(p, by_width)) for _, p in sorted(predicted.items())),
            )
            return [new, *(e for e in experiments if e.digest != new.digest)]

        self.experiment = self._file.update(change)[0]


def _by_width(students: Iterable[StudentRecord]) -> dict[int, list[StudentRecord]]:
    """By width, and then by seed."""
    ordered = sorted(students, key=lambda s: s.key)
    return {width: list(group) for width, group in itertools.groupby(ordered, lambda s: s.width)}


def _floor(students: list[StudentRecord]) -> Floor:
    """The mean over the seeds of one width."""
    floor, kl, ce = (math.fsum(getattr(s, key) for s in students) / len(students) for key in ("floor", "kl", "ce"))
    return Floor(
        width=students[0].width, seeds=len(students), floor=floor, spread=spread([s.floor for s in students]), kl=kl, ce=ce
    )


def _fits(prediction: Prediction, students: dict[int, list[StudentRecord]]) -> Fits:
    """Over the widths that were both predicted for and measured."""
    measured = {w: [s.floor for s in group] for w, group in students.items() if w in prediction.widths}
    widths = {w: prediction.widths[w] for w in measured}
    predicted, naive = {w: p.predicted for w, p in widths.items()}, {w: p.naive for w, p in widths.items()}
    log_width, fit = {w: -math.log(w) for w in widths}, partial(fit_floors, measured, critical_width=prediction.critical_width)
    return Fits(predicted=fit(predicted), naive=fit(naive), log_width=fit(log_width))


def distill_table(experiment: Experiment) -> str:
    """For a terminal."""
    lines = [f"{'width':>5}  {'seeds':>5}  {'floor':>7}  {'spread':>7}  {'KL':>7}  {'CE':>7}   nats a token, held-out"]
    for f in experiment.floors:
        nats = "  ".join(_number(value).rjust(7) for value in (f.floor, f.spread, f.kl, f.ce))
        lines += [f"{f.width:>5}  {f.seeds:>5}  {nats}"]
    rows = [_fit_row(p, fit) for p in experiment.predictions if (fit := p.fits.predicted)]
    if rows:
        lines.append(
            "\nfloor ≈ C · L* + B; R² of the fit, of widths left out, and of the same fits without knowledge of features"
        )
        rows = [("run", "layer", "d*", "C", "B", "R²", "left out", "naive", "log width", "near d*"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _fit_row(prediction: Prediction, fit: Fit) -> tuple[str, ...]:
    near, others = fit.near_critical, [prediction.fits.naive, prediction.fits.log_width]
    return (
        prediction.run,
        str(prediction.layer),
        f"{prediction.critical_width:.1f}",
        f"{fit.C:.3g} ± {fit.C_se:.1g}",
        f"{fit.B:.3g} ± {fit.B_se:.1g}",
        _number(fit.r2),
        _number(fit.left_out_r2),
        *(_number(other.left_out_r2 if other else None) for other in others),
        "–" if near is None else f"{near.error:+.1%} at {near.width}",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
