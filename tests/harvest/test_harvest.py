import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.harvest import HarvestConfig, Shares, harvest_blocks, planned_bytes
from harvest.model import ResidualModel
from harvest.native import Sink
from shared.cache import Cache
from shared.lm import load_model
from tests.conftest import Cli

CPU = torch.device("cpu")


def residuals(lm: Path, tokens: torch.Tensor, precision: str = "bf16") -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    model = ResidualModel(load_model(str(lm), None, precision, head=False), (0, 1, 2), CPU)
    model.run(tokens, lambda layer, output: found.__setitem__(layer, output.float()))
    return found


def test_every_row_is_the_activation_its_place_says(lm: Path, cache: Cache) -> None:
    """Row j of a block belongs to (sequence, position) = divmod(order[j], context), in every layer."""
    spec = cache.spec
    for block in (0, 11, spec.n_blocks - 1):
        wanted = residuals(lm, torch.from_numpy(cache.block_tokens(block)))
        order, out = cache.block_order(block), np.empty((spec.block_rows, spec.d_model), dtype=np.float16)
        assert sorted(order) == list(range(spec.block_rows))
        for layer in cache.layers:
            cache.read_block(layer, block, out)
            flat = wanted[layer].reshape(-1, spec.d_model).numpy()
            np.testing.assert_allclose(out, flat[order], rtol=1e-3, atol=1e-3)


def test_bf16_stays_near_fp32(lm: Path, cache: Cache) -> None:
    tokens = torch.from_numpy(cache.block_tokens(0))
    half, full = residuals(lm, tokens), residuals(lm, tokens, "fp32")
    for layer in cache.layers:
        assert (half[layer] - full[layer]).norm() / full[layer].norm() < 0.02


def test_blocks_come_out_the_same_in_any_order_and_batch(lm: Path, cache: Cache, tmp_path: Path) -> None:
    other = tmp_path / "c"
    shutil.copytree(cache.path, other)
    copy = Cache.open(other)
    for block in (3, 1):
        copy.forget(block, (0, 1, 2))
        for layer in copy.layers:
            copy.block_path(layer, block).unlink()
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), (0, 1, 2), CPU)
    harvest_blocks(copy, model, [3, 1], HarvestConfig(device=CPU, forward_sequences=16))
    for layer in copy.layers:
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
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), (0, 1, 2), CPU)
    harvest_blocks(copy, model, [3, 1], HarvestConfig(device=CPU))
    assert copy.block_path(0, 1).read_bytes() == cache.block_path(0, 1).read_bytes()


