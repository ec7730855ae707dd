"""The files of feature pages: folders that are whole or count for nothing, and scripts that hand data to the page.

<runs>/pages/
    index.html                                  the page: its script, its style and a list of what there is
    notes.js                                    names and stars that a reader gave and saved here
    text.<digest>/                              the held-out tokens of a cache, and what each of its tokens says
    <run>/layer12_final.<digest>/               one SAE: facts.json, and
        columns.safetensors                     everything about every feature, a column a fact (features.py; `Pages`)
        index.js  000.js  001.js …              the same for the page: what its list needs, and CHUNK features a file
        near-<digest>.js                        nearest features in another SAE (elsewhere.py)

A page opened from a disk may not read files, but it may run scripts: every .js hands its columns over, as base64, when the page
asks for it. Folders are named by what they are of. A folder counts when its facts.json is there and right, which is written
last and has the checksums of all other files; one of an older checkpoint, or of less text, goes when its successor is listed.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from residual_saes.eval.pages import features
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import (
    locked,
    make_dir,
    publish_file,
    publish_json,
    publish_text,
    refuse_links,
    sync_dir,
    write_file,
)
from residual_saes.shared.seal import SEAL, canonical, crc32c, parse_sealed, read_tensors, seal
from residual_saes.shared.sites import Site
from residual_saes.shared.temporaries import remove_leftovers
from residual_saes.shared.typed import Count, read

FORMAT = 1
CHUNK = 64  # features in a file
CONTEXTS = features.TOP + features.SAMPLES
_FACTS, _NOTES = "facts.json", "notes.js"
_TEMPLATES = Path(__file__).with_name("templates")

Facts = dict[str, Any]
Columns = dict[str, Tensor]


@dataclass(kw_only=True, frozen=True, slots=True)
class _OfText:
    """What is asked of the facts of a text's folder."""

    context: Count
    chunk: Count
    files: dict[str, str]


@dataclass(kw_only=True, frozen=True, slots=True)
class _OfSae:
    """What is asked of the facts of an SAE's folder."""

    name: str
    layer: Site
    snapshot: str
    tokens: Count
    file: str
    text: str
    first_row: int
    files: dict[str, str]


@dataclass(kw_only=True, frozen=True, slots=True)
class Pages:
    """What is known of every feature of one SAE, for a notebook."""

    facts: Facts
    columns: Columns

    @classmethod
    def open(cls, folder: Path) -> "Pages":
        """One SAE's folder. Raises UserError if it is not whole."""
        facts = whole_facts(folder)
        if facts is None:
            raise UserError(f"{folder} does not hold whole feature pages: run `rsae eval pages` again")
        return cls(facts=facts, columns=read_tensors(folder / "columns.safetensors")[0])

    def around(self, feature: int, n: int) -> tuple[Tensor, Tensor]:
        """(offsets from `columns["row"][feature, n]`, activations there) of what is not zero near it."""
        place = feature * CONTEXTS + n
        start, end = self.columns["near_start"][place : place + 2].tolist()
        return self.columns["near_at"][start:end], self.columns["near_value"][start:end]


# --- folders that are whole or count for nothing ---


def publish_pages(folder: Path, facts: Facts, files: Iterable[tuple[str, bytes]]) -> None:
    """Write all files (name, content) of a folder, and last the facts that say that they are there. Raises UserError."""
    refuse_links(folder)
    make_dir(folder)
    (folder / _FACTS).unlink(missing_ok=True)
    sync_dir(folder)
    checksums = {}
    for name, content in files:
        write_file(folder / name, content)
        checksums[name] = _checksum(content)
    sync_dir(folder)
    publish_json(folder / _FACTS, seal(facts | {"files": checksums}))
    sync_dir(folder.parent)
    sync_dir(folder.parent.parent)


