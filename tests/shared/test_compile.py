import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from residual_saes.shared import compile as native
from residual_saes.shared.compile import cpu_flags, load

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("CC", raising=False)
    load.cache_clear()
    yield
    load.cache_clear()


def write(folder: Path, answer: int = 42) -> Path:
    source = folder / "answer.c"
    source.write_text(f"int answer(void) {{ return {answer}; }}\n")
    return source


def answer(source: Path) -> int:
    load.cache_clear()
    library = load(source)
    assert isinstance(library, ctypes.CDLL)
    return int(library.answer())


def kept(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("*/**/*.so"))


def test_compiles_once_and_again_when_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compiler = native._compile
    monkeypatch.setattr(native, "_compile", lambda *args: compiled.append(args) or compiler(*args))
    for value in (41, 42):
        source = write(tmp_path, value)
        assert [answer(source) for _ in range(2)] == [value, value]
    assert len(compiled) == len(kept(tmp_path)) == 2


def test_another_processor_compiles_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    answer(source)
    monkeypatch.setattr(native, "cpu_flags", lambda: ["asimd"])
    answer(source)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("line", ["flags\t\t: fpu amx_bf16", "Features\t: fpu amx_bf16"])
def test_features_of_both_kinds_of_processor(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\n{line}\nother\t: x\n")
    assert cpu_flags() == ["fpu", "amx_bf16"]


@pytest.mark.parametrize("size", [0, 100, 4000, -1])
def test_a_damaged_library_is_compiled_again(tmp_path: Path, size: int) -> None:
    """Cut to any size, or with a byte changed; mapping such a file would kill the process."""
    source = write(tmp_path)
    answer(source)
    (library,) = kept(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(whole[:size] if size >= 0 else whole[:-1] + bytes([whole[-1] ^ 1]))
    assert native._kept(library.parent, library.name.rpartition("-")[0]) is None
    assert answer(source) == 42
    assert [path.read_bytes() == whole for path in kept(tmp_path)] == [True]


@pytest.mark.parametrize("compiler", ["gcc -m64", "env cc", "cc -O0", "no-such-compiler", "'cc", "", " "])
def test_what_people_put_into_cc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    if shutil.which(compiler.split(" ")[0]) is None and compiler == "gcc -m64":
        pytest.skip("no gcc")
    monkeypatch.setenv("CC", compiler)
    assert answer(write(tmp_path)) == 42


def test_a_folder_that_will_not_do_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file where the folder should be, for root too
    assert answer(write(tmp_path)) == 42
    assert [path.parent for path in kept(tmp_path)] == [tmp_path / "home/.cache/residual-saes"]


def test_nothing_may_be_run_in_the_first_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted noexec, or full: both are an OSError, of the loader or of the compiler."""
    opened = ctypes.CDLL

    def refuse(path: str) -> ctypes.CDLL:
        if str(tmp_path / "cache") in path:
            raise OSError("failed to map segment from shared object")
        return opened(path)

    monkeypatch.setattr("ctypes.CDLL", refuse)
    source = write(tmp_path)
    library = load(source)
    assert library is not None
    assert library.answer() == 42


def test_without_a_home_or_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and a uid that nobody knows
    assert answer(write(tmp_path)) == 42
    assert [path.parent.parent for path in kept(tmp_path)] == [tmp_path / "tmp"]

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    load.cache_clear()
    assert load(tmp_path / "answer.c") is None
    assert "note: answer.c cannot be used (there is no folder of one's own" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["writable by others", "a link", "of somebody else"])
def test_what_others_may_have_put_there_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    source = write(tmp_path, 666)
    answer(source)
    (planted,) = kept(tmp_path)
    # the very name that is looked for, in the folder that is looked into first
    trap = tmp_path / "trap"
    shutil.move(planted.parent, trap)
    source = write(tmp_path, 42)
    answer(source)
    (good,) = kept(tmp_path / "cache")
    wrong = trap / planted.name
    wrong.rename(trap / native._named(wrong, good.name.rpartition("-")[0]))
    shutil.rmtree(good.parent)
    if how == "a link":
        good.parent.symlink_to(trap)
    else:
        shutil.move(trap, good.parent)
        good.parent.chmod(0o777 if how == "writable by others" else 0o700)
    if how == "of somebody else":
        uid = os.geteuid()
        monkeypatch.setattr("os.geteuid", lambda: uid + 1)
        with pytest.raises(AssertionError):  # every folder here is ours, so to that user none is left
            answer(source)
    else:
        assert answer(source) == 42


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        answer(write(tmp_path))
    finally:
        os.umask(before)
    (library,) = kept(tmp_path)
    assert library.parent.stat().st_mode & 0o777 == 0o700


def test_without_a_compiler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("residual_saes.shared.compile.shutil.which", lambda _: None)
    assert load(tmp_path / "a.c") is None
    assert "a.c cannot be used (no C compiler found)" in capsys.readouterr().err


def test_source_that_does_not_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.c").write_text("int f( {")
    assert load(tmp_path / "a.c") is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "a.c cannot be used (it did not compile: " in said[0]


def test_a_compiler_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(subprocess, "run", fail)
    assert load(write(tmp_path)) is None
