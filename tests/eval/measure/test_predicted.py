import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from residual_saes.eval.measure.predicted import Statistics, capacity, critical_width, floors, student_widths
from tests.conftest import ROOT, Cli
from tests.test_bad_input import refused


def write(path: Path, alpha: Any, count: Any, importance: Any) -> Path:
    path.write_text(json.dumps({"alpha": alpha, "F": count, "sorted_importance": importance}))
    return path


def test_capacity_is_the_papers() -> None:
    """In the paper, F ≈ 28,700 and α ≈ 0.992 are a critical width of 1,065: some α that is printed so must give it."""
    assert capacity(0.992) == pytest.approx(25.8889, rel=1e-5)
    assert 28_700 / capacity(0.9925) < 1_065 < 28_700 / capacity(0.9915)
    assert capacity(1 - 1 / math.e) == pytest.approx(math.e, rel=1e-15)
    assert capacity(0) == 1
    assert capacity(1) == math.inf


def test_a_floor_is_its_formula_by_hand() -> None:
    """α = 0.9: g = 1 / (0.1 ln 10) = 4.342944819; a width of 2 keeps ⌊8.69⌋ = 8 features, d* = 20 / g = 4.605."""
    statistics = Statistics(alpha=0.9, importance=tuple(2.0**-i for i in range(20)))
    assert critical_width(statistics) == pytest.approx(4.605170186, rel=1e-9)
    got = floors(statistics, (1, 2, 4, 5, 1024))
    assert got[1] == sum(2.0**-i for i in range(4, 20))
    assert got[2] == sum(2.0**-i for i in range(8, 20))
    assert got[4] == sum(2.0**-i for i in range(17, 20))
    assert got[5] == got[1024] == 0.0


@given(
    st.floats(0, 1),
    st.lists(st.floats(0, 1e300), max_size=60),
    st.lists(st.integers(1, 200), min_size=1, max_size=20).map(sorted),
)
def test_wider_students_lose_no_more_and_nothing_from_the_critical_width_on(
    alpha: float, importance: list[float], widths: list[int]
) -> None:
    statistics = Statistics(alpha=alpha, importance=tuple(sorted(importance, reverse=True)))
    got = [floors(statistics, (w,))[w] for w in widths]
    assert got == sorted(got, reverse=True)
    for width, floor in zip(widths, got, strict=True):
        assert 0 <= floor <= math.fsum(importance)
        if width >= critical_width(statistics):
            assert floor == 0
        kept = int(min(width * capacity(alpha), len(importance)))
        assert width >= critical_width(statistics) or floor == math.fsum(statistics.importance[kept:])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.floats(0, 0.5))
def test_statistics_of_any_densities_can_be_predicted_from(density: list[float], alive_above: float) -> None:
    f = torch.tensor(density, dtype=torch.float64)
    got = Statistics.measured(f, f * 2, alive_above)
    alive = [d for d in density if d > alive_above]
    assert got.features == len(alive)
    assert got.importance == tuple(sorted((d * 2 for d in alive), reverse=True))
    if alive:
        assert got.alpha is not None
        assert 0 <= got.alpha <= 1
        assert got.alpha == 1 - math.fsum(alive) / len(alive)
    else:
        assert got.alpha is None
    assert all(math.isfinite(v) for v in floors(got, (1, 7, 128)).values())


def test_widths_of_other_models_are_the_same_fractions() -> None:
    assert student_widths(1024) == (128, 256, 384, 512, 768, 1024)
    assert student_widths(128) == (16, 32, 48, 64, 96, 128)
    assert student_widths(4) == (1, 2, 3, 4)


