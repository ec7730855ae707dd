import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.quality import HEAD, KINDS, OURS, SIDES, At, best, dump, fvu_at, pairs, rows, trainings
from residual_saes.shared.cache import Cache
from residual_saes.train.step import Begun, TrainingSae
from tests.conftest import Cli

FIRST, SECOND = KINDS["BatchTopK"].peers


def points(
    who: str,
    fvu: dict[float, float],
    *,
    kind: str = "BatchTopK",
    lr: str = "1e-2",
    layer: int = 2,
    seed: int = 0,
    tokens: int = 9,
) -> list[dict[str, Any]]:
    more = {"who": who, "kind": kind, "lr": lr, "layer": layer, "seed": seed, "tokens": tokens, "batch": 3}
    return [more | {"l0": l0, "fvu": value, "ce_recovered": 1 - value, "dead": l0 / 100} for l0, value in fvu.items()]


def test_a_power_law_is_followed_between_points_and_no_further() -> None:
    law = points(OURS, {l0: 3 * l0**-0.5 for l0 in (160.0, 10.0, 60.0, 25.0)})
    for l0 in (10, 12.5, 40, 77, 160):
        assert fvu_at(law, l0) == pytest.approx(3 * l0**-0.5)
    assert fvu_at(law, 9.9) is None and fvu_at(law, 161) is None and fvu_at([], 10) is None
    assert fvu_at(points(OURS, {10.0: 0.4, 29.0: 0.4}), 20) == pytest.approx(0.4)
    assert fvu_at(points(OURS, {10.0: 0.4, 31.0: 0.4}), 20) is None  # a guess


def test_a_curve_that_bends_is_followed() -> None:
    """As measured ones do: slopes of −0.7 at small L0 and −1.4 at large."""

    def law(l0: float) -> float:
        return math.exp(-0.1 * math.log(l0) - 0.12 * math.log(l0) ** 2)

    bent = points(OURS, {l0: law(l0) for l0 in (300.0, 8.0, 17.0, 43.0, 122.0)})
    for l0 in (8, 11, 30, 72, 200, 300):
        assert fvu_at(bent, l0) == pytest.approx(law(l0), rel=1e-9)


def test_what_counts_is_the_best_of_all_rates_at_that_l0_of_the_same_kind_layer_and_seed() -> None:
    known = (
        points(FIRST, {10.0: 0.2, 20.0: 0.5}) + points(SECOND, {10.0: 0.3, 20.0: 0.4}) + points(OURS, {10.0: 0.15, 20.0: 0.3})
    )
    known += points(OURS, {10.0: 0.1, 12.0: 0.1}, lr="2e-2") + points(FIRST, {10.0: 0.01}, kind="TopK")
    known += points(FIRST, {10.0: 0.01, 20.0: 0.01}, layer=5) + points(OURS, {10.0: 0.02, 20.0: 0.02}, layer=5)

    def fvus(of: list[dict[str, Any]], kind: str, l0: float) -> list[tuple[float, float | None]]:
        return [(ours.fvu, theirs and theirs.fvu) for ours, theirs in pairs(of, kind, 2, l0)]

    assert fvus(known, "BatchTopK", 10) == [pytest.approx((0.1, 0.2))]
    assert fvus(known, "BatchTopK", 20) == [pytest.approx((0.3, 0.4))]
    assert fvus(known, "TopK", 10) == [] and fvus(known, "BatchTopK", 30) == []
    ((alone, none),) = fvus(known + points(OURS, {10.0: 0.4}, kind="Matryoshka"), "Matryoshka", 10)
    assert alone == pytest.approx(0.4) and none is None
    both = known + points(FIRST, {10.0: 0.5}, seed=1) + points(OURS, {10.0: 0.55}, seed=1)
    both += points(OURS, {10.0: 0.7}, seed=2)  # of a seed that nobody else has
    assert fvus(both, "BatchTopK", 10) == [pytest.approx((0.1, 0.2)), pytest.approx((0.55, 0.5)), (pytest.approx(0.7), None)]
    (of_two, *_), of_one = (rows(of) for of in (both, points(OURS, {32.0: 0.4}, kind="TopK", layer=5)))
    assert of_two == ("3", "2", "10", "BatchTopK", "0.3250", "0.6750", "10.0%", "2", FIRST, "0.3500", "0.6500", "10.0%", "0.80")
    assert of_one == [("3", "5", "32", "TopK", "0.4000", "0.6000", "32.0%", "1", *["–"] * 5)]
    assert len(of_two) == len(of_one[0]) == len(HEAD) == len(SIDES)


def test_what_else_an_sae_is_lies_between_its_neighbours() -> None:
    known = points(OURS, {10.0: 0.4, 20.0: 0.2}) + points(FIRST, {10.0: 0.5, 20.0: 0.4})
    assert best(known, math.sqrt(200)) == At(OURS, *map(pytest.approx, (math.sqrt(0.08), 0.7, 0.15)))


def test_points_of_shorter_trainings_are_not_mixed_in() -> None:
    shorter, longer = points(FIRST, {5.0: 0.4, 10.0: 0.2}, tokens=6), points(OURS, {5.0: 0.5, 10.0: 0.3})
    assert trainings(longer + shorter) == {2: shorter, 3: longer}
    assert [row[0] for row in rows(longer + points(OURS, {10.0: 0.2}, tokens=6))] == ["2", "3"]


def test_the_file_for_the_others_holds_the_batches_that_ours_are_trained_on(
    cli: Cli, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, begin = [], TrainingSae.begin

    def seen(self: TrainingSae, x: torch.Tensor, *more: Any) -> Begun:
        ours.append(x.clone())
        return begin(self, x, *more)

    monkeypatch.setattr(TrainingSae, "begin", seen)
    where = ("--preset", "demo", "--cache", cache.path, "--runs", tmp_path, "--layers", 1, "--seed", 1, "--device", "cpu")
    assert cli("train", *where, "--l1", "1e-2", "--expansion", 1, "--batch", 1024).code == 0
    dump(cache, 1, 1, 20, 1024, tmp_path / "batches.npy")
    theirs = np.load(tmp_path / "batches.npy")
    assert theirs.shape == (20, 1024, 32)
    assert torch.equal(torch.from_numpy(theirs).float(), torch.stack(ours))
