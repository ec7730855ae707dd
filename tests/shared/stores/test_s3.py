"""A bucket on a real server: as a folder, and through everything that a network does."""

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import settings

from residual_saes.harvest.writer import BlockWriter, WriterConfig
from residual_saes.shared.cache import BlockStats, Cache
from residual_saes.shared.cache.zarr import block_key
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.stores import Bucket, Folder, Location, Store, open_store
from residual_saes.shared.stores.mirror import Mirror
from tests.bucket import BUCKET, KEY, SECRET, Proxy, Server
from tests.harvest.test_writer import write_at_once
from tests.shared.cache import test_cache
from tests.shared.cache.test_cache import SPEC, STATS

pytest.importorskip("obstore", reason="the extra [s3] is not installed")
from residual_saes.shared.stores import s3
from residual_saes.shared.stores.s3 import S3


@pytest.fixture
def place(s3_server: Server) -> Bucket:
    return Bucket.parse(s3_server.place())


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Folder(tmp_path / "store")
    return S3(Bucket.parse(request.getfixturevalue("s3_server").place()))


def test_folder_and_bucket_do_the_same(store: Store) -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    store.prepare()
    assert store.list("") == []
    with pytest.raises(FileNotFoundError):
        store.get("a/none")
    with pytest.raises(FileNotFoundError):
        store.read("a/none", memoryview(bytearray(5)))
    assert not store.has("a/none")
    store.delete("a/none")
    store.write("a/b/large", data.data)
    for offset, size in ((0, 100_000), (0, 7), (4096, 50_000), (99_990, 50), (100_000, 5), (123_456, 5), (0, 0)):
        out = bytearray(size)
        n = store.read("a/b/large", memoryview(out), offset)
        assert out[:n] == data[offset : offset + size].tobytes()
        assert n == len(data[offset : offset + size])
    assert store.create("a/x", b"1")
    assert not store.create("a/x", b"2")
    assert store.get("a/x") == b"1"
    assert store.replace("a/x", b"3", b"1")
    assert store.get("a/x") == b"3"
    store.write("a/x", b"")
    assert store.get("a/x") == b""
    assert (store.list(""), store.list("a"), store.list("a/b"), store.list("none")) == (["a"], ["b", "x"], ["large"], [])
    assert store.has("a/x") and not store.has("a/y")
    store.delete("a/x")
    assert store.list("a") == ["b"]
    store.delete_all("a")
    assert not store.has("a/b/large")


def test_what_was_changed_meanwhile_is_not_replaced(place: Bucket) -> None:
    store = S3(place)
    assert not store.replace("a", b"2", b"1")
    store.write("a", b"1")
    assert not store.replace("a", b"3", b"2")
    assert store.get("a") == b"1"


class BucketLedger(test_cache.LedgerMachine):
    """The same rules, where the place has neither locks nor moves."""

    server: Server

    def new_place(self) -> Location:
        return Bucket.parse(self.server.place())


def test_the_ledger_in_a_bucket(s3_server: Server) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    BucketLedger.server = s3_server
    run_state_machine_as_test(BucketLedger, settings=settings(max_examples=3, stateful_step_count=6))


def stored(cache: Cache, layer: int, block: int) -> np.ndarray:
    """A block as it lies there, if the ledger speaks of it."""
    return cache.whole_block(Site(layer), block)


def of(value: float) -> np.ndarray:
    return np.full((SPEC.block_rows, SPEC.d_model), value, np.float16)


def test_of_two_harvests_of_a_block_whoever_records_it_speaks_of_what_lies_there(place: Bucket) -> None:
    """Their bytes differ in the last bit. Each is first with one layer; either may write the entry, or both."""
    for block, order in enumerate(("one", "other", "both")):
        one, other = Cache.create(place, SPEC, parse_sites("0,2")), Cache.open(place)
        mine, theirs = {s: of(1.0) for s in parse_sites("0,2")}, {s: of(1.001) for s in parse_sites("0,2")}
        staged_mine = {Site(0): one.stage_block(Site(0), block, mine[Site(0)], replace=False)}
        staged_theirs = {s: other.stage_block(s, block, theirs[s], replace=False) for s in parse_sites("0,2")[::-1]}
        staged_mine[Site(2)] = one.stage_block(Site(2), block, mine[Site(2)], replace=False)
        for cache, data, staged in ((one, mine, staged_mine), (other, theirs, staged_theirs)):
            if order in ("both", "one" if cache is one else "other"):
                stats = {layer: BlockStats.of(data[layer], SPEC.slice_rows) for layer in data}
                cache.commit(block, stats, staged, replace=False)
        for cache in (one, other, Cache.open(place)):
            assert float(stored(cache, 0, block)[0, 0]) == np.float16(1.0)
            assert float(stored(cache, 2, block)[0, 0]) == np.float16(1.001)


