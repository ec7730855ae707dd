"""The pipeline over a bucket: the same bytes as over a folder, whatever is killed on the way."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.fleet import cluster
from residual_saes.shared.sites import parse_sites
from residual_saes.shared.stores import Bucket
from residual_saes.shared.stores.mirror import Mirror, fetched
from tests.bucket import KEY, SECRET, Server, serving
from tests.conftest import TRAIN_ARGS, Cli, invoke
from tests.test_bad_input import refused

s3 = pytest.importorskip("residual_saes.shared.stores.s3") if __import__("importlib").util.find_spec("obstore") else None
pytestmark = pytest.mark.skipif(s3 is None, reason="the extra [s3] is not installed")

RUN = ("--l1", "3e-3", "--layers", "1")


def keys(place: str) -> dict[str, bytes]:
    """Everything that lies there."""
    import obstore

    store = s3.S3(Bucket.parse(place))
    return {each["path"]: store.get(each["path"]) for part in obstore.list(store._store) for each in part}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_saes(runs: Path, wanted: Path) -> None:
    found = sorted(path.relative_to(runs) for path in runs.glob("*/sae_layer01_*.pt"))
    assert len(found) == 6
    for name in found:
        mine, theirs = (torch.load(base / name, weights_only=True)["model_state"] for base in (runs, wanted))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs), name


def _command(environment: dict[str, str], threads: int, args: tuple[object, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)  # which the ledger records
    raise SystemExit(invoke(*args))


def kill_when(reached: Callable[[], bool], server: Server, *args: object) -> None:
    """Start a command in a process of its own, forked from one that has imported everything, and end it with SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "datasets"])
    process = context.Process(target=_command, args=(server.environment, torch.get_num_threads(), args))
    process.start()
    deadline = time.monotonic() + 240
    while not reached():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()


@pytest.fixture(scope="module")
def bucket_cache(s3_server: Server, harvest_args: tuple[object, ...]) -> str:
    """A cache whose harvest was killed three times; the fourth finished it."""
    place = s3_server.place()
    store = s3.S3(Bucket.parse(place))
    for blocks in (5, 15, 25):
        kill_when(
            lambda blocks=blocks: len(store.list("ledger/0-2")) >= blocks,
            s3_server,
            "harvest", *harvest_args, "--cache", place, "--forward-sequences", 1,
        )  # fmt: skip
        assert blocks <= len(store.list("ledger/0-2")) < 44
    assert invoke("harvest", *harvest_args, "--cache", place) == 0
    return place


def test_a_harvest_killed_three_times_is_as_one_on_a_disk(bucket_cache: str, cache_path: Path) -> None:
    assert keys(bucket_cache) == files(cache_path)


def test_how_far_a_fleet_is_is_read_in_the_bucket(bucket_cache: str, s3_server: Server) -> None:
    assert cluster._blocks(Bucket.parse(bucket_cache), parse_sites("0-2")) == (132, 132, "blocks")
    runs = Bucket.parse(s3_server.place())
    for name in ("sae_layer01_final.pt", "sae_layer01_3413.pt", "sae_layer02_final.pt", "config.json"):
        s3.S3(runs / "a").write(name, b"")
    assert cluster._checkpoints([runs / "a", runs / "b"], parse_sites("0,1")) == (2, 24, "checkpoints")


