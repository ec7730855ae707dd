"""Labelled texts as the package sae-probes 0.4.2 holds them: one .csv.zst a set, with the columns `prompt` and `target`.

Which of a set's texts are for training and which for testing is that package's "normal" setting, draw by draw.
"""

import hashlib
import io
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import zstandard
from numpy.typing import NDArray
from pyarrow import csv

from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import canonical

Indices = NDArray[np.int64]

SEED = 42
_FOLDERS = ("sae_probes/data/cleaned_data", "data/cleaned_data", "cleaned_data", ".")
_ENDING = ".csv.zst"
_MOST, _TRAIN, _TEST, _LEAST = 5000, 1024, 100, 120  # texts of a set; for training at most; for testing at least; at all


@dataclass(kw_only=True, frozen=True, slots=True)
class TextSet:
    """Texts of two kinds."""

    name: str
    texts: list[str]
    labels: Indices  # 0 or 1 of each
    train: Indices  # places of texts
    test: Indices

    @property
    def digest(self) -> str:
        """Of all that a probe's result depends on."""
        return hashlib.sha256(canonical([self.texts, self.labels.tolist()])).hexdigest()


def read_sets(place: Path, names: Collection[str] | None) -> list[TextSet]:
    """The sets of two labels in a folder, an unpacked wheel or a .whl file; only these, where `names` are given. Raises
    UserError where there are none, or one that is named is not there or too small."""
    files = dict(_files(place))
    if unknown := sorted(set(names or ()) - files.keys()):
        raise UserError(f"{place} has no set {unknown[0]}: name some of {', '.join(sorted(files)[:3])}, …")
    sets = [_read(name, files[name], place) for name in sorted(names or files)]
    readable = [each for each in sets if each is not None]
    if not readable or (names and len(readable) < len(set(names))):
        raise UserError(f"{place} has no such sets of two labels: give the wheel of sae-probes, or a folder of {_ENDING}")
    return readable


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    try:
        root = zipfile.Path(place) if place.is_file() else place
        folder = next((f for f in (root / name if name != "." else root for name in _FOLDERS) if f.is_dir()), root)
        for file in folder.iterdir():
            if file.name.endswith(_ENDING):
                yield file.name.removesuffix(_ENDING), file.read_bytes()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read labelled texts from {place} ({error}): give the wheel of sae-probes, or a folder"
        ) from None


def _read(name: str, content: bytes, place: Path) -> TextSet | None:
    """None where there are no texts, or not two labels."""
    text = pyarrow.string()
    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as stream:
            plain = stream.read()
        columns = csv.read_csv(
            io.BytesIO(plain),
            csv.ReadOptions(block_size=len(plain) + 1),  # else no row may be longer than a block
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types={"prompt": text, "target": text}, include_columns=["prompt", "target"]),
        ).to_pydict()
    except KeyError:
        return None
    except (zstandard.ZstdError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{name}{_ENDING} in {place} is damaged ({error}): get it again") from None
    texts, targets = columns["prompt"], columns["target"]
    kinds = sorted(set(targets))
    if len(kinds) != 2:
        return None
    if len(texts) < _LEAST:
        raise UserError(f"{name} in {place} has {len(texts)} texts, and probes need {_LEAST}: leave it out with --sets")
    labels = np.array([kinds.index(target) for target in targets[:_MOST]])
    train, test = split(labels, min(len(texts) - _TEST, _TRAIN), f"{name} in {place}")
    return TextSet(name=name, texts=texts[:_MOST], labels=labels, train=train, test=test)


def split(labels: Indices, n_train: int, name: str) -> tuple[Indices, Indices]:
    """Texts to train and to test on, as many of either label, in an order that is drawn: all but one are used. Raises UserError
    for labels that are not balanced."""
    draw = np.random.RandomState(SEED)
    sizes, left = (n_train, len(labels) - n_train - 1), [np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)]
    parts = []
    for size in sizes:
        positive = -(-size // 2)
        drawn = []
        for kind, n in enumerate((positive, size - positive)):
            if n > len(left[kind]):
                raise UserError(f"{name} has not as many texts of either label: leave some out")
            drawn.append(draw.choice(left[kind], size=n, replace=False))
            left[kind] = np.setdiff1d(left[kind], drawn[-1])
        parts.append(np.concatenate(drawn))
    train, test = map(draw.permutation, parts)
    return train, test
