from dataclasses import replace

import pytest

from bench import scale
from bench.scale import DENSE, FOLLOW, HARVEST, SPARSE, Found, Point, points, simulate, tables
from shared.errors import UserError

FIGURES = dict(zip(scale.FIGURES.values(), (209_132.0, 0.0518, 0.0293), strict=True))
POINT = points(FIGURES)[0]


def found(point: Point, *, seconds: float, twice: int = 0) -> Found:
    return Found(point=point, seconds=seconds, twice=twice, busy=0.0, date="2026")


def test_bounds_are_those_of_the_gpus_and_of_the_store() -> None:
    slow = replace(POINT, part=HARVEST, bandwidth=2.5)
    assert [replace(slow, workers=n).bound * 32_768 for n in (1, 8)] == pytest.approx([2.5e9 / 49_152] * 2)
    assert replace(slow, workers=8, bandwidth=100.0).bound * 32_768 == pytest.approx(8 * 209_132)
    dense = replace(POINT, part=DENSE, workers=8, bandwidth=10.0)
    assert dense.bound * 32_768 * 2048 == pytest.approx(10e9)  # bytes: eight GPUs would take 10.4 GB/s
    assert replace(dense, workers=1).bound == pytest.approx(1 / 0.0518)
    follow = replace(POINT, part=FOLLOW, workers=2, bandwidth=1e3, blocks=100)
    assert follow.shortest == pytest.approx(100 * 32_768 / (2 * 209_132) + 15 / 16 * 100 * 0.0518)


def test_blocks_done_twice_are_work_and_come_once_in_the_full_job() -> None:
    point = replace(POINT, part=HARVEST, bandwidth=100.0, blocks=100)
    one = found(point, seconds=120 / point.bound, twice=20)
    assert one.rate == pytest.approx(one.bound)
    assert one.hours == pytest.approx((9_218 + 20) / point.bound / 3600)
    two = found(replace(point, part=SPARSE, workers=2), seconds=200 * 0.0293)  # half of what two could
    assert two.hours == pytest.approx(9_156 * 24 * 0.0293 / 3600) and two.rate / two.bound == pytest.approx(0.5)


def test_a_gpu_that_was_not_measured_is_named() -> None:
    with pytest.raises(UserError, match="lack three sparse settings, seconds: run `python -m bench gpu`"):
        points({name: FIGURES[name] for name in list(FIGURES)[:2]})


def test_tables_show_the_latest_of_each_point_beside_its_bound() -> None:
    both = [found(point, seconds=share * point.shortest) for share in (9, 2) for point in points(FIGURES)]
    text = tables({"date": "today", "gpu": "H1"}, both)
    assert text[0].startswith("**Simulated** by")
    assert text[1].splitlines()[2].startswith("| 2.5 GB/s | 25,431 (50%) | 25,431 (50%) |")
    assert len(text) == 5 and "(11%)" not in "".join(text)
    assert text[4].splitlines()[2].startswith("| 1 + 1, 10 GB/s | 0.98") and "| 1.9" in text[4]


@pytest.mark.parametrize("part", [DENSE, FOLLOW])
def test_two_simulated_workers_do_all_of_the_work_and_are_no_faster_than_the_bound(part: str) -> None:
    """How much slower they are is a matter of the machine."""
    point = replace(POINT, part=part, workers=2, bandwidth=10.0, durable=1e-4, blocks=32, tempo=40.0)
    one = simulate(point)
    assert one.seconds >= 0.97 * point.shortest
    assert 0 <= one.twice <= 16
