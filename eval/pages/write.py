"""Feature pages: every feature of every SAE in one static page, which a double click opens (files.py)."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.pages import elsewhere, features, files
from residual_saes.eval.pages.spell import spell
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import option
from residual_saes.shared.device import announce, fitting
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, refuse_links
from residual_saes.shared.identity import harvested_model, tokenizer_hash
from residual_saes.shared.lm import Unembedding, load_model, load_tokenizer
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.run import FINAL, Run, Snapshot
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.runs.target import Target
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.units import parse_count

_TEXT_CHUNK = 1 << 16  # tokens in a file, or one context
_IN_CHUNKS = (
    "bins", "bin_width", "row", "similar", "similar_cosine", "together", "together_jaccard", "together_count",
    "promoted_logit", "suppressed_logit", "logit_bins", "layer_share",
)  # fmt: skip


@dataclass(kw_only=True, frozen=True, slots=True)
class PagesConfig:
    """Which pages, and from how much text."""

    device: torch.device
    out: Path
    tokens: int = option("Held-out tokens to look at, in whole contexts [default: all].", type=parse_count)
    snapshot: str = option("Which of each layer's snapshots.", FINAL)
    layers: tuple[Site, ...] | None = option("Such as 0-5,12 [default: all there are].", None, type=parse_sites)
    model: str | None = None  # where the language model lies, if not where the cache says


@dataclass(kw_only=True, frozen=True, slots=True)
class _Job:
    """One SAE to look at."""

    run: Run
    snapshot: Snapshot
    identity: files.Facts  # what its pages are of

    @property
    def target(self) -> Target:
        return self.run.config.target_at(self.snapshot.site)

    def folder(self, out: Path) -> Path:
        name = f"layer{self.snapshot.site.key}_{self.snapshot.label}.{files.digest(self.identity)}"
        return out / self.run.name / name

    def made(self, out: Path) -> Path | None:
        """Whole pages of the same checkpoint from as much text or more."""
        for folder in files.siblings(self.folder(out)):
            facts = files.read_facts(folder)
            if facts is None or facts["tokens"] < self.identity["tokens"]:
                continue
            if self.identity.items() <= (facts | {"tokens": self.identity["tokens"]}).items() and files.whole_facts(folder):
                return folder
        return None

    def shown(self, folder: Path) -> elsewhere.Shown:
        return elsewhere.Shown(run=self.run.name, site=self.snapshot.site, folder=folder, checkpoint=self.snapshot.path)

    def open(self, cache: Cache, device: torch.device) -> Sae:
        """Raises UserError."""
        sae = self.run.load(self.snapshot, cache.spec.d_model)
        if not all(bool(tensor.isfinite().all()) for tensor in sae.tensors().values()):
            raise UserError(f"{self.snapshot.path} holds values that are not finite; name an earlier --snapshot")
        return sae.to(device)


def write_pages(cache: Cache, runs: Sequence[Run], config: PagesConfig, skipped: Skipped) -> Path:
    """Write pages of the runs' SAEs that have none yet, and the page that shows them; an SAE that cannot be shown is left out.
    Raises UserError for what concerns all SAEs, or if there is none to show."""
    spec = cache.spec
    if config.tokens < spec.context:
        raise UserError(f"--tokens {config.tokens} is less than one context of {spec.context}: raise it")
    sequences = min(config.tokens // spec.context, spec.holdout_blocks * spec.block_sequences)
    if sequences == 0:
        raise UserError(f"{cache.path} holds out no context of {spec.context} tokens to look at: harvest with --holdout-tokens")
    files.sweep(make_dir(config.out))
    jobs = _jobs(cache, runs, sequences * spec.context, config, skipped)
    made = {job.folder(config.out): job.made(config.out) for job in jobs}
    current = {folder for folder in made.values() if folder}
    todo = [job for job in jobs if made[job.folder(config.out)] is None]
    model = harvested_model(cache, config.model)
    text, vocabulary = _write_text(cache, load_tokenizer(str(model.folder), None), config.out)
    if todo:
        to_logits = Unembedding(load_model(str(model.folder), None, "fp32", head=True)).to(config.device)
        announce(config.device)
        layers = itertools.groupby(todo, lambda job: job.target)
        groups = (fitting(jobs, lambda job: _size(job, spec.d_model), config.device) for _, jobs in layers)
        for group in itertools.chain.from_iterable(groups):
            with skipped.leaving_out():
                looked = _look(cache, group, sequences, config.device, skipped)
                with Progress(f"layer {group[0].snapshot.site}, neighbours and words", len(looked), "SAEs") as progress:
                    for job, tally in looked:
                        columns, together = tally.columns(to_logits, vocabulary)
                        _write_sae(cache, job, tally, columns, {"together_tokens": together, "text": text}, config.out)
                        current.add(job.folder(config.out))
                        files.write_index(config.out, current)
                        progress.advance(1, job.run.name)
    of_jobs = ((job, made[job.folder(config.out)] or job.folder(config.out)) for job in jobs)
    shown = [job.shown(folder) for job, folder in of_jobs if folder in current]
    with skipped.leaving_out():
        elsewhere.write_nearest(shown, config.device)
    gone = [old for folder in current for old in files.siblings(folder) if old not in current]
    elsewhere.forget(config.out, gone)
    page = files.write_index(config.out, current)
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return page


def _jobs(cache: Cache, runs: Sequence[Run], tokens: int, config: PagesConfig, skipped: Skipped) -> list[_Job]:
    """By site, then by run: a site is read once for all."""
    jobs: list[_Job] = []
    gone: set[Site] = set()
    for run in runs:
        with skipped.leaving_out():
            refuse_links(config.out / run.name)
            of_run = {"format": files.FORMAT, "cache": cache.digest, "run": run.config.digest}
            wanted = [s for s in run.snapshots() if s.label == config.snapshot and s.site in (config.layers or [s.site])]
            for s in wanted:
                with skipped.leaving_out():
                    absent = set(run.config.target_at(s.site).inputs) - set(cache.sites)
                    gone |= absent
                    if not absent:
                        facts = {"layer": s.site.json, "snapshot": s.label, "tokens": tokens, "file": Sae.checksum(s.path)}
                        jobs.append(_Job(run=run, snapshot=s, identity=of_run | facts))
    if gone:
        say(f"layers {format_sites(gone)} are not in {cache.path}: pages made of them before are kept", err=True)
    if not jobs and not gone:
        raise UserError(f"there is no {config.snapshot!r} snapshot of these layers to look at; name others")
    return sorted(jobs, key=lambda job: (job.snapshot.site, job.target.inputs))


def _size(job: _Job, d_model: int) -> int:
    """Bytes of an SAE's weights, which are 8 d a feature, and of what is kept of it."""
    return int(job.snapshot.path.stat().st_size * (1 + features.kept_bytes() / (8 * d_model)))


