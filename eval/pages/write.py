"""Feature pages: every feature of every SAE in one static page, which a double click opens.

<runs>/pages/
    index.html                                  the page: its script, its style and a list of what there is
    text.<digest>/                              the held-out tokens of a cache, and what each of its tokens says
    <run>/layer12_final.<digest>/               one SAE: facts.json, and
        columns.safetensors                     everything about every feature, a column a fact (features.py; `Pages`)
        index.js  000.js  001.js …              the same for the page: what its list needs, and CHUNK features a file

A page opened from a disk may not read files, but it may run scripts: every .js hands its columns over, as base64, when the page
asks for it. Folders are named by what they are of. One counts when its facts.json is there and right, which is written last
and has the checksums of all other files; one of an older checkpoint, or of less text, goes when its successor is listed.
"""

import base64
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eval.measure.evaluate import Skipped
from eval.pages import features
from shared.cache import Cache
from shared.device import announce, fitting
from shared.errors import UserError
from shared.files import locked, make_dir, publish_json, remove_leftovers, replacing, sync_dir, write_file
from shared.identity import harvested_model, tokenizer_hash
from shared.lm import Unembedding, load_model, load_tokenizer
from shared.progress import Progress, say
from shared.runs.run import FINAL, Run
from shared.runs.sae import Sae
from shared.seal import SEAL, canonical, crc32c, seal, sealed
from shared.sites import Site, format_sites

FORMAT = 1
CHUNK = 64  # features in a file
_TEXT_CHUNK = 1 << 16  # tokens in a file, or one context
_FACTS = "facts.json"
_TEMPLATES = Path(__file__).with_name("templates")
_CONTEXTS = features.TOP + features.SAMPLES
_IN_CHUNKS = (
    "bins", "bin_width", "row", "similar", "similar_cosine", "together", "together_jaccard", "together_count",
    "promoted_logit", "suppressed_logit",
)  # fmt: skip

Facts = dict[str, Any]
Columns = dict[str, Tensor]


@dataclass(kw_only=True, frozen=True, slots=True)
class PagesConfig:
    """Which pages, and from how much text."""

    device: torch.device
    out: Path
    tokens: int  # held-out ones, rounded down to whole contexts
    snapshot: str = FINAL
    layers: tuple[Site, ...] | None = None  # None: all there are
    model: str | None = None  # where the language model lies, if not where the cache says


@dataclass(kw_only=True, frozen=True, slots=True)
class Pages:
    """What is known of every feature of one SAE, for a notebook."""

    facts: Facts
    columns: Columns

    @classmethod
    def open(cls, folder: Path) -> "Pages":
        """One SAE's folder. Raises UserError if it is not whole."""
        facts = _whole(folder)
        if facts is None:
            raise UserError(f"{folder} does not hold whole feature pages: run `python -m eval pages` again")
        return cls(facts=facts, columns=load_file(folder / "columns.safetensors"))

    def around(self, feature: int, n: int) -> tuple[Tensor, Tensor]:
        """(offsets from `columns["row"][feature, n]`, activations there) of what is not zero near it."""
        place = feature * _CONTEXTS + n
        start, end = self.columns["near_start"][place : place + 2].tolist()
        return self.columns["near_at"][start:end], self.columns["near_value"][start:end]


@dataclass(kw_only=True, frozen=True, slots=True)
class _Job:
    """One SAE to look at."""

    run: Run
    path: Path
    identity: Facts  # what its pages are of

    @property
    def site(self) -> Site:
        return Site.of(self.identity["layer"])

    def folder(self, out: Path) -> Path:
        return out / self.run.name / f"layer{self.site.key}_{self.identity['snapshot']}.{_short(self.identity)}"

    def there(self, out: Path) -> Path | None:
        """Whole pages of the same checkpoint from as much text or more."""
        for folder in _siblings(self.folder(out)):
            facts = _facts(folder)
            same = facts and all(facts.get(k) == v for k, v in self.identity.items() if k != "tokens")
            if facts and same and facts["tokens"] >= self.identity["tokens"] and _whole(folder):
                return folder
        return None

    def open(self, cache: Cache, device: torch.device) -> Sae:
        """Raises UserError."""
        belongs = self.run.belongs(self.site, self.identity["snapshot"])
        sae = Sae.load(self.path, cache.spec.d_model, belongs=belongs)
        if not all(bool(tensor.isfinite().all()) for tensor in sae.tensors().values()):
            raise UserError(f"{self.path} holds values that are not finite; name an earlier --snapshot")
        return sae.to(device)


