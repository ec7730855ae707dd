"""Hours of a job from rates that were measured."""

import json
from pathlib import Path

import pytest

from residual_saes.fleet import hours
from residual_saes.fleet.hours import RATES, Rates, Work, measured_rates, this_machine
from residual_saes.fleet.plan import Plan
from residual_saes.fleet.room import Window
from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.sites import Site

SHAPE = {"d_model": 1024, "features": 32_768}
RATES_OF_TWO = {"forward": 1.0, "write": 2 / 5, "read": 2 / 2, "dense": 1 / 7, "sparse": 1.0}


def rates(machine: str = "M", cores: int | None = None, overlap: bool = True) -> Rates:
    return Rates(machine=machine, cores=cores, date="2026", overlap=overlap, **SHAPE, **RATES_OF_TWO)


def test_parts_that_hide_behind_one_another_count_once() -> None:
    work = Work(forward=1, bytes=2, training=1)  # 1, 5, 2, 7 and 1 seconds
    together, apart = rates().times(work), rates(overlap=False).times(work)
    assert (together.harvest, together.train_dense, together.train_sparse) == (5, 7, 2)
    assert (apart.harvest, apart.train_dense, apart.train_sparse) == (6, 9, 3)


def test_rates_are_those_of_this_machine_and_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cores = this_machine()
    every = [rates("GPU"), rates(name, cores), rates(name, cores + 1), rates("other", cores)]
    (tmp_path / "rates.json").write_text(
        json.dumps({"rates": [{k: getattr(one, k) for k in Rates.__slots__} for one in every]})
    )
    monkeypatch.setattr(hours, "RATES", tmp_path / "rates.json")
    assert measured_rates(**SHAPE) == every[:2]
    assert measured_rates(1024, 8192) == []


def test_the_package_comes_with_rates_of_a_gpu_at_the_published_shape() -> None:
    assert RATES.parent == Path(hours.__file__).parent
    assert any(one.cores is None and one.overlap for one in measured_rates(**SHAPE))


def test_a_plan_adds_up_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.fleet.plan.measured_rates", lambda d_model, features: [rates()])
    spec = CacheSpec(
        model="m", model_revision="", dataset="d", dataset_revision="", split="", text_column="", tokenizer_sha256="",
        separator=0, context=4, d_model=1, n_layers=4, vocab_size=9, block_sequences=1, n_blocks=10, holdout_blocks=2, seed=0,
        precision="bf16",
    )  # fmt: skip
    windows = (Window(layers=(Site(0), Site(1)), peak=1), Window(layers=(Site(3),), peak=1))
    plan = Plan(windows=windows, written=1, spec=spec, settings=3, features=1, so_far="all")
    # Harvests of 160 and 80 bytes behind forward passes of 20 and 40 tokens: 400 + 200 s. Training: 192 and 96 tokens x SAEs.
    assert (
        str(plan).splitlines()[-1]
        == "at the rates of M (2026): harvest 10m00s, training 4m48s (every step sparse) to 33m36s (dense)"
    )
