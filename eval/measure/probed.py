"""What k-sparse probes have measured: records beside a run's other results, and their means over sets of texts.

A record is of one checkpoint's content and one set's, and stays for good. Of the two baselines, which belong to no run, there
are records beside the runs: the activations themselves (features are dimensions), and a dictionary of random directions.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from residual_saes.shared.files import make_dir
from residual_saes.shared.records import JsonLines, Record
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.sites import Site

ALL = "all"
RESIDUAL, RANDOM = "residual", "random"
NAME = "probes.jsonl"


@dataclass(kw_only=True, frozen=True)
class Probed(Record):
    """AUC on a set's test texts of probes on k features of one dictionary."""

    run: str  # digest; of a baseline RESIDUAL or RANDOM
    site: Site = field(metadata={"key": "layer"})
    snapshot: str
    file: str  # checksum of the checkpoint; of a baseline the cache's digest
    features: int
    dataset: str
    texts: str  # checksum of its texts and labels
    train: int  # texts that the probes were trained on
    test: int
    auc: dict[str, float]  # {k: AUC}; k is a number or "all"

    @property
    def subject(self) -> "Subject":
        return Subject(self.run, self.site, self.snapshot, self.file, self.features)


class Subject(NamedTuple):
    """What was probed: fields of a record."""

    run: str
    site: Site
    snapshot: str
    file: str
    features: int


Known = dict[Subject, dict[str, dict[str, float]]]  # {subject: {checksum of a set: {k: AUC}}}


class Probes:
    """The records of one file."""

    def __init__(self, folder: Path) -> None:
        """Of a run's results, or of the baselines beside the runs."""
        self._file = JsonLines(folder / NAME, Probed)

    def add(self, record: Probed) -> None:
        make_dir(self._file.path.parent)
        self._file.append(record)

    def read(self) -> Known:
        """Raises UserError where a record is damaged."""
        known: Known = {}
        for r in self._file.read():
            known.setdefault(r.subject, {}).setdefault(r.texts, {}).update(r.auc)
        return known


def run_probes(run: Run) -> Probes:
    return Probes(run.path / "results")


def mean_auc(sets: Iterable[dict[str, float]]) -> dict[str, float]:
    """{k: mean AUC over sets}, of those k that all of them have."""
    each = list(sets)
    common = [k for k in (each[0] if each else {}) if all(k in of for of in each)]
    return {k: sum(of[k] for of in each) / len(each) for k in sorted(common, key=lambda k: (k == ALL, k.zfill(9)))}


@dataclass(kw_only=True, frozen=True, slots=True)
class Compared:
    """A dictionary of a site beside the others of it: mean AUC over the sets that all of these have."""

    site: Site
    name: str
    features: int
    sets: int
    auc: dict[str, float]


_NAMES = {RESIDUAL: "dimensions of the activations", RANDOM: "random directions"}


def compared(folder: Path, runs: Sequence[Run], cache: str) -> list[Compared]:
    """Final SAEs of these runs and the baselines of their cache, by site. Raises UserError where a record is damaged."""
    by_site: dict[Site, list[tuple[str, int, dict[str, dict[str, float]]]]] = {}
    for of, sets in Probes(folder).read().items():
        if of.file == cache and of.run in _NAMES:
            by_site.setdefault(of.site, []).append((_NAMES[of.run], of.features, sets))
    for run in runs:
        files = {}
        for snapshot in run.snapshots():
            with contextlib.suppress(Damaged):
                files[snapshot.site, snapshot.label] = Sae.checksum(snapshot.path)
        for of, sets in run_probes(run).read().items():
            if of.run == run.config.digest and of.file == files.get((of.site, of.snapshot)):
                by_site.setdefault(of.site, []).append((run.name, of.features, sets))
    rows = []
    for site, of_site in sorted(by_site.items()):
        common = set.intersection(*(set(sets) for *_, sets in of_site))
        rows += [
            Compared(site=site, name=name, features=n, sets=len(common), auc=mean_auc(sets[t] for t in sorted(common)))
            for name, n, sets in of_site
        ]
    return rows
