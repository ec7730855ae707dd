"""Which files are text, and what is read from them: every resume point, every failure by file and row."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from residual_saes.harvest.documents import LocalText
from residual_saes.harvest.pieces import TextSource, resume_point
from residual_saes.shared.errors import UserError

TEXTS = [f"document {i}, with an é\nand two lines" for i in range(40)]


def source(path: Path, column: str = "text") -> TextSource:
    return LocalText(dataset=str(path), column=column)


def read(path: Path) -> list[str]:
    """The documents, put together again from their pieces."""
    documents = [""]
    for piece in source(path).pieces():
        documents[-1] += piece.text
        if piece.ends:
            documents.append("")
    assert documents.pop() == ""
    return documents


def refused(path: Path, message: str, column: str = "text") -> None:
    with pytest.raises(UserError, match=message) as error:
        list(source(path, column).pieces())
    assert "\n" not in str(error.value)


def lines(texts: list[str], **extra: object) -> bytes:
    return "".join(json.dumps({"n": 1, "text": t, **extra}) + "\n" for t in texts).encode()


def zstd(data: bytes) -> bytes:
    """Packed as by `zstd --long=28` from a pipe: with a window that decompressors refuse unless they are told."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "t.jsonl": bytes, "t.jsonl.gz": gzip.compress, "t.JSONL.BZ2": bz2.compress, "t.json.xz": lzma.compress,
    "t.ndjson.zst": zstd,
}  # fmt: skip


