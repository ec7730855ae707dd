"""The sparsity settings: a fixed λ, or one that is steered until L0 reaches a target."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Self

from residual_saes.train.sparsity.base import RELU, Control, ControllerConfig, Hidden, Recipe, Sparsity
from residual_saes.train.sparsity.batchtopk import LargestOfBatch

ADAPTIVE_INIT, ADAPTIVE_TARGET = 5e-4, 150.0
_MOST = 1e9  # of λ and of L0: beyond it is a slip of the keyboard


@dataclass(kw_only=True, frozen=True, slots=True)
class L1Setting(Sparsity):
    """λ at the start, and the L0 to steer to (None: λ stays as it is)."""

    FORMS: ClassVar[str] = "a positive λ such as 3e-4, adaptive, adaptive:5e-4@150"
    BEST: ClassVar[Recipe] = Recipe(decoder_norm="free", hold_l0=0.2)

    init: float
    target: float | None = None

    @property
    def name(self) -> str:
        """As it stands in the name of a run: 'l1-3e-4-fixed', 'l1-adaptive', 'l1-adaptive-1e-3-l0-64'."""
        if self.target is None:
            return f"l1-{format_l1(self.init)}-fixed"
        if (self.init, self.target) == (ADAPTIVE_INIT, ADAPTIVE_TARGET):
            return "l1-adaptive"
        return f"l1-adaptive-{format_l1(self.init)}-l0-{self.target:g}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """'3e-4', 'adaptive' or 'adaptive:1e-3@64'; None for anything else."""
        number = r"[0-9.]+(?:e[+-]?[0-9]+)?"
        if text == "adaptive":
            return cls(init=ADAPTIVE_INIT, target=ADAPTIVE_TARGET)
        match = re.fullmatch(rf"(?:adaptive:({number})@({number})|({number}))", text, re.IGNORECASE)
        try:
            values = [float(group) for group in match.groups() if group is not None] if match else []
        except ValueError:
            values = []
        if not values or not all(0 < v <= _MOST for v in values):
            return None
        return cls(init=values[0], target=values[1] if len(values) == 2 else None)

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> "L1Controller":
        return L1Controller(self, steps, config, hold)


def format_l1(value: float) -> str:
    """0.0003 → '3e-4', as the published runs write it."""
    mantissa, exponent = f"{value:.9e}".split("e")
    return f"{float(mantissa):.10g}e{int(exponent)}"


@dataclass(slots=True)
class ControllerState:
    """What a resumed run needs to steer on as if it had not stopped."""

    value: float  # λ
    mean: float = 0.0  # of L0
    slow: float = 0.0  # mean of ln(mean / target)
    slope: float = 0.0  # of ln λ, a step
    threshold: float | None = None  # mean of the least activation that was kept, once some were chosen


class L1Controller(Control):
    """λ of one SAE. From `begin` to the last step, with e = ln(L0 / target), L0 as it will be after `lead`:

        ln λ ← ln λ + k · clip(e, ±most) + s        s ← s + slope · k² · e  where |e| < near        k = gain / steps

    At one λ L0 goes on falling as long as an SAE learns, so that the right λ is a ramp. The first integrator alone would
    follow a ramp at a distance; s learns its slope. The prediction, by the difference of L0's mean and a slower one, keeps λ
    from overshooting, which kills features. After that λ has no say; with `hold` L0 stays at the target, or as it is
    where there is none, by keeping so many of each batch's largest activations, as BatchTopK does all along.
    """

    def __init__(self, setting: L1Setting, steps: int, config: ControllerConfig, hold: bool = False) -> None:
        self._setting, self._steps, self._config, self._hold = setting, steps, config, hold
        self._aim = None if setting.target is None else setting.target * (config.above if hold else 1)
        self.state: ControllerState = ControllerState(value=setting.init)

    @property
    def value(self) -> float:
        return self.state.value

    @property
    def threshold(self) -> float | None:
        return self.state.threshold

    def l1_at(self, step: int) -> float:
        return self.value if step < self._steps else 0.0

    def hidden_at(self, step: int) -> Hidden:
        held = self._hold and step >= self._steps
        return LargestOfBatch(self._setting.target or self.state.mean) if held else RELU

    def update(self, step: int, l0: float, least: float = 0.0) -> None:
        """Take the L0 of step `step` (from 0) into account for the next, and the least activation if some were left out."""
        c, now, span = self._config, self.state, max(self._steps, self._config.shortest)
        if step >= self._steps:
            if self._hold:
                mean = now.threshold or 0.0
                now.threshold = mean + (least - mean) / min(step + 1 - self._steps, c.smoothing * span)
            return
        now.mean += (l0 - now.mean) / min(step + 1, c.smoothing * span)
        if self._aim is None:
            return
        level = math.log(max(now.mean, 1e-3) / self._aim)
        now.slow += (level - now.slow) / min(step + 1, c.lead * span)
        if step < c.begin * self._steps:
            return
        # A mean over n steps lags a ramp by n steps, so that this is where L0 will be after `lead`.
        error, rate = level + (level - now.slow), c.gain / span
        if abs(error) < c.near:
            now.slope += c.slope * rate**2 * error
        now.value *= math.exp(rate * min(c.most, max(-c.most, error)) + now.slope)