def test_many_harvests_at_once_leave_a_ledger_that_is_true(place: Bucket) -> None:
    Cache.create(place, SPEC, parse_sites("0,2"))
    write_at_once(place)
    cache = Cache.open(place)
    assert cache.missing(parse_sites("0,2")) == {}
    for block in range(SPEC.n_blocks):
        for layer in (0, 2):
            assert len(np.unique(stored(cache, layer, block))) == 1


@pytest.mark.parametrize("what", ["of another cache", "of another block", "damaged", "short"])
def test_what_lies_in_a_block_s_place_and_is_not_of_it_is_written_over(place: Bucket, what: str) -> None:
    cache, store, data = Cache.create(place, SPEC, parse_sites("0")), S3(place), of(2.0)
    if what == "of another cache":
        store.stage(block_key(Site(0), 1), memoryview(of(1.0).data).cast("B"), "another digest", replace=False)
    elif what == "of another block":
        store._put(
            block_key(Site(0), 1),
            of(1.0).tobytes(),
            "create",
            s3._seal(cache.digest, block_key(Site(0), 2), of(1.0).tobytes()),
        )
    elif what == "damaged":
        store._put(
            block_key(Site(0), 1),
            of(1.0).tobytes(),
            "create",
            s3._seal(cache.digest, block_key(Site(0), 1), of(3.0).tobytes()),
        )
    else:
        store.write(block_key(Site(0), 1), b"short")
    staged = cache.stage_block(Site(0), 1, data, replace=False)
    cache.commit(1, {Site(0): BlockStats.of(data, SPEC.slice_rows)}, {Site(0): staged}, replace=False)
    assert (stored(cache, 0, 1) == 2.0).all()