@pytest.fixture(params=[*COMPRESSED, "array.json", "t.parquet", "t.txt", "folder"])
def any_kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same 40 documents in every kind of file (as txt one document), in pieces of at most 25 bytes."""
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 25)
    path = tmp_path / str(request.param)
    if path.name in COMPRESSED:
        compress = COMPRESSED[path.name]
        path.write_bytes(compress(b"\xef\xbb\xbf" + lines(TEXTS[:17])) + compress(b"\n" + lines(TEXTS[17:])))  # two streams
    elif path.name == "array.json":
        path.write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"bad": [[b"\xff"]] * 40, "text": TEXTS}), path, row_group_size=7)
    elif path.suffix == ".txt":
        path.write_bytes(b"\xef\xbb\xbf" + "".join(TEXTS).encode())
    else:
        (path / "a").mkdir(parents=True)
        (path / "a" / "0.jsonl").write_bytes(lines(TEXTS[:10]))
        (path / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[10:])))
        (path / "c.jsonl").touch()
    return path


def test_every_kind_of_file_gives_the_same_documents(any_kind: Path) -> None:
    assert read(any_kind) == (["".join(TEXTS)] if any_kind.suffix == ".txt" else TEXTS)


def test_every_piece_has_a_resume_point(any_kind: Path) -> None:
    pieces = list(source(any_kind).pieces())
    assert max(len(piece.text.encode()) for piece in pieces) <= 25 + 3  # a byte order mark is read, and is no text
    assert len(pieces) > 60
    for i in range(0, len(pieces), 3):
        point = resume_point(json.loads(json.dumps(asdict(pieces[i].point))))
        assert list(source(any_kind).pieces(point)) == pieces[i:]


# --- which files ---


def test_paths_are_literal(tmp_path: Path) -> None:
    for name in ("text[1].jsonl", "a*.jsonl", "[2024] dump/x.jsonl", "{a,b}.jsonl", "what?.jsonl", "hf:x.jsonl", "a::b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([name]))
    (tmp_path / "text1.jsonl").write_bytes(lines(["another file"]))
    for path in (p for p in tmp_path.rglob("*.jsonl") if p.name != "text1.jsonl"):
        assert read(path) == [str(path.relative_to(tmp_path))]
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "p[1].parquet")
    assert read(tmp_path / "p[1].parquet") == ["p"]


def test_what_is_hidden_a_cache_or_a_description_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(lines(["b"]))
    before = source(tmp_path).pinned_revision()
    for name in (
        ".x.jsonl", "._b.jsonl", "@eaDir/b.jsonl", ".ipynb_checkpoints/b.jsonl", "__MACOSX/b.jsonl", "#recycle/b.jsonl",
        "$RECYCLE.BIN/b.jsonl", "~b.jsonl", "dataset_infos.json", "notes.md", "b.jsonl.part",
        "demo/activations.zarr/zarr.json", "demo/ledger/tokens.json", "other/cache.json", "other/ledger/0/00000000.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no text")
    assert read(tmp_path) == ["b"]
    assert source(tmp_path).pinned_revision() == before
    refused(tmp_path / "._b.jsonl", "line 1: it is not JSON")  # who names a file means it


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_bytes(lines(["b"]))
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "elsewhere" / "b.jsonl")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to(folder)
    assert read(folder) == ["b", "b"]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    refused(folder, "gone.jsonl is a link to nothing")


def test_a_folder_of_txt_is_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n two \n")
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.txt").touch()
    assert read(tmp_path) == ["one\r\n\r\n two \n", "three"]


def test_folders_that_leave_it_open_what_is_meant(tmp_path: Path) -> None:
    refused(tmp_path, "expected files of one kind out of .*; it has none")
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    (tmp_path / "b.txt").write_text("b")
    refused(tmp_path, r"it has .*a\.jsonl and .*b\.txt: name one file")
    (tmp_path / "saved").mkdir()
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        (tmp_path / "saved" / name).write_text("{}")
    refused(tmp_path / "saved", "was written by save_to_disk: export it with to_parquet")
    refused(tmp_path / "a.csv", "there is no such file or folder")
    (tmp_path / "a.csv").touch()
    refused(tmp_path / "a.csv", "is not a file of text: give one out of jsonl")
    (tmp_path / "a.parquet.gz").touch()
    refused(tmp_path / "a.parquet.gz", "is not a file of text")
    refused(tmp_path / "none.jsonl", "there is no such file or folder")


def test_a_folder_is_every_file_of_it_whatever_names_say(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001", "test/a", "validation"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_bytes(lines([name]))
    assert read(tmp_path) == ["test/a", "train-00000-of-00001", "validation"]


# --- what is no text ---


LATE = lines(TEXTS)
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "two lines run together": (b'{"text": "half {"text": "x"}\n', r"line 41: it is not JSON"),
    "cut off": (b'{"text": "ha', r"line 41: it is not JSON"),
    "bytes": (b'{"text": "\xff"}\n', r"line 41: it is not UTF-8 \(byte 10: 0xff\)"),
    "another name": (b'{"content": "x"}\n', r"line 41: it has no column 'text'; it has content"),
    "an empty object": (b"{}\n", r"line 41: it has no column 'text'; it has none"),
    "a list": (b'["x"]\n', r"line 41: expected a JSON object with a field 'text', found list"),
    "a number": (b'{"text": 5}\n', r"line 41: column 'text' holds int, not text"),
    "a struct": (b'{"text": {"a": 1}}\n', r"line 41: column 'text' holds dict, not text"),
    "half a character": (b'{"text": "\\ud83d"}\n', r"line 41: its text holds half a surrogate pair"),
    "very deep": (b"[" * 200_000 + b"\n", r"line 41: it is not JSON"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_late(tmp_path: Path, what: str) -> None:
    bad, message = BAD_LINES[what]
    (tmp_path / "t.jsonl").write_bytes(LATE + bad + lines(["after"]))
    refused(tmp_path / "t.jsonl", message)
    pieces = source(tmp_path / "t.jsonl").pieces()
    assert [next(pieces).text for _ in TEXTS] == TEXTS  # what is before it can be read


def test_other_fields_are_not_looked_at(tmp_path: Path) -> None:
    more = lines(["b"], n="a string now", more=[1, {}]) + b'{"text": "c", "n": 1e999, "symlink": [null]}\n'
    (tmp_path / "t.jsonl").write_bytes(lines(["a"]) + more)
    assert read(tmp_path / "t.jsonl") == ["a", "b", "c"]


def test_rows_without_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(lines(["a"]) + b'{"text": null}\n' * 255 + lines(["b"]))
    assert read(path) == ["a", *[""] * 255, "b"]
    path.write_bytes(lines(["a"]) + b'{"text": null}\n' * 256 + lines(["b"]))
    refused(path, "line 257: column 'text' has been empty for 256 rows")


PARQUET: dict[str, tuple[Any, str]] = {
    "binary": (pa.array([b"x"], pa.binary()), "column 'text' holds binary, not text"),
    "list": (pa.array([["x"]]), "column 'text' holds list<.*>, not text"),
    "struct": (pa.array([{"a": "x"}]), "column 'text' holds struct<.*>, not text"),
    "date": (pa.array([1], pa.date32()), "column 'text' holds date32.day., not text"),
    "integer": (pa.array([1]), "column 'text' holds int64, not text"),
}


@pytest.mark.parametrize("what", PARQUET)
def test_parquet_columns_that_are_no_text(tmp_path: Path, what: str) -> None:
    column, message = PARQUET[what]
    pq.write_table(pa.table({"text": column}), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", message)


def test_parquet_strings_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"]).cast(kind)}), path)
        assert read(path) == ["a", "", "b"]
    refused(path, "it has no column 'body'; it has text: name one with --text-column", column="body")
    values = pa.array([b"a"] * 20 + [b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), path)
    refused(path, "row 21: it is not UTF-8")


def test_txt_that_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 16)
    (tmp_path / "t.txt").write_bytes(b"a text of some length, caf\xe9")
    refused(tmp_path / "t.txt", "t.txt, byte 26: it is not UTF-8")


@pytest.mark.parametrize("name", [*COMPRESSED, "t.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_files_that_were_cut_off(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name in COMPRESSED:
        path.write_bytes(COMPRESSED[name](lines([f"{i * i} " * 50 for i in range(200)])))
    else:
        pq.write_table(pa.table({"text": TEXTS}), path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    refused(path, "is empty|after row .*; is the file whole|it is not JSON")


def test_an_array_too_long_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.harvest.documents._ARRAY_BYTES", 100)
    (tmp_path / "t.json").write_text(json.dumps([{"text": t} for t in TEXTS]))
    refused(tmp_path / "t.json", "is one JSON array of more than 0 MiB: write one object a line")
