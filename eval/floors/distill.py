"""Measured loss floors: students narrower than the model, trained from it, and what is left between them on held-out tokens.

`python -m eval distill` trains students (students.py) of several widths and seeds on the cache's training tokens, measures
each on its held-out tokens, and holds the floors beside those that predicted.py predicts from every SAE that `python -m eval`
has measured. All of it is in one file, <runs>/distilled.json: a list of experiments, the one asked for last first. An
experiment is everything that was distilled under one setting; widths and seeds are added to it and never taken away. Keys:

    digest, cache     of what the students depend on (model, tokens and `setting`), and of the cache
    model             its name
    setting           temperature, tokens, batch, lr, …: eval.floors.students.DistillConfig and the held-out tokens measured on
    teacher           {"width", "ce"}: nats a token on the held-out tokens
    students          one a width and seed, in that order: {"width", "seed", "heads", "parameters", "steps", "floor", "kl",
                      "ce", "device"}
                          floor   mean KL(teacher ‖ student) a token in nats, both at `temperature`: what was minimised, without
                                  the factor temperature² that some write before it
                          kl      the same at temperature 1, as `kl_div_with_sae` is
                          ce      the student's cross-entropy on the next token
    floors            one a width: {"width", "seeds", "floor", "spread", "kl", "ce"}: means over seeds, and the standard
                      deviation of the seeds' floors (n − 1; null of one seed)
    predictions       one an SAE, latest snapshot of each run and layer: {"run", "run_digest", "layer", "snapshot", "file",
                      "tokens", "alive_above", "F", "alpha", "capacity", "critical_width",
                      "widths": {"<width>": {"predicted", "naive"}},   L* of that student, and the same without superposition: a
                                                                       feature a dimension, g = 1
                      "fits": {"predicted", "naive", "log_width"}}     fit.Fit of the measured floors over L*, the naive
                                                                       floor, and −ln(width), which knows nothing of
                                                                       features: L* is worth what it does better
    checksum          of this experiment; see shared/seal.py

A fit (null where there are fewer than three widths, or the prediction is the same for all):

    {"C", "B"         floor ≈ C · x + B, least squares over the widths' mean floors
     "C_se", "B_se"   their standard errors from the residuals, with n − 2 degrees of freedom
     "r2"             1 − Σ residual² / Σ (floor − mean)²
     "r2_low", "r2_high"   2.5 and 97.5 % of r2 when each width's seeds are drawn again with replacement: what seeds leave
                      open, not whether the line is right
     "left_out_r2"    1 − Σ (floor − left_out)² / Σ (floor − mean)²: below 0 the mean of the floors is the better prediction
     "points": [{"width", "x", "floor", "spread", "fitted", "left_out"}]   left_out: from the fit of all other widths
     "near_critical": {"width", "ratio", "error", "left_out_error"} | null}   of the width nearest to d*: width / d*, and
                      (fitted − floor) / floor of the fit and of the fit without it
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.floors.fit import fit_floors, spread
from eval.floors.measured import FILE
from eval.floors.students import DistillConfig, Student, Teacher, Texts, student_config
from eval.measure.evaluate import Skipped, find_runs, measured_features
from eval.measure.metrics import finite, heldout_tokens
from eval.measure.predicted import ALIVE_ABOVE, Statistics, capacity, critical_width, floors, naive_floors
from shared.cache import Cache
from shared.device import announce, device_kind
from shared.errors import UserError
from shared.files import locked, make_dir, remove_leftovers, replacing, sync_dir
from shared.identity import harvested_model
from shared.lm import load_config, load_model
from shared.progress import Progress
from shared.runs.run import Run, Snapshot
from shared.runs.sae import Sae
from shared.seal import canonical, seal, sealed
from shared.sites import format_sites
from shared.stop import finishing

Record = dict[str, Any]
_PREDICTORS = ("predicted", "naive", "log_width")


@dataclass(kw_only=True, frozen=True, slots=True)
class DistillOptions:
    """What is to be there in the end, and how it is come by; nothing here changes a student."""

    runs: Path  # gets distilled.json, and the states of unfinished students under distilling/
    widths: tuple[int, ...]
    seeds: int  # 0 … seeds − 1
    eval_tokens: int
    device: torch.device
    model: str | None = None  # where the language model lies, if not where the cache says
    alive_above: float = ALIVE_ABOVE
    save_minutes: float = 5.0


def distill(cache: Cache, config: DistillConfig, options: DistillOptions, skipped: Skipped) -> Record:
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
    setting = dataclasses.asdict(config) | {"heldout_tokens": heldout.numel()}
    digest = hashlib.sha256(canonical({"cache": cache.digest, "setting": setting})).hexdigest()
    _require_widths(str(folder), options.widths)
    new = {"digest": digest, "cache": cache.digest, "model": Path(spec.model).name, "setting": setting}
    store = _Store(make_dir(options.runs), new)
    sync_dir(options.runs.absolute().parent)
    states = options.runs / "distilling" / digest[:16]
    store.add([], _predictions(cache, options, skipped))
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
                job = _Seed(teacher, seed, students, config, steps, options.save_minutes)
                if widths and job.train(texts, asked):
                    store.teacher, found = job.measure(heldout)
                    store.add(found, [])
                    _drop_states(states, store.known)
    return store.experiment


def _require_widths(model: str, widths: Iterable[int]) -> None:
    config = load_config(model, None)
    for width in widths:
        student_config(config, width)
        if width > config.hidden_size:
            raise UserError(f"a student of width {width} is wider than the model, which has {config.hidden_size}")


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


class _Seed:
    """The students of one seed, which take the same batches."""

    def __init__(
        self, teacher: Teacher, seed: int, students: list[Student], config: DistillConfig, steps: int, save_minutes: float
    ) -> None:
        self._teacher, self._seed, self._students = teacher, seed, students
        self._config, self._steps, self._save_seconds = config, steps, 60 * save_minutes

    def train(self, texts: Texts, asked: Callable[[], bool]) -> bool:
        """To the end, or until `asked` to stop; whether it is the end. Raises UserError where a loss is not finite."""
        if asked():
            return False
        students, saved = self._students, time.monotonic()
        first = min(s.step for s in students)
        total, done = len(students) * self._steps, sum(s.step for s in students)
        with Progress(f"distilling seed {self._seed}", total, "steps", start=done) as progress:
            for step, tokens in enumerate(texts.batches(self._config, self._seed, first, self._steps), first):
                now = [s for s in students if s.step == step]
                losses = self._teacher.train_step(now, tokens)
                if not all(map(math.isfinite, losses)):
                    worst = next(s.width for s, loss in zip(now, losses, strict=True) if not math.isfinite(loss))
                    raise UserError(f"the student of width {worst} and seed {self._seed} has a loss of NaN: lower --lr")
                progress.advance(len(now), "KL " + " ".join(f"{loss:.3f}" for loss in losses))
                if asked() or time.monotonic() - saved > self._save_seconds or step + 1 == self._steps:
                    for student in students:
                        student.save()
                    saved = time.monotonic()
                if asked():
                    return False
        return True

    def measure(self, heldout: Tensor) -> tuple[Record, list[Record]]:
        """The teacher's record, and one for each student."""
        ce, measured = self._teacher.measure([s.model for s in self._students], heldout)
        records = [
            {
                "width": s.width,
                "seed": s.seed,
                "heads": s.heads,
                "parameters": s.parameters,
                "steps": s.step,
                **dataclasses.asdict(m),
                "device": device_kind(self._teacher.device),
            }
            for s, m in zip(self._students, measured, strict=True)
        ]
        return {"width": self._teacher.config.hidden_size, "ce": ce}, records


