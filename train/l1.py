"""The sparsity settings: a fixed λ, or one that is steered until L0 reaches a target."""

import math
import re
from dataclasses import dataclass

from shared.cli import UserError

ADAPTIVE_INIT, ADAPTIVE_TARGET = 5e-4, 150.0


@dataclass(kw_only=True, frozen=True, slots=True)
class L1Setting:
    """λ at the start, and the L0 to steer to (None: λ stays as it is)."""

    init: float
    target: float | None = None

    @property
    def label(self) -> str:
        """As it stands in the name of a run: '3e-4-fixed', 'adaptive', 'adaptive-1e-3-l0-64'."""
        if self.target is None:
            return f"{format_l1(self.init)}-fixed"
        if (self.init, self.target) == (ADAPTIVE_INIT, ADAPTIVE_TARGET):
            return "adaptive"
        return f"adaptive-{format_l1(self.init)}-l0-{self.target:g}"


def parse_l1(text: str) -> tuple[L1Setting, ...]:
    """'3e-4,8e-5,adaptive' or 'adaptive:1e-3@64' → settings. Raises UserError."""
    settings = tuple(_parse_one(part.strip()) for part in text.split(","))
    if len(set(settings)) < len(settings):
        raise UserError(f"{text!r} names an L1 setting twice; name each once")
    return settings


def _parse_one(text: str) -> L1Setting:
    number = r"[0-9.]+(?:e[+-]?[0-9]+)?"
    if text == "adaptive":
        return L1Setting(init=ADAPTIVE_INIT, target=ADAPTIVE_TARGET)
    match = re.fullmatch(rf"(?:adaptive:({number})@({number})|({number}))", text, re.IGNORECASE)
    try:
        values = [float(group) for group in match.groups() if group is not None] if match else []
    except ValueError:
        values = []
    if not values or not all(0 < v < math.inf for v in values):
        raise UserError(f"{text!r} is not an L1 setting: write a positive number such as 3e-4, adaptive, or adaptive:5e-4@150")
    return L1Setting(init=values[0], target=values[1] if len(values) == 2 else None)


def format_l1(value: float) -> str:
    """0.0003 → '3e-4', as the published runs write it."""
    mantissa, exponent = f"{value:.9e}".split("e")
    return f"{float(mantissa):.10g}e{int(exponent)}"


@dataclass(kw_only=True, frozen=True, slots=True)
class ControllerConfig:
    """How λ is steered. The numbers are shares of the run, so that a short run is steered as far as a long one."""

    gain: float = 30.0  # e-folds of λ over a whole run spent at L0 = e · target
    max_rate: float = 0.02  # e-folds of λ in one step, however short the run: L0 needs time to answer
    smoothing: float = 0.005  # horizon of the mean of L0, as a share of the run
    begin: float = 0.2  # λ stays at its start until then: L0 of a fresh SAE says nothing
    freeze: float = 5 / 6  # λ stays at its end from then on


class L1Controller:
    """λ of one SAE: λ ← λ · exp(rate · clip(ln(mean L0 / target), ±1)), rate = gain/steps,
    after every step between begin and freeze."""

    def __init__(self, setting: L1Setting, steps: int, config: ControllerConfig) -> None:
        self._setting, self._steps, self._config = setting, steps, config
        self.value = setting.init
        self.mean_l0 = 0.0

    def update(self, step: int, l0: float) -> None:
        """Take the L0 of step `step` (from 0) into account for the next."""
        if self._setting.target is None:
            return
        c = self._config
        keep = math.exp(-1 / max(1.0, c.smoothing * self._steps))
        self.mean_l0 = keep * self.mean_l0 + (1 - keep) * l0 if step else l0
        if c.begin * self._steps <= step < c.freeze * self._steps:
            error = math.log(max(self.mean_l0, 1e-3) / self._setting.target)
            self.value *= math.exp(min(c.gain / self._steps, c.max_rate) * min(1.0, max(-1.0, error)))