def test_two_that_change_an_entry_at_once_lose_nothing(place: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has made another layer's block again and puts it into the entry that both have read."""
    cache = Cache.create(place, SPEC, parse_sites("0,1"))
    data = {layer: of(layer.layer) for layer in parse_sites("0,1")}
    staged = {layer: cache.stage_block(layer, 3, data[layer], replace=False) for layer in data}
    cache.commit(3, {layer: BlockStats.of(data[layer], SPEC.slice_rows) for layer in data}, staged)
    both, replace = threading.Barrier(2), S3.replace
    waited: list[int] = []

    def together(self: S3, key: str, new: bytes, seen: bytes) -> bool:
        if len(waited) < 2:
            waited.append(1)
            both.wait(20)
        return replace(self, key, new, seen)

    monkeypatch.setattr(S3, "replace", together)

    def again(layer: int) -> None:
        mine, new = Cache.open(place), of(layer + 10)
        token = mine.stage_block(Site(layer), 3, new, replace=True)
        mine.commit(3, {Site(layer): BlockStats.of(new, SPEC.slice_rows)}, {Site(layer): token}, replace=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(again, (0, 1)))
    assert [float(stored(Cache.open(place), layer, 3)[0, 0]) for layer in (0, 1)] == [10.0, 11.0]


def test_a_server_that_heeds_no_conditions_is_refused(place: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    S3(place).prepare()
    assert S3(place).objects("") == {}
    monkeypatch.setattr(S3, "create", lambda self, key, data: self.write(key, data) is None)
    with pytest.raises(UserError, match="ignores conditions"):
        S3(place).prepare()
    assert S3(place).objects("") == {}


def test_zarr_reads_what_lies_in_a_bucket(place: Bucket) -> None:
    cache, data = (
        Cache.create(place, SPEC, parse_sites("0,2")),
        np.random.default_rng(0).standard_normal((8, 3)).astype(np.float16),
    )
    stats = {Site(2): BlockStats.of(data, SPEC.slice_rows)}
    cache.commit(3, stats, {Site(2): cache.stage_block(Site(2), 3, data, replace=False)})
    group = zarr.open_group(zarr.storage.ObjectStore(S3(place)._store, read_only=True), path="activations.zarr", mode="r")
    np.testing.assert_array_equal(group["resid_post/02"][3 * 8 : 4 * 8], data)
    assert group.attrs["digest"] == cache.digest


def test_an_upload_whose_answer_is_lost_is_known_for_our_own(
    through: "Through", place: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    through(lambda n, head: "lose" if head.startswith(b"PUT") and n % 2 == 0 else "")
    mirror = Mirror(place)
    path = mirror.folder / "a"
    path.parent.mkdir(parents=True)
    for text in ("one", "two", "three"):
        path.write_text(text)
        mirror.push(path)
    assert S3(place).get("a") == b"three"


# --- a network ---


Through = Callable[[Callable[[int, bytes], str | float]], Proxy]


@pytest.fixture
def through(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Through]:
    """A proxy in front of the server, which from then on is the endpoint."""
    opened: list[Proxy] = []

    def open_(spoil: Callable[[int, bytes], str | float]) -> Proxy:
        proxy = Proxy(int(s3_server.endpoint.rpartition(":")[2]), spoil).__enter__()
        opened.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        return proxy

    monkeypatch.setattr(s3, "STALL", 0.3)
    yield open_
    for proxy in opened:
        proxy.__exit__()


@pytest.mark.parametrize(("what", "share"), [("503", 0.35), ("cut", 0.35), ("lose", 0.35), (0.5, 0.08)])
def test_what_fails_in_passing_is_tried_again(through: Through, place: Bucket, what: str | float, share: float) -> None:
    """Requests are spoiled; what is written and read is right, and said to be there once."""
    with_proxy = through(lambda n, head: what if random.Random(n).random() < share else "")
    cache = Cache.create(place, SPEC, parse_sites("0,2"))
    with BlockWriter(cache, parse_sites("0,2"), WriterConfig(threads=2), pinned=False, done=lambda _: None) as writer:
        for block in range(3):
            buffer = writer.buffer()
            buffer.data.fill_(float(block))
            writer.submit(block, buffer)
    for block in range(3):
        for layer in (0, 2):
            assert (stored(Cache.open(place), layer, block) == block).all()
    assert with_proxy.spoiled.count(what) >= 5


def test_a_server_that_stays_away_is_one_line(through: Through, place: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = threading.Event()
    through(lambda n, head: "503" if dead.is_set() else "")
    cache = Cache.create(place, SPEC, parse_sites("0"))
    data = of(1.0)
    cache.commit(
        0, {Site(0): BlockStats.of(data, SPEC.slice_rows)}, {Site(0): cache.stage_block(Site(0), 0, data, replace=False)}
    )
    dead.set()
    monkeypatch.setattr(s3, "PATIENCE", 0.5)
    for use in (
        lambda: stored(cache, 0, 0),
        lambda: cache.commit(1, {Site(0): STATS}),
        lambda: cache.missing(parse_sites("0")),
    ):
        with pytest.raises(UserError, match=r"cannot \w+ s3://.*: http://.* answers with status 503; put that right and run"):
            use()
    dead.clear()
    assert (stored(cache, 0, 0) == 1.0).all()


def test_what_is_read_goes_by_the_proxy_that_writes_go_by(
    through: Through, place: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = through(lambda n, head: "" if b" http://store.invalid:9000/" in head.partition(b"\r\n")[0] else "503")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid:9000")  # a name that the proxy alone knows
    monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
    store, out = S3(place), bytearray(5)
    store.prepare()
    store.write("a", b"hello")
    assert (store.read("a", memoryview(out)), bytes(out), store.get("a")) == (5, b"hello", b"hello")


def test_a_bucket_that_can_be_written_but_not_read_is_refused_at_once(
    through: Through, place: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PATIENCE", 0.5)
    through(lambda n, head: "503" if head.startswith(b"GET") else "")
    with pytest.raises(UserError, match=r"cannot read s3://.*/trial-\w+: http://.* answers with status 503"):
        S3(place).prepare()


# --- who we are ---


def test_credentials_may_lie_in_files(place: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = no\naws_secret_access_key = no\n"
        f"[lab]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n"
    )
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    S3(place).write("a", b"1")
    assert S3(place).get("a") == b"1"
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match="refuses our credentials"):
        S3(place).get("a")


def test_what_makes_the_package_panic_is_one_line(place: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("AWS_SSE_KMS_KEY_ID", "é\n")
    with pytest.raises(UserError, match=r"AWS_\* variable"):
        S3(place).write("a", b"")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "residual_saes.shared.stores.s3")
    with pytest.raises(UserError, match="needs the obstore package: pip install obstore"):
        open_store(Bucket(BUCKET))
