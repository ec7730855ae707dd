import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harvest.hub import HubText
from harvest.language_model import ResidualModel, Sink
from harvest.run import (
    HarvestConfig,
    Shares,
    await_tokens,
    harvest_blocks,
    in_turn,
    planned_bytes,
    probe_write,
    warnings_of_overflow,
)
from shared.cache import Cache
from shared.errors import UserError
from shared.identity import harvested_model, open_model
from shared.lm import load_model
from shared.presets import PRESETS
from shared.sites import Site, parse_sites
from shared.units import ALONE, Shard
from tests.conftest import Cli

CPU = torch.device("cpu")


def residuals(lm: Path, tokens: torch.Tensor, precision: str = "bf16") -> dict[Site, torch.Tensor]:
    found: dict[Site, torch.Tensor] = {}
    model = ResidualModel(load_model(str(lm), None, precision, head=False), parse_sites("0,1,2"), CPU)
    model.run(tokens, lambda layer, output: found.__setitem__(layer, output.float()))
    return found


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
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), parse_sites("0,1,2"), CPU)
    harvest_blocks(copy, model, [3, 1], HarvestConfig(device=CPU, forward_sequences=16))
    for layer in copy.sites:
        for block in (1, 3):
            assert copy.block_path(layer, block).read_bytes() == cache.block_path(layer, block).read_bytes()


def test_the_next_block_is_read_while_one_runs(lm: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy, read, following = Cache.open(tmp_path / "c"), Cache.block_tokens, threading.Event()

    def watched(self: Cache, block: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        assert threading.current_thread().name.startswith("inputs")
        if block == 1:
            following.set()
        return read(self, block)

    run = ResidualModel.run

    def patient(self: ResidualModel, tokens: torch.Tensor, sink: Sink) -> None:
        assert following.wait(20), "nothing was read ahead"
        run(self, tokens, sink)

    monkeypatch.setattr(Cache, "block_tokens", watched)
    monkeypatch.setattr(ResidualModel, "run", patient)
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), parse_sites("0,1,2"), CPU)
    harvest_blocks(copy, model, [3, 1], HarvestConfig(device=CPU), replace=True)
    assert copy.block_path(Site(0), 1).read_bytes() == cache.block_path(Site(0), 1).read_bytes()


def written_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_a_plan_says_what_a_harvest_writes(cli: Cli, cache: Cache, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    assert planned_bytes(cache.spec, cache.sites) == pytest.approx(written_bytes(cache.path), rel=0.01)
    result = cli("harvest", "plan", *harvest_args[:-2], "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert f"({planned_bytes(cache.spec, cache.sites):,} bytes)" in result.out
    for word in ("free disk", "write probe", "room for"):
        assert word in result.out
    assert not (tmp_path / "none").exists()


def test_the_published_job_is_planned_without_model_or_hub(cli: Cli, tmp_path: Path) -> None:
    result = cli("harvest", "plan", "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert "14.8 TB" in result.out  # 300M + 2M tokens x 24 layers x 2 KiB
    assert "9,218 blocks" in result.out or "blocks      9,218" in result.out


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


def test_values_that_do_not_fit_are_reported(lm: Path, cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    base = load_model(str(lm), None, "fp32", head=False)
    with torch.no_grad():
        base.get_submodule("layers.1.mlp.dense_4h_to_h").bias[3] = 1e6  # type: ignore[operator]
    harvest_blocks(copy, ResidualModel(base, parse_sites("0,1,2"), CPU), [5], HarvestConfig(device=CPU), replace=True)
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
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), parse_sites("0,1,2"), CPU)
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
    monkeypatch.setattr("harvest.run._POLL", 0.01)
    monkeypatch.setattr("harvest.run._LATE", 0.0)
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
    monkeypatch.setattr("harvest.run._PATIENCE", 0.1)
    alone = cli("harvest", *harvest_args, "--cache", copy.path, "--shard", "3/8")
    assert alone.code == 0 and "nothing came for 0s: shard 3/8 writes the tokens itself" in alone.err
    assert copy.tokens.entry_path(1).read_bytes() == whole
    monkeypatch.setattr("harvest.run._PATIENCE", 600.0)
    (tmp_path / "c" / "cache.json").unlink()
    copy.tokens.entry_path(1).unlink()
    with pytest.raises(UserError, match="shard 0/8 has given up"):
        await_tokens(copy, Shard(index=3, count=8))


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


@pytest.fixture
def small(cli: Cli, lm: Path, text: Path, tmp_path: Path) -> Cache:
    """A cache of its own, of a model and a text of its own: three blocks of two layers."""
    shutil.copytree(lm, tmp_path / "lm")
    shutil.copy(text, tmp_path / "text.jsonl")
    result = cli("harvest", *small_args(tmp_path))
    assert result.code == 0, result.err
    return Cache.open(tmp_path / "c")


def small_args(path: Path, model: str = "lm", text: str = "text.jsonl", layers: str = "0-1") -> tuple[object, ...]:
    shape = ("--context", 32, "--block-sequences", 16, "--tokens", 1024, "--holdout-tokens", 512, "--device", "cpu")
    given = ("--model", path / model, "--dataset", path / text, "--layers", layers, "--cache", path / "c")
    return ("--preset", "demo", *given, *shape)


def content(cache: Cache) -> dict[str, bytes]:
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in cache.path.rglob("*") if p.is_file()}


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def other_weights(folder: Path) -> None:
    """The same configuration and sizes."""
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


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


def test_a_probe_of_the_disk_leaves_nothing_and_makes_no_folder(tmp_path: Path) -> None:
    assert probe_write(tmp_path / "not" / "yet", 2, 0.01) > 0
    assert list(tmp_path.iterdir()) == []
