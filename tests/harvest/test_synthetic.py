"""Caches of synthetic worlds: the same contracts as a language model's, and nothing of a text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from residual_saes.harvest.origin import Synthetic
from residual_saes.harvest.run import HarvestConfig, harvest, harvest_blocks
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site
from residual_saes.shared.synthetic.world import world_of
from residual_saes.shared.units import Shard
from tests.conftest import Cli, invoke
from tests.harvest.conftest import content, flip

CPU = torch.device("cpu")
WORLD = ("--features", 40, "--roots", 3, "--branching", 3, "--depth", 1, "--d-model", 16, "--worlds", 2)
ROWS = ("--tokens", 4096, "--holdout-tokens", 1024, "--context", 64, "--block-sequences", 8)
ARGS = ("synthetic", "--preset", "synthetic-small", *WORLD, *ROWS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Ten blocks of two worlds. Tests that change it copy it first."""
    path = tmp_path_factory.mktemp("synthetic") / "c"
    assert invoke("harvest", *ARGS, "--cache", path) == 0
    return Cache.open(path)


@pytest.fixture
def copy(made: Cache, tmp_path: Path) -> Cache:
    shutil.copytree(made.path, tmp_path / "c")
    return Cache.open(tmp_path / "c")


def test_blocks_hold_the_rows_of_their_sequences(made: Cache) -> None:
    spec = made.spec
    assert (spec.n_blocks, spec.holdout_blocks, made.sites) == (10, 2, (Site(0), Site(1)))
    for site in made.sites:
        world = world_of(spec, site)
        for block in (0, 9):
            rows = torch.cat([world.rows(block * 8 + i, 64) for i in range(8)]).half().numpy()
            np.testing.assert_array_equal(made.whole_block(site, block), rows[made.block_order(block)])
    assert not np.array_equal(made.whole_block(Site(0), 0), made.whole_block(Site(1), 0))


def test_rows_are_stored_in_half_the_bytes(made: Cache, tmp_path: Path, cli: Cli) -> None:
    assert cli("harvest", *ARGS, "--cache", tmp_path / "c", "--store", "int8").code == 0
    half = Cache.open(tmp_path / "c")
    assert half.spec.store == "int8" and half.spec.world == made.spec.world
    for site in made.sites:
        near, exact = (cache.whole_block(site, 9).astype(np.float64) for cache in (half, made))
        assert 0 < np.square(near - exact).sum() < 1e-3 * np.square(exact).sum()


def test_the_spec_has_the_world_and_nothing_of_a_text(made: Cache) -> None:
    stored = json.loads((made.path / "cache.json").read_bytes())
    assert set(stored["spec"]) == {
        "model", "context", "d_model", "n_layers", "block_sequences", "n_blocks", "holdout_blocks", "seed", "world",
    }  # fmt: skip
    assert stored["spec"]["model"] == "synthetic-40" and stored["spec"]["world"]["features"] == 40
    assert stored["digest"] == made.digest == CacheSpec.from_dict(stored["spec"]).digest
    with pytest.raises(ValueError, match="model_revision is missing"):
        CacheSpec.from_dict({k: v for k, v in stored["spec"].items() if k != "world"})


def test_another_world_is_refused(cli: Cli, made: Cache) -> None:
    before = content(made)
    for other in (("--seed", 1), ("--features", 41), ("--zipf", 0.7), ("--worlds", 3)):
        result = cli("harvest", *ARGS, *other, "--cache", made.path)
        assert result.code == 2 and "other settings" in result.err and result.err.count("\n") == 1
    assert content(made) == before


def test_bad_worlds_are_refused_in_a_line(cli: Cli, tmp_path: Path) -> None:
    for options, said in (
        (("--preset", "demo"), "name a world with --preset synthetic-small"),
        (
            ("--preset", "synthetic-small", "--most-frequent", 1.5),
            "1.5 is not in the range 0<=x<=1",
        ),
        (("--preset", "synthetic-small", "--features", 1), "1 is not in the range"),
    ):
        result = cli("harvest", "synthetic", *options, "--cache", tmp_path / "c")
        assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    result = cli("harvest", "--preset", "synthetic-small", "--cache", tmp_path / "c")
    assert result.code == 2 and "rsae harvest synthetic --preset synthetic-small" in result.err
    assert not (tmp_path / "c").exists()


