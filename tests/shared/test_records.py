import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.records import JsonLines, JsonRecords, Record
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site


@dataclass(kw_only=True, frozen=True)
class Point:
    x: float
    y: float | None


@dataclass(kw_only=True, frozen=True)
class Line(Record):
    name: str
    weight: float | None = field(default=None, metadata={"key": "lambda"})
    sites: tuple[Site, ...] = ()
    points: tuple[Point, ...] = ()
    nearest: Point | None = None
    widths: dict[int, Point] | None = None
    parts: "list[Line] | None" = None


LINE = Line(
    name="a",
    weight=1.0,
    sites=(Site(1), Site(2, "mlp_out")),
    points=(Point(x=1, y=None),),
    nearest=Point(x=2.5, y=0.0),
    widths={128: Point(x=0, y=1)},
)
STORED: dict[str, Any] = {
    "name": "a", "lambda": 1.0, "sites": [1, "2.mlp_out"], "points": [{"x": 1, "y": None}], "nearest": {"x": 2.5, "y": 0.0},
    "widths": {"128": {"x": 0, "y": 1}}, "parts": None,
}  # fmt: skip


def test_a_record_is_the_json_of_its_fields() -> None:
    assert LINE.to_dict() == STORED and list(LINE.to_dict()) == list(STORED)
    assert Line.from_dict(json.loads(json.dumps(STORED))) == LINE
    whole = Line(name="b", parts=[LINE])
    assert Line.from_dict(whole.to_dict()) == whole and whole.parts == [LINE]
    with pytest.raises(ValueError, match="name is missing"):
        Line.from_dict({"lambda": 1.0})


def test_a_file_of_records_is_one_list_or_named(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    records, named = JsonRecords(path, Line), JsonRecords(path, Line, lambda lines: [line.name for line in lines])
    assert records.read() == []
    assert records.update(lambda known: [*known, LINE]) == records.read() == [LINE]
    assert path.read_text() == json.dumps([seal(STORED)], indent=1) + "\n"
    for damaged in (path.read_text().replace("2.5", "2.6"), path.read_text()[:-5], "{}", "null", json.dumps([seal({"x": 1})])):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            records.update(lambda known: [])
        assert path.read_text() == damaged
    path.write_text("{}")
    assert named.update(lambda known: [LINE]) == named.read() == [LINE]
    assert path.read_text() == json.dumps({"a": seal(STORED)}, indent=1) + "\n"


def test_what_only_another_version_knows_is_written_back_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([seal({"newer": [1], "name": "a", "points": []})], indent=1) + "\n")
    before, records = path.read_bytes(), JsonRecords(path, Line)
    assert records.update(lambda known: known) == [Line(name="a")]
    assert path.read_bytes() == before
    assert list(replace(records.read()[0], weight=0.0).to_dict()) == ["newer", "name", "points", "lambda"]


def test_what_cannot_be_read_is_said_and_not_taken_for_nothing(tmp_path: Path) -> None:
    """A folder stands for a file on a bad block."""
    assert JsonLines(tmp_path / "none", Line).lines() == JsonRecords(tmp_path / "none", Line).read() == []
    for read in (JsonLines(tmp_path, Line).read, JsonRecords(tmp_path, Line).read):
        with pytest.raises(UserError, match="cannot read .*: Is a directory"):
            read()


def test_lines_are_added_and_one_that_is_cut_or_damaged_is_known(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, Line)
    assert lines.lines() == []
    for name in "abc":
        lines.append(Line(name=name))
    whole = path.read_bytes()
    assert [record and record.name for _, record in lines.lines()] == ["a", "b", "c"]
    assert b"".join(line for line, _ in lines.lines()) == whole
    path.write_bytes(whole[:-3])
    assert lines.read() == [Line(name="a"), Line(name="b")]
    path.write_bytes(whole.replace(b'"b"', b'"x"'))
    assert [record and record.name for _, record in lines.lines()] == ["a", None, "c"]
    with pytest.raises(UserError, match=r"line 2 of .* is damaged: delete that line"):
        lines.read()
