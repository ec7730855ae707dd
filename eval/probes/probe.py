"""Probe final SAEs, the activations that they read, and random dictionaries of their size: one pass of the language model over
the labelled texts for all layers, as far as activations fit into memory. What is measured is written as it is made."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from residual_saes.eval.measure.activations import SiteReader
from residual_saes.eval.measure.probed import ALL, RANDOM, RESIDUAL, Known, Probed, Probes, Subject, run_probes
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.probes.classify import auc, by_difference, fitting_quietly
from residual_saes.eval.probes.config import ProbeConfig
from residual_saes.eval.probes.texts import TextSet, read_sets
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.device import announce, fitting
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import harvested_model
from residual_saes.shared.lm import encode_text, load_config, load_tokenizer
from residual_saes.shared.progress import Progress
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site

_CONTEXT = 1024  # tokens of a text, the last ones
_TOGETHER = 1 << 14  # tokens of a forward pass
_ROWS = 1024  # texts that are encoded at once
Encode = Callable[[Tensor, Tensor], Tensor]  # x [n, d] and the mean [d] of training texts → z [n, F]


@dataclass(kw_only=True, frozen=True)
class _Subject:
    """What is probed, where its records go, and what is missing of them: {checksum of a set: ks}."""

    run: str
    site: Site
    file: str
    features: int
    store: Probes
    missing: dict[str, list[str]]
    inputs: tuple[Site, ...]  # that it reads
    load: Callable[[int], Sae] | None = None  # of an SAE


def probe(cache: Cache, runs: Sequence[Run], config: ProbeConfig, baselines: Path, skipped: Skipped) -> None:
    """Measure what is missing. The baselines' records lie in the folder `baselines`. Raises UserError."""
    sets = {each.digest: each for each in read_sets(config.data, config.sets)}
    subjects = [s for s in _subjects(cache, runs, config, list(sets), baselines, skipped) if s.missing]
    wanted = [text_set for digest, text_set in sets.items() if any(digest in s.missing for s in subjects)]
    if not wanted:
        return
    model = harvested_model(cache, config.model)
    announce(config.device)
    sites = sorted({site for s in subjects for site in s.inputs})
    reader = TextReader(str(model.folder), cache.spec, sites, config.device)
    size = cache.spec.d_model * len(sites) * (4 if cache.spec.precision == "fp32" else 2)
    done, total = 0, sum(len(s.missing) for s in subjects)
    for group in fitting(wanted, lambda each: len(each.texts) * size, torch.device("cpu")):
        activations = reader.read(group)
        with Progress("probing", total, "sets × SAEs", start=done) as progress, fitting_quietly():
            for subject in subjects:
                due = [each for each in group if each.digest in subject.missing]
                done += len(due)
                with skipped.leaving_out():
                    encode = _encoder(subject, cache.spec.d_model, config.device)
                    x = [torch.cat([activations[each.name, site] for site in subject.inputs], dim=1) for each in due]
                    for record in _probed(subject, due, x, encode):
                        subject.store.add(record)
                        progress.advance(1, f"layer {subject.site} {record.dataset}")
                progress.update(done)


def _subjects(
    cache: Cache, runs: Sequence[Run], config: ProbeConfig, sets: list[str], baselines: Path, skipped: Skipped
) -> Iterator[_Subject]:
    """Final SAEs of these layers, by run, and the baselines that belong beside them."""
    beside = Probes(baselines)
    known, shapes = beside.read(), set[tuple[str, Site, int]]()

    def subject(known: Known, run: str, site: Site, file: str, features: int, **of: Any) -> _Subject:
        have = known.get(Subject(run, site, FINAL, file, features), {})
        missing = {digest: left for digest in sets if (left := [k for k in config.k if k not in have.get(digest, {})])}
        return _Subject(run=run, site=site, file=file, features=features, missing=missing, **of)

    for run in runs:
        with skipped.leaving_out():
            own = run_probes(run)
            of_run, features = own.read(), round(run.config.train.expansion * cache.spec.d_model)
            for snapshot in run.snapshots():
                if snapshot.label == FINAL and (config.layers is None or snapshot.site in config.layers):
                    with skipped.leaving_out():
                        digest, file, site = run.config.digest, Sae.checksum(snapshot.path), snapshot.site
                        of = {"inputs": run.config.target_at(site).inputs, "load": partial(run.load, snapshot)}
                        yield subject(of_run, digest, site, file, features, store=own, **of)
                        shapes |= {(RESIDUAL, site, cache.spec.d_model), (RANDOM, site, features)}
    for name, site, features in sorted(shapes, reverse=True):
        yield subject(known, name, site, cache.digest, features, store=beside, inputs=(site,))