def written_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def test_a_plan_says_what_a_harvest_writes(cli: Cli, cache: Cache, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    assert planned_bytes(cache.spec, cache.layers) == pytest.approx(written_bytes(cache.path), rel=0.01)
    result = cli("harvest", "plan", *harvest_args[:-2], "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert f"({planned_bytes(cache.spec, cache.layers):,} bytes)" in result.out
    for word in ("free disk", "write probe", "room for"):
        assert word in result.out
    assert not (tmp_path / "none").exists()


def test_the_published_job_is_planned_without_model_or_hub(cli: Cli, tmp_path: Path) -> None:
    result = cli("harvest", "plan", "--cache", tmp_path / "none")
    assert result.code == 0, result.err
    assert "14.8 TB" in result.out  # 300M + 2M tokens x 24 layers x 2 KiB
    assert "9,218 blocks" in result.out or "blocks      9,218" in result.out


def test_totals_are_those_of_all_blocks_together(cache: Cache) -> None:
    spec, totals = cache.spec, cache.totals()
    assert list(totals) == [0, 1, 2]
    data = np.empty((spec.n_blocks, spec.block_rows, spec.d_model), dtype=np.float16)
    for block in range(spec.n_blocks):
        cache.read_block(2, block, data[block])
    x = data.astype(np.float64)
    n, mean, m2 = totals[2].moments
    assert n == x.size
    assert mean == pytest.approx(x.mean(), abs=1e-7)
    assert m2 == pytest.approx(((x - x.mean()) ** 2).sum(), rel=1e-6)
    assert totals[2].max_norm == pytest.approx(np.linalg.norm(x, axis=2).max(), rel=1e-6)


def test_a_second_run_has_nothing_to_do(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...]) -> None:
    before = {f: f.stat().st_mtime_ns for f in cache_path.rglob("c.*")}
    assert cli("harvest", *harvest_args, "--cache", cache_path).code == 0
    assert {f: f.stat().st_mtime_ns for f in cache_path.rglob("c.*")} == before


def test_layers_can_be_added_later(cli: Cli, cache: Cache, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert cli("harvest", *harvest_args, "--cache", path, "--layers", 1).code == 0
    assert Cache.open(path).layers == (1,)
    assert cli("harvest", *harvest_args, "--cache", path, "--layers", "0-2").code == 0
    assert Cache.open(path).layers == (0, 1, 2)
    for layer in range(3):
        for block in range(cache.spec.n_blocks):
            assert Cache.open(path).block_path(layer, block).read_bytes() == cache.block_path(layer, block).read_bytes()


def test_damage_is_found_named_and_mended(cli: Cli, cache_path: Path, harvest_args: tuple[object, ...], tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(cache_path, path)
    cache = Cache.open(path)
    assert cli("harvest", "verify", "--cache", path).code == 0
    flipped = bytearray(cache.block_path(1, 7).read_bytes())
    flipped[100] ^= 1
    cache.block_path(1, 7).write_bytes(flipped)
    cache.block_path(2, 9).unlink()
    cache.token_chunk_path(1).write_bytes(b"")
    result = cli("harvest", "verify", "--cache", path)
    assert result.code == 1
    assert "layer 1 block 7 " in result.out
    assert "layer 2 block 9 " in result.out
    assert "token chunk 1" in result.out
    untouched = cache.block_path(1, 8).stat().st_mtime_ns
    mended = cli("harvest", "repair", "--cache", path, "--device", "cpu")
    assert mended.code == 0, mended.err
    assert "repaired 2 layer blocks and the tokens" in mended.out
    assert cache.block_path(1, 8).stat().st_mtime_ns == untouched
    for file in cache_path.rglob("c.*"):
        assert (path / file.relative_to(cache_path)).read_bytes() == file.read_bytes()
    named = cli("harvest", "repair", "--cache", path, "--blocks", "4", "--device", "cpu")
    assert "repaired 3 layer blocks" in named.out
    assert cli("harvest", "verify", "--cache", path).code == 0


def test_values_that_do_not_fit_are_reported(lm: Path, cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    copy.forget(5, (0, 1, 2))
    base = load_model(str(lm), None, "fp32", head=False)
    with torch.no_grad():
        base.get_submodule("layers.1.mlp.dense_4h_to_h").bias[3] = 1e6  # type: ignore[operator]
    harvest_blocks(copy, ResidualModel(base, (0, 1, 2), CPU), [5], HarvestConfig(device=CPU))
    totals = copy.totals()
    assert totals[0].nonfinite == 0
    assert totals[1].nonfinite == cache.spec.block_rows
    assert totals[2].nonfinite >= cache.spec.block_rows
    assert f"WARNING: {cache.spec.block_rows} values did not fit float16" in str(totals[1])
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    copy.read_block(1, 5, out)
    assert np.isfinite(out).all()
    assert (out[:, 3] == 65504).all()


def test_shares_are_of_the_whole_time(lm: Path, cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    copy.forget(5, (0, 1, 2))
    model = ResidualModel(load_model(str(lm), None, "bf16", head=False), (0, 1, 2), CPU)
    shares = harvest_blocks(copy, model, [5], HarvestConfig(device=CPU))
    assert shares.forward > 0 and shares.copy > 0 and shares.wait > 0
    assert shares.forward + shares.copy + shares.wait == pytest.approx(shares.total)


def test_what_overlaps_is_not_taken_off_twice() -> None:
    assert str(Shares(forward=6, copy=1, total=10)) == "forward 60%, copy 10%, waiting for the disk 30%"
    beside = Shares(forward=6, copy=1, total=10, overlap=True)
    assert str(beside) == "forward 60%, copy 10% beside it, waiting for the disk 40%"
