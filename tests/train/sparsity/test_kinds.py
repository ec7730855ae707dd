"""Kinds with thresholds of their own or with prefixes through the whole pipeline. Their gradients are held against autograd in
tests/train/test_step.py, resuming in tests/train/test_trainer.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.run import Run, run_config
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.kernels.cpu import load_native
from residual_saes.train.sparsity.base import ControllerConfig
from residual_saes.train.sparsity.jumprelu import BANDWIDTH, LOG, Jump, JumpRelu
from tests.conftest import TRAIN_ARGS, Cli, curve_of, invoke

SETTINGS = "jumprelu:12,matryoshka:12,matryoshka:12@16+64"
READINGS = {
    "jumprelu-12": ("JumpReLU, thresholds learnt for an L0 of 12", "JumpReluAutoEncoder"),
    "matryoshka-12": ("Matryoshka BatchTopK, the 12 largest activations a token", "MatryoshkaBatchTopKSAE"),
    "matryoshka-12-of-16-64": ("Matryoshka BatchTopK, the 12 largest activations a token", "MatryoshkaBatchTopKSAE"),
}


@pytest.fixture(scope="module")
def trained(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds")
    where = ("--cache", cache_path, "--runs", path, "--layers", 1)
    assert invoke("train", *TRAIN_ARGS, *where, "--l1", SETTINGS, "--lr", "1e-2") == 0
    cached = ("--preset", "demo", "--cache", cache_path, "--device", "cpu", "--runs", path)
    assert invoke("eval", *cached, "--eval-tokens", 512, "--ce-tokens", 64) == 0
    assert invoke("eval", "pages", *cached) == 0
    return path


@pytest.mark.parametrize("name", READINGS)
def test_a_kind_is_trained_evaluated_shown_and_exported(
    trained: Path, cache: Cache, name: str, cli: Cli, tmp_path: Path
) -> None:
    (run,) = (Run(path) for path in trained.glob(f"*-x4-{name}"))
    config, (words, dictionary) = run.config.stored, READINGS[name]
    assert config["train"]["step"]["beta2"] == (0.99 if name == "jumprelu-12" else 0.999)
    assert run_config(config["train"], config["cache"])["digest"] == config["digest"]
    curve = curve_of(run, Site(1))
    assert curve[-1]["loss"] < curve[0]["loss"]
    saved = Sae.load(run.snapshot_path(Site(1), "final"))
    assert saved.rule == "threshold" and saved.threshold is not None and float(saved.threshold.min()) > 0
    x = torch.empty(cache.spec.block_rows, cache.spec.d_model, dtype=torch.float16)
    cache.read_block(Site(1), cache.spec.train_blocks, x.numpy())
    l0 = float((saved.encode(x.float()) > 0).sum(1).double().mean())
    assert (len(saved.threshold.unique()) > 1) is (name == "jumprelu-12")
    assert l0 == pytest.approx(12, rel=0.5)
    if name == "jumprelu-12":
        assert curve[0]["l0"] > 24 and curve[-1]["l0"] == pytest.approx(12, rel=0.2)
    else:
        assert {record["l0"] for record in curve} == {12.0}

    results: dict[str, Any] = json.loads((run.path / "results" / "metrics.json").read_text())
    assert all(0 < record["fvu"] < 1 for record in results.values() if record["snapshot"] == "final")
    assert f"setting: {words}." in (run.path / "README.md").read_text()
    assert list((trained / "pages").glob(f"*-x4-{name}/layer01_final.*/facts.json"))
    for form in ("saelens", "dictionary_learning"):
        assert cli("eval", "export", "--to", form, "--runs", run.path, "--out", tmp_path / form).code == 0
    cfg, trainer = (json.loads(next(tmp_path.rglob(file)).read_text()) for file in ("cfg.json", "config.json"))
    assert (cfg["architecture"], trainer["trainer"]["dict_class"]) == ("jumprelu", dictionary)
    published = cli("eval", "publish", "--runs", run.path, "--to", "somebody", "--dry-run")
    assert published.code == 0, published.err


@pytest.mark.parametrize("l1", ["batchtopk:1", "topk:1", "jumprelu:1"])
def test_features_are_kept_from_dying(cli: Cli, cache_path: Path, tmp_path: Path, l1: str) -> None:
    where = ("--cache", cache_path, "--runs", tmp_path, "--layers", 1, "--l1", f"{l1}/decay,{l1}/best", "--lr", "1e-2")
    assert cli("train", *TRAIN_ARGS, *where).code == 0
    best, decay = (Run(next(tmp_path.glob(f"*-{recipe}"))) for recipe in ("best", "decay"))
    assert best.config.stored["train"]["revive"] is True
    (first, *_, last), plain = curve_of(best, Site(1)), curve_of(decay, Site(1))[-1]
    assert last["alive"] > plain["alive"] + 5  # of 128
    if l1 == "batchtopk:1":
        assert 1 < first["l0"] < 2 and last["l0"] == 1


def test_a_prefix_that_is_no_part_of_the_dictionary_is_refused(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    where = ("--cache", cache_path, "--runs", tmp_path, "--l1", "matryoshka:8@100000")
    refused = cli("train", *TRAIN_ARGS, *where)
    assert refused.code == 2 and "a prefix of 100000 is no part of the" in refused.err


@pytest.mark.parametrize(("l0", "left"), [(1, 8), (20, 90)])
def test_first_thresholds_leave_many_times_the_target(l0: int, left: int) -> None:
    h = torch.rand(50, 100)
    (start,) = JumpRelu(l0=l0).own(h).values()
    assert start.shape == (100,) and float((h >= start.exp()).sum()) == pytest.approx(50 * left, abs=1)


@pytest.mark.parametrize("kernels", [TorchKernels(), load_native()], ids=["torch", "native"])
def test_what_is_silent_and_what_is_near_goes_by_each_features_threshold(kernels: TorchKernels | None) -> None:
    assert kernels is not None
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, generator=generator).bfloat16() for size in ((40, 24), (100, 24)))
    own = {LOG: torch.randn(100, generator=generator)}
    room = Workspace(40, 24, 100, "bf16", torch.device("cpu"))
    h = kernels.encode(x, w, torch.zeros(100), room)[0].float()
    theta = 0.7 * own[LOG].exp()
    got = Jump(factor=0.7).encode(kernels, x, w, torch.zeros(100), own, room)
    torch.testing.assert_close(got.z.float(), torch.where(h > theta.bfloat16(), h, 0.0))
    assert torch.equal(got.activation.feature_count, (got.z > 0).sum(0).int())
    near = torch.zeros(40, 100, dtype=torch.bool)
    near[got.near.token, got.near.feature] = True
    low, high = (theta * (1 + side * BANDWIDTH / 2) for side in (-1, 1))
    assert torch.equal(near, (h > low.bfloat16()) & (h < high.bfloat16())) and near.any()


def test_one_factor_follows_l0_down_to_its_target() -> None:
    """Of activations whose density falls as e^−h, in batches whose L0 is 3 % off, and that double once."""
    control, generator, size, seen = JumpRelu(l0=10).control(400, ControllerConfig()), torch.Generator().manual_seed(0), 1.0, []
    for step in range(400):
        threshold = 0.2 * float(control.thresholds({LOG: torch.zeros(1)}))
        size *= 2 if step == 300 else 1
        seen.append(400 * math.exp(-threshold / size) * (1 + 0.03 * float(torch.randn((), generator=generator))))
        control.update(step, seen[-1], 0.0)
    assert seen[0] > 300 and seen[100] == pytest.approx(math.sqrt(seen[0] * 10), rel=0.3)
    assert seen[200] == pytest.approx(10, rel=0.2) and sum(seen[-20:]) / 20 == pytest.approx(10, rel=0.03)
