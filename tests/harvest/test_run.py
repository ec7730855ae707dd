import dataclasses
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from residual_saes.harvest.care import warnings_of_overflow
from residual_saes.harvest.hub import HubText
from residual_saes.harvest.language_model import LanguageModel
from residual_saes.harvest.run import HarvestConfig, Shares, await_tokens, harvest_blocks, in_turn
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import harvested_model, open_model
from residual_saes.shared.lm import load_model
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.units import ALONE, Shard
from tests.conftest import Cli
from tests.harvest.conftest import content, other_weights, small_args

CPU = torch.device("cpu")


def residuals(lm: Path, tokens: torch.Tensor, precision: str = "bf16") -> dict[Site, torch.Tensor]:
    outputs: dict[Site, torch.Tensor] = {}
    model = LanguageModel(load_model(str(lm), None, precision, head=False), parse_sites("0,1,2"), CPU)
    model.run(tokens, lambda layer, output: outputs.__setitem__(layer, output.float()))
    return outputs


def test_every_row_is_the_activation_its_place_says(lm: Path, cache: Cache) -> None:
    """Row j of a block belongs to (sequence, position) = divmod(order[j], context), in every layer."""
    spec = cache.spec
    for block in (0, 11, spec.n_blocks - 1):
        wanted = residuals(lm, torch.from_numpy(cache.block_tokens(block)))
        order, out = cache.block_order(block), np.empty((spec.block_rows, spec.d_model), dtype=np.float16)
        assert sorted(order) == list(range(spec.block_rows))
        for layer in cache.sites:
            cache.read_block(layer, block, out)
            flat = wanted[layer].reshape(-1, spec.d_model).numpy()
            np.testing.assert_allclose(out, flat[order], rtol=1e-3, atol=1e-3)


def test_bf16_stays_near_fp32(lm: Path, cache: Cache) -> None:
    tokens = torch.from_numpy(cache.block_tokens(0))
    half, full = residuals(lm, tokens), residuals(lm, tokens, "fp32")
    for layer in cache.sites:
        assert (half[layer] - full[layer]).norm() / full[layer].norm() < 0.02


def test_blocks_come_out_the_same_in_any_order_and_batch(lm: Path, cache: Cache, tmp_path: Path) -> None:
    other = tmp_path / "c"
    shutil.copytree(cache.path, other)
    copy = Cache.open(other)
    for block in (3, 1):
        for layer in copy.sites:
            copy.block_path(layer, block).unlink()
    model = LanguageModel(load_model(str(lm), None, "bf16", head=False), parse_sites("0,1,2"), CPU)
    harvest_blocks(copy, model, [3, 1], HarvestConfig(device=CPU, forward_sequences=16))
    for layer in copy.sites:
        for block in (1, 3):
            assert copy.block_path(layer, block).read_bytes() == cache.block_path(layer, block).read_bytes()


def test_totals_are_those_of_all_blocks_together(cache: Cache) -> None:
    totals = cache.totals()
    assert tuple(totals) == parse_sites("0-2")
    assert {site: (sum(layer.by.values()), layer.nonfinite, layer.mixed) for site, layer in totals.items()} == dict.fromkeys(
        cache.sites, (cache.spec.n_blocks, 0, "")
    )


def test_a_second_run_has_nothing_to_do(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...]) -> None:
    before = {f: f.stat().st_mtime_ns for f in cache_path.rglob("c.*")}
    assert cli("harvest", *harvest_args, "--cache", cache_path).code == 0
    assert {f: f.stat().st_mtime_ns for f in cache_path.rglob("c.*")} == before


