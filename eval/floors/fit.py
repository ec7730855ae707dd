"""How well measured floors lie on a line over a prediction, floor ≈ C · x + B, and how much five points can say about that.

Least squares over the widths' mean floors. Any two things that fall with width have a high R² over five widths, so beside it
stand the standard errors (residuals, n − 2 degrees of freedom: of five points 95 % intervals are 3.18 of them either way), what
the fit says of a width that it was not shown, and the same for predictions that know nothing of features (distill.py).
Everything is float64.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000  # of seeds with replacement
_FEWEST = 3  # widths: two lie on a line whatever they are

Floats = NDArray[np.float64]


@dataclass(kw_only=True, frozen=True, slots=True)
class Point:
    """A width in the fit."""

    width: int
    x: float  # the prediction
    floor: float  # measured, mean over seeds
    spread: float | None  # standard deviation over seeds
    fitted: float
    left_out: float | None  # from the fit of the others; None where they have one x


@dataclass(kw_only=True, frozen=True, slots=True)
class Nearest:
    """The width nearest to the critical one, by ratio."""

    width: int
    ratio: float  # width / d*
    error: float  # (fitted − floor) / floor
    left_out_error: float | None


@dataclass(kw_only=True, frozen=True, slots=True)
class Fit:
    """floor ≈ C · x + B, least squares over the widths' mean floors."""

    C: float
    B: float
    C_se: float  # standard errors from the residuals, with n − 2 degrees of freedom
    B_se: float
    r2: float | None  # 1 − Σ residual² / Σ (floor − mean)²; None where all floors are one
    # 2.5 and 97.5 % of r2 over draws of each width's seeds: what seeds leave open, not whether the line is right
    r2_low: float | None
    r2_high: float | None
    left_out_r2: float | None  # r2 of the points' `left_out`: below 0 the mean of the floors is the better prediction
    points: tuple[Point, ...]
    near_critical: Nearest | None  # None where there is no critical width


def fit_floors(floors: dict[int, list[float]], x: dict[int, float], critical_width: float | None) -> Fit | None:
    """{width: the floor of each seed} over {width: prediction}. None of fewer than three widths, or of one x for all."""
    widths = sorted(floors)
    mean, at = np.array([np.mean(floors[w]) for w in widths]), np.array([x[w] for w in widths], np.float64)
    if len(widths) < _FEWEST or (line := _line(at, mean)) is None:
        return None
    slope, offset = line
    residual = mean - (slope * at + offset)
    variance = float(residual @ residual) / (len(widths) - 2)
    centred = at - at.mean()
    left_out = [_left_out(at, mean, i) for i in range(len(widths))]
    points = tuple(
        Point(width=w, x=float(at[i]), floor=float(mean[i]), spread=spread(floors[w]), fitted=float(mean[i] - residual[i]),
              left_out=left_out[i])
        for i, w in enumerate(widths)
    )  # fmt: skip
    low, high = _r2_interval([floors[w] for w in widths], at)
    others = None if None in left_out else mean - np.array(left_out, np.float64)
    return Fit(
        C=slope,
        B=offset,
        C_se=math.sqrt(variance / float(centred @ centred)),
        B_se=math.sqrt(variance * (1 / len(at) + float(at.mean() ** 2) / float(centred @ centred))),
        r2=_r2(mean, residual),
        r2_low=low,
        r2_high=high,
        left_out_r2=None if others is None else _r2(mean, others),
        points=points,
        near_critical=_nearest(points, critical_width),
    )


def spread(values: list[float]) -> float | None:
    """Standard deviation (n − 1); None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _line(x: Floats, y: Floats) -> tuple[float, float] | None:
    """(slope, offset) of least squares; None where all x are one."""
    centred = x - x.mean()
    if not np.any(centred):
        return None
    slope = float(centred @ (y - y.mean())) / float(centred @ centred)
    return slope, float(y.mean()) - slope * float(x.mean())


def _r2(y: Floats, residual: Floats) -> float | None:
    total = float(np.square(y - y.mean()).sum())
    return 1 - float(residual @ residual) / total if total else None


def _left_out(x: Floats, y: Floats, i: int) -> float | None:
    line = _line(np.delete(x, i), np.delete(y, i))
    return None if line is None else line[0] * float(x[i]) + line[1]


def _r2_interval(floors: list[list[float]], x: Floats) -> tuple[float | None, float | None]:
    """2.5 and 97.5 % of R² over draws of each width's seeds; None where a width has one seed only."""
    if min(map(len, floors)) < 2:
        return None, None
    rng = np.random.Generator(np.random.Philox(0))
    drawn = np.stack([np.array(f)[rng.integers(len(f), size=(_DRAWS, len(f)))].mean(1) for f in floors], 1)  # [draws, widths]
    lines = ((y, line) for y in drawn if (line := _line(x, y)) is not None)
    r2 = [value for y, (slope, offset) in lines if (value := _r2(y, y - (slope * x + offset))) is not None]
    low, high = map(float, np.quantile(r2, [0.025, 0.975])) if r2 else (None, None)
    return low, high


def _nearest(points: tuple[Point, ...], critical_width: float | None) -> Nearest | None:
    if not critical_width:
        return None
    point = min(points, key=lambda p: abs(math.log(p.width / critical_width)))
    return Nearest(
        width=point.width,
        ratio=point.width / critical_width,
        error=(point.fitted - point.floor) / point.floor,
        left_out_error=None if point.left_out is None else (point.left_out - point.floor) / point.floor,
    )
