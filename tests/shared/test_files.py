import errno
import fcntl
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import (
    PAGE,
    UNKNOWN_FREE,
    append_line,
    create_file,
    free_bytes,
    locked,
    make_dir,
    moved,
    owned,
    page_aligned,
    publish_file,
    publish_json,
    publish_text,
    read_file,
    replacing,
    sync_dir,
    write_file,
)
from residual_saes.shared.progress import Progress
from residual_saes.shared.temporaries import remove


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system takes of it at a time, and on a disk that is full after a few bytes."""
    path, write, room = tmp_path / "curve.jsonl", os.write, [100]

    def short(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = write(fd, data[: min(3, room[0])])
        room[0] -= n
        return n

    monkeypatch.setattr(os, "write", short)
    append_line(path, b"the first")
    room[0] = 5
    with pytest.raises(UserError, match=r"curve.jsonl: No space left"):
        append_line(path, b"the second")
    assert path.read_bytes() == b"the first\n"
    room[0] = 100
    append_line(path, b"the second")
    path.write_bytes(path.read_bytes() + b"half of what a kill le")
    append_line(path, b"the third")
    assert path.read_bytes() == b"the first\nthe second\nthe third\n"


def test_nothing_is_changed_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "key", tmp_path / "link"
    target.write_text("secret")
    link.symlink_to(target)
    with pytest.raises(UserError, match="link is a link to .*key, which is left alone"), owned(link):
        pass
    with pytest.raises(UserError, match="cannot write .*link"):
        append_line(link, b"line")
    with pytest.raises(UserError, match="left alone"):
        write_file(link, b"content")
    with locked(link, make=True):
        pass
    remove(link)
    link.symlink_to(target.parent)
    remove(link)
    link.symlink_to(tmp_path / "nothing" / "there")
    with pytest.raises(UserError, match="left alone"), owned(link):
        pass
    assert target.read_text() == "secret" and not (tmp_path / "nothing").exists()


def test_a_published_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    publish_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        publish_file(path, b"new")
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_name_that_is_no_text_is_written_by_its_numbers(tmp_path: Path) -> None:
    publish_text(tmp_path / "page.html", "café " + os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "café caf\\udce9"


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["write", "fsync", "replace", "link"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    publish_file(tmp_path / "old", b"old")
    monkeypatch.setattr(os, failing, full)
    message = r"cannot write .*/(old|new): No space left on device; put that right"
    if failing != "link":
        with pytest.raises(UserError, match=message):
            publish_file(tmp_path / "old", b"newer")
        with pytest.raises(UserError, match=message), replacing(tmp_path / "new") as file:
            file.write_bytes(b"x")
            if failing == "write":
                full()
    if failing != "replace":
        with pytest.raises(UserError, match=message):
            create_file(tmp_path / "new", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("old", b"old")]


def test_of_many_that_create_a_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_file(tmp_path / "a", str(i).encode() * 100), range(40)))
    assert sum(made) == 1
    assert (tmp_path / "a").read_bytes() == str(made.index(True)).encode() * 100
    assert os.listdir(tmp_path) == ["a"]

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # a file system without hard links
    assert not create_file(tmp_path / "a", b"other")
    assert create_file(tmp_path / "b", b"other")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_folders_of_file_systems_that_sync_none_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    sync_dir(tmp_path)


def test_a_folder_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        sync_dir(tmp_path)
    with pytest.raises(UserError, match="Input/output"):
        publish_file(tmp_path / "a", b"x")


def test_reading_from_a_place_on(tmp_path: Path) -> None:
    data = random_bytes(6 * PAGE + 100)
    write_file(tmp_path / "a", data)
    for offset, size in ((0, 10), (PAGE, 2 * PAGE), (PAGE + 8, 2 * PAGE), (5 * PAGE, PAGE + 100)):
        out = random_bytes(size)
        assert read_file(tmp_path / "a", out, offset) == size
        assert out == data[offset : offset + size]
    assert read_file(tmp_path / "a", random_bytes(PAGE), 6 * PAGE) == 100


SIZES = (0, 2, PAGE - 2, PAGE, PAGE + 2, 5 * PAGE, 5 * PAGE + 1234)


class Calls:
    """Watch reads and writes: with the page cache or without, and refusing to go without it if told to."""

    def __init__(self, patch: pytest.MonkeyPatch, *, refuse_flag: bool = False, refuse_call: bool = False) -> None:
        self.seen: list[tuple[bool, int]] = []
        write, preadv, control, opened = os.write, os.preadv, fcntl.fcntl, os.open

        def watch(fd: int, size: int) -> None:
            direct = bool(control(fd, fcntl.F_GETFL) & os.O_DIRECT)
            self.seen.append((direct, size))
            if direct and refuse_call:
                raise OSError(errno.EINVAL, "Invalid argument")

        def watched_write(fd: int, data: memoryview) -> int:
            watch(fd, len(data))
            return write(fd, data)

        def watched_preadv(fd: int, parts: list[memoryview], offset: int) -> int:
            watch(fd, len(parts[0]))
            return preadv(fd, parts, offset)

        def refusing_to_open(path: Path, flags: int, *mode: int) -> int:
            if refuse_flag and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, *mode)

        def refusing(fd: int, command: int, argument: int = 0) -> Any:
            if refuse_flag and command == fcntl.F_SETFL and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return control(fd, command, argument)

        patch.setattr(os, "write", watched_write)
        patch.setattr(os, "preadv", watched_preadv)
        patch.setattr(os, "open", refusing_to_open)
        patch.setattr(fcntl, "fcntl", refusing)


def random_bytes(size: int, *, shift: int = 0) -> memoryview:
    """Bytes that begin `shift` after a page does."""
    memory = page_aligned(size // 2 + PAGE).numpy().view(np.uint8)[shift : shift + size]
    memory[:] = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    return memory.data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refusal", ["none", "flag", "call"])
@pytest.mark.parametrize("shift", [0, 64])
def test_the_bytes_are_right_whatever_the_file_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, refusal: str, shift: int
) -> None:
    data, out = random_bytes(size, shift=shift), random_bytes(size + 2, shift=shift)
    before = moved.total()
    Calls(monkeypatch, refuse_flag=refusal == "flag", refuse_call=refusal == "call")
    (tmp_path / "a").write_bytes(b"older and longer" * PAGE)
    write_file(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert read_file(tmp_path / "a", out) == size  # two bytes fewer than asked for
    assert out[:size] == data
    assert read_file(tmp_path / "a", out[: size // 2]) == size // 2
    assert moved.total() - before == 2 * size + size // 2


def test_whole_pages_go_past_the_page_cache_and_the_rest_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    write_file(tmp_path / "a", random_bytes(3 * PAGE + 10))
    if not calls.seen[0][0]:
        pytest.skip("this file system takes no direct writes")
    assert calls.seen == [(True, 3 * PAGE), (False, 10)]
    calls.seen.clear()
    before = moved.copy()
    write_file(tmp_path / "a", random_bytes(3 * PAGE + 10))
    assert moved - before == {"direct": 3 * PAGE, "buffered": 10}
    calls.seen.clear()
    before = moved.copy()
    write_file(tmp_path / "a", random_bytes(3 * PAGE, shift=64))
    assert calls.seen == [(False, 3 * PAGE)]
    assert moved - before == {"buffered": 3 * PAGE}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_what_cannot_be_opened_past_the_page_cache_is_read_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    opened, data, out = os.open, random_bytes(2 * PAGE), random_bytes(2 * PAGE)

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return opened(path, flags, *mode)

    (tmp_path / "a").write_bytes(data)
    out[:] = bytes(len(out))
    monkeypatch.setattr(os, "open", refuse)
    assert read_file(tmp_path / "a", out) == 2 * PAGE
    assert out == data
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "b", out)


def test_other_errors_are_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*/a: No space left on device.* run the same command again"):
        write_file(tmp_path / "a", random_bytes(PAGE))


def test_folders_are_proved_writable(tmp_path: Path) -> None:
    assert make_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/b: Not a directory"):
        make_dir(tmp_path / "file" / "b")


def test_free_space_of_what_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.05)


def test_free_space_that_is_not_said_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    assert free_bytes(tmp_path) == UNKNOWN_FREE


def test_progress_says_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("residual_saes.shared.progress.time.monotonic", lambda: now)
    with Progress("training layer 3", 5000, "tokens", start=1000) as progress:
        now += 20
        progress.update(3000, "L0 31")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training layer 3: 3k/5k tokens  60% · 100/s · ETA 20s · L0 31"
    assert lines[1] == "training layer 3: 3k/5k tokens  60% · 100/s · in 20s"


def test_in_a_notebook_progress_rewrites_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's stream is no terminal, but a carriage return means there what it means on one."""
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr("sys.stderr", stream)
    now = 100.0
    monkeypatch.setattr("residual_saes.shared.progress.time.monotonic", lambda: now)
    with Progress("training", 10, "tokens") as progress:
        now += 1
        progress.update(5, "a note that goes")
    text = stream.getvalue()
    assert text.startswith("\rtraining: 5/10") and text.count("\n") == 1 and text.count("\r") == 2
    first, last = text.rstrip("\n").split("\r")[1:]
    assert len(last) == len(first) and last.endswith(" ")  # nothing of the note stays


def test_a_group_may_share_what_the_umask_lets_it(tmp_path: Path) -> None:
    """Files and locks are for whoever the umask says, and no narrower."""
    before = os.umask(0o002)
    try:
        publish_file(tmp_path / "a", b"x")
        with owned(tmp_path / "state" / "owner"), locked(tmp_path / "lock", make=True):
            made = [tmp_path / "a", tmp_path / "state" / "owner", tmp_path / "lock"]
            assert [oct(path.stat().st_mode & 0o777) for path in made] == ["0o664"] * 3
    finally:
        os.umask(before)


def test_an_owner_of_any_name_is_told(tmp_path: Path) -> None:
    (path := tmp_path / "owner").write_bytes(b"process 1 on h\xe9te")
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with owned(path) as owner:
            assert owner == "process 1 on h\ufffdte"
