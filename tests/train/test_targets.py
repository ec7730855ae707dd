"""Dictionaries that write other sites than they read, or several: the step against float64 autograd, and runs of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.rows import Rows
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.runs.target import Target, dictionaries
from residual_saes.shared.sites import Site
from residual_saes.train.kernels.base import TorchKernels
from residual_saes.train.loader import AlignedLoader, LoaderConfig
from residual_saes.train.look import deviation, read_rows
from residual_saes.train.step import StepConfig, TrainingSae
from residual_saes.train.targets import parse_targets
from tests.conftest import TRAIN_ARGS, Cli, curve_of
from tests.train.test_step import CPU, EVEN, HIDDEN, autograd, gradients, problem, worst
from tests.train.test_trainer import kill_in_step, same

D, F, B = EVEN
READS = "resid_post@l-1>resid_post@l"
NAME = "transcoders-resid_post-1-resid_post"


def weights(runs: Path) -> dict[str, dict[str, Tensor]]:
    """Of every checkpoint, by run and file."""
    return {f"{p.parent.name}/{p.name}": torch.load(p, weights_only=True)["model_state"] for p in runs.glob("*/*.pt")}


def train_whole_and_killed(cli: Cli, monkeypatch: pytest.MonkeyPatch, folder: Path, layers: str, *args: object) -> None:
    """Runs in folder / "whole" and, killed in a step and gone on with, in folder / "killed", which must be the same."""
    for name in ("whole", "killed"):
        if name == "killed":
            kill_in_step(monkeypatch, cli, 41, *args, "--runs", folder / name, "--save-minutes", 0)
        result = cli("train", *TRAIN_ARGS, *args, "--runs", folder / name)
        assert result.code == 0, result.err
        assert f"trained layers {layers} into {folder / name}/" in result.err
    same(weights(folder / "whole"), weights(folder / "killed"))


def written() -> Tensor:
    """A batch of what is written, about another mean."""
    return (2 * torch.randn(B, D, generator=torch.Generator().manual_seed(9)) + 1).half()


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize(("sparse_below", "skip"), [(0.0, True), (1.0, True), (1.0, False)])
def test_a_transcoders_step_in_float64_is_autograd_exactly(sparse_below: float, skip: bool, norm: str, kind: str) -> None:
    sae, x = problem(1, "fp64", sparse_below, size=EVEN, norm=norm, kind=kind, transcodes=True, skip=skip)
    l1, y = 0.0 if kind == "jumprelu" else 0.05, written()
    wanted_loss, wanted = autograd(sae, x, l1, "sum", kind, y)
    loss, sparse, got = gradients(sae, x, l1, kind, y)
    assert sparse == bool(sparse_below)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert worst(got, wanted) < 1e-12


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize(("precision", "native", "bound"), [("fp32", False, 1e-5), ("bf16", False, 0.1), ("bf16", True, 0.1)])
def test_other_precisions_are_near_float64(precision: str, native: bool, bound: float, sparse_below: float, skip: bool) -> None:
    sae, x = problem(2, precision, sparse_below, native=native, size=EVEN, transcodes=True, skip=skip)
    y = written()
    wanted_loss, wanted = autograd(sae, x, 0.05, "sum", y=y)
    loss, _, got = gradients(sae, x, 0.05, y=y)
    assert loss == pytest.approx(wanted_loss, rel=bound / 5)
    assert worst(got, wanted) < bound


def test_a_transcoder_starts_near_the_best_linear_map() -> None:
    """And its skip connection at zero."""
    rng = torch.Generator().manual_seed(0)
    sae = TrainingSae(D, 64 * D, StepConfig(precision="fp32"), TorchKernels(), CPU, 1, transcodes=True, skip=True)
    x = 5 + 3 * torch.randn(4096, D, generator=rng)
    turn = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q
    y = 7 + (x - 5) @ turn / 30 + 0.01 * torch.randn(4096, D, generator=rng)
    sae.init_centre(x, y)
    saved = sae.snapshot({"inputs": [0], "outputs": [1]}, {})
    given = saved.reconstruct(x, saved.encode(x))
    torch.testing.assert_close(sae.b_dec, y.mean(0))
    assert sae.w_skip is not None and not sae.w_skip.any()
    assert float((given - y).square().mean()) < 0.2 * float(y.var())  # measured: 0.04
    start = sae.w_enc.clone()
    for read, given in ((x, torch.full_like(y, 7)), (torch.full_like(x, 5), y), (x, y * math.nan)):
        sae.init_centre(read, given)
        assert torch.equal(sae.w_enc, start)  # which says nothing of where to start


def test_a_transcoder_goes_on_bit_for_bit_and_its_file_computes_what_it_does(
    cli: Cli, cache: Cache, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--cache", cache_path, "--target", READS, "--skip", "--layers", 2, "--l1", "3e-3,topk:8,batchtopk:8")
    train_whole_and_killed(cli, monkeypatch, tmp_path, "1>2", *args)
    names = [f"{NAME}-x4-{setting}-skip" for setting in ("batchtopk-8", "l1-3e-3-fixed", "topk-8")]
    assert [path.name.split("-", 1)[1] for path in sorted((tmp_path / "whole").iterdir())] == names
    run = Run(sorted((tmp_path / "whole").iterdir())[0])
    sae = Sae.load(run.snapshot_path(Site(2), "final"), 32, belongs=run.belongs(Site(2), "final"))
    assert sae.target == Target((Site(1),), (Site(2),)) == run.config.target_at(Site(2))
    state = torch.load(run.snapshot_path(Site(2), "final"), weights_only=True)["model_state"]
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "b_pre": (32,), "encoder.weight": (128, 32), "encoder.bias": (128,), "decoder.weight": (32, 128),
        "decoder.bias": (32,), "threshold": (128,), "skip.weight": (32, 32),
    }  # fmt: skip
    x, y = (torch.from_numpy(cache.values(site, cache.whole_block(site, 41))).float() for site in sae.target.sites)
    z = torch.relu((x - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"])
    z = z * (z > state["threshold"])
    given = z @ state["decoder.weight"].T + state["decoder.bias"] + (x - state["b_pre"]) @ state["skip.weight"].T
    torch.testing.assert_close(sae.reconstruct(x, sae.encode(x)), given, rtol=1e-4, atol=1e-5)
    mse, variance = float((given - y).square().mean()), float((y - y.mean(0)).square().mean())
    assert mse < 0.8 * variance
    assert mse == pytest.approx(curve_of(run, Site(2))[-1]["mse"], rel=0.3)


def test_a_crosscoder_goes_on_bit_for_bit_and_its_file_is_of_rows_as_they_are(
    cli: Cli, cache: Cache, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--cache", cache_path, "--target", "all", "--l1", "3e-3,topk:8,batchtopk:8")
    train_whole_and_killed(cli, monkeypatch, tmp_path, "0-2", *args)
    run = next(Run(path) for path in (tmp_path / "whole").iterdir() if path.name.endswith("-crosscoder-0-2-x4-topk-8"))
    sae = Sae.load(run.snapshot_path(Site(0), "final"), 32, belongs=run.belongs(Site(0), "final"))
    sites = tuple(map(Site, range(3)))
    assert sae.target == Target(sites, sites)
    assert sae.w_enc.shape == sae.w_dec.shape == (128, 96) and sae.b_pre.shape == sae.b_dec.shape == (96,)
    scales = sae.stats["scales"]
    deviations = torch.tensor([deviation(*read_rows(cache, site, 0)) for site in sites])
    torch.testing.assert_close(torch.tensor(scales), deviations / deviations.square().mean().sqrt())
    by = torch.tensor(scales).repeat_interleave(32)
    torch.testing.assert_close((sae.w_dec / by).norm(dim=1), torch.ones(128))  # as it was trained: of unit norm over all layers
    assert sae.shares().sum(1).numpy() == pytest.approx(1)
    rows = [torch.from_numpy(cache.values(site, cache.whole_block(site, 41))).float() for site in sites]
    x, z = torch.cat(rows, 1), sae.encode(torch.cat(rows, 1))
    assert int((z > 0).sum(1).max()) <= 8
    mse = float(((sae.reconstruct(x, z) - x) / by).square().mean())
    assert mse < 0.8 * float(((x - x.mean(0)) / by).square().mean())
    assert mse == pytest.approx(curve_of(run, Site(0))[-1]["mse"], rel=0.3)
    parts = sae.parts()
    assert [part.target for part in parts] == [Target(sites, (site,)) for site in sites]
    assert all(torch.equal(part.encode(x), z) for part in parts)
    torch.testing.assert_close(torch.cat([part.reconstruct(x, z) for part in parts], 1), sae.reconstruct(x, z))


def test_a_dictionary_that_layers_share_goes_on_bit_for_bit_and_is_an_sae_of_each(
    cli: Cli, cache: Cache, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is of one layer, divided by its scale, and a step has those of all layers of its tokens."""
    args = ("--cache", cache_path, "--target", "shared:0,2", "--l1", "3e-3,topk:8,batchtopk:8")
    train_whole_and_killed(cli, monkeypatch, tmp_path, "shared:0,2", *args)
    run = next(Run(path) for path in (tmp_path / "whole").iterdir() if path.name.endswith("-mlsae-0_2-x4-batchtopk-8"))
    finals = [snapshot for snapshot in run.snapshots() if snapshot.label == "final"]
    assert [snapshot.site for snapshot in finals] == [Site(0), Site(2)] and len({s.path for s in finals}) == 1
    file = torch.load(finals[0].path, weights_only=True)
    state, scales = file["model_state"], file["stats"]["scales"]
    assert state["encoder.weight"].shape == (128, 32) and file["config"]["shared"] and file["config"]["inputs"] == [0, 2]
    squares = []
    for snapshot, scale in zip(finals, scales, strict=True):
        sae = run.load(snapshot, 32)
        assert sae.target == run.config.target_at(snapshot.site) == Target.itself(snapshot.site)
        x = torch.from_numpy(cache.values(snapshot.site, cache.whole_block(snapshot.site, 41))).float()
        z = torch.relu((x / scale - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"])
        z = z * (z > state["threshold"])
        given = scale * (z @ state["decoder.weight"].T + state["decoder.bias"] + state["b_pre"])
        torch.testing.assert_close(sae.reconstruct(x, sae.encode(x)), given, rtol=1e-3, atol=1e-4)
        assert float((given - x).square().sum() / (x - x.mean(0)).square().sum()) < 0.9
        squares.append(float(((given - x) / scale).square().mean()))
    assert sum(squares) / 2 == pytest.approx(curve_of(run, Site(0))[-1]["mse"], rel=0.3)


@pytest.mark.parametrize("window_blocks", [1, 4])
def test_rows_that_are_left_out_are_those_of_what_is_read(cache: Cache, window_blocks: int) -> None:
    """By their norm at the first site, whatever it is at the second; also where a batch is of several windows."""
    read, other = ([cache.values(s, cache.whole_block(s, block)) for block in range(40)] for s in (Site(0), Site(1)))
    pairs = {row.tobytes(): partner for row, partner in zip(np.concatenate(read), np.concatenate(other), strict=True)}
    longest = float(np.median(np.linalg.norm(np.concatenate(read).astype(np.float64), axis=1)))
    config = LoaderConfig(batch=700, window_blocks=window_blocks, threads=2, rows=Rows(longest=longest))
    loader = AlignedLoader(cache, (Site(0), Site(1)), config, CPU, last=60)
    for batch in loader:
        x, y = batch[Site(0)].numpy(), batch[Site(1)].numpy()
        assert np.linalg.norm(x.astype(np.float64), axis=1).max() <= longest
        assert all(np.array_equal(pairs[row.tobytes()], partner) for row, partner in zip(x, y, strict=True))


def test_targets_by_what_is_written(cache: Cache) -> None:
    def parse(text: str, layers: str | None = None) -> tuple[str, list[str]]:
        form, targets = parse_targets(text, layers, cache)
        assert all(Target.at(form, target.place) == target for target in targets)
        assert len({target.place for target in targets}) == len(targets)
        return form, list(map(str, targets))

    assert parse("") == ("", ["0", "1", "2"])
    assert parse(" resid_post@l-1 > resid_post@l ") == ("resid_post@l-1>resid_post", ["0>1", "1>2"])
    assert parse("resid_post@l-2>resid_post", "2") == ("resid_post@l-2>resid_post", ["0>2"])
    assert parse("mlp_out>resid_post", "1,2") == ("mlp_out>resid_post", ["1.mlp_out>1", "2.mlp_out>2"])
    assert parse("all") == ("0-2", ["0-2"])
    assert parse("all", "0,2") == parse("0,2") == ("0,2", ["0,2"])
    assert [dictionaries(form) for form in ("", "mlp_out>resid_post", "0,1.mlp_out", "0-2,5", "shared:0-2,5")] == [
        "saes", "transcoders-mlp_out-resid_post", "crosscoder-0_1.mlp_out", "crosscoder-0-2_5", "mlsae-0-2_5",
    ]  # fmt: skip
    sites = (Site(0), Site(2))
    assert parse_targets("shared:all", "0,2", cache) == ("shared:0,2", (Target(sites, sites, shared=True),))
    assert Target.at("shared:0,2", Site(2)) == Target.itself(Site(2))  # as whoever reads it sees it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--target", "resid_post@l-1>resid_post@l+1"), "is no target"),
        (("--target", "nothing>resid_post"), "is no target"),
        (("--target", "nothing>resid_post"), "such as all, 0,6,12 or shared:all"),
        (("--target", "resid_post>resid_post@l"), "reads what it writes: leave out --target"),
        (("--target", "mlp_out>resid_post"), "has no layer with what"),
        (("--target", "mlp_out>resid_post", "--layers", 1), "layers 1.mlp_out are not in"),
        (("--target", READS, "--layers", "0-2"), "there is no layer 1 before 0"),
        (("--target", "1"), "name more"),
        (("--target", "shared:1"), "name more"),
        (("--target", "shared:mlp_out>resid_post"), "is no target"),
        (("--target", "0,1", "--layers", "0,1"), "leave out --layers"),
        (("--target", "0,1", "--max-norm", 5), "use --skip-positions"),
        (("--target", "0,1", "--skip"), "--skip is of transcoders"),
        (("--skip",), "--skip is of transcoders"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    cli: Cli, cache_path: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "runs", "--l1", "topk:8", *options)
    assert result.code == 2 and says in result.err
    assert not (tmp_path / "runs").exists()