def _predictions(cache: Cache, options: DistillOptions, skipped: Skipped) -> list[Record]:
    """One for each run and layer, of its latest snapshot; what has not been evaluated is left out with a line."""
    found = []
    with skipped.leaving_out():
        for run in find_runs(options.runs, cache, skipped):
            with skipped.leaving_out():
                made = {s.site: _predict(run, s, options) for s in {s.site: s for s in run.snapshots()}.values()}
                found += [record for record in made.values() if record]
                if missing := [site for site, record in made.items() if not record]:
                    layers = format_sites(missing)
                    raise UserError(
                        f"layers {layers} of {run.path} have not been evaluated: run `python -m eval`, then this again"
                    )
    return found


def _predict(run: Run, snapshot: Snapshot, options: DistillOptions) -> Record:
    """Empty where this checkpoint was not evaluated. Raises UserError for a file that is damaged."""
    file = Sae.checksum(snapshot.path)
    measured = measured_features(run, snapshot.site, snapshot.label, file)
    if measured is None:
        return {}
    features, tokens = measured
    statistics = Statistics.measured(features.density.double(), features.mean_square.double(), options.alive_above)
    predicted, naive = (f(statistics, options.widths) for f in (floors, naive_floors))
    return {
        "run": run.name,
        "run_digest": run.config()["digest"],
        "layer": snapshot.site.json,
        "snapshot": snapshot.label,
        "file": file,
        "tokens": tokens,
        "alive_above": options.alive_above,
        "F": statistics.features,
        "alpha": statistics.alpha,
        "capacity": None if statistics.alpha is None else finite(capacity(statistics.alpha)),
        "critical_width": critical_width(statistics),
        "widths": {str(w): {"predicted": predicted[w], "naive": naive[w]} for w in options.widths},
    }


