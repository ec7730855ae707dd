"""Measured loss floors: the records of <runs>/distilled.json, which `rsae eval distill` writes for whoever shows them.

The file is a list of experiments, the one asked for last first. An experiment is everything that was distilled under one
setting; widths and seeds are added to it and never taken away.
"""

from dataclasses import dataclass
from pathlib import Path

from residual_saes.eval.floors.fit import Fit
from residual_saes.shared.records import JsonRecords, Record
from residual_saes.shared.sites import Site
from residual_saes.shared.typed import Count


@dataclass(kw_only=True, frozen=True)
class StudentRecord(Record):
    """A student on the held-out tokens, means a token in nats."""

    width: Count
    seed: int
    heads: int
    parameters: int
    steps: int
    floor: float  # KL(teacher ‖ student), both at the setting's temperature T: what was minimised, without the T² that some add
    kl: float  # the same at temperature 1, as `kl_div_with_sae` is
    ce: float  # cross-entropy on the next token
    device: str

    @property
    def key(self) -> tuple[int, int]:
        return self.width, self.seed


@dataclass(kw_only=True, frozen=True)
class TeacherRecord(Record):
    """The language model on the held-out tokens."""

    width: int
    ce: float


@dataclass(kw_only=True, frozen=True)
class Floor(Record):
    """The floor of one width: means over seeds."""

    width: int
    seeds: int
    floor: float
    spread: float | None  # standard deviation of the seeds' floors (n − 1); None of one seed
    kl: float
    ce: float


@dataclass(kw_only=True, frozen=True)
class Predicted:
    """Of one width."""

    predicted: float  # L*
    naive: float  # the same without superposition: a feature a dimension, g = 1


@dataclass(kw_only=True, frozen=True)
class Fits:
    """Of the measured floors over three predictors, the last of which knows nothing of features: L* is worth what it does
    better. None where there are too few widths."""

    predicted: Fit | None = None  # over L*
    naive: Fit | None = None  # over the naive floor
    log_width: Fit | None = None  # over −ln(width)


@dataclass(kw_only=True, frozen=True)
class Prediction(Record):
    """The floors that the latest snapshot of a run's layer predicts, and how well the measured ones lie on a line over them."""

    run: str
    run_digest: str
    layer: Site
    snapshot: str
    file: str  # checksum of the checkpoint
    tokens: int  # that its features' statistics are from
    alive_above: float
    F: int
    alpha: float | None
    capacity: float | None
    critical_width: float
    widths: dict[int, Predicted]
    fits: Fits

    @property
    def key(self) -> tuple[str, Site, str, str, int, float]:
        return self.run, self.layer, self.snapshot, self.file, self.tokens, self.alive_above


@dataclass(kw_only=True, frozen=True)
class Experiment(Record):
    """All students and predictions of one setting."""

    digest: str  # of what the students depend on: cache (model and tokens) and setting
    cache: str
    model: str
    setting: dict[str, float]  # temperature, tokens, batch, lr, …: `DistillConfig`, and the held-out tokens measured on
    teacher: TeacherRecord | None = None
    students: tuple[StudentRecord, ...] = ()  # by width and seed
    floors: tuple[Floor, ...] = ()  # by width
    predictions: tuple[Prediction, ...] = ()


def experiments_in(folder: Path) -> JsonRecords[Experiment]:
    return JsonRecords(folder / "distilled.json", Experiment)


def measured_floors(folder: Path, cache_digest: str) -> Experiment | None:
    """The latest experiment on this cache that has measured a student, or None. Raises UserError for a damaged file."""
    experiments = experiments_in(folder).read()
    return next((e for e in experiments if e.cache == cache_digest and e.floors), None)
