import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import Cache
from shared.cli import UserError
from train import loader as module
from train.loader import ActivationLoader, LoaderConfig

CPU = torch.device("cpu")


def batches(cache: Cache, *, first: int = 0, last: int, batch: int = 96, layer: int = 1, **options: int) -> list[torch.Tensor]:
    config = LoaderConfig(batch=batch, window_blocks=options.get("window", 3), threads=2, seed=options.get("seed", 0))
    return [x.clone() for x in ActivationLoader(cache, layer, config, CPU, first=first, last=last)]


def all_rows(cache: Cache, layer: int = 1) -> np.ndarray:  # type: ignore[type-arg]
    spec = cache.spec
    data = np.empty((spec.train_tokens, spec.d_model), dtype=np.float16)
    for block in range(spec.train_blocks):
        cache.read_block(layer, block, data[block * spec.block_rows : (block + 1) * spec.block_rows])
    return data


def keys(rows: np.ndarray) -> list[bytes]:  # type: ignore[type-arg]
    return sorted(row.tobytes() for row in rows)


def test_an_epoch_is_every_training_row_once_and_no_held_out_one(cache: Cache) -> None:
    spec = cache.spec
    batch = 160  # 20,480 rows in 128 batches
    got = torch.cat(batches(cache, last=spec.train_tokens // batch, batch=batch)).numpy()
    assert len(got) == spec.train_tokens
    assert keys(got) == keys(all_rows(cache))


def test_rows_are_mixed_over_blocks(cache: Cache) -> None:
    """A batch holds rows of every block of its window: far from the order on disk."""
    x = batches(cache, last=1, batch=512, window=8)[0].numpy()
    order = {row.tobytes(): i // cache.spec.block_rows for i, row in enumerate(all_rows(cache))}
    assert len({order[row.tobytes()] for row in x}) >= 8


@pytest.mark.parametrize("first", [1, 15, 16, 17, 100, 250, 400])
def test_resumes_at_any_batch(cache: Cache, first: int) -> None:
    """Batches straddle windows and epochs here: 96 rows, windows of 3 x 512, the last of an epoch of 1."""
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


def test_damage_met_in_training_names_the_block(cache: Cache, tmp_path: Path) -> None:
    shutil.copytree(cache.path, tmp_path / "c")
    copy = Cache.open(tmp_path / "c")
    data = bytearray(copy.block_path(1, 4).read_bytes())
    data[0] ^= 255
    copy.block_path(1, 4).write_bytes(data)
    with pytest.raises(UserError, match=r"layer 1 block 4 .*checksum.*repair"):
        batches(copy, last=200)


def test_the_next_windows_are_read_while_one_is_used_and_no_further(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is two windows: while the first is handed out only the second is read, and once it is used up the third."""
    blocks: list[int] = []
    read = Cache.read_block

    def count(self: Cache, layer: int, block: int, out: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]") -> None:
        read(self, layer, block, out)
        blocks.append(block)

    monkeypatch.setattr(Cache, "read_block", count)
    config = LoaderConfig(batch=2 * cache.spec.block_rows, window_blocks=2, threads=2)  # a batch is a window
    expected = iter((4, 6, 8, 10, 10))
    for _ in ActivationLoader(cache, 1, config, CPU, last=5):
        wanted, deadline = next(expected), time.monotonic() + 20
        while len(blocks) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # for what should not be read
        assert len(blocks) == len(set(blocks)) == wanted
    assert next(expected, None) is None


def test_waiting_is_counted(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Cache.read_block

    def slow(self: Cache, layer: int, block: int, out: "np.ndarray[tuple[int, ...], np.dtype[np.float16]]") -> None:
        time.sleep(0.05)
        read(self, layer, block, out)

    monkeypatch.setattr(Cache, "read_block", slow)
    loader = ActivationLoader(cache, 1, LoaderConfig(batch=512, window_blocks=2, threads=1), CPU, last=8)
    assert len(list(loader)) == 8
    assert loader.waited > 0.2  # eight reads of 50 ms in turn, less what overlapped


def test_orders_are_drawn_by_reader_threads_and_waited_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is slow here, and the first window has nothing to hide behind."""
    threads: list[str] = []
    draw = module.window_rows

    def slow(n_rows: int, **key: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        threads.append(threading.current_thread().name)
        time.sleep(0.2)
        return draw(n_rows, **key)

    monkeypatch.setattr(module, "window_rows", slow)
    loader = ActivationLoader(cache, 1, LoaderConfig(batch=512, window_blocks=20, threads=2), CPU, last=21)
    assert len(list(loader)) == 21
    assert len(threads) == 2 and all(name.startswith("reader") for name in threads)
    assert loader.waited > 0.15


def test_the_order_of_blocks_is_drawn_once_an_epoch(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    draw = module.epoch_blocks

    def count(n_blocks: int, *, seed: int, epoch: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        epochs.append(epoch)
        return draw(n_blocks, seed=seed, epoch=epoch)

    monkeypatch.setattr(module, "epoch_blocks", count)
    assert len(batches(cache, first=100, last=430)) == 330
    assert epochs == [0, 1, 2]
