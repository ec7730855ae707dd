import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from residual_saes.shared.cache import Cache
from residual_saes.shared.presets import PRESETS
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.temporaries import _release, temporary
from tests.conftest import Cli
from tests.harvest.conftest import content, flip, other_weights, small_args


def test_damage_is_found_named_and_mended(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(cache_path, path)
    cache = Cache.open(path)
    assert cli("harvest", "verify", "--cache", path).code == 0
    flipped = bytearray(cache.block_path(Site(1), 7).read_bytes())
    flipped[100] ^= 1
    cache.block_path(Site(1), 7).write_bytes(flipped)
    cache.block_path(Site(2), 9).unlink()
    cache.tokens.path(1).write_bytes(b"")
    result = cli("harvest", "verify", "--cache", path)
    assert result.code == 1
    assert "layer 1 block 7 " in result.out
    assert "layer 2 block 9 " in result.out
    assert "token chunk 1" in result.out
    untouched = cache.block_path(Site(1), 8).stat().st_mtime_ns
    mended = cli("harvest", "repair", "--cache", path, "--device", "cpu")
    assert mended.code == 0, mended.err
    assert "repaired 2 layer blocks and the tokens" in mended.out
    assert cache.block_path(Site(1), 8).stat().st_mtime_ns == untouched
    for file in cache_path.rglob("c.*"):
        assert (path / file.relative_to(cache_path)).read_bytes() == file.read_bytes()
    named = cli("harvest", "repair", "--cache", path, "--blocks", "4", "--device", "cpu")
    assert "repaired 3 layer blocks" in named.out
    assert cli("harvest", "verify", "--cache", path).code == 0


def test_what_a_killed_harvest_left_is_said_and_removed_by_the_next(
    cli: Cli, harvest_args: tuple[object, ...], cache_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    left = temporary(Cache.open(tmp_path / "c").block_path(Site(1), 7))
    left.write_bytes(bytes(2000))
    _release(left)
    verified = cli("harvest", "verify", "--cache", tmp_path / "c")
    assert verified.code == 0 and f"{tmp_path / 'c'} has 1 half-written files, 2 KB, of a harvest at work or" in verified.err
    assert cli("harvest", *harvest_args, "--cache", tmp_path / "c").code == 0
    assert not left.exists() and "half-written" not in cli("harvest", "verify", "--cache", tmp_path / "c").err


def test_blocks_of_machines_of_several_kinds_are_said(
    cli: Cli, harvest_args: tuple[object, ...], cache: Cache, tmp_path: Path
) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    assert {copy.stats(Site(0), block).by for block in range(44)} == {f"cpu, threads: {torch.get_num_threads()}"}
    assert "several kinds" not in cli("harvest", "verify", "--cache", copy.path).err
    for layer in (0, 1):
        copy.commit(5, {Site(layer): dataclasses.replace(copy.stats(Site(layer), 5), by="H100")})
    for command in (("harvest", *harvest_args, "--cache", copy.path), ("harvest", "verify", "--cache", copy.path)):
        result = cli(*command)
        assert result.code == 0
        assert "layers 0-1 were made on machines of several kinds (1 on H100, 43 on cpu" in result.err


def test_repair_touches_nothing_unless_model_and_text_are_the_caches(cli: Cli, small: Cache, tmp_path: Path) -> None:
    flip(small.block_path(Site(1), 2))
    flip(small.tokens.path(0))
    damaged = content(small)
    repair = ("harvest", "repair", "--cache", small.path, "--device", "cpu")

    (tmp_path / "text.jsonl").rename(tmp_path / "moved.jsonl")
    assert cli(*repair).code == 2
    lines = (tmp_path / "moved.jsonl").read_text().splitlines(keepends=True)
    for other in (lines[:2], lines[::-1]):  # shorter, and of the same length
        (tmp_path / "text.jsonl").write_text("".join(other))
        result = cli(*repair)
        assert result.code == 2
        assert "is not the text that" in result.err and "nothing was changed" in result.err
    shutil.copytree(tmp_path / "lm", tmp_path / "original")
    other_weights(tmp_path / "lm")
    result = cli(*repair, "--dataset", tmp_path / "moved.jsonl")
    assert result.code == 2
    assert "is not the model" in result.err
    shutil.rmtree(tmp_path / "lm")
    assert "there is no model at" in cli(*repair, "--dataset", tmp_path / "moved.jsonl").err
    assert content(small) == damaged
    assert cli("harvest", "verify", "--cache", small.path).code == 1

    result = cli(*repair, "--dataset", tmp_path / "moved.jsonl", "--model", tmp_path / "original")
    assert result.code == 0, result.err
    assert "repaired 1 layer blocks and the tokens" in result.out
    assert cli("harvest", "verify", "--cache", small.path).code == 0


def test_a_cache_of_files_that_were_chosen_by_a_split_goes_on(
    cli: Cli, lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity holds the split that earlier versions read from file names; whoever names the files has the same text."""
    shutil.copytree(lm, tmp_path / "lm")
    (tmp_path / "set").mkdir()
    shutil.copy(text, tmp_path / "set" / "test-0.jsonl")
    monkeypatch.setitem(PRESETS, "demo", dataclasses.replace(PRESETS["demo"], split="test"))
    assert cli("harvest", *small_args(tmp_path, text="set/test-0.jsonl", layers="0")).code == 0
    monkeypatch.undo()
    (tmp_path / "set" / "train-0.jsonl").write_text(json.dumps({"text": "another"}))
    refused = cli("harvest", *small_args(tmp_path, text="set", layers="1"))
    assert refused.code == 2
    assert "harvested by file names that say 'test', put those files into a folder of their own" in refused.err
    assert cli("harvest", *small_args(tmp_path, text="set/test-0.jsonl", layers="1")).code == 0
    cache = Cache.open(tmp_path / "c")
    assert (cache.spec.split, cache.sites) == ("test", (Site(0), Site(1)))
    flip(cache.tokens.path(0))
    assert cli("harvest", "repair", "--cache", cache.path, "--device", "cpu").code == 0


def test_repair_brings_back_every_byte(cli: Cli, small: Cache) -> None:
    whole = content(small)
    (entry,) = (p for p in small.path.glob("ledger/0-1/*1.json"))
    for damage in (
        [lambda: flip(small.block_path(Site(0), 0)), lambda: small.block_path(Site(1), 1).unlink()],
        [lambda: flip(entry), lambda: flip(small.tokens.entry_path(0))],
        [lambda: small.tokens.path(0).unlink(), lambda: flip(small.path / "activations.zarr" / "tokens" / "zarr.json")],
        [lambda: entry.write_bytes(small.ledger.entry_path(parse_sites("0,1"), 2).read_bytes())],
        [lambda: small.tokens.entry_path(0).unlink()],
    ):
        for harm in damage:
            harm()
        verified = cli("harvest", "verify", "--cache", small.path)
        assert verified.code == 1
        mended = cli("harvest", "repair", "--cache", small.path, "--device", "cpu")
        assert mended.code == 0, mended.err
        assert content(small) == whole
    assert "repaired nothing" in cli("harvest", "repair", "--cache", small.path).out


def test_repair_of_named_blocks_does_these_alone(cli: Cli, small: Cache) -> None:
    whole = content(small)
    for block in (1, 2):
        small.ledger.entry_path(parse_sites("0,1"), block).unlink()  # as after a kill
    flip(small.block_path(Site(0), 0))
    result = cli("harvest", "repair", "--cache", small.path, "--blocks", 0, "--device", "cpu")
    assert result.code == 0, result.err
    assert small.committed(Site(0)) == small.committed(Site(1)) == {0}
    assert small.block_path(Site(0), 0).read_bytes() == whole["activations.zarr/resid_post/00/c.0.0"]
    assert cli("harvest", "repair", "--cache", small.path, "--blocks", 3).code == 2


def test_activations_are_never_made_of_tokens_that_are_damaged(cli: Cli, small: Cache, tmp_path: Path) -> None:
    flip(small.tokens.path(0))
    result = cli("harvest", *small_args(tmp_path, layers="0-2"))
    assert result.code == 2
    assert "token chunk 0 of" in result.err and "harvest repair" in result.err
    assert small.committed(Site(2)) == set()


def test_blocks_of_other_tokens_are_found_and_made_again(cli: Cli, small: Cache) -> None:
    whole = content(small)
    stats = {s: dataclasses.replace(small.stats(s, 1), tokens="12345678") for s in parse_sites("0,1")}
    small.commit(1, stats)
    result = cli("harvest", "verify", "--cache", small.path)
    assert result.code == 1
    assert "layer 0 block 1 " in result.out and "was made from other tokens" in result.out
    assert cli("harvest", "repair", "--cache", small.path, "--device", "cpu").code == 0
    assert content(small) == whole
