import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from residual_saes.shared.cache import BlockStats, Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.stores import Folder
from residual_saes.shared.stores.scratch import Scratch, ScratchConfig
from residual_saes.shared.temporaries import _release
from residual_saes.shared.units import parse_bytes
from tests.shared.cache.test_cache import SPEC

SIZE = SPEC.block_bytes  # of a block


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A cache whose block b of layer l is l·10 + b."""
    cache = Cache.create(tmp_path / "far", SPEC, parse_sites("0,1"))
    for block in range(SPEC.n_blocks):
        shape, sites = (SPEC.block_rows, SPEC.d_model), parse_sites("0,1")
        data = {site: np.full(shape, site.layer * 10 + block, np.float16) for site in sites}
        staged = {layer: cache.stage_block(layer, block, data[layer], replace=False) for layer in data}
        cache.commit(block, {layer: BlockStats.of(data[layer], SPEC.slice_rows) for layer in data}, staged)
    return tmp_path / "far"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each block was read where it lies."""
    count, read, lock = Counter[str](), Folder.read, threading.Lock()

    def counted(self: Folder, key: str, out: memoryview, offset: int = 0) -> int:
        with lock:
            count[key] += 1
        return read(self, key, out, offset)

    monkeypatch.setattr(Folder, "read", counted)
    return count


def config(tmp_path: Path, blocks: float) -> ScratchConfig:
    return ScratchConfig(folder=tmp_path / "scratch", size=int(blocks * SIZE))


def read_all(cache: Cache, layers: tuple[int, ...] = (0, 1)) -> None:
    for layer in layers:
        for block in range(SPEC.n_blocks):
            for index in range(SPEC.slices):
                out = np.empty((SPEC.slice_rows, SPEC.d_model), np.float16)
                cache.read_slice(Site(layer), block, index, out)
                cache.check_slice(Site(layer), block, index, out, cache.stats(Site(layer), block))
                assert (out == layer * 10 + block).all()


def kept(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "scratch").glob("*/*") if path.parent.name != "locks")


def test_each_block_is_fetched_once_and_served_from_the_disk_ever_after(tmp_path: Path, far: Path, asked: Counter[str]) -> None:
    read_all(Cache.open(far, config(tmp_path, 12)))
    read_all(Cache.open(far, config(tmp_path, 12)))  # another process, later
    assert set(asked.values()) == {1} and len(asked) == 12
    assert kept(tmp_path) == 12 * SIZE == int((tmp_path / "scratch" / "used").read_text())


def test_processes_at_once_fetch_each_block_once_between_them(tmp_path: Path, far: Path, asked: Counter[str]) -> None:
    caches = [Cache.open(far, config(tmp_path, 12)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_all, caches))
    assert set(asked.values()) == {1} and len(asked) == 12


def test_never_more_than_the_size_and_what_is_there_stays(
    tmp_path: Path, far: Path, asked: Counter[str], capfd: pytest.CaptureFixture[str]
) -> None:
    caches = [Cache.open(far, config(tmp_path, 5.5)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read_all, caches))
    assert kept(tmp_path) == 5 * SIZE
    there, before = {path.name for path in (tmp_path / "scratch").glob("*/*-*")}, asked.copy()
    read_all(Cache.open(far, config(tmp_path, 5.5)))
    assert {path.name for path in (tmp_path / "scratch").glob("*/*-*")} == there
    assert len(asked - before) == 12 - 5  # those that found no room are read where they lie
    assert capfd.readouterr().err.count("full; the rest is read where it lies") == 4


@pytest.mark.parametrize("damage", [b"\xff" * SIZE, b"short", b""])
def test_a_damaged_copy_goes_and_the_block_is_read_where_it_lies(tmp_path: Path, far: Path, damage: bytes) -> None:
    read_all(Cache.open(far, config(tmp_path, 12)))
    (copy,) = (tmp_path / "scratch").glob("*/01-3")
    copy.write_bytes(damage)
    cache = Cache.open(far, config(tmp_path, 12))
    read_all(cache)
    assert (cache.whole_block(Site(1), 3) == 13).all()
    copy.write_bytes(damage)
    assert (cache.whole_block(Site(1), 3) == 13).all()


def test_damage_in_the_cache_itself_is_said_and_not_kept(tmp_path: Path, far: Path) -> None:
    path = Cache.open(far).block_path(Site(0), 2)
    path.write_bytes(b"\xff" * SIZE)
    with pytest.raises(UserError, match=r"layer 0 block 2 .* is damaged: its checksum"):
        read_all(Cache.open(far, config(tmp_path, 12)))
    assert not list((tmp_path / "scratch").glob("*/00-2*"))
    assert int((tmp_path / "scratch" / "used").read_text()) == kept(tmp_path) == 2 * SIZE


def test_what_a_kill_left_is_removed_and_its_room_given_back(tmp_path: Path, far: Path) -> None:
    read_all(Cache.open(far, config(tmp_path, 3)), (0,))
    (folder,) = (path for path in (tmp_path / "scratch").iterdir() if path.is_dir() and path.name != "locks")
    (tmp_path / "scratch" / "used").write_text(" " * 10 + "9" * 10)
    mine = Scratch(config(tmp_path, 3), Cache.open(far).digest)._reserve
    assert mine(folder / "00-9", SIZE) is None  # counted anew, and full
    (folder / "00-0").unlink()
    mine = Scratch(config(tmp_path, 3), Cache.open(far).digest)._reserve(folder / "00-9", SIZE)
    assert mine is not None and mine.stat().st_size == SIZE  # taken while it is being written
    _release(mine)
    Scratch(config(tmp_path, 3), Cache.open(far).digest)
    assert not mine.exists()
    assert int((tmp_path / "scratch" / "used").read_text()) == 2 * SIZE


def test_a_disk_that_takes_no_more_is_said_once(
    tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("os.posix_fallocate", "residual_saes.shared.stores.scratch.write_all"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            read_all(Cache.open(far, config(tmp_path, 12)))
        assert capfd.readouterr().err.count("cannot write: No space left on device; the rest is read where it lies") == 1
        assert kept(tmp_path) == 0 == int((tmp_path / "scratch" / "used").read_text())


@pytest.mark.parametrize(("text", "size"), [("2TB", 2 * 10**12), ("1.5 gb", 1_500_000_000), ("4096", 4096)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "nvme", ":2TB", "/nvme:", "/nvme:much", "/nvme:0", "/nvme:-1", "/nvme:nan", "/nvme:2TiB"])
def test_what_says_no_place_and_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"write --scratch DIR:SIZE|is not an amount of bytes: write it as"):
        ScratchConfig.parse(text)


def test_a_disk_s_root_holds_folders_that_are_not_ours(tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, scandir = tmp_path / "scratch" / "lost+found", os.scandir
    lost.mkdir(parents=True)
    (lost / "large").write_bytes(bytes(100 * SIZE))
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "large").write_bytes(bytes(100 * SIZE))
    (tmp_path / "scratch" / "0123456789abcdef").symlink_to(tmp_path / "large")  # as a cache is named

    def forbidden(path: Path) -> object:
        if Path(path) == lost:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    read_all(Cache.open(far, config(tmp_path, 3)), (0,))
    assert int((tmp_path / "scratch" / "used").read_text()) == 3 * SIZE