def write_pages(cache: Cache, runs: Sequence[Run], config: PagesConfig, skipped: Skipped) -> Path:
    """Pages of the runs' SAEs, where they are not there yet, and the page that shows them. What cannot be made is left out.
    Raises UserError for what concerns all of them, or if there is nothing to show."""
    spec = cache.spec
    sequences = min(config.tokens // spec.context, spec.holdout_blocks * spec.block_sequences)
    if sequences == 0:
        raise UserError(f"{cache.path} holds out no context of {spec.context} tokens to look at: harvest with --holdout-tokens")
    _sweep(make_dir(config.out))
    jobs = _jobs(cache, runs, sequences * spec.context, config, skipped)
    there = {job.folder(config.out): job.there(config.out) for job in jobs}
    current = {folder for folder in there.values() if folder}
    todo = [job for job in jobs if there[job.folder(config.out)] is None]
    model = harvested_model(cache, config.model)
    text, vocabulary = _write_text(cache, load_tokenizer(str(model.folder), None), config.out)
    if todo:
        to_logits = Unembedding(load_model(str(model.folder), None, "fp32", head=True)).to(config.device)
        announce(config.device)
        layers = itertools.groupby(todo, lambda job: job.site)
        groups = (fitting(jobs, lambda job: _size(job, spec.d_model), config.device) for _, jobs in layers)
        for group in itertools.chain.from_iterable(groups):
            with skipped.leaving_out():
                looked = _look(cache, group, sequences, config.device, skipped)
                with Progress(f"layer {group[0].site}, neighbours and words", len(looked), "SAEs") as progress:
                    for job, tally in looked:
                        columns, together = tally.columns(to_logits, vocabulary)
                        _write_sae(cache, job, tally, columns, {"together_tokens": together, "text": text}, config.out)
                        current.add(job.folder(config.out))
                        _write_index(config.out, current)
                        progress.advance(1, job.run.name)
    page = _write_index(config.out, current)
    for folder in current:
        for old in _siblings(folder):
            if old not in current:
                shutil.rmtree(old, ignore_errors=True)
    return page


def _jobs(cache: Cache, runs: Sequence[Run], tokens: int, config: PagesConfig, skipped: Skipped) -> list[_Job]:
    """By layer, then by run: a layer is read once for all."""
    jobs = []
    gone: set[Site] = set()
    for run in runs:
        with skipped.leaving_out():
            digest = run.config()["digest"]
            for snapshot in run.snapshots():
                if snapshot.label != config.snapshot or (config.layers is not None and snapshot.site not in config.layers):
                    continue
                if snapshot.site not in cache.sites:
                    gone.add(snapshot.site)
                    continue
                with skipped.leaving_out():
                    identity = {
                        "format": FORMAT,
                        "cache": cache.digest,
                        "run": digest,
                        "layer": snapshot.site.json,
                        "snapshot": snapshot.label,
                        "tokens": tokens,
                        "file": Sae.checksum(snapshot.path),
                    }
                    jobs.append(_Job(run=run, path=snapshot.path, identity=identity))
    if gone:
        say(f"layers {format_sites(gone)} are not in {cache.path}: pages made of them before are kept", err=True)
    if not jobs and not gone:
        raise UserError(f"there is no {config.snapshot!r} snapshot of these layers to look at; name others")
    return sorted(jobs, key=lambda job: job.site)


def _size(job: _Job, d_model: int) -> int:
    """Bytes of an SAE's weights, which are 8 d a feature, and of what is kept of it."""
    return int(job.path.stat().st_size * (1 + features.kept_bytes() / (8 * d_model)))


def _look(
    cache: Cache, group: list[_Job], sequences: int, device: torch.device, skipped: Skipped
) -> list[tuple[_Job, features.Tally]]:
    """One reading of the layer for all of these SAEs. Raises UserError for held-out blocks that are damaged."""
    opened = []
    for job in group:
        with skipped.leaving_out():
            opened.append((job, job.open(cache, device)))
    if not opened:
        return []
    spec, layer = cache.spec, group[0].site
    tokens = sequences * spec.context
    with Progress(f"layer {layer}", tokens, "tokens") as progress:
        blocks = _shown(features.heldout_text(cache, layer, sequences), progress)
        tallies = features.look(blocks, [sae for _, sae in opened], spec.context, tokens)
    return [(job, tally) for (job, _), tally in zip(opened, tallies, strict=True)]


def _shown(blocks: Iterator[features.Block], progress: Progress) -> Iterator[features.Block]:
    for first, block in blocks:
        yield first, block
        progress.update(first + len(block))


# --- what is written ---


def _write_sae(cache: Cache, job: _Job, tally: features.Tally, columns: Columns, facts: Facts, out: Path) -> None:
    """All files of one SAE, and last what says that they are there."""
    folder, stats, first = job.folder(out), tally.sae.stats, cache.spec.train_tokens
    name = f"{job.run.name}/{folder.name}"
    facts = job.identity | {
        "name": job.run.name,
        "features": len(columns["count"]),
        "first_row": first,
        "context": cache.spec.context,
        "trained_tokens": stats["tokens"],
        "lambda": stats["lambda"],
        **facts,
    }
    absolute = columns["row"] + first * (columns["row"] >= 0)

    def files() -> Iterator[tuple[str, bytes]]:
        yield "columns.safetensors", save(columns | {"row": absolute})
        yield "index.js", _script(f"{name}/index", _index(cache, columns))
        for number, chunk in enumerate(_chunks(columns)):
            yield f"{number:03d}.js", _script(f"{name}/{number:03d}", chunk)

    _publish(folder, facts, files())


def _index(cache: Cache, columns: Columns) -> Columns:
    """What the page's list sorts, filters and searches by. Tokens are counted from 1, 0 is none."""
    spec = cache.spec
    tokens = torch.from_numpy(cache.read_tokens(spec.train_blocks * spec.block_sequences, spec.sequences)).view(-1)
    top = columns["row"][:, : features.TOP]
    peaks = (tokens[top.clamp(min=0)] + 1) * (top >= 0)
    dtype = torch.uint16 if spec.vocab_size < 1 << 16 else torch.int32
    index = {name: columns[name] for name in ("count", "maximum", "mean")}
    return index | {
        "peaks": peaks.to(dtype),
        "promoted": (columns["promoted"] + 1).to(dtype),
        "suppressed": (columns["suppressed"] + 1).to(dtype),
    }


def _chunks(columns: Columns) -> Iterator[Columns]:
    """All else, CHUNK features at a time."""
    for first in range(0, len(columns["count"]), CHUNK):
        chunk = {name: columns[name][first : first + CHUNK] for name in _IN_CHUNKS}
        start = columns["near_start"][first * _CONTEXTS : (first + len(chunk["row"])) * _CONTEXTS + 1]
        near = slice(int(start[0]), int(start[-1]))
        yield chunk | {
            "row": chunk["row"].int(),
            "near_start": start - start[0],
            "near_at": columns["near_at"][near],
            "near_value": columns["near_value"][near],
        }


def _write_text(cache: Cache, tokenizer: PreTrainedTokenizerBase, out: Path) -> tuple[str, int]:
    """The held-out tokens, and what each token says. The name of their folder, and how many tokens the tokeniser knows.
    Raises UserError for another tokeniser than the cache's."""
    spec = cache.spec
    if tokenizer_hash(tokenizer) != spec.tokenizer_sha256:
        raise UserError(
            f"the tokenizer beside the model is not the one that {cache.path} was made with: name a folder with both by --model"
        )
    known = min(len(tokenizer), spec.vocab_size)
    identity = {"format": FORMAT, "cache": cache.digest}
    folder = out / f"text.{_short(identity)}"
    if _whole(folder):
        return folder.name, known
    size, first = max(1, _TEXT_CHUNK // spec.context), spec.train_blocks * spec.block_sequences

    def files() -> Iterator[tuple[str, bytes]]:
        yield "vocabulary.js", _call(f"{folder.name}/vocabulary", spell(tokenizer, known))
        for number, start in enumerate(range(first, spec.sequences, size)):
            tokens = cache.read_tokens(start, min(start + size, spec.sequences)).reshape(-1)
            dtype = np.uint16 if spec.vocab_size <= 1 << 16 else np.int32
            yield f"{number:03d}.js", _script(f"{folder.name}/{number:03d}", {"tokens": torch.from_numpy(tokens.astype(dtype))})

    _publish(folder, identity | {"context": spec.context, "chunk": size * spec.context}, files())
    return folder.name, known


def spell(tokenizer: PreTrainedTokenizerBase, n: int) -> list[str]:
    """What the first n tokens stand for in a text; of one that is part of a character, its bytes as \\xe2."""
    backend = tokenizer.backend_tokenizer
    names = tokenizer.convert_ids_to_tokens(list(range(n)))
    if backend.decoder is None:  # what it would say is not what it was made from
        return [_bytes(name) for name in names]
    # a token alone may lose the space it begins with, the second of two does not
    once, twice = (backend.decode_batch([[i] * times for i in range(n)], skip_special_tokens=False) for times in (1, 2))
    spelt = [b[len(a) :] if b.startswith(a) else a for a, b in zip(once, twice, strict=True)]
    return [_bytes(name) if "\ufffd" in text else text for name, text in zip(names, spelt, strict=True)]


def _bytes(name: str | None) -> str:
    """A token of a byte-level tokeniser, from its name; any other's name."""
    try:
        raw = bytes(_BYTES[letter] for letter in name or "")
    except KeyError:
        return name or ""
    return raw.decode(errors="backslashreplace")


def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenisers spell bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _script(key: str, columns: Columns) -> bytes:
    """A file that hands columns to the page: {name: [type, base64 of little-endian values]}."""
    return _call(key, {name: [str(c.dtype).removeprefix("torch."), _base64(c)] for name, c in columns.items()})


def _base64(column: Tensor) -> str:
    return base64.b64encode(column.contiguous().numpy().tobytes()).decode()


def _call(key: str, value: Any) -> bytes:
    """ASCII alone: a script's idea of where a line or a string ends is not JSON's."""
    return f"pages.take({json.dumps(key)},{json.dumps(value, separators=(',', ':'))});\n".encode()


def _write_index(out: Path, current: set[Path]) -> Path:
    """The page, with a list of everything that is there: of one SAE what is in `current`, else what is of most text."""
    with locked(out):
        chosen: dict[tuple[str, int, str], tuple[Any, Facts]] = {}
        for folder in sorted(out.glob("*/layer*_*.*")):
            facts = _facts(folder)
            if facts is not None and facts.get("name") == folder.parent.name:
                key, rank = (facts["name"], facts["layer"], facts["snapshot"]), (folder in current, facts["tokens"])
                shown = {k: v for k, v in facts.items() if k not in ("files", SEAL)} | {"folder": folder.name}
                if key not in chosen or rank > chosen[key][0]:
                    chosen[key] = rank, shown
        texts = {folder.name: facts["chunk"] for folder in out.glob("text.*") if (facts := _facts(folder))}
        sizes = ("TOP", "SAMPLES", "NEAREST", "WORDS", "BEFORE", "AFTER", "BINS")
        shape = {name.lower(): getattr(features, name) for name in sizes}
        catalogue = {"shape": shape | {"chunk": CHUNK}, "texts": texts, "saes": [chosen[key][1] for key in sorted(chosen)]}
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
        )
        style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("pages.css", "pages.js"))
        page = environment.get_template("pages.html").render(catalogue=catalogue, style=style, script=script)
        with replacing(out / "index.html") as temporary:
            temporary.write_text(page, encoding="utf-8")
    return out / "index.html"