def _look(
    cache: Cache, group: list[_Job], sequences: int, device: torch.device, skipped: Skipped
) -> list[tuple[_Job, features.Tally]]:
    """Read the site's activations once for all of these SAEs. Raises UserError for held-out blocks that are damaged."""
    opened = []
    for job in group:
        with skipped.leaving_out():
            opened.append((job, job.open(cache, device)))
    if not opened:
        return []
    spec, target = cache.spec, group[0].target
    tokens = sequences * spec.context
    with Progress(f"layer {target}", tokens, "tokens") as progress:
        blocks = _shown(features.heldout_text(cache, target.inputs, sequences), progress)
        tallies = features.look(blocks, [sae for _, sae in opened], spec.context, tokens)
    return [(job, tally) for (job, _), tally in zip(opened, tallies, strict=True)]


def _shown(blocks: Iterator[features.Block], progress: Progress) -> Iterator[features.Block]:
    for first, block in blocks:
        yield first, block
        progress.update(first + len(block))


# --- what is written ---


def _write_sae(cache: Cache, job: _Job, tally: features.Tally, columns: files.Columns, facts: files.Facts, out: Path) -> None:
    """Write the pages of one SAE."""
    folder, stats, first = job.folder(out), tally.sae.stats, cache.spec.train_tokens
    name = f"{job.run.name}/{folder.name}"
    facts = job.identity | {
        "name": job.run.name,
        "features": len(columns["count"]),
        "first_row": first,
        "context": cache.spec.context,
        "trained_tokens": stats["tokens"],
        "lambda": stats["lambda"],
        **job.target.fields(),
        "of": str(job.target),
        **facts,
    }
    absolute = columns["row"] + first * (columns["row"] >= 0)

    def contents() -> Iterator[tuple[str, bytes]]:
        yield "columns.safetensors", save(columns | {"row": absolute})
        yield "index.js", files.columns_script(f"{name}/index", _index(cache, columns))
        for number, chunk in enumerate(_chunks(columns)):
            yield f"{number:03d}.js", files.columns_script(f"{name}/{number:03d}", chunk)

    files.publish_pages(folder, facts, contents())


def _index(cache: Cache, columns: files.Columns) -> files.Columns:
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


def _chunks(columns: files.Columns) -> Iterator[files.Columns]:
    """All else that the page shows of a feature, CHUNK features at a time."""
    for first in range(0, len(columns["count"]), files.CHUNK):
        chunk = {name: columns[name][first : first + files.CHUNK] for name in _IN_CHUNKS if name in columns}
        start = columns["near_start"][first * files.CONTEXTS : (first + len(chunk["row"])) * files.CONTEXTS + 1]
        near = slice(int(start[0]), int(start[-1]))
        yield chunk | {
            "row": chunk["row"].int(),
            "near_start": start - start[0],
            "near_at": columns["near_at"][near],
            "near_value": columns["near_value"][near],
        }


def _write_text(cache: Cache, tokenizer: PreTrainedTokenizerBase, out: Path) -> tuple[str, int]:
    """Write the held-out tokens and the text of each token; (name of their folder, how many tokens the tokeniser knows).
    Raises UserError for another tokeniser than the cache's."""
    spec = cache.spec
    if tokenizer_hash(tokenizer) != spec.tokenizer_sha256:
        raise UserError(
            f"the tokenizer beside the model is not the one that {cache.path} was made with: name a folder with both by --model"
        )
    known = min(len(tokenizer), spec.vocab_size)
    identity = {"format": files.FORMAT, "cache": cache.digest}
    folder = out / f"text.{files.digest(identity)}"
    if files.whole_facts(folder):
        return folder.name, known
    size, first = max(1, _TEXT_CHUNK // spec.context), spec.train_blocks * spec.block_sequences

    def contents() -> Iterator[tuple[str, bytes]]:
        yield "vocabulary.js", files.script(f"{folder.name}/vocabulary", spell(tokenizer, known))
        for number, start in enumerate(range(first, spec.sequences, size)):
            tokens = cache.read_tokens(start, min(start + size, spec.sequences)).reshape(-1)
            dtype = np.uint16 if spec.vocab_size <= 1 << 16 else np.int32
            columns = {"tokens": torch.from_numpy(tokens.astype(dtype))}
            yield f"{number:03d}.js", files.columns_script(f"{folder.name}/{number:03d}", columns)

    files.publish_pages(folder, identity | {"context": spec.context, "chunk": size * spec.context}, contents())
    return folder.name, known
