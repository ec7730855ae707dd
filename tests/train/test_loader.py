import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.caches import cache_spec
from residual_saes.shared.cache import BlockStats, Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.train import loader as module
from residual_saes.train.loader import ActivationLoader, LoaderConfig

CPU = torch.device("cpu")


def batches(cache: Cache, *, first: int = 0, last: int, batch: int = 96, layer: int = 1, **options: int) -> list[torch.Tensor]:
    config = LoaderConfig(batch=batch, window_blocks=options.get("window", 3), threads=2, seed=options.get("seed", 0))
    return [x.clone() for x in ActivationLoader(cache, Site(layer), config, CPU, first=first, last=last)]


def all_rows(cache: Cache, layer: int = 1) -> np.ndarray:  # type: ignore[type-arg]
    spec = cache.spec
    data = np.empty((spec.train_tokens, spec.d_model), dtype=np.float16)
    for block in range(spec.train_blocks):
        cache.read_block(Site(layer), block, data[block * spec.block_rows : (block + 1) * spec.block_rows])
    return data


def keys(rows: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    return sorted(row.tobytes() for row in rows)


def test_an_epoch_is_every_training_row_once_and_no_held_out_one(cache: Cache) -> None:
    spec = cache.spec
    batch = 160  # 20,480 rows in 128 batches
    got = torch.cat(batches(cache, last=spec.train_tokens // batch, batch=batch)).numpy()
    assert len(got) == spec.train_tokens
    assert keys(got) == keys(all_rows(cache))


@pytest.mark.parametrize(("window", "windows"), [(1, 40), (31, 2)])
def test_every_window_holds_about_as_much_of_every_block(cache: Cache, window: int, windows: int) -> None:
    """The last window of an epoch too: it is no rest of nine blocks after 31 of them."""
    spec = cache.spec
    block_of = {row.tobytes(): i // spec.block_rows for i, row in enumerate(all_rows(cache))}
    size = spec.train_tokens // windows
    for x in batches(cache, last=windows, batch=size, window=window):
        held = Counter(block_of[row.tobytes()] for row in x.numpy())
        even = size / spec.train_blocks
        assert all(abs(held[block] - even) < 2 * spec.slice_rows for block in range(spec.train_blocks))


@pytest.mark.parametrize("first", [0, 1, 17, 40])
def test_slices_need_not_be_equally_long(tmp_path: Path, first: int) -> None:
    """Blocks of 21 rows: ten slices of two and one of one."""
    cache = numbered_cache(tmp_path / "c", rows=21, blocks=11)
    whole = torch.cat(batches(cache, last=42, batch=11, window=3, layer=0))
    assert sorted(whole[:231, 0].tolist()) == sorted(whole[231:, 0].tolist()) == list(range(231))
    tail = torch.cat(batches(cache, first=first, last=42, batch=11, window=3, layer=0))
    assert torch.equal(tail, whole[first * 11 :])


def numbered_cache(path: Path, *, rows: int, blocks: int) -> Cache:
    """One layer over one dimension; row i of it is i."""
    spec = cache_spec(d=1, n_layers=1, context=rows, sequences=1, blocks=blocks)
    cache = Cache.create(path, spec, parse_sites("0"))
    for block in range(blocks):
        data = np.arange(rows * block, rows * (block + 1), dtype=np.float16)[:, None]
        stats = BlockStats.of(data, cache.spec.slice_rows)
        cache.commit(block, {Site(0): stats}, {Site(0): cache.stage_block(Site(0), block, data, replace=False)})
    return cache


def test_a_block_repaired_during_training_counts_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry was read with its first slice; a repair in another last bit replaces both file and entry."""
    checked: list[int] = []
    check = Cache.check_slice

    def count(self: Cache, site: Site, block: int, *args: Any) -> None:
        check(self, site, block, *args)
        checked.append(block)

    monkeypatch.setattr(Cache, "check_slice", count)
    cache, other = numbered_cache(tmp_path / "c", rows=32, blocks=2), numbered_cache(tmp_path / "other", rows=32, blocks=3)
    loader = iter(ActivationLoader(cache, Site(0), LoaderConfig(batch=32, window_blocks=1, threads=1), CPU, last=4))
    rows = [next(loader)]
    deadline = time.monotonic() + 20
    while len(checked) < 32 and time.monotonic() < deadline:  # the first epoch is read whole, the second not begun
        time.sleep(0.01)
    data = np.empty((32, 1), np.float16)
    other.read_block(Site(0), 2, data)
    cache.commit(1, {Site(0): other.stats(Site(0), 2)}, {Site(0): cache.stage_block(Site(0), 1, data, replace=True)})
    rows += loader
    assert sorted(torch.cat(rows[:2])[:, 0].tolist()) == list(range(64))
    assert sorted(torch.cat(rows[2:])[:, 0].tolist()) == [*range(32), *range(64, 96)]


@pytest.mark.parametrize("first", [1, 15, 16, 17, 100, 250, 400])
def test_resumes_at_any_batch(cache: Cache, first: int) -> None:
    """Batches straddle windows and epochs here: 96 rows, windows of 1,440 and 1,472."""
    whole = batches(cache, last=430)  # two epochs and some
    assert all(len(x) == 96 for x in whole)
    tail = batches(cache, first=first, last=430)
    assert len(tail) == 430 - first
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[first:], strict=True))


def test_the_order_depends_on_seed_and_epoch(cache: Cache) -> None:
    per_epoch = cache.spec.train_tokens // 160
    two = batches(cache, last=2 * per_epoch, batch=160)
    assert keys(torch.cat(two[:per_epoch]).numpy()) == keys(torch.cat(two[per_epoch:]).numpy())
    assert not torch.equal(two[0], two[per_epoch])
    assert not torch.equal(two[0], batches(cache, last=1, batch=160, seed=1)[0])


def test_layers_are_seen_in_the_same_order(cache: Cache) -> None:
    """The rows of a batch are the same tokens in every layer."""
    rows = {layer: {row.tobytes(): i for i, row in enumerate(all_rows(cache, layer))} for layer in (0, 2)}
    places = [
        [rows[layer][row.tobytes()] for row in torch.cat(batches(cache, last=3, layer=layer)).numpy()] for layer in (0, 2)
    ]
    assert places[0] == places[1]


def test_damage_met_in_training_names_block_and_slice(cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    data = bytearray(copy.block_path(Site(1), 4).read_bytes())
    data[0] ^= 255
    copy.block_path(Site(1), 4).write_bytes(data)
    with pytest.raises(UserError, match=r"layer 1 block 4 .*checksum of slice 0 .*repair"):
        batches(copy, last=200)


def test_the_next_windows_are_read_while_one_is_used_and_no_further(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is two windows: while the first is handed out only the second is read, and once it is used up the third."""
    slices: list[tuple[int, int]] = []
    read = Cache.read_slice

    def count(
        self: Cache, site: Site, block: int, index: int, out: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]"
    ) -> None:
        read(self, site, block, index, out)
        slices.append((block, index))

    monkeypatch.setattr(Cache, "read_slice", count)
    config = LoaderConfig(batch=2 * cache.spec.block_rows, window_blocks=2, threads=2)  # a batch is a window
    expected = iter((64, 96, 128, 160, 160))
    for _ in ActivationLoader(cache, Site(1), config, CPU, last=5):
        wanted, deadline = next(expected), time.monotonic() + 20
        while len(slices) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # for what should not be read
        assert len(slices) == len(set(slices)) == wanted
    assert next(expected, None) is None


def test_a_window_is_read_as_fast_as_it_is_used_up_and_faster_where_it_is_waited_for(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen, count = Cache.read_slice, list[float](), 64  # slices of four blocks

    def timed(
        self: Cache, site: Site, block: int, index: int, out: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]"
    ) -> None:
        seen.append(time.perf_counter())
        read(self, site, block, index, out)

    load = ActivationLoader._load

    def in_hand(self: ActivationLoader, *args: Any) -> Any:
        begun = load(self, *args)
        time.sleep(0.1)  # every thread has its slice in hand, and waits for the time at which it is due
        return begun

    monkeypatch.setattr(Cache, "read_slice", timed)
    monkeypatch.setattr(ActivationLoader, "_load", in_hand)
    config = LoaderConfig(batch=4 * cache.spec.block_rows, window_blocks=4, threads=16)  # a batch is a window
    loader = iter(ActivationLoader(cache, Site(1), config, CPU, last=4))
    next(loader)
    time.sleep(2.0)
    began = time.perf_counter()
    next(loader)  # it is there, and hurries nobody; the third one is read from here on, and the first one took two seconds
    time.sleep(0.1)
    paced, elapsed = len(seen) - 2 * count, time.perf_counter() - began
    assert 0 < paced <= count * elapsed / 1.4 + 4
    next(loader)
    assert seen[3 * count - 1] - seen[2 * count] < 1.0


def test_waiting_is_counted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Cache.read_slice

    def slow(self: Cache, site: Site, block: int, index: int, out: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]") -> None:
        time.sleep(0.003)
        read(self, site, block, index, out)

    monkeypatch.setattr(Cache, "read_slice", slow)
    loader = ActivationLoader(cache, Site(1), LoaderConfig(batch=512, window_blocks=2, threads=1), CPU, last=8)
    assert len(list(loader)) == 8
    assert loader.waited > 0.2  # 128 reads of 3 ms in turn, less what overlapped


def test_orders_are_drawn_by_reader_threads_and_waited_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is slow here, and the first window has nothing to hide behind."""
    threads: list[str] = []
    draw = module.window_rows

    def slow(n_rows: int, **key: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        threads.append(threading.current_thread().name)
        time.sleep(0.2)
        return draw(n_rows, **key)

    monkeypatch.setattr(module, "window_rows", slow)
    loader = ActivationLoader(cache, Site(1), LoaderConfig(batch=512, window_blocks=20, threads=2), CPU, last=21)
    assert len(list(loader)) == 21
    assert len(threads) == 2 and all(name.startswith("reader") for name in threads)
    assert loader.waited > 0.15


def test_the_order_of_slices_is_drawn_once_an_epoch(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    draw = module.epoch_slices

    def count(n_blocks: int, slices: int, *, seed: int, epoch: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        epochs.append(epoch)
        return draw(n_blocks, slices, seed=seed, epoch=epoch)

    monkeypatch.setattr(module, "epoch_slices", count)
    assert len(batches(cache, first=100, last=430)) == 330
    assert epochs == [0, 1, 2]