def read_facts(folder: Path) -> Facts | None:
    """What a folder says of itself, None unless it is readable and of this format; its other files are not looked at."""
    try:
        facts = parse_sealed((folder / _FACTS).read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # any other failure to read is no sign that there is nothing
        return None
    try:
        if facts is not None and facts.get("format") == FORMAT:
            read(_OfText if "chunk" in facts else _OfSae, facts)
            return facts
    except ValueError:  # made by another hand
        pass
    return None


def whole_facts(folder: Path) -> Facts | None:
    """The facts of a folder whose every file is as it was written."""
    facts = read_facts(folder)
    try:
        right = facts is not None and all(_checksum((folder / n).read_bytes()) == c for n, c in facts["files"].items())
    except OSError:
        right = False
    return facts if right else None


def _checksum(content: bytes) -> str:
    return crc32c(np.frombuffer(content, np.uint8))


def digest(identity: Facts) -> str:
    """What tells a folder from others of its name."""
    return _checksum(canonical(identity))


def siblings(folder: Path) -> list[Path]:
    """Folders of the same SAE, itself included."""
    stem = folder.name.rpartition(".")[0]
    return [path for path in sorted(folder.parent.glob("*")) if path.is_dir() and path.name.rpartition(".")[0] == stem]


def sweep(out: Path) -> None:
    """Remove what killed writers left half-written."""
    for folder in (out, *(path for pattern in ("*", "*/*") for path in out.glob(pattern))):
        if folder.is_dir() and not folder.is_symlink():
            remove_leftovers(folder)


# --- what the page reads ---


def columns_script(key: str, columns: Columns) -> bytes:
    """A file that hands columns to the page: {name: [type, base64 of little-endian values]}."""
    return script(key, {name: [str(c.dtype).removeprefix("torch."), _base64(c)] for name, c in columns.items()})


def _base64(column: Tensor) -> str:
    return base64.b64encode(column.contiguous().numpy().tobytes()).decode()


def script(key: str, value: Any) -> bytes:
    """A file that hands JSON to the page. ASCII alone: a script's idea of where a line or a string ends is not JSON's."""
    return f"pages.take({json.dumps(key)},{json.dumps(value, separators=(',', ':'))});\n".encode()


def read_script(path: Path) -> Any:
    """The JSON of such a file. Raises OSError and ValueError."""
    text = path.read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def read_columns(path: Path) -> Columns:
    """The columns of such a file. Raises OSError and ValueError."""

    def column(kind: str, text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=getattr(torch, kind))

    return {name: column(*value) for name, value in read_script(path).items()}


def write_index(out: Path, current: set[Path]) -> Path:
    """The page, with a list of everything that is there: of one SAE what is in `current`, else what is of most text."""
    with locked(out):
        chosen: dict[tuple[str, Site, str], tuple[Any, Facts]] = {}
        for folder in sorted(out.glob("*/layer*_*.*")):
            facts = read_facts(folder)
            if facts is not None and facts.get("name") == folder.parent.name:
                key, rank = (facts["name"], Site.of(facts["layer"]), facts["snapshot"]), (folder in current, facts["tokens"])
                near = sorted(path.stem.removeprefix("near-") for path in folder.glob("near-*.js"))
                kept = {k: v for k, v in facts.items() if k not in ("files", SEAL)}
                shown = kept | {"folder": folder.name, "near": near}
                if key not in chosen or rank > chosen[key][0]:
                    chosen[key] = rank, shown
        texts = {folder.name: facts["chunk"] for folder in out.glob("text.*") if (facts := read_facts(folder))}
        sizes = ("TOP", "SAMPLES", "NEAREST", "WORDS", "BEFORE", "AFTER", "BINS", "LOGIT_BINS")
        shape = {name.lower(): getattr(features, name) for name in sizes} | {"chunk": CHUNK}
        catalogue = {"shape": shape, "texts": texts, "saes": [chosen[key][1] for key in sorted(chosen)]}
        script_text = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS)
        page = templates().get_template("pages.html").render(catalogue=catalogue, style=style(), script=script_text)
        if not (out / _NOTES).exists():  # it is the reader's from then on
            publish_file(out / _NOTES, script("notes", [{}]))
        publish_text(out / "index.html", page)
    return out / "index.html"


_SCRIPTS = ("pages.js", "first.js")


def templates() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)


def style() -> str:
    return (_TEMPLATES / "pages.css").read_text(encoding="utf-8")
