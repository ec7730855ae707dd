"""Documents of datasets on the hub, streamed by `datasets`."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from residual_saes.harvest.documents import LocalText, is_local
from residual_saes.harvest.pieces import (
    FilePoint,
    Piece,
    ResumePoint,
    Row,
    StreamPoint,
    TextSource,
    column_of,
    reason,
    split_rows,
)
from residual_saes.shared.errors import UserError
from residual_saes.shared.hub import retried
from residual_saes.shared.identity import dataset_commit, unreachable

if TYPE_CHECKING:  # imported where text is read: a harvest whose tokens are written does without
    from datasets import IterableDataset


@dataclass(kw_only=True, frozen=True, slots=True)
class HubText:
    """One split of a dataset on the hub: a TextSource."""

    dataset: str
    revision: str | None
    split: str
    column: str

    def pinned_revision(self) -> str:
        """The commit that the revision stands for. Raises UserError."""
        return dataset_commit(self.dataset, self.revision)

    def pieces(self, start: ResumePoint | None = None) -> Iterator[Piece]:
        """Every document from `start` on. Raises UserError at whatever is no text."""
        assert not isinstance(start, FilePoint), "a cache of a hub dataset is compared with its commit"
        return split_rows(self._rows(start), self.dataset, self.column, start)

    def _rows(self, start: StreamPoint | None) -> Iterator[Row]:
        name = f"the dataset {self.dataset}"
        reader = _Reader(self._stream, start.stream if start else None)
        for number in itertools.count(start.row if start else 0):
            try:
                before, record = retried(name, reader.read)
            except Exception as error:  # the hub's client, the network, and whatever describes a dataset
                if number == 0:
                    raise unreachable(name, error) from None
                raise UserError(f"{name}, after row {number}: {reason(error)}; run again to continue there") from None
            if record is None:
                return
            where = f"{name}, row {number + 1}"
            yield Row(point=StreamPoint(stream=before, row=number), value=column_of(record, self.column, where), where=where)

    def _stream(self) -> "IterableDataset":
        from datasets import load_dataset

        return load_dataset(self.dataset, revision=self.revision, split=self.split, streaming=True)


class _Reader:
    """The records of a stream, which is opened again after a failure at the record before it."""

    def __init__(self, open_stream: Callable[[], "IterableDataset"], state: dict[str, Any] | None) -> None:
        self._open, self._state = open_stream, state  # the state before the last record, or before the first
        self._stream: IterableDataset | None = None
        self._records: Iterator[Any] = iter(())
        self._last: Any = None  # the record read last

    def read(self) -> tuple[dict[str, Any], Any]:
        """(state before a record, the record); the record is None at the end. Raises whatever `datasets` does."""
        try:
            if self._stream is None:
                self._stream = self._opened()
            state = self._stream.state_dict()
            self._last = next(self._records, None)
            self._state = state
            return state, self._last
        except Exception:
            self._stream = None
            raise

    def _opened(self) -> "IterableDataset":
        stream = self._open()
        if self._state:
            stream.load_state_dict(self._state)
        self._records = iter(stream)
        if self._last is not None and repr(next(self._records, None)) != repr(self._last):
            raise ValueError("the stream goes on at another row than that at which it broke")
        return stream


def open_text(*, dataset: str, revision: str | None, split: str, column: str) -> TextSource:
    """The text at a path, or of a hub dataset; local files have neither revision nor split."""
    if is_local(dataset):
        return LocalText(dataset=dataset, column=column)
    return HubText(dataset=dataset, revision=revision, split=split, column=column)


def refuse_local_split(dataset: str) -> None:
    """Raises UserError where `--split` is given for local files."""
    if is_local(dataset):
        raise UserError(
            f"--split names a split of a hub dataset, and {dataset} is local: all of it is read; "
            "name the file, or a folder of those you want, with --dataset"
        )
