"""Room for other layers: training blocks that are removed on purpose are no damage, and come back when asked for."""

import shutil
from pathlib import Path

import pytest
import torch

from residual_saes.eval.measure.heldout import heldout_blocks
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import to_bytes
from residual_saes.shared.sites import Site, parse_sites
from tests.conftest import TRAIN_ARGS, Cli


@pytest.fixture
def copy(cache_path: Path, tmp_path: Path) -> Cache:
    shutil.copytree(cache_path, tmp_path / "c")
    return Cache.open(tmp_path / "c")


def files(cache: Cache, layer: int) -> dict[int, bytes]:
    paths = {block: cache.block_path(Site(layer), block) for block in range(cache.spec.n_blocks)}
    return {block: path.read_bytes() for block, path in paths.items() if path.exists()}


def test_training_blocks_go_and_all_else_stays(cli: Cli, copy: Cache, cache: Cache, harvest_args: tuple[object, ...]) -> None:
    result = cli("harvest", "free", "--cache", copy.path, "--layers", "0,2", "--yes")
    assert result.code == 0, result.err
    assert "removed the training blocks of layers 0,2" in result.out and "2.62 MB" in result.out
    for layer in (0, 2):
        assert sorted(files(copy, layer)) == [40, 41, 42, 43]
        assert len(list(heldout_blocks(copy, Site(layer), 2048))) == 4
    assert files(copy, 1) == files(cache, 1)
    assert copy.freed() == parse_sites("0,2")
    assert copy.totals() == cache.totals()
    verified = cli("harvest", "verify", "--cache", copy.path)
    assert (verified.code, verified.out) == (0, "every committed block is as it was written\n")
    assert "repaired nothing" in cli("harvest", "repair", "--cache", copy.path).out
    copy.block_path(Site(0), 41).unlink()  # that is damage
    assert "layer 0 block 41" in cli("harvest", "verify", "--cache", copy.path).out

    again = cli("harvest", *harvest_args, "--cache", copy.path)  # brings back what is held out, and nothing else
    assert again.code == 0 and "note: layers 0,2 were freed but for what is held out" in again.err
    assert sorted(files(copy, 0)) == [40, 41, 42, 43]
    assert cli("harvest", "repair", "--cache", copy.path, "--blocks", "3", "--device", "cpu").code == 0
    assert sorted(files(copy, 2)) == [40, 41, 42, 43]

    back = cli("harvest", *harvest_args, "--cache", copy.path, "--layers", 2)
    assert back.code == 0, back.err
    assert files(copy, 2) == files(cache, 2)
    assert copy.freed() == parse_sites("0")


def test_freeing_asks_first(cli: Cli, copy: Cache, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(_: object = None) -> str:
        raise EOFError

    for answer in (no, lambda _: "n"):
        monkeypatch.setattr("click.termui.visible_prompt_func", answer)
        refused = cli("harvest", "free", "--cache", copy.path, "--layers", "0")
        assert refused.code == 2
        assert refused.err.rstrip().endswith("error: nothing was removed: answer y, or say --yes")
    assert files(copy, 0) == files(cache, 0) and copy.freed() == ()
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "y")
    assert cli("harvest", "free", "--cache", copy.path, "--layers", "0").code == 0
    assert copy.freed() == parse_sites("0")
    absent = cli("harvest", "free", "--cache", copy.path, "--layers", "0,3", "--yes")
    assert absent.code == 2 and "layers 3 are not in" in absent.err


def test_what_is_freed_is_not_trained(cli: Cli, copy: Cache, tmp_path: Path) -> None:
    assert cli("harvest", "free", "--cache", copy.path, "--layers", "0-1", "--yes").code == 0
    args = ("train", *TRAIN_ARGS, "--cache", copy.path, "--runs", tmp_path / "r", "--l1", "3e-3", "--tokens", 2048)
    refused = cli(*args, "--layers", "1-2")
    assert refused.code == 2
    assert "layers 1 of" in refused.err and "were freed: harvest them again with `rsae harvest --layers 1`" in refused.err
    assert not (tmp_path / "r").exists()
    rest = cli(*args)
    assert rest.code == 0 and "note: layers 0-1 were freed and are left out" in rest.err
    assert {p.name[:11] for p in (tmp_path / "r").rglob("*.pt")} == {"sae_layer02"}
    with pytest.raises(UserError, match="of layers 0 of .* were freed"):
        copy.read_block(Site(0), 3, torch.empty(512, 32, dtype=torch.float16).numpy())
    assert cli("harvest", "free", "--cache", copy.path, "--layers", "2", "--yes").code == 0
    assert "layers 0-2 of" in cli(*args).err


def test_a_layer_that_is_wanted_again_is_not_trained_before_it_is_there(cli: Cli, copy: Cache, tmp_path: Path) -> None:
    assert cli("harvest", "free", "--cache", copy.path, "--layers", "1", "--yes").code == 0
    copy.ledger.unmark_freed(parse_sites("1"))
    refused = cli("train", *TRAIN_ARGS, "--cache", copy.path, "--runs", tmp_path / "r", "--layers", 1)
    assert refused.code == 2 and "layer 1 of" in refused.err and "lacks 40 blocks" in refused.err


def test_records_of_freeing_are_checked(cli: Cli, copy: Cache) -> None:
    copy.ledger.mark_freed(parse_sites("1"))
    path = copy.path / "ledger" / "freed" / "01.json"
    for data in (b"{}", to_bytes({"cache": "0" * 64, "freed": 1}), to_bytes({"cache": copy.digest, "freed": 0})):
        path.write_bytes(data)
        for command in (("harvest", "verify"), ("train",)):
            result = cli(*command, "--cache", copy.path)
            assert result.code == 2 and "01.json is unreadable" in result.err and len(result.err.splitlines()) == 1
    assert cli("harvest", "free", "--cache", copy.path, "--layers", "1", "--yes").code == 0
    assert copy.freed() == parse_sites("1")