def test_layers_can_be_added_later(cli: Cli, cache: Cache, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert cli("harvest", *harvest_args, "--cache", path, "--layers", 1).code == 0
    assert Cache.open(path).sites == parse_sites("1")
    assert cli("harvest", *harvest_args, "--cache", path, "--layers", "0-2").code == 0
    assert Cache.open(path).sites == parse_sites("0-2")
    for layer in range(3):
        for block in range(cache.spec.n_blocks):
            assert (
                Cache.open(path).block_path(Site(layer), block).read_bytes()
                == cache.block_path(Site(layer), block).read_bytes()
            )


def test_values_that_do_not_fit_are_reported(lm: Path, cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    base = load_model(str(lm), None, "fp32", head=False)
    with torch.no_grad():
        base.get_submodule("layers.1.mlp.dense_4h_to_h").bias[3] = 1e6  # type: ignore[operator]
    harvest_blocks(copy, LanguageModel(base, parse_sites("0,1,2"), CPU), [5], HarvestConfig(device=CPU), replace=True)
    totals = copy.totals()
    assert totals[Site(0)].nonfinite == 0
    assert totals[Site(1)].nonfinite == cache.spec.block_rows
    assert totals[Site(2)].nonfinite >= cache.spec.block_rows
    lines = warnings_of_overflow(totals)
    assert [line[:18] for line in lines] == ["layer  1: WARNING:", "layer  2: WARNING:"]
    assert f"WARNING: {cache.spec.block_rows} values did not fit float16" in lines[0]
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    copy.read_block(Site(1), 5, out)
    assert np.isfinite(out).all()
    assert (out[:, 3] == 65504).all()


def test_shares_are_of_the_whole_time(lm: Path, cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    model = LanguageModel(load_model(str(lm), None, "bf16", head=False), parse_sites("0,1,2"), CPU)
    shares = harvest_blocks(copy, model, [5], HarvestConfig(device=CPU), replace=True)
    assert shares.forward > 0 and shares.copy > 0 and shares.wait > 0
    assert shares.forward + shares.copy + shares.wait == pytest.approx(shares.total)


def test_what_overlaps_is_not_taken_off_twice() -> None:
    assert str(Shares(forward=6, copy=1, total=10)) == "forward 60%, copy 10%, waiting for the disk 30%"
    beside = Shares(forward=6, copy=1, total=10, overlap=True)
    assert str(beside) == "forward 60%, copy 10% beside it, waiting for the disk 40%"


def test_shards_do_their_own_blocks_first_and_leave_none_out(cache: Cache) -> None:
    """Of blocks that are missing, some were done before; what is a shard's own does not depend on that."""
    spec, blocks = cache.spec, [b for b in range(cache.spec.n_blocks) if b % 5]
    turns = [in_turn(spec, blocks, Shard(index=i, count=8)) for i in range(8)]
    assert all(sorted(turn) == blocks for turn in turns)
    own = [set(in_turn(spec, list(range(spec.n_blocks)), Shard(index=i, count=8))[: 6 if i < 4 else 5]) for i in range(8)]
    assert sorted(block for mine in own for block in mine) == list(range(spec.n_blocks))
    for turn, mine in zip(turns, own, strict=True):
        left = mine.intersection(blocks)
        assert set(turn[: len(left)]) == left
    assert len({tuple(block for block in turn if block not in own[0] | own[1]) for turn in turns[:2]}) == 2
    assert in_turn(spec, blocks, ALONE)[: spec.holdout_blocks - 1] == [41, 42, 43]


def test_shards_wait_for_the_first_to_tokenise(
    cli: Cli, harvest_args: tuple[object, ...], cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("residual_saes.harvest.run._POLL", 0.01)
    monkeypatch.setattr("residual_saes.harvest.run._LATE", 0.0)
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    whole = copy.tokens.entry_path(1).read_bytes()
    copy.tokens.entry_path(1).unlink()
    timer = threading.Timer(0.5, copy.tokens.entry_path(1).write_bytes, (whole,))
    timer.start()
    began = time.monotonic()
    await_tokens(copy, Shard(index=3, count=8))
    assert time.monotonic() - began > 0.4
    timer.join()
    copy.tokens.entry_path(1).unlink()
    monkeypatch.setattr("residual_saes.harvest.run._PATIENCE", 0.1)
    alone = cli("harvest", *harvest_args, "--cache", copy.path, "--shard", "3/8")
    assert alone.code == 0 and "nothing came for 0s: shard 3/8 writes the tokens itself" in alone.err
    assert copy.tokens.entry_path(1).read_bytes() == whole
    monkeypatch.setattr("residual_saes.harvest.run._PATIENCE", 600.0)
    (tmp_path / "c" / "cache.json").unlink()
    copy.tokens.entry_path(1).unlink()
    with pytest.raises(UserError, match="shard 0/8 has given up"):
        await_tokens(copy, Shard(index=3, count=8))


def test_the_model_that_is_named_is_the_model_that_is_loaded(cli: Cli, small: Cache, tmp_path: Path) -> None:
    """Renamed, and another one in its place: new layers are the renamed one's."""
    (tmp_path / "lm").rename(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "lm")
    other_weights(tmp_path / "lm")
    refused = cli("harvest", *small_args(tmp_path, layers="0-2"))
    assert refused.code == 2
    assert "model_revision is" in refused.err
    result = cli("harvest", *small_args(tmp_path, model="first", layers="0-2"))
    assert result.code == 0, result.err
    wanted = residuals(tmp_path / "first", torch.from_numpy(small.block_tokens(0)))[Site(2)].reshape(-1, 32).numpy()
    out = np.empty((small.spec.block_rows, small.spec.d_model), dtype=np.float16)
    small.read_block(Site(2), 0, out)
    np.testing.assert_allclose(out, wanted[small.block_order(0)], rtol=1e-3, atol=1e-3)


def test_arrays_that_were_deleted_are_harvested_again(cli: Cli, small: Cache, tmp_path: Path) -> None:
    whole = content(small)
    for lost in ("activations.zarr/resid_post/01", "activations.zarr", "activations.zarr/tokens"):
        shutil.rmtree(small.path / lost)
        result = cli("harvest", *small_args(tmp_path))
        assert result.code == 0, result.err
        assert content(small) == whole


def test_a_hub_model_is_its_content_at_a_commit(
    cli: Cli, small: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's own cache on disk: a branch that moves is another model, and a copy in a folder the same."""
    first, second = "1" * 40, "2" * 40
    hub = tmp_path / "hub" / "models--org--lm"
    for commit in (first, second):
        shutil.copytree(tmp_path / "lm", hub / "snapshots" / commit)
    other_weights(hub / "snapshots" / second)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    found = open_model("org/lm", "main")
    assert (found.commit, found.folder.name) == (first, first)
    assert found.sha256 == open_model(str(tmp_path / "lm"), None).sha256 == small.spec.model_revision
    assert harvested_model(small, "org/lm", "main").commit == first
    (hub / "refs" / "main").write_text(second)
    assert open_model("org/lm", "main").commit == second
    assert open_model("org/lm", first).sha256 == found.sha256
    with pytest.raises(UserError, match="org/lm is not the model"):
        harvested_model(small, "org/lm", "main")
    with pytest.raises(UserError, match="cannot load the model org/none"):
        open_model("org/none", None)


def test_a_datasets_branch_is_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> SimpleNamespace:
            return SimpleNamespace(sha={("org/text", "main"): "a" * 40, ("org/text", None): "a" * 40}[name, revision])

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    source = HubText(dataset="org/text", revision="main", split="train", column="text")
    assert source.pinned_revision() == dataclasses.replace(source, revision=None).pinned_revision() == "a" * 40
    assert dataclasses.replace(source, revision="b" * 40).pinned_revision() == "b" * 40
    with pytest.raises(UserError, match="cannot load the dataset org/text"):
        dataclasses.replace(source, revision="v2").pinned_revision()