def _encoder(subject: _Subject, d_model: int, device: torch.device) -> Encode:
    """Raises UserError for an SAE that cannot be read."""
    if subject.run == RESIDUAL:
        return lambda x, _mean: x
    if subject.run == RANDOM:
        draw = np.random.default_rng([subject.site.layer, subject.features])
        rows = torch.from_numpy(draw.standard_normal((subject.features, d_model), np.float32))
        rows = torch.nn.functional.normalize(rows).to(device)
        return lambda x, mean: torch.relu((x - mean).to(device) @ rows.t()).cpu()
    assert subject.load is not None
    sae = subject.load(d_model).to(device)
    return lambda x, _mean: sae.encode(x.to(device)).cpu()


def _probed(subject: _Subject, sets: list[TextSet], activations: list[Tensor], encode: Encode) -> Iterator[Probed]:
    """A record of each set, a set a thread. Raises UserError where z is no number."""
    pool = ThreadPoolExecutor(torch.get_num_threads())
    try:
        yield from pool.map(lambda each, x: _record(subject, each, x, encode), sets, activations)
    finally:
        pool.shutdown(cancel_futures=True)


def _record(subject: _Subject, texts: TextSet, x: Tensor, encode: Encode) -> Probed:
    train, test = x[torch.from_numpy(texts.train)].float(), x[torch.from_numpy(texts.test)].float()
    mean, labels = train.mean(0), texts.labels[texts.train]
    z = encode(train, mean)
    if not z.isfinite().all():
        raise UserError(f"layer {subject.site} of {subject.run} gives no numbers on {texts.name}: train it again")
    order = by_difference(z, torch.from_numpy(labels))
    active = z.any(0)  # the others' weights stay 0
    order = order[active[order] | (torch.arange(len(order)) < 1)]
    ks = {k: len(order) if k == ALL else int(k) for k in subject.missing[texts.digest]}
    order = order[: max(ks.values())]
    z, of_test = z[:, order], torch.cat([encode(rows, mean)[:, order] for rows in torch.split(test, _ROWS)])
    return Probed(
        run=subject.run, site=subject.site, snapshot=FINAL, file=subject.file, features=subject.features,
        dataset=texts.name, texts=texts.digest, train=len(texts.train), test=len(texts.test),
        auc={k: auc(z[:, :n], labels, of_test[:, :n], texts.labels[texts.test], sparse=k != ALL) for k, n in ks.items()},
    )  # fmt: skip


class TextReader:
    """The language model's activations on the last token of texts."""

    def __init__(self, folder: str, spec: CacheSpec, sites: list[Site], device: torch.device) -> None:
        """Raises UserError."""
        self._spec, self._sites = spec, sites
        self._tokenizer, self._model = load_tokenizer(folder, None), SiteReader(folder, spec, sites, device)
        positions = getattr(load_config(folder, None), "max_position_embeddings", None) or _CONTEXT
        self._longest = min(_CONTEXT, positions)

    def read(self, sets: list[TextSet]) -> dict[tuple[str, Site], Tensor]:
        """{(name of a set, site): activations [texts, d] in the model's precision}."""
        activations: dict[tuple[str, Site], Tensor] = {}
        with Progress("running the language model", sum(len(each.texts) for each in sets), "texts") as progress:
            for each in sets:
                activations |= {(each.name, site): x for site, x in self._read(each.texts, progress).items()}
        return activations

    def _read(self, texts: list[str], progress: Progress) -> dict[Site, Tensor]:
        tokens = [encode_text(self._tokenizer, self._spec, text) for text in texts]
        tokens = [[first, *rest[-(self._longest - 1) :]] for first, *rest in tokens]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        rows: dict[Site, list[Tensor]] = {site: [] for site in self._sites}
        while order_left := order[sum(map(len, rows[self._sites[0]])) :]:
            some = order_left[: max(1, _TOGETHER // len(tokens[order_left[-1]]))]
            batch = pad_sequence([torch.tensor(tokens[i]) for i in some], batch_first=True)
            last = torch.tensor([len(tokens[i]) - 1 for i in some])
            for site, x in self._model.read(batch).items():
                rows[site].append(x[torch.arange(len(some)), last.to(x.device)].cpu())
            progress.advance(len(some))
        place = torch.tensor(order).argsort()
        return {site: torch.cat(x)[place] for site, x in rows.items()}
