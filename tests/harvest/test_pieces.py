import pytest

from residual_saes.harvest.pieces import FilePoint, StreamPoint, resume_point, split_text
from residual_saes.shared.errors import UserError


def test_long_texts_are_parted_before_a_single_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 16)
    for text in ("one two  three\n four five six seven eight", "é" * 50, "a" * 33, "  " * 20):
        parts = [part for part, _ in split_text(text)]
        assert "".join(parts) == text
        assert [last for _, last in split_text(text)] == [False] * (len(parts) - 1) + [True]
        assert all(0 < len(part.encode()) <= 16 for part in parts)
    assert [part for part, _ in split_text("one two  three four five")] == ["one two  three", " four five"]


def test_resume_points_are_read_from_ledger_entries() -> None:
    assert resume_point({"file": 1, "position": 2, "row": 3, "piece": 4}) == FilePoint(file=1, position=2, row=3, piece=4)
    assert resume_point({"stream": {"a": 1}, "row": 3, "piece": 4}) == StreamPoint(stream={"a": 1}, row=3, piece=4)
    for odd in ({"page": 1}, {"file": -1}, {"row": "x"}, {"position": 1 << 63}, {"stream": 3}, None, []):
        with pytest.raises(UserError, match="not a place in a text"):
            resume_point(odd)
