"""TopK through the whole pipeline. Its gradients are held against autograd in tests/train/test_step.py."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.eval.publish.formats import FORMS
from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.run import Run, run_config
from residual_saes.shared.runs.sae import Sae, keep_top_k_
from residual_saes.shared.sites import Site
from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.kernels.cpu import load_native
from residual_saes.train.sparsity.base import Unfused
from residual_saes.train.sparsity.topk import TopK
from tests.conftest import TRAIN_ARGS, Cli, curve_of


def test_a_token_keeps_its_largest() -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
    assert keep_top_k_(z.clone(), 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0]]
    assert torch.equal(keep_top_k_(z.clone(), 9), z)


@pytest.mark.parametrize("kernels", [TorchKernels(), load_native()], ids=["torch", "native"])
def test_the_unfused_pass_fills_the_kernels_own_order_and_counts_what_is_there(kernels: TorchKernels | None) -> None:
    """Of numbers among which there are many equal ones."""
    assert kernels is not None
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(*size, generator=generator).mul(4).round().div(8).bfloat16() for size in ((40, 24), (100, 24), (100,))
    )
    workspace = Workspace(40, 24, 100, "bf16", torch.device("cpu"))
    got = Unfused(TopK(k=5)).encode(kernels, x, w, b.float(), {}, workspace)
    kept = got.z > 0
    assert got.z.data_ptr() == workspace.z(40, feature_major=kernels.feature_major).data_ptr()
    assert kept.sum(1).tolist() == [5] * 40 and torch.equal(got.activation.feature_count, kept.sum(0).int())
    everything = torch.relu(x.float() @ w.float().t() + b.float())
    left = torch.where(kept, 0.0, everything.bfloat16())
    assert torch.all(left.max(1).values <= torch.where(kept, got.z, torch.inf).min(1).values)
    assert float(got.activation.total) == pytest.approx(float(got.z.double().sum()))
    active = kernels.compact(got.z, got.activation, 200, 0)
    assert torch.equal(active.row_start, torch.arange(0, 201, 5))


@pytest.mark.slow
def test_topk_is_trained_evaluated_shown_and_exported(cli: Cli, cache_path: Path, cache: Cache, tmp_path: Path) -> None:
    where = ("--preset", "demo", "--cache", cache_path, "--device", "cpu", "--runs", tmp_path / "runs")
    assert (
        cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "runs", "--layers", 1, "--l1", "topk:12").code
        == 0
    )
    (run,) = map(Run, (tmp_path / "runs").iterdir())
    config = run.config.stored
    assert run.name.endswith("x4-topk-12") and config["train"]["l1"] == {"kind": "topk", "k": 12}
    assert run_config(config["train"], config["cache"])["digest"] == config["digest"]
    assert {record["l0"] for record in curve_of(run, Site(1))} == {12.0}

    saved = Sae.load(run.snapshot_path(Site(1), "final"))
    x = torch.empty(cache.spec.block_rows, cache.spec.d_model, dtype=torch.float16)
    cache.read_block(Site(1), cache.spec.train_blocks, x.numpy())
    z = saved.encode(x.float())
    assert (saved.rule, saved.k, saved.threshold) == ("topk", 12, None)
    assert (z > 0).sum(1).tolist() == [12] * len(x)

    assert cli("eval", *where, "--eval-tokens", 512, "--ce-tokens", 64).code == 0
    (record,) = (
        r for r in json.loads((run.path / "results" / "metrics.json").read_text()).values() if r["snapshot"] == "final"
    )
    assert record["l0"] == 12.0
    card = (run.path / "README.md").read_text()
    assert "setting: TopK, the 12 largest activations of each token." in card and "0 but for a token's 12 largest" in card
    names: dict[str, Any] = {
        "torch": torch,
        "w": torch.load(run.snapshot_path(Site(1), "final"), weights_only=True)["model_state"],
    }
    exec(re.findall(r"def encode.*?\n\n", card, re.DOTALL)[0], names)
    torch.testing.assert_close(names["encode"](x.float()), z)
    assert cli("eval", "pages", *where).code == 0
    assert list((tmp_path / "runs" / "pages").glob("*topk-12/layer01_final.*/facts.json"))
    for form in FORMS:
        assert cli("eval", "export", "--to", form, "--runs", run.path, "--out", tmp_path / form).code == 0