def test_a_second_run_does_what_is_missing_and_nothing_else(cli: Cli, made: Cache, copy: Cache) -> None:
    kept = {f: f.stat().st_mtime_ns for f in copy.path.rglob("c.*")}
    gone = [copy.block_path(Site(1), 4), copy.block_path(Site(0), 9), copy.tokens.path(0)]
    for path in gone:
        path.unlink()
    assert cli("harvest", *ARGS, "--cache", copy.path).code == 0
    assert content(copy) == content(made)
    assert {f for f in kept if f.stat().st_mtime_ns != kept[f]} <= set(gone)


def test_verify_finds_damage_and_repair_mends_it(cli: Cli, made: Cache, copy: Cache) -> None:
    assert cli("harvest", "verify", "--cache", copy.path).code == 0
    flip(copy.block_path(Site(0), 3))
    flip(copy.tokens.path(0), 11)
    assert cli("harvest", "verify", "--cache", copy.path).code == 1
    result = cli("harvest", "repair", "--cache", copy.path, "--device", "cpu")
    assert result.code == 0 and "repaired 1 layer blocks and the tokens" in result.out
    assert content(copy) == content(made)


def test_a_world_that_was_freed_comes_back_when_it_is_named(cli: Cli, made: Cache, copy: Cache) -> None:
    assert cli("harvest", "free", "--cache", copy.path, "--layers", 1, "--yes").code == 0
    assert not copy.block_path(Site(1), 0).exists() and copy.block_path(Site(1), 9).exists()
    assert "--layers brings them back" in cli("harvest", *ARGS, "--cache", copy.path).err
    assert cli("harvest", *ARGS, "--layers", 1, "--cache", copy.path).code == 0
    for block in range(10):
        np.testing.assert_array_equal(copy.whole_block(Site(1), block), made.whole_block(Site(1), block))


def test_blocks_come_out_the_same_in_any_order_and_by_any_shard(made: Cache, tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", made.spec, made.sites)
    for index in (0, 1):
        harvest(cache, made.sites, Synthetic(), HarvestConfig(device=CPU, shard=Shard(index=index, count=2)))
    harvest_blocks(cache, Synthetic().source(made.spec, made.sites, CPU), [7, 2, 0], HarvestConfig(device=CPU), replace=True)
    for site in made.sites:
        for block in range(10):
            np.testing.assert_array_equal(cache.whole_block(site, block), made.whole_block(site, block))


def test_what_needs_a_language_model_says_so(cli: Cli, made: Cache, tmp_path: Path) -> None:
    runs = ("--cache", made.path, "--runs", tmp_path / "runs")
    train = ("--preset", "synthetic-small", "--tokens", 4096, "--batch", 128, "--l1", "batchtopk:4", "--layers", 0)
    assert cli("train", *train, *runs, "--window-blocks", 2, "--device", "cpu").code == 0
    for command in (("pages", *runs), ("ask", *runs[2:], "--text", "a"), ("distill", *runs)):
        result = cli("eval", *command, "--device", "cpu")
        assert result.code == 2 and "is of the synthetic world synthetic-40" in result.err
        assert "error:" in result.err.splitlines()[-1] and "Traceback" not in result.err
    with pytest.raises(UserError, match="there is no language model"):
        import residual_saes as rs

        _ = rs.saes(tmp_path / "runs")[0].load().tokens("a")


def test_evaluation_measures_all_but_the_language_model(cli: Cli, made: Cache, tmp_path: Path) -> None:
    runs = ("--cache", made.path, "--runs", tmp_path / "runs")
    train = ("--preset", "synthetic-small", "--tokens", 4096, "--batch", 128, "--l1", "batchtopk:4", "--window-blocks", 2)
    assert cli("train", *train, *runs, "--layers", 0, "--device", "cpu").code == 0
    result = cli("eval", *runs, "--snapshots", "final", "--device", "cpu")
    assert result.code == 0, result.err
    assert "FVU" in result.out and "CE" not in result.out
    report = (tmp_path / "runs" / "report.html").read_text()
    assert "synthetic world" in report and "CE recovered</th>" not in report and "is no number" not in report
    [card] = [path.read_text() for path in (tmp_path / "runs").glob("*/README.md")]
    assert "worlds whose features are known" in card and "AutoModel" not in card and "CE" not in card
    results = json.loads(next((tmp_path / "runs").glob("*/results/metrics.json")).read_text())
    assert {r["ce_tokens"] for r in results.values()} == {0} and {r["ce"] for r in results.values()} == {None}
    assert all(0 < r["fvu"] < 1.5 for r in results.values())