def test_the_command_prints_one_line_a_width(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    importance = sorted(rng.lognormal(size=5_000).tolist(), reverse=True)
    result = cli("eval", "floor", "--statistics", write(tmp_path / "s.json", 0.99, 5_000, importance), "--widths", "64,128,256")
    assert result.code == 0, result.err
    lines = [line.split(" ") for line in result.out.splitlines()]
    assert [width for width, _ in lines] == ["64", "128", "256"]
    g = 1 / (0.01 * math.log(100))
    for width, floor in lines:
        wanted = sum(importance[int(int(width) * g) :])
        assert float(floor) == pytest.approx(wanted, rel=5e-8)
        assert len(floor.replace(".", "")) >= 8
    assert lines[-1] == ["256", "0.0000000"]
    assert "F 5,000, α 0.99, g 21.7147, d* 230.259" in result.err
    default = cli("eval", "floor", "--statistics", tmp_path / "s.json")
    assert [line.split(" ")[0] for line in default.out.splitlines()] == ["128", "256", "384", "512", "768", "1024"]


@pytest.mark.parametrize(
    ("alpha", "count", "importance", "wanted"),
    [
        (1, 2, [2.0, 1.0], ["0.0000000", "0.0000000"]),  # nothing ever fires
        (0, 3, [4.0, 2.0, 1.0], ["3.0000000", "1.0000000"]),  # all fire always: a dimension each
        (0.9, 0, [], ["0.0000000", "0.0000000"]),
        (None, 0, [], ["0.0000000", "0.0000000"]),
        (0.5, 8, [1, 8, 2, 7, 3, 6, 4, 5], ["21.000000", "6.0000000"]),  # g = 2.885: the largest 2 and 5 are kept
        (1e-17, 2, [2.0, 1.0], ["0.0000000", "0.0000000"]),  # the formula's own limit, with a warning
        (0.5, 1.0, [3.0], ["0.0000000", "0.0000000"]),
    ],
)
def test_limits(cli: Cli, tmp_path: Path, alpha: Any, count: Any, importance: list[float], wanted: list[str]) -> None:
    result = cli("eval", "floor", "--statistics", write(tmp_path / "s.json", alpha, count, importance), "--widths", "1,2")
    assert result.code == 0, result.err
    assert result.out == f"1 {wanted[0]}\n2 {wanted[1]}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[1, 2]", "is not an object with alpha, F and sorted_importance"),
        ('{"alpha": 0.5, "F": 1}', "is not an object with alpha, F and sorted_importance"),
        ('{"alpha": 1.5, "F": 1, "sorted_importance": [1]}', "alpha is 1.5; it is 1 − L0/F, a number from 0 to 1"),
        ('{"alpha": "x", "F": 1, "sorted_importance": [1]}', "alpha is 'x'"),
        ('{"alpha": NaN, "F": 1, "sorted_importance": [1]}', "alpha is nan"),
        ('{"alpha": null, "F": 1, "sorted_importance": [1]}', "alpha is None"),
        ('{"alpha": true, "F": 1, "sorted_importance": [1]}', "alpha is True"),
        ('{"alpha": 0.5, "F": 2, "sorted_importance": [1]}', "F is 2, and sorted_importance has 1 values"),
        ('{"alpha": 0.5, "F": null, "sorted_importance": []}', "F is None"),
        ('{"alpha": 0.5, "F": 1, "sorted_importance": [-1]}', "none negative"),
        ('{"alpha": 0.5, "F": 1, "sorted_importance": [Infinity]}', "finite"),
        ('{"alpha": 0.5, "F": 1, "sorted_importance": [1' + "0" * 400 + "]}", "finite numbers"),
        ('{"alpha": 0.5, "F": 1, "sorted_importance": ["1"]}', "finite numbers"),
        ("[" * 100_000, "is not JSON"),
        ('{"alpha": 0.5, "F": 1, "sorted_importance": 1}', "must be a list"),
    ],
)
def test_bad_statistics_are_one_line(cli: Cli, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content.encode("latin1") if "\xff" in content else content.encode())
    refused(cli("eval", "floor", "--statistics", path), message)


def test_the_example_in_the_docs_is_so(cli: Cli, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reference" / "eval.md").read_text(encoding="utf-8")
    found = re.search(
        r"\$ rsae (eval floor) --statistics file.json (--widths \S+)\n(.*?)\n\nwhere the file is `(.*?)`", text, re.DOTALL
    )
    assert found
    (tmp_path / "file.json").write_text(found[4])
    result = cli(*found[1].split(), "--statistics", tmp_path / "file.json", *found[2].split())
    assert result.out.split() == found[3].split()


def test_bad_options_are_one_line(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", 0.9, 1, [1.0])
    refused(cli("eval", "floor", "--statistics", path, "--widths", "12,x"), "'x' is not a count")
    refused(cli("eval", "floor", "--statistics", path, "--widths", ""), "--widths is empty")
    refused(cli("eval", "floor", "--statistics", path, "--widths", "0"), "'0' is not a count")
    refused(cli("eval", "floor", "--statistics", tmp_path / "none.json"), "none.json: No such file")
    refused(cli("eval", "floor", "--statistics", tmp_path), "Is a directory")
    refused(cli("eval", "floor"), "Missing option '--statistics'")