@pytest.mark.slow
def test_training_and_evaluation_are_those_from_a_disk_and_say_no_secret(
    cli: Cli, bucket_cache: str, runs_path: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    said = [
        cli("harvest", "verify", "--cache", bucket_cache),
        cli("train", *TRAIN_ARGS, "--cache", bucket_cache, "--runs", runs, "--scratch", f"{tmp_path}/nvme:1GB", *RUN),
        cli("eval", "--preset", "demo", "--cache", bucket_cache, "--runs", runs, "--ce-tokens", 640, "--device", "cpu"),
    ]
    assert [result.code for result in said] == [0, 0, 0], said
    same_saes(runs, runs_path)
    written = [*files(tmp_path).values(), *keys(bucket_cache).values(), *((r.out + r.err).encode() for r in said)]
    for secret in (SECRET, KEY, "X-Amz-"):
        assert not any(secret.encode() in text for text in written)


@pytest.mark.slow
def test_a_cache_of_bytes_in_a_bucket_is_that_on_a_disk_and_trains_the_same(
    cli: Cli, s3_server: Server, harvest_args: tuple[object, ...], tmp_path: Path
) -> None:
    place, disk, narrow = s3_server.place(), tmp_path / "disk", ("--store", "int8", "--tokens", 4096, "--holdout-tokens", 1024)
    for cache in (disk, place):
        assert cli("harvest", *harvest_args, *narrow, "--cache", cache).code == 0
    assert keys(place) == files(disk)
    for cache, scratch in ((disk, ()), (place, ("--scratch", f"{tmp_path}/nvme:1GB"))):
        runs = tmp_path / ("wanted" if cache == disk else "runs")
        assert cli("train", *TRAIN_ARGS, "--cache", cache, "--runs", runs, *scratch, *RUN).code == 0
    same_saes(tmp_path / "runs", tmp_path / "wanted")
    store = s3.S3(Bucket.parse(place))
    store.write("activations.zarr/resid_post/01/c.1.0", store.get("activations.zarr/resid_post/01/c.0.0"))
    assert "layer 1 block 1" in cli("harvest", "verify", "--cache", place).out
    assert cli("harvest", "repair", "--cache", place, "--device", "cpu").code == 0
    assert keys(place) == files(disk)


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One that may be killed."""
    monkeypatch.setattr(s3, "LONGEST", 0.3)
    with serving(tmp_path / "server") as server:
        yield server


def kill_at(monkeypatch: pytest.MonkeyPatch, server: Server, name: str, calls: int, *, back: bool) -> list[threading.Thread]:
    """The server dies at the n-th call of a method of S3, and comes back a second later."""
    method, left, threads = getattr(s3.S3, name), [calls], []

    def restart() -> None:
        time.sleep(1)
        server.start()

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            server.kill()
            if back:
                threads.append(threading.Thread(target=restart))
                threads[0].start()
        return method(self, *args, **more)

    monkeypatch.setattr(s3.S3, name, counted)
    return threads


@pytest.mark.slow
def test_a_server_killed_and_started_again_costs_a_pause(
    cli: Cli, own_server: Server, harvest_args: tuple[object, ...], cache_path: Path, runs_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = own_server.place()
    with monkeypatch.context() as patch:
        threads = kill_at(patch, own_server, "_put", 60, back=True)
        result = cli("harvest", *harvest_args, "--cache", place)
        [thread.join() for thread in threads]
    assert (result.code, len(threads)) == (0, 1), result
    assert keys(place) == files(cache_path)
    with monkeypatch.context() as patch:
        threads = kill_at(patch, own_server, "read", 250, back=True)
        result = cli("train", *TRAIN_ARGS, "--cache", place, "--runs", tmp_path / "runs", *RUN)
        [thread.join() for thread in threads]
    assert (result.code, len(threads)) == (0, 1), result
    same_saes(tmp_path / "runs", runs_path)


@pytest.mark.slow
def test_a_server_that_stays_away_ends_training_with_one_line_and_it_goes_on_later(
    cli: Cli, own_server: Server, cache_path: Path, runs_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = filled(own_server, cache_path)
    train = ("train", *TRAIN_ARGS, "--cache", place, "--runs", tmp_path / "runs", *RUN, "--save-minutes", 0)
    with monkeypatch.context() as patch:
        patch.setattr(s3, "PATIENCE", 0.5)
        kill_at(patch, own_server, "read", 400, back=False)
        result = cli(*train)
    assert result.code == 2
    assert "no whole answer from http://127.0.0.1" in result.err and "run the same command again" in result.err
    assert "Traceback" not in result.err
    own_server.start()
    assert cli(*train).code == 0
    same_saes(tmp_path / "runs", runs_path)


def filled(server: Server, folder: Path) -> str:
    """A place with everything that is in a folder."""
    place = server.place()
    store = s3.S3(Bucket.parse(place))
    for key, data in files(folder).items():
        store.write(key, data)
    return place


def test_damage_in_a_bucket_is_found_and_mended(
    cli: Cli, s3_server: Server, harvest_args: tuple[object, ...], cache_path: Path
) -> None:
    place = filled(s3_server, cache_path)
    store = s3.S3(Bucket.parse(place))
    store.write("activations.zarr/resid_post/01/c.7.0", store.get("activations.zarr/resid_post/01/c.8.0"))
    store.delete("activations.zarr/resid_post/02/c.9.0")
    store.write("ledger/0-2/00000011.json", b"{}")
    found = cli("harvest", "verify", "--cache", place)
    assert found.code == 1 and f"layer 1 block 7 of {place} is damaged: its checksum does not match" in found.out
    assert f"repair --cache {place} --blocks 9" in found.out and "layer 0 block 11" in found.out
    assert cli("harvest", "repair", "--cache", place, "--device", "cpu").code == 0
    assert keys(place) == files(cache_path)
    plan = cli("harvest", "plan", *harvest_args[:-2], "--cache", place)
    assert "free disk   unknown" in plan.out and "write probe none" in plan.out


@pytest.mark.soak
def test_a_server_that_dies_every_few_seconds(
    cli: Cli, own_server: Server, harvest_args: tuple[object, ...], cache_path: Path, runs_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Several rounds of harvest and training, through as many deaths as come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(s3, "FIRST", 60.0)  # it may be dead when a command begins
    done, deaths, chance = threading.Event(), [0], random.Random(0)

    def torment() -> None:
        while not done.wait(chance.uniform(1, 6)):
            own_server.kill()
            deaths[0] += 1
            time.sleep(chance.uniform(0, 2))
            own_server.start()

    thread = threading.Thread(target=torment)
    thread.start()
    try:
        for number in range(3):
            place, runs = own_server.place(), own_server.place()
            assert cli("harvest", *harvest_args, "--cache", place, "--forward-sequences", 1).code == 0
            assert cli("train", *TRAIN_ARGS, "--cache", place, "--runs", runs, *RUN, "--save-minutes", 0).code == 0
            assert keys(place) == files(cache_path), number
            same_saes(fetched(Bucket.parse(runs)), runs_path)
    finally:
        done.set()
        thread.join()
    assert deaths[0] >= 5


# --- runs ---


class Gone(KeyboardInterrupt):
    """A machine that stops at once: nothing that it would do afterwards is done."""


def uploads(place: str) -> set[str]:
    return {key.partition("/")[2] for key in keys(place)}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Work on another machine, which has none of our files."""

    def go(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)

    return go


def test_a_run_in_a_bucket_goes_on_on_another_machine(
    cli: Cli, s3_server: Server, elsewhere: Callable[[str], None], cache_path: Path, runs_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = s3_server.place()
    train = ("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", place, *RUN, "--save-minutes", 0)
    elsewhere("first")
    with monkeypatch.context() as patch:
        put, left = s3.S3.put_if, [12]

        def until(*args: Any) -> str | None:
            left[0] -= 1
            if left[0] < 0:
                raise Gone
            return put(*args)

        patch.setattr(s3.S3, "put_if", until)
        assert cli(*train).code != 0
    before = uploads(place)
    assert "state/layer01/state.safetensors" in before and "sae_layer01_final.pt" not in before
    elsewhere("second")
    result = cli(*train)
    assert result.code == 0, result
    assert "fetching s3://activations/" in result.err and "trained layers 1 into s3://" in result.err
    same_saes(next(tmp_path.glob("second/data/s3/activations/*")), runs_path)
    assert uploads(place) == {
        "config.json",
        "metrics/layer01.jsonl",
        *(p.name for p in runs_path.glob("*3e-3-fixed/sae_layer01_*")),
    }
    assert {place.rpartition("/")[2] + "/" + k: v for k, v in keys(place).items()} == files(Path("data/s3/activations"))
    elsewhere("first")  # what it has is older, and gives way
    assert cli(*train).code == 0
    assert {place.rpartition("/")[2] + "/" + k: v for k, v in keys(place).items()} == files(Path("data/s3/activations"))
    elsewhere("third")
    args = ("--preset", "demo", "--cache", cache_path, "--runs", place, "--ce-tokens", 640, "--device", "cpu")
    assert cli("eval", *args, "--numbers-only").code == 0
    assert len(list(tmp_path.glob("third/data/s3/activations/*/*/results/*.json"))) > 0


@pytest.mark.parametrize("theirs", ["state/layer01/state.safetensors", "metrics/layer01.jsonl", "sae_layer01_final.pt"])
def test_whoever_comes_late_is_refused_and_changes_nothing(
    cli: Cli,
    s3_server: Server,
    elsewhere: Callable[[str], None],
    cache_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: str,
) -> None:
    """Another process writes to the run after the tenth upload of this one."""
    place, left, put = s3_server.place(), [10], s3.S3.put_if
    store, after = s3.S3(Bucket.parse(place)), []

    def meanwhile(self: Any, key: str, data: bytes, tag: str | None) -> str | None:
        left[0] -= 1
        if left[0] == 0:
            store.write(f"{key.partition('/')[0]}/{theirs}", b"of another process")
        made = put(self, key, data, tag)
        if made is None:
            after.append(keys(place))
        return made

    elsewhere("late")
    monkeypatch.setattr(s3.S3, "put_if", meanwhile)
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", place, *RUN, "--save-minutes", 0)
    assert result.code == 2
    assert f"{theirs} was written by another process since this one read it, so this one stops" in result.err
    assert "Traceback" not in result.err
    assert len(after) == 1 and keys(place) == after[0]
    assert b"of another process" in after[0].values()


def test_of_several_that_create_a_run_at_once_all_go_on_with_the_first_one_s(
    s3_server: Server, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    place = Bucket.parse(s3_server.place())
    contents = []
    for name in ("one", "other"):
        elsewhere(name)
        mirror = Mirror(place)
        path = mirror.folder / "run" / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(name)
        mirror.settle(path)
        mirror.push(path)
        contents.append(path.read_text())
    assert contents == ["one", "one"]


BAD = [
    ({}, "s3://nobucket/x", "there is no bucket nobucket at http://127.0.0.1"),
    ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "s3://activations/x", "refuses our credentials (SignatureDoesNotMatch): check AWS_"),
    ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "s3://activations/x", "refuses our credentials (InvalidAccessKeyId)"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://activations/x", "no whole answer from http://127.0.0.1:9 (is the end"),
    ({"AWS_ALLOW_HTTP": ""}, "s3://activations/x", "is not https, which is taken only where AWS_ALLOW_HTTP=true is set"),
    (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9"},
        "s3://activations/x",
        "no credentials: set AWS_ACCESS_KEY_ID and",
    ),
    ({}, "s3://Bad Name", "is not a place in S3: write s3://bucket/prefix"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "place", "message"), BAD)
def test_what_cannot_be_reached_is_one_line(
    cli: Cli, s3_server: Server, harvest_args: tuple[object, ...], cache_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "FIRST", 0.3)
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    refused(cli("harvest", *harvest_args, "--cache", place), message)
    refused(cli("train", *TRAIN_ARGS, "--cache", place, "--runs", tmp_path / "runs"), message)
    refused(cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", place), message)


def test_a_bucket_without_a_cache_in_it(cli: Cli, s3_server: Server) -> None:
    refused(cli("train", *TRAIN_ARGS, "--cache", "s3://activations/none"), "no activation cache at s3://activations/none: run")
