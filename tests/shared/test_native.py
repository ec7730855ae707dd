import ctypes
from pathlib import Path

import pytest

from shared.native import load


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load.cache_clear()


def test_compiles_once_and_again_when_the_source_changes(tmp_path: Path) -> None:
    source = tmp_path / "answer.c"
    for answer in (41, 42):
        source.write_text(f"int answer(void) {{ return {answer}; }}\n")
        for _ in range(2):
            load.cache_clear()
            library = load(source)
            assert isinstance(library, ctypes.CDLL)
            assert library.answer() == answer
    assert len(list((tmp_path / "cache" / "residual-saes").glob("*.so"))) == 2


def test_without_a_compiler_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shared.native.shutil.which", lambda _: None)
    assert load(tmp_path / "a.c") is None
    assert "no C compiler found; a.c is replaced by something slower" in capsys.readouterr().err


def test_source_that_does_not_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.c").write_text("int f( {")
    assert load(tmp_path / "a.c") is None
    assert "a.c did not compile" in capsys.readouterr().err
