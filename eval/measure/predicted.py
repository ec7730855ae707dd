"""Predicted loss floors: what a narrower student must lose of the features that an SAE finds in its teacher.

A student of width d_S can encode at most d_S · g(α) features, those beyond are lost, and each costs its importance (Sarkar &
Deka, "Geometric Limits of Knowledge Distillation", arXiv:2604.04037; the capacity g comes from compressed sensing, by way of
Elhage et al., "Toy Models of Superposition", 2022). Of features with density f_i, the share of tokens on which one fires:

    alive       f_i > 1e-5, or another threshold      F = how many      L0 = Σ f_i over them      α = 1 − L0 / F
    importance  E[z_i²] over all tokens
    g(α)        1 / ((1−α) · ln(1/(1−α)))              features per dimension; e at least
    d*          F / g(α)                               narrowest student with no floor
    L*(d_S)     Σ importance_i of the features ranked below ⌊d_S · g(α)⌋; 0 from d* on

An independent audit found L* unreliable near d*: it is a prediction, to be shown beside a measured floor, not a result.
Everything is float64, and sums are exact to the last bit of it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from residual_saes.shared.errors import UserError

ALIVE_ABOVE = 1e-5  # density; the threshold of the paper's Pythia figures
PUBLISHED_WIDTHS = (128, 256, 384, 512, 768, 1024)  # of students of a teacher of width 1,024


@dataclass(kw_only=True, frozen=True, slots=True)
class Statistics:
    """What a prediction is made from. F is the length of `importance`."""

    alpha: float | None  # in [0, 1]; None where no feature is alive
    importance: tuple[float, ...]  # of the alive features, descending

    @property
    def features(self) -> int:
        return len(self.importance)

    @classmethod
    def measured(cls, density: Tensor, mean_square: Tensor, alive_above: float = ALIVE_ABOVE) -> Self:
        """From density and E[z²] of all features, both [F_all] and float64."""
        alive = density > alive_above
        count = int(alive.sum())
        alpha = 1 - math.fsum(density[alive].tolist()) / count if count else None
        return cls(alpha=alpha, importance=tuple(mean_square[alive].sort(descending=True).values.tolist()))

    @classmethod
    def read(cls, path: Path) -> Self:
        """From {"alpha": …, "F": …, "sorted_importance": […]}; another order than descending is put right. Raises UserError."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name a file of statistics with --statistics") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); write {_FORM}") from None
        if not isinstance(content, dict) or not {"alpha", "F", "sorted_importance"} <= set(content):
            raise UserError(f"{path} is not an object with alpha, F and sorted_importance; write {_FORM}")
        alpha, count, importance = content["alpha"], content["F"], content["sorted_importance"]
        if not isinstance(importance, list) or not all(_number(v) and v >= 0 for v in importance):
            raise UserError(f"{path}: sorted_importance must be a list of finite numbers, none negative (means of squares)")
        if not _number(count) or count != len(importance):
            counts = f"F is {count!r:.40}, and sorted_importance has {len(importance)} values"
            raise UserError(f"{path}: {counts}; give one for each feature")
        if (alpha is not None or count) and not (_number(alpha) and 0 <= alpha <= 1):
            raise UserError(f"{path}: alpha is {alpha!r:.40}; it is 1 − L0/F, a number from 0 to 1")
        return cls(alpha=alpha, importance=tuple(sorted(map(float, importance), reverse=True)))


_FORM = '{"alpha": 0.99, "F": 3, "sorted_importance": [2.5, 1.0, 0.1]}'


_LARGEST = 1e300  # sums of fewer than 1e8 such numbers are still finite


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def capacity(alpha: float) -> float:
    """g(α), features per dimension: e at the least, infinite at α = 1, where nothing ever fires.

    At α = 0, where every feature fires on every token, the formula has no value; it is 1 there, a dimension for each feature.
    Below 1 − 1/e the formula grows again towards denser features: that is outside what it was made for.
    """
    if alpha == 0:
        return 1.0
    return 1 / ((1 - alpha) * -math.log1p(-alpha)) if alpha < 1 else math.inf


def critical_width(statistics: Statistics) -> float:
    """d*, in dimensions: the narrowest student with no floor; 0 where there is nothing to lose."""
    if statistics.alpha is None:
        return 0.0
    return statistics.features / capacity(statistics.alpha)


def floors(statistics: Statistics, widths: tuple[int, ...]) -> dict[int, float]:
    """{d_S: L*(d_S)} in the units of importance, squared activations."""
    return {width: _floor(statistics, width) for width in widths}


def _floor(statistics: Statistics, width: int) -> float:
    if statistics.alpha is None or width >= critical_width(statistics):
        return 0.0
    return math.fsum(statistics.importance[math.floor(width * capacity(statistics.alpha)) :])


def naive_floors(statistics: Statistics, widths: tuple[int, ...]) -> dict[int, float]:
    """The same without superposition, a feature for each dimension: g = 1. What L* must be better than."""
    return {width: math.fsum(statistics.importance[width:]) for width in widths}


def student_widths(d_model: int) -> tuple[int, ...]:
    """The published widths as fractions of 1,024, of a model of another width."""
    return tuple(sorted({max(1, width * d_model // PUBLISHED_WIDTHS[-1]) for width in PUBLISHED_WIDTHS}))


def describe(statistics: Statistics) -> str:
    """F, α, g and d* in one line, with a warning where the formula is asked for more than it can say."""
    if statistics.alpha is None:
        return "no feature is alive: there is nothing to lose"
    g = capacity(statistics.alpha)
    line = f"F {statistics.features:,}, α {statistics.alpha:.6g}, g {g:.6g}, d* {critical_width(statistics):.6g}"
    dense = statistics.alpha < 1 - 1 / math.e
    return line + ("; WARNING: features this dense are outside the formula, which would have them pack better" if dense else "")
