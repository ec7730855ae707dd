"""Caches that store a value in a byte: harvested, converted, read by others, damaged and mended, trained on."""

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import to_bytes
from residual_saes.shared.sites import Site
from residual_saes.train.loader import ActivationLoader, LoaderConfig
from tests.conftest import Cli
from tests.harvest.conftest import content, flip, small_args

REFERENCE = "ledger/references/01.json"


@pytest.fixture
def narrow(cli: Cli, small: Cache, tmp_path: Path) -> Cache:
    """The same blocks as in the small cache."""
    result = cli(
        "harvest", *small_args(tmp_path)[:-2], "--store", "int8", *small_args(tmp_path)[-2:], "--cache", tmp_path / "n"
    )
    assert result.code == 0, result.err
    return Cache.open(tmp_path / "n")


def stored(cache: Cache) -> dict[str, bytes]:
    """Its blocks, by their files' names."""
    return {name: data for name, data in content(cache).items() if "resid_post" in name and "/c." in name}


def test_a_value_takes_a_byte_and_is_nearly_what_it_was(small: Cache, narrow: Cache) -> None:
    assert narrow.digest != small.digest and narrow.spec.block_bytes == small.spec.block_rows * (small.spec.d_model + 2)
    assert {len(data) for data in stored(narrow).values()} == {narrow.spec.block_bytes}
    for site in small.sites:
        for block in range(small.spec.n_blocks):
            exact, near = (cache.whole_block(site, block).astype(np.float64) for cache in (small, narrow))
            assert np.square(near - exact).sum() < 3e-4 * np.square(exact - exact.mean(0)).sum()
    assert np.array_equal(narrow.layer(1)[5:40], narrow.values(Site(1), narrow.stored_block(Site(1), 0))[
        np.argsort(narrow.block_order(0))[5:40]])  # fmt: skip


def test_any_zarr_tool_reads_it(narrow: Cache) -> None:
    """As docs/reference/formats.md says."""
    array = zarr.open_group(narrow.path / "activations.zarr", mode="r")["resid_post/01"]
    d = narrow.spec.d_model
    mean, scale = (np.frombuffer(base64.b64decode(array.attrs[name]), "<f4").reshape(2, d) for name in ("mean", "scale"))
    rows = np.asarray(array[:100])
    s = rows[:, d:].copy().view("<f2")
    k = np.signbit(s[:, 0]).astype(int)
    x = mean[k] + scale[k] * abs(s) * rows[:, :d]
    np.testing.assert_allclose(x, narrow.values(Site(1), narrow.stored_block(Site(1), 0))[:100], rtol=1e-3, atol=1e-3)


def test_a_harvest_that_was_killed_goes_on_with_the_same_bytes(cli: Cli, narrow: Cache, tmp_path: Path) -> None:
    whole = content(narrow)
    for path in (narrow.block_path(Site(0), 2), narrow.block_path(Site(1), 2)):
        path.unlink()
    shutil.rmtree(narrow.path / "ledger" / "0-1")
    (narrow.path / "activations.zarr" / "resid_post" / "01" / "zarr.json").unlink()
    again = cli("harvest", *small_args(tmp_path)[:-2], "--store", "int8", *small_args(tmp_path)[-2:], "--cache", tmp_path / "n")
    assert again.code == 0, again.err
    assert content(narrow) == whole
    other = cli("harvest", *small_args(tmp_path), "--cache", tmp_path / "n")
    assert other.code == 2 and "store is" in other.err


@pytest.mark.parametrize("hurt", [flip, Path.unlink])
@pytest.mark.parametrize("name", [REFERENCE, "activations.zarr/resid_post/01/zarr.json"])
def test_either_record_of_the_scales_brings_back_the_other(cli: Cli, narrow: Cache, name: str, hurt: object) -> None:
    whole = content(narrow)
    hurt(narrow.path / name)  # type: ignore[operator]
    damaged = cli("harvest", "verify", "--cache", narrow.path)
    assert damaged.code == 1 and f"{name} is not as it was written" in damaged.out
    assert Cache.open(narrow.path).whole_block(Site(1), 0).any()
    assert cli("harvest", "repair", "--cache", narrow.path, "--device", "cpu").code == 0
    assert content(narrow) == whole


def test_without_either_nothing_is_made_up(cli: Cli, narrow: Cache, tmp_path: Path) -> None:
    (narrow.path / REFERENCE).unlink()
    (narrow.path / "activations.zarr/resid_post/01/zarr.json").unlink()
    with pytest.raises(UserError, match=r"no scales of layer 1"):
        Cache.open(narrow.path).whole_block(Site(1), 0)
    by_hand = {"cache": narrow.digest, "site": 1, "mean": "", "scale": ""}
    (narrow.path / REFERENCE).write_bytes(to_bytes(by_hand))
    with pytest.raises(UserError, match=r"01.json holds no scales that can be"):
        Cache.open(narrow.path).whole_block(Site(1), 0)
    (narrow.path / REFERENCE).unlink()
    narrow.block_path(Site(1), 2).unlink()
    again = cli("harvest", *small_args(tmp_path)[:-2], "--store", "int8", *small_args(tmp_path)[-2:], "--cache", tmp_path / "n")
    assert again.code == 2 and "no scales of layer 1" in again.err
    assert not (narrow.path / REFERENCE).exists()


def test_the_loader_hands_out_what_the_view_does(narrow: Cache) -> None:
    config = LoaderConfig(batch=100, window_blocks=1, threads=2)
    rows = torch.cat([x.clone() for x in ActivationLoader(narrow, Site(1), config, torch.device("cpu"), first=0, last=10)])
    known = {row.tobytes() for row in narrow.layer(1)[: narrow.spec.train_tokens]}
    assert rows.dtype == torch.float16 and {row.numpy().tobytes() for row in rows} <= known


@pytest.mark.parametrize("move", [False, True])
def test_a_converted_cache_is_as_if_harvested(cli: Cli, small: Cache, narrow: Cache, tmp_path: Path, move: bool) -> None:
    args = ("harvest", "convert", "--cache", small.path, "--out", tmp_path / "other", *["--move"] * move)
    assert cli(*args, "--layers", 1).code == 0
    assert len(small.freeable(Site(1))) == (0 if move else 2) and len(small.freeable(Site(0))) == 2
    again = cli(*args)
    assert again.code == 0, again.err
    other = Cache.open(tmp_path / "other")
    assert other.digest == narrow.digest and stored(other) == stored(narrow)
    assert other.references.files(other.sites) == narrow.references.files(narrow.sites)
    assert np.array_equal(other.read_tokens(0, 8), narrow.read_tokens(0, 8))
    assert cli("harvest", "verify", "--cache", tmp_path / "other").code == 0
    assert cli(*args).code == 0  # there is nothing left to do
    back = cli("harvest", "convert", "--cache", tmp_path / "other", "--out", tmp_path / "back", "--store", "float16")
    assert back.code == 2 and "does not come back" in back.err


def test_freed_layers_are_left_out(cli: Cli, small: Cache, tmp_path: Path) -> None:
    assert cli("harvest", "free", "--cache", small.path, "--layers", 1, "--yes").code == 0
    result = cli("harvest", "convert", "--cache", small.path, "--out", tmp_path / "other")
    assert result.code == 0 and "layer 1 is left out: its training blocks were freed" in result.err
    assert Cache.open(tmp_path / "other").sites == (Site(0),)
