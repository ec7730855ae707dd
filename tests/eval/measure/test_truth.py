"""SAEs held against the true features of a synthetic world: by hand, by brute force, and by SAELens, whose metrics they are."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers import ENVIRONMENTS
from residual_saes.eval.measure.truth import Classified, Fires, cosines, matching, mean_correlation
from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from residual_saes.shared.synthetic.config import WorldConfig
from residual_saes.shared.synthetic.world import World, world_of
from tests.conftest import Cli, invoke

KINDS = "1e-1,topk:3,batchtopk:3,jumprelu:3,matryoshka:3,adaptive:1e-1@3/best"
WORLD = ("--features", 48, "--roots", 6, "--branching", 2, "--depth", 1, "--most-frequent", 0.3, "--least-frequent", 0.03)
ROWS = ("--rank", 4, "--d-model", 32, "--tokens", "64K", "--holdout-tokens", "8K", "--context", 256, "--block-sequences", 8)
TRAIN = ("--batch", 128, "--window-blocks", 4, "--expansion", 1, "--lr", 1e-2, "--lr-warmup", 20, "--lr-decay", 0.3)
NAMES = ("f1", "precision", "recall", "mcc", "uniqueness", "true_l0")


@pytest.fixture(scope="module")
def world_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of 48 features in 32 dimensions, c, and 32 features of every kind trained on it, runs."""
    path, preset, threads = tmp_path_factory.mktemp("world"), ("--preset", "synthetic-small"), torch.get_num_threads()
    torch.set_num_threads(1)  # SAEs are so small that threads would wait for each other
    assert invoke("harvest", "synthetic", *preset, *WORLD, *ROWS, "--cache", path / "c") == 0
    where = ("--cache", path / "c", "--runs", path / "runs", "--device", "cpu")
    assert invoke("train", *preset, *TRAIN, "--tokens", "64K", "--l1", KINDS, *where) == 0
    yield path
    torch.set_num_threads(threads)


def results(path: Path) -> dict[str, dict[str, Any]]:
    """{run: the record of its final SAE}"""
    return {
        file.parent.parent.name: json.loads(file.read_text())["layer00_final"]
        for file in sorted((path / "runs").glob("*/results/metrics.json"))
    }


def heldout(path: Path) -> tuple[torch.Tensor, torch.Tensor, World]:
    """Held-out rows as they are stored, float32, and the magnitudes of all true features in them [n, 48]."""
    cache, rows, truth = Cache.open(path / "c"), [], []
    spec, world = cache.spec, world_of(cache.spec, Site(0))
    for block in range(spec.train_blocks, spec.n_blocks):
        z = torch.zeros(spec.block_rows, world.config.features)
        for i in range(spec.block_sequences):
            firing = world.fire(block * spec.block_sequences + i, spec.context)
            z[i * spec.context + firing.row, firing.feature] = torch.from_numpy(firing.magnitude)
        rows.append(torch.from_numpy(cache.whole_block(Site(0), block)).float())
        truth.append(z[cache.block_order(block)])
    return torch.cat(rows), torch.cat(truth), world


def sae_of(run: Path) -> Sae:
    return Sae.load(Run(run).snapshot_path(Site(0), "final"))


def test_every_kind_finds_features(cli: Cli, world_path: Path) -> None:
    """Directions that were drawn by chance, the bound below, find hardly any."""
    where = ("--cache", world_path / "c", "--runs", world_path / "runs", "--device", "cpu")
    result = cli("eval", "truth", *where, "--snapshots", "final")
    assert result.code == 0, result.err
    assert "F1" in result.out and "CE" not in result.out and result.out.count("synthetic-48-saes-x1") == 6
    found = results(world_path)
    assert len(found) == 6
    for name, record in found.items():
        assert 0.5 < record["f1"] < 1 and record["mcc"] > 0.65 and record["uniqueness"] > 0.6, (name, record)
        assert 2.5 < record["true_l0"] < 3.7 and record["fvu"] < 0.5
    assert cli("eval", "truth", *where, "--snapshots", "final").code == 0 and results(world_path) == found  # nothing is new
    report = cli("eval", *where, "--snapshots", "final", "--numbers-only")
    assert report.code == 0 and results(world_path) == found