# --- folders that are whole or count for nothing ---


def _publish(folder: Path, facts: Facts, files: Iterator[tuple[str, bytes]]) -> None:
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


def _facts(folder: Path) -> Facts | None:
    """What a folder says of itself, if it is all there and readable; its other files are not looked at."""
    try:
        facts = json.loads((folder / _FACTS).read_bytes())
    except (OSError, ValueError):
        return None
    return facts if sealed(facts) and facts.get("format") == FORMAT else None


def _whole(folder: Path) -> Facts | None:
    """The facts of a folder whose every file is as it was written."""
    facts = _facts(folder)
    try:
        right = facts is not None and all(_checksum((folder / n).read_bytes()) == c for n, c in facts["files"].items())
    except OSError:
        right = False
    return facts if right else None


def _checksum(content: bytes) -> str:
    return crc32c(np.frombuffer(content, np.uint8))


def _short(identity: Facts) -> str:
    return _checksum(canonical(identity))


def _siblings(folder: Path) -> list[Path]:
    """Folders of the same SAE, itself included."""
    stem = folder.name.rpartition(".")[0]
    return [path for path in sorted(folder.parent.glob("*")) if path.is_dir() and path.name.rpartition(".")[0] == stem]


def _sweep(out: Path) -> None:
    """What killed writers left half-written."""
    for folder in (out, *(path for pattern in ("*", "*/*") for path in out.glob(pattern) if path.is_dir())):
        remove_leftovers(folder)
