import math

import numpy as np
import pytest

from residual_saes.eval.floors.fit import fit_floors

WIDTHS = (16, 32, 48, 64, 96)
FLOORS = {w: [1 / w + 0.01 * s * (1 + w % 5) for s in range(3)] for w in WIDTHS}
X = {16: 9.0, 32: 4.0, 48: 3.0, 64: 1.0, 96: 0.0}


def test_the_line_and_its_errors_are_those_of_numpy() -> None:
    fit = fit_floors(FLOORS, X, None)
    assert fit is not None
    mean = [np.mean(FLOORS[w]) for w in WIDTHS]
    (slope, offset), covariance = np.polyfit([X[w] for w in WIDTHS], mean, 1, cov=True)
    assert pytest.approx((slope, offset)) == (fit.C, fit.B)
    assert (fit.C_se, fit.B_se) == pytest.approx(np.sqrt(np.diag(covariance)))
    assert fit.r2 == pytest.approx(np.corrcoef([X[w] for w in WIDTHS], mean)[0, 1] ** 2)
    assert [p.fitted for p in fit.points] == pytest.approx([slope * X[w] + offset for w in WIDTHS])
    assert [p.spread for p in fit.points] == pytest.approx([np.std(FLOORS[w], ddof=1) for w in WIDTHS])


def test_a_width_that_is_left_out_is_predicted_from_the_others_alone() -> None:
    fit = fit_floors(FLOORS, X, None)
    assert fit is not None
    changed = fit_floors(FLOORS | {48: [100.0]}, X, None)
    assert changed is not None
    slope, offset = np.polyfit([X[w] for w in WIDTHS if w != 48], [np.mean(FLOORS[w]) for w in WIDTHS if w != 48], 1)
    assert fit.points[2].left_out == pytest.approx(slope * X[48] + offset)
    assert changed.points[2].left_out == fit.points[2].left_out
    errors = np.array([p.left_out for p in fit.points], float) - [p.floor for p in fit.points]
    assert fit.left_out_r2 == pytest.approx(1 - np.square(errors).mean() / np.var([p.floor for p in fit.points]))
    assert changed.left_out_r2 is not None and changed.left_out_r2 < 0


def test_seeds_that_agree_leave_r2_where_it_is_and_others_do_not() -> None:
    sure = fit_floors({w: [1 / w] * 3 for w in WIDTHS}, X, None)
    unsure = fit_floors(FLOORS, X, None)
    alone = fit_floors({w: [1 / w] for w in WIDTHS}, X, None)
    assert sure is not None and unsure is not None and alone is not None
    assert sure.r2_low == pytest.approx(sure.r2) and sure.r2_high == pytest.approx(sure.r2)
    assert unsure.r2_low is not None and unsure.r2_high is not None and unsure.r2 is not None
    assert unsure.r2_low < unsure.r2 < unsure.r2_high
    assert alone.r2_low is None and alone.points[0].spread is None


def test_the_width_nearest_to_the_critical_one_is_nearest_by_ratio() -> None:
    fit = fit_floors(FLOORS, X, 39.5)  # 32 is nearer by difference, 48 by ratio
    assert fit is not None and fit.near_critical is not None
    near, point = fit.near_critical, fit.points[2]
    assert (near.width, near.ratio) == (48, pytest.approx(48 / 39.5))
    assert near.error == pytest.approx(point.fitted / point.floor - 1)
    assert point.left_out is not None and near.left_out_error == pytest.approx(point.left_out / point.floor - 1)


def test_what_has_no_line_has_no_fit() -> None:
    assert fit_floors({16: [1.0], 32: [2.0]}, X, None) is None
    assert fit_floors(FLOORS, dict.fromkeys(WIDTHS, 0.0), 3.0) is None
    flat = fit_floors({w: [0.5] for w in WIDTHS}, X, None)
    assert flat is not None and flat.r2 is None and flat.C == 0 and math.isfinite(flat.B_se)
