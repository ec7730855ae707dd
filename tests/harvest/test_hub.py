"""Documents of a hub dataset: a file stands for it, streamed by `datasets`. Over HTTP: tests/test_hub.py."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from residual_saes.harvest.hub import HubText, open_text
from residual_saes.harvest.pieces import resume_point
from residual_saes.shared.errors import UserError
from tests.harvest.test_documents import TEXTS, lines

SOURCE = HubText(dataset="some/dataset", revision=None, split="train", column="text")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hub.jsonl"
    path.write_bytes(lines(TEXTS))

    def stream(self: HubText) -> Any:
        from datasets import load_dataset

        return load_dataset("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(HubText, "_stream", stream)
    return path


def refused(message: str, column: str = "text") -> None:
    with pytest.raises(UserError, match=message) as error:
        list(HubText(dataset="some/dataset", revision=None, split="train", column=column).pieces())
    assert "\n" not in str(error.value)


def test_a_hub_dataset_goes_on_at_every_row(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.harvest.pieces._PIECE", 25)
    pieces = list(SOURCE.pieces())
    assert [piece.ends for piece in pieces].count(True) == 40
    for i in (0, 1, 2, 40, len(pieces) - 1):
        point = resume_point(json.loads(json.dumps(asdict(pieces[i].point))))
        assert [p.text for p in SOURCE.pieces(point)] == [p.text for p in pieces[i:]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (b'{"n": 1, "text": "cut', "the dataset some/dataset"),
        (b'{"n": 1, "text": 5}\n', "the dataset some/dataset|row 41: column 'text' holds int"),
        (b'{"n": 1}\n' * 300, "row 296: column 'text' has been empty for 256 rows"),
    ],
)
def test_what_goes_wrong_in_a_hub_dataset_is_one_line(hub: Path, more: bytes, message: str) -> None:
    hub.write_bytes(lines(TEXTS) + more)
    refused(message)


def test_hub_datasets_that_cannot_be_opened(hub: Path) -> None:
    refused("row 1: it has no column 'body'; it has n, text", column="body")
    hub.unlink()
    refused("cannot load the dataset some/dataset")


class Breaking:
    """A stream whose connection breaks after each ten rows; `lies`: it is opened again at the beginning whatever it is told."""

    lies = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.state_dict = stream.state_dict

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.lies:
            self._stream.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        for i, record in enumerate(self._stream):
            if i == 10:
                raise ConnectionResetError("gone")
            yield record


def test_a_stream_that_breaks_is_opened_again_where_it_was(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write_bytes(lines(TEXTS[:27]))
    stream = HubText._stream
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(HubText, "_stream", lambda self: Breaking(stream(self)))
    assert [piece.text for piece in SOURCE.pieces()] == TEXTS[:27]
    monkeypatch.setattr(Breaking, "lies", True)
    refused("after row 10: the stream goes on at another row than that at which it broke; run again")


def test_what_is_a_path_is_not_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name, local in {
        "org": True,
        "org/text": False,
        "./text": True,
        "~/text": True,
        "/a/text": True,
        "a.jsonl": True,
    }.items():
        assert isinstance(open_text(dataset=name, revision=None, split="train", column="text"), HubText) is not local
