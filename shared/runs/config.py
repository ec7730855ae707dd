"""A run's config.json as those read it who do not train it. `stored` is all that stands there, later versions' fields too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.records import Record
from residual_saes.shared.runs.sparsity import Reading, hold_from
from residual_saes.shared.runs.target import Target, members
from residual_saes.shared.sites import Site
from residual_saes.shared.typed import Bounds, Count, read
from residual_saes.shared.units import format_count


@dataclass(kw_only=True, frozen=True, slots=True)
class Step:
    """What readers ask of `train.step`."""

    decoder: str = "trained"


@dataclass(kw_only=True, frozen=True, slots=True)
class Source:
    """Where SAEs come from that were not trained here."""

    tool: str
    form: str  # what the tool calls such an SAE
    name: str  # of the folder


@dataclass(kw_only=True, frozen=True, slots=True)
class Training:
    """What readers ask of `train`. Fields that have defaults came later, or are unknown where there is a `source`."""

    tokens: Count | None = None
    batch: Count | None = None
    expansion: Annotated[float, Bounds(0, 10**15)]
    l1: dict[str, Any]  # the setting, whose fields are its kind's
    source: Source | None = None
    seed: int = 0
    step: Step = field(default_factory=Step)
    l1_warmup: int = 0
    refit: Annotated[float, Bounds(0, 1)] = 0.0
    refit_kind: str = "decoder"
    skip_positions: int = 0
    max_norm: float | None = None
    target: str = ""  # the form of its targets
    skip: bool = False

    def __post_init__(self) -> None:
        if self.source is None and None in (self.tokens, self.batch):
            raise ValueError("train has no tokens, or no batch")

    @property
    def holds_l0(self) -> bool:
        """Whether training ends with steps that hold L0 by a choice among each batch."""
        if self.tokens is None or self.batch is None:
            return False
        steps = self.tokens // self.batch
        return self.refit_kind == "topk" and hold_from(steps, self.refit) < steps

    @property
    def amount(self) -> str:
        """Its tokens, for people."""
        return "–" if self.tokens is None else format_count(self.tokens)

    @property
    def removed(self) -> str:
        """What it was trained with that training has no longer, in words; nothing for most."""
        decoder = (self.refit_kind == "topk") != (self.refit > 0)
        options = {"--l1-warmup": self.l1_warmup, f"--refit-kind {self.refit_kind}": decoder}
        return " and ".join(option for option, used in options.items() if used)

    @property
    def left_out(self) -> str:
        """The rows that are not trained on, in words; "" if all are."""
        skip, most = self.skip_positions, self.max_norm
        parts = [f"the first {skip} position{'s' * (skip > 1)} of each context"] if skip else []
        parts += [] if most is None else [f"rows longer than {most:g} × the median norm"]
        return " and ".join(parts)


@dataclass(kw_only=True, frozen=True, slots=True)
class _Penalty:
    init: float
    target: float | None


@dataclass(kw_only=True, frozen=True, slots=True)
class _BatchTopK:
    k: int


@dataclass(kw_only=True, frozen=True, slots=True)
class CacheIdentity:
    """The cache of a run: the digest settles whether another is the same, the spec says what differs."""

    digest: str
    spec: CacheSpec
    place: str = ""  # advice: where it lay, as a path from the run's folder


@dataclass(kw_only=True, frozen=True)
class RunConfig(Record):
    """Everything needed to repeat the run, as config.json has it and each checkpoint repeats it."""

    digest: str  # the run's identity
    train: Training
    cache: CacheIdentity
    machine: dict[str, Any] = field(default_factory=dict)
    sparsity: Reading | None = None  # of a kind that is told by its name

    @classmethod
    def of(cls, stored: dict[str, Any], path: Path) -> Self:
        """As it stands in a file, without the seal. Raises UserError that names the file and the field that is not right."""
        try:
            return read(cls, stored)
        except ValueError as error:
            raise UserError(f"{path} is not of a run that can be: {error}; restore it or use another --runs folder") from None

    @property
    def portable(self) -> dict[str, Any]:
        """As a checkpoint repeats it, which may go anywhere: without the cache's place."""
        return self.stored | {"cache": {k: v for k, v in self.stored["cache"].items() if k != "place"}}

    def target_at(self, place: Site) -> Target:
        """What its dictionary of this place reads and writes."""
        return Target.at(self.train.target, place)

    def members(self, place: Site) -> tuple[Site, ...]:
        """The sites of which its checkpoint of this place has an SAE of each."""
        return members(self.train.target, place)

    @property
    def reading(self) -> Reading:
        """How its SAEs are read. Raises UserError for a setting that nothing is known of."""
        if self.sparsity is not None:
            return self.sparsity
        train, held = self.train, self.train.holds_l0
        try:
            if set(train.l1) == {"k"}:
                words = f"BatchTopK, the {read(_BatchTopK, train.l1).k} largest activations a token"
            else:
                penalty = read(_Penalty, train.l1 if set(train.l1) == {"init", "target"} else {})
                words = f"λ = {penalty.init:g}" + (f", steered to an L0 of {penalty.target:g}" if penalty.target else "")
        except ValueError:
            raise UserError(f"a setting of {', '.join(train.l1)} is not known here: use the version that trained it") from None
        if held:
            words += f", then L0 held by keeping the largest activations of each batch (last {train.refit:.0%} of training)"
        return Reading(words=words, rule="threshold" if held or "k" in train.l1 else "relu")
