import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from residual_saes.harvest.writer import BlockWriter, WriterConfig
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import PAGE
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.stores import Location
from tests.shared.cache.test_cache import SPEC


def fill(writer: BlockWriter, block: int) -> None:
    buffer = writer.buffer()
    buffer.data.fill_(float(block))
    buffer.nonfinite.zero_()
    writer.submit(block, buffer)


def test_blocks_are_committed_once_they_are_whole(tmp_path: Path) -> None:
    cache, done = Cache.create(tmp_path / "c", SPEC, parse_sites("0,2")), []
    with BlockWriter(cache, parse_sites("0,2"), WriterConfig(threads=3, buffers=2), pinned=False, done=done.append) as writer:
        for block in range(SPEC.n_blocks):
            fill(writer, block)
    assert sorted(done) == list(range(SPEC.n_blocks))
    assert cache.missing(parse_sites("0,2")) == {}
    out = np.empty((SPEC.block_rows, SPEC.d_model), dtype=np.float16)
    for block in range(SPEC.n_blocks):
        for layer in (0, 2):
            cache.read_block(Site(layer), block, out)
            assert (out == block).all()


@pytest.mark.parametrize("d_model", [PAGE // 8, PAGE // 8 + 3])
def test_blocks_written_past_the_page_cache_are_what_zarr_reads(tmp_path: Path, d_model: int) -> None:
    """Blocks of whole pages, and blocks that leave a rest and do not begin on a page."""
    spec = dataclasses.replace(SPEC, d_model=d_model)
    assert (spec.block_bytes % PAGE == 0) == (d_model == PAGE // 8)
    cache, data = Cache.create(tmp_path / "c", spec, parse_sites("0,2")), torch.randn(2, spec.block_rows, d_model).half()
    with BlockWriter(cache, parse_sites("0,2"), WriterConfig(), pinned=False, done=lambda _: None) as writer:
        buffer = writer.buffer()
        assert buffer.data.data_ptr() % PAGE == 0
        buffer.data.copy_(data)
        writer.submit(1, buffer)
    for i, layer in enumerate((0, 2)):
        array = zarr.open_array(str(cache.path / "activations.zarr" / "resid_post" / f"{layer:02d}"), mode="r")
        np.testing.assert_array_equal(array[spec.block_rows : 2 * spec.block_rows], data[i].numpy())
        cache.check_block(Site(layer), 1, data[i].numpy(), cache.stats(Site(layer), 1))


def test_a_failed_write_stops_the_harvest_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,2"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"cannot write .*c\.\d\.0: No space left on device.* run the same command again"),
        BlockWriter(cache, parse_sites("0,2"), WriterConfig(threads=2, buffers=2), pinned=False, done=lambda _: None) as writer,
    ):
        for block in range(SPEC.n_blocks):
            fill(writer, block)
    assert cache.committed(Site(0)) == set()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("zarr.json", "cache.json")] == []


def test_a_block_of_another_harvest_stays_and_is_replaced_on_request(tmp_path: Path) -> None:
    cache, out = (
        Cache.create(tmp_path / "c", SPEC, parse_sites("0,2")),
        np.empty((SPEC.block_rows, SPEC.d_model), dtype=np.float16),
    )

    def write(layers: tuple[Site, ...], value: float, *, replace: bool) -> None:
        with BlockWriter(cache, layers, WriterConfig(), pinned=False, done=lambda _: None, replace=replace) as writer:
            buffer = writer.buffer()
            buffer.data.fill_(value)
            writer.submit(1, buffer)

    def stored(layer: int) -> float:
        cache.read_block(Site(layer), 1, out)
        cache.check_block(Site(layer), 1, out, cache.stats(Site(layer), 1))
        return float(out[0, 0])

    write(parse_sites("0,2"), 1.0, replace=False)
    write(parse_sites("0,2"), 2.0, replace=False)
    assert (stored(0), stored(2)) == (1.0, 1.0)
    write(parse_sites("2"), 3.0, replace=True)
    assert (stored(0), stored(2)) == (1.0, 3.0)
    cache.block_path(Site(0), 1).unlink()
    write(parse_sites("0"), 4.0, replace=False)
    assert (stored(0), stored(2)) == (4.0, 3.0)
    assert [p.parent.name for p in tmp_path.glob("c/ledger/*/*.json")] == ["0,2"]


def write_at_once(place: Location) -> None:
    """Four writers put all blocks of layers 0 and 2 into a cache, each of a value of its own: 1 to 4."""

    def write(value: int) -> None:
        with BlockWriter(
            Cache.open(place), parse_sites("0,2"), WriterConfig(threads=2), pinned=False, done=lambda _: None
        ) as writer:
            for block in range(SPEC.n_blocks):
                buffer = writer.buffer()
                buffer.data.fill_(float(value))
                writer.submit(block, buffer)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(1, 5)))


def test_harvests_of_the_same_block_at_once_leave_one_that_is_whole(tmp_path: Path) -> None:
    """Though their bytes differ, as those of two kinds of device may, the record is of the bytes that stay."""
    Cache.create(tmp_path / "c", SPEC, parse_sites("0,2"))
    write_at_once(tmp_path / "c")
    cache, out = Cache.open(tmp_path / "c"), np.empty((SPEC.block_rows, SPEC.d_model), dtype=np.float16)
    assert cache.missing(parse_sites("0,2")) == {}
    for block in range(SPEC.n_blocks):
        for layer in (0, 2):
            cache.read_block(Site(layer), block, out)
            cache.check_block(Site(layer), block, out, cache.stats(Site(layer), block))
            assert len(np.unique(out)) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_block_is_waited_for_once_and_written_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a block is submitted before its copy has arrived. While it is on its way the threads are free for others."""
    cache, arrived, done = Cache.create(tmp_path / "c", SPEC, parse_sites("0,2")), threading.Event(), threading.Event()
    waits: list[int] = []

    def ready() -> None:
        waits.append(1)
        assert arrived.wait(20)

    with BlockWriter(
        cache, parse_sites("0,2"), WriterConfig(threads=1, buffers=2), pinned=False, done=lambda _: done.set()
    ) as writer:
        buffer = writer.buffer()
        buffer.data.fill_(-1.0)
        writer.submit(4, buffer, ready)
        assert writer._disk.submit(lambda: True).result(20)
        buffer.data.fill_(4.0)  # the copy arrives
        buffer.nonfinite.zero_()
        arrived.set()
        assert done.wait(20)
    assert len(waits) == 1
    out = np.empty((SPEC.block_rows, SPEC.d_model), dtype=np.float16)
    cache.read_block(Site(2), 4, out)
    cache.check_block(Site(2), 4, out, cache.stats(Site(2), 4))
    assert (out == 4).all()


def test_a_copy_that_fails_stops_the_harvest_and_commits_nothing(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,2"))

    def fail() -> None:
        raise RuntimeError("CUDA error")

    with (
        pytest.raises(RuntimeError, match="CUDA error"),
        BlockWriter(cache, parse_sites("0,2"), WriterConfig(), pinned=False, done=lambda _: None) as writer,
    ):
        writer.submit(0, writer.buffer(), fail)
    assert cache.committed(Site(0)) == set()
