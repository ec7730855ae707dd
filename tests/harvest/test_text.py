import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from harvest.text import TextSource, TokenLedger, load_tokenizer, write_tokens
from shared.cache import Cache
from shared.cli import UserError
from tests.conftest import documents


def source(path: Path, column: str = "text") -> TextSource:
    return TextSource(dataset=str(path), revision=None, split="train", column=column)


def expected(lm: Path, cache: Cache) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Every document's tokens and a separator, end to end, without this project's code."""
    tokenizer = load_tokenizer(str(lm), None).backend_tokenizer
    stream = itertools.chain.from_iterable([*tokenizer.encode(d).ids, 0] for d in documents(60))
    n = cache.spec.sequences * cache.spec.context
    return np.array(list(itertools.islice(stream, n))).reshape(cache.spec.sequences, cache.spec.context)


def test_tokens_are_the_documents_end_to_end(lm: Path, cache: Cache) -> None:
    np.testing.assert_array_equal(cache.read_tokens(0, cache.spec.sequences), expected(lm, cache))


def test_continues_after_every_chunk(
    lm: Path, text: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop after each chunk, open everything anew, go on: the same array, and nothing written twice."""
    monkeypatch.setattr("harvest.text._DOCUMENTS", 7)
    again = Cache.create(tmp_path / "c", cache.spec, (0,))
    tokenizer, written = load_tokenizer(str(lm), None), []

    class Stop(Exception):
        pass

    def publish_and_stop(path: Path, value: object) -> None:
        path.write_text(json.dumps(value))
        written.append(TokenLedger.load(again).sequences)
        raise Stop

    monkeypatch.setattr("harvest.text.publish_json", publish_and_stop)
    while TokenLedger.load(again).sequences < cache.spec.sequences:
        with pytest.raises(Stop):
            write_tokens(again, source(text), tokenizer)
    assert written == sorted(set(written))
    assert len(written) == 3
    np.testing.assert_array_equal(again.read_tokens(0, cache.spec.sequences), expected(lm, cache))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "folder"])
def test_local_formats_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = [d.replace("\n", " ").replace("\r", " ") for d in documents(6)]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    elif kind == "txt":
        path.write_text("".join(r + "\n" for r in rows))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows}), path)
    else:
        path.mkdir()
        for i in range(3):
            (path / f"{i}.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows[2 * i : 2 * i + 2]))
    assert [row["text"] for row in source(path).documents()] == rows


def test_what_is_no_text_is_refused(tmp_path: Path, text: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(UserError, match="is empty"):
        source(empty).documents()
    with pytest.raises(UserError, match=r"no column 'body'; it has n, text: name one with --text-column"):
        source(text, "body").documents()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="expected files of one kind"):
        source(tmp_path / "folder").documents()


def test_text_that_runs_out_leaves_nothing_behind(lm: Path, text: Path, cache: Cache, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    spec = dataclasses.replace(cache.spec, n_blocks=200, holdout_blocks=1)
    big = Cache.create(tmp_path / "c", spec, (0,))
    with pytest.raises(UserError, match=r"ends after \d+ tokens, 102400 are wanted; ask for at most --tokens \d+"):
        write_tokens(big, source(short), load_tokenizer(str(lm), None))
    assert not list((tmp_path / "c").iterdir())
    shutil.rmtree(tmp_path / "c")


def test_a_changed_file_is_another_revision(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = source(path).pinned_revision()
    path.write_text("two")
    assert source(path).pinned_revision() != first
    assert first.startswith("sha256:")