class _Store:
    """An experiment in <runs>/distilled.json, which may hold others."""

    def __init__(self, folder: Path, new: Record) -> None:
        """Raises UserError for a file that is not as it was written; it is left as it is."""
        self._folder, self._path = folder, folder / FILE
        remove_leftovers(folder)
        nothing: Record = {"teacher": None, "students": [], "floors": [], "predictions": []}
        self.experiment = next((e for e in self._read() if e["digest"] == new["digest"]), new | nothing)
        self.teacher: Record | None = self.experiment["teacher"]

    @property
    def known(self) -> set[tuple[int, int]]:
        """(width, seed) of the students that are measured."""
        return {(s["width"], s["seed"]) for s in self.experiment["students"]}

    def _read(self) -> list[Record]:
        if not self._path.exists():
            return []
        try:
            experiments = json.loads(self._path.read_bytes())
        except ValueError:
            experiments = None
        if not isinstance(experiments, list) or not all(map(sealed, experiments)):
            raise UserError(f"{self._path} is damaged: restore it, or delete it to measure everything again")
        return experiments

    def add(self, students: list[Record], predictions: list[Record]) -> None:
        """Add to what is on disk by now: another process may have added its own. This experiment becomes the first."""
        with locked(self._folder):
            there = self._read()
            mine = next((e for e in there if e["digest"] == self.experiment["digest"]), self.experiment)
            measured = {_student(s): s for s in [*students, *mine["students"]]}  # what is there already stays
            predicted = {_sae(p): p for p in mine["predictions"]}
            for p in predictions:
                widths = predicted.get(_sae(p), {"widths": {}})["widths"] | p["widths"]
                predicted[_sae(p)] = p | {"widths": dict(sorted(widths.items(), key=lambda item: int(item[0])))}
            mine = mine | {
                "teacher": self.teacher or mine["teacher"],
                "students": [measured[key] for key in sorted(measured)],
                "floors": _floors(measured.values()),
                "predictions": [p | {"fits": _fits(p, measured.values())} for _, p in sorted(predicted.items())],
            }
            self.experiment = seal(mine)
            others = [e for e in there if e["digest"] != mine["digest"]]
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps([self.experiment, *others], indent=1) + "\n", encoding="utf-8")


def _student(record: Record) -> tuple[int, int]:
    return record["width"], record["seed"]


def _sae(record: Record) -> tuple[Any, ...]:
    return record["run"], record["layer"], record["snapshot"], record["file"], record["tokens"], record["alive_above"]


def _by_width(students: Iterable[Record], key: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for s in sorted(students, key=_student):
        found.setdefault(s["width"], []).append(s[key])
    return found


def _floors(students: Iterable[Record]) -> list[Record]:
    by_key = {key: _by_width(students, key) for key in ("floor", "kl", "ce")}
    return [
        {
            "width": width,
            "seeds": len(values),
            "floor": math.fsum(values) / len(values),
            "spread": spread(values),
            **{key: math.fsum(by_key[key][width]) / len(values) for key in ("kl", "ce")},
        }
        for width, values in by_key["floor"].items()
    ]


def _fits(prediction: Record, students: Iterable[Record]) -> dict[str, Record | None]:
    """Over the widths that were both predicted for and measured."""
    measured = {w: values for w, values in _by_width(students, "floor").items() if str(w) in prediction["widths"]}
    fits: dict[str, Record | None] = {}
    for name in _PREDICTORS:
        x = {w: -math.log(w) if name == "log_width" else prediction["widths"][str(w)][name] for w in measured}
        fit = fit_floors(measured, x, prediction["critical_width"])
        fits[name] = None if fit is None else dataclasses.asdict(fit)
    return fits


def distill_table(experiment: Record) -> str:
    """For a terminal."""
    lines = [f"{'width':>5}  {'seeds':>5}  {'floor':>7}  {'spread':>7}  {'KL':>7}  {'CE':>7}   nats a token, held-out"]
    for f in experiment["floors"]:
        nats = "  ".join(map(_number, (f["floor"], f["spread"], f["kl"], f["ce"])))
        lines += [f"{f['width']:>5}  {f['seeds']:>5}  {nats}"]
    fits = [(p, p["fits"]["predicted"]) for p in experiment["predictions"] if p["fits"]["predicted"]]
    if fits:
        lines.append(
            "\nfloor ≈ C · L* + B; R² of the fit, of widths left out, and of the same fits without knowledge of features"
        )
        heads = ("run", "layer", "d*", "C", "B", "R²", "left out", "naive", "log width", "near d*")
        rows = [heads] + [
            (
                p["run"],
                str(p["layer"]),
                f"{p['critical_width']:.1f}",
                f"{fit['C']:.3g} ± {fit['C_se']:.1g}",
                f"{fit['B']:.3g} ± {fit['B_se']:.1g}",
                _number(fit["r2"]).strip(),
                _number(fit["left_out_r2"]).strip(),
                *(_number((p["fits"][name] or {}).get("left_out_r2")).strip() for name in ("naive", "log_width")),
                "–"
                if fit["near_critical"] is None
                else f"{fit['near_critical']['error']:+.1%} at {fit['near_critical']['width']}",
            )
            for p, fit in fits
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'–' if value is None else format(value, '.4f'):>7}"