def test_metrics_are_those_of_the_definition(world_path: Path) -> None:
    """Feature by feature over all rows at once, in NumPy, beside what one pass in pieces gives."""
    x, truth, world = heldout(world_path)
    for name, record in results(world_path).items():
        sae = sae_of(world_path / "runs" / name)
        on, true = (sae.encode(x) > 0).numpy(), (truth > 0).numpy()
        assert record["true_l0"] == pytest.approx(true.sum(1).mean())
        rows, directions = sae.w_dec.double().numpy(), world.directions.double().numpy()
        similar = np.abs((rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ directions.T)
        scores = []
        for feature, partner in enumerate(similar.argmax(1)):
            right = (on[:, feature] & true[:, partner]).sum()
            p, r = (right / n if n else 0.0 for n in (on[:, feature].sum(), true[:, partner].sum()))
            scores.append((2 * p * r / (p + r) if right else 0.0, p, r))
        assert [record[n] for n in NAMES[:3]] == pytest.approx(np.mean(scores, axis=0).tolist(), abs=1e-6)
        assert record["uniqueness"] == len(np.unique(similar.argmax(1))) / len(rows)


def test_a_feature_by_hand() -> None:
    """Three features: one that is right in 2 of its 3 firings and misses 1 of 3, one dead, one that fires always."""
    world = World(WorldConfig(features=3, roots=0), 4, seed=0, number=0)
    world.directions = torch.eye(4)[:3]
    w_dec = torch.tensor([[0, -3.0, 0, 0.1], [0, 2.0, 0.5, 0], [1.0, 0, 0, 0]])  # the first two stand for feature 1
    zeros = {"b_pre": torch.zeros(4), "b_dec": torch.zeros(4), "b_enc": torch.zeros(3)}
    sae = Sae(w_enc=w_dec, w_dec=w_dec, **zeros, config={}, stats={})
    on = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 0, 1]]).float()
    true = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    tally = Classified(sae, world)
    tally.add(*on[:2].nonzero().unbind(1), true[:2])
    tally.add(*on[2:].nonzero().unbind(1), true[2:])
    found = tally.finish(on.double().sum(0), 5)
    assert found.precision == pytest.approx((2 / 3 + 0 + 1 / 5) / 3) and found.recall == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found.f1 == pytest.approx((2 / 3 + 0 + 1 / 3) / 3)
    assert found.uniqueness == pytest.approx(2 / 3) and found.true_l0 == pytest.approx(5 / 5)
    assert found.mcc == pytest.approx((3 / 9.01**0.5 + 0.5 / 4.25**0.5 + 1) / 3)  # the second is left with feature 2


def test_the_matching_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for n, m, kind in itertools.product((1, 2, 4, 5), (5, 6), range(4)):
        cost = rng.normal(size=(n, m)) if kind < 2 else rng.integers(0, 3, (n, m)).astype(float)  # the latter with ties
        columns = matching(cost)
        assert len(set(columns.tolist())) == n
        least = min(cost[np.arange(n), list(of)].sum() for of in itertools.permutations(range(m), n))
        assert cost[np.arange(n), columns].sum() == pytest.approx(least, abs=1e-12)
    matrix = torch.rand(30, 50, generator=torch.Generator().manual_seed(0))
    assert mean_correlation(matrix) == pytest.approx(mean_correlation(matrix.t()), abs=1e-12)
    shuffled = matrix[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    assert mean_correlation(shuffled) == pytest.approx(mean_correlation(matrix), abs=1e-12)


def test_a_permuted_copy_of_the_truth_is_perfect() -> None:
    world = World(WorldConfig(features=40, roots=4, branching=2, depth=1), 16, seed=0, number=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert mean_correlation(cosines(-2 * world.directions[order], world.directions)) == pytest.approx(1, abs=1e-6)


def test_what_fires_is_dense_row_by_row_in_the_order_of_the_block() -> None:
    world, order = World(WorldConfig(features=40, roots=4, branching=2, depth=1), 16, seed=0, number=0), torch.randperm(60)
    fires = Fires.of(world, 7, 3, 20, order)
    wanted = torch.zeros(60, 40, dtype=torch.bool)
    for i in range(3):
        firing = world.fire(7 + i, 20)
        wanted[i * 20 + firing.row, firing.feature] = True
    parts = [fires.dense(a, b, torch.device("cpu")) for a, b in ((0, 1), (1, 41), (41, 60))]
    assert torch.equal(torch.cat(parts), wanted[order])


def test_a_cache_of_a_language_model_has_no_truth(cli: Cli, cache_path: Path, runs_path: Path) -> None:
    result = cli("eval", "truth", "--cache", cache_path, "--runs", runs_path)
    assert result.code == 2 and "whose true features nobody knows" in result.err and result.err.count("\n") == 1


@pytest.mark.slow
def test_saelens_measures_the_same(cli: Cli, world_path: Path, tmp_path: Path) -> None:
    """Its own evaluator, on the exported SAEs and the same rows."""
    python = ENVIRONMENTS / "sae_lens" / "bin" / "python"
    if not python.exists():
        pytest.skip("SAELens is not installed: `python -m bench.peers`")
    x, truth, world = heldout(world_path)
    torch.save({"x": x, "truth": truth, "directions": world.directions}, tmp_path / "data.pt")
    runs = ("--runs", world_path / "runs")
    assert cli("eval", "truth", "--cache", world_path / "c", *runs).code == 0
    assert cli("eval", "export", *runs, "--to", "saelens", "--out", tmp_path / "out").code == 0
    script = Path(__file__).with_name("saelens_truth.py")
    done = subprocess.run([python, script, tmp_path / "data.pt", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), results(world_path)
    assert theirs.keys() == ours.keys() and len(ours) == 6
    for name, of in theirs.items():
        for key in (*NAMES, "l0", "explained_variance"):
            assert ours[name][key] == pytest.approx(of[key], abs=1e-4), (name, key)
        assert round((1 - ours[name]["frac_alive"]) * 32) == of["dead"]
