"""The results of one run: results/metrics.json, and the same as .csv.

A result is of one checkpoint's content (its checksum) under one amount of held-out text, and stays for good: activations and
checkpoints it was measured on may be gone. The file maps a name to each: `layer00_50M` is of the checkpoint that lies there, on
the most text; a result of the same snapshot on other text, or of an earlier file, has both after its name.
"""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Iterable
from typing import Any

from residual_saes.eval.measure.features import features_path
from residual_saes.eval.measure.probed import Known, mean_auc, run_probes
from residual_saes.eval.measure.result import Basis, Result
from residual_saes.eval.measure.runs import Skipped
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import locked, publish_file, sync_dir
from residual_saes.shared.records import JsonRecords
from residual_saes.shared.runs.run import Run, Snapshot
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.runs.target import Target
from residual_saes.shared.sites import Site

_NO_COLUMNS = ("run", "file")  # of the .csv


class Results:
    """What has been measured of the snapshots of one run."""

    def __init__(self, run: Run) -> None:
        """Raises UserError for a file that is not as it was written; it is left as it is."""
        self.run = run
        self._file = JsonRecords(run.path / "results" / "metrics.json", Result, _names)
        self._labels, self._digest = run.labels, run.config.digest
        self.files: dict[tuple[Site, str], str] = {}  # {(site, snapshot): checksum of the checkpoint that lies there}
        self._results = self._own(self._file.read())

    def _own(self, results: list[Result]) -> list[Result]:
        if any(r.run != self._digest or r.snapshot not in self._labels for r in results):
            raise UserError(f"{self._file.path} is of another run: put it back where it belongs, or delete it")
        return results

    def missing(self, basis: Basis, skipped: Skipped) -> list[Snapshot]:
        """The checkpoints that have no result on this basis."""
        known, missing = {_identity(r) for r in self._results}, []
        for snapshot in self.run.snapshots():
            with skipped.leaving_out():
                keys = self._look(snapshot)
                if not all((*k, self.files[k], *basis.basis) in known and features_path(self.run, *k).exists() for k in keys):
                    missing.append(snapshot)
        return missing

    def target(self, snapshot: Snapshot) -> Target:
        """What it reads and writes."""
        return self.run.config.target_at(snapshot.site)

    def _look(self, snapshot: Snapshot) -> list[tuple[Site, str]]:
        """Notes the checksum of a checkpoint for each site that it writes. Raises UserError if it cannot be read."""
        keys = [(site, snapshot.label) for site in self.target(snapshot).outputs]
        self.files |= dict.fromkeys(keys, "")  # if it cannot be
        self.files |= dict.fromkeys(keys, Sae.checksum(snapshot.path))
        return keys

    def add(self, result: Result) -> None:
        """Add it to those on disk by now: another evaluation may have added its own."""
        folder = self._file.path.parent
        if not folder.exists():
            folder.mkdir(exist_ok=True)
            sync_dir(folder.parent)
        self._results = self._file.update(
            lambda stored: self._ordered({_identity(r): r for r in [*self._own(stored), result]}.values())
        )

    def tabulate(self) -> None:
        """Write the .csv, which has the same results whatever became of an earlier one."""
        path = self._file.path.with_suffix(".csv")
        if not self._file.path.exists():  # nothing was measured, or could not be written
            return
        with locked(path.parent):
            self._results = self._ordered(self._own(self._file.read()))
            text = _csv([r.to_dict() for r in self._results]).encode()
            if not path.exists() or path.read_bytes() != text:
                publish_file(path, text)

    def _ordered(self, results: Iterable[Result]) -> list[Result]:
        """By site and age; of one snapshot the result of the file that lies there first, and then the one on the most text."""

        def place(r: Result) -> tuple[Any, ...]:
            other = r.file != self.files.get((r.site, r.snapshot), r.file)
            return r.site, self._labels.index(r.snapshot), other, -r.eval_tokens, -r.ce_tokens, r.file, r.basis[2:]

        return sorted(results, key=place)

    def view(self, basis: Basis | None) -> list[Result]:
        """One result for each snapshot: on this basis where there is one, else the first of those in order."""
        chosen: dict[tuple[Site, str], Result] = {}
        for r in self._ordered(self._results):
            first = chosen.setdefault((r.site, r.snapshot), r)
            if basis and r.file == first.file and r.basis == basis.basis:
                chosen[r.site, r.snapshot] = r
        probed = run_probes(self.run).read()
        return [self._with_probes(r, probed) for r in chosen.values()]

    def _with_probes(self, r: Result, known: Known) -> Result:
        sets = next((sets for of, sets in known.items() if of[:4] == (r.run, r.site, r.snapshot, r.file)), {})
        of = mean_auc(sets.values()).get
        return dataclasses.replace(r, probe_sets=len(sets), probe_1=of("1"), probe_5=of("5"), probe_16=of("16"))

    def present(self, *ignored: type[Exception]) -> list[Result]:
        """As `view`, of checkpoints that lie there alone. Raises UserError for one that cannot be opened, unless `ignored`."""
        for snapshot in self.run.snapshots():
            with contextlib.suppress(*ignored):
                self._look(snapshot)
        return [r for r in self.view(None) if self.files.get((r.site, r.snapshot)) == r.file]


def stored_results(run: Run) -> list[Result]:
    """What has been measured of the checkpoints that lie there, one result for each by site and age: the one on the most text.
    Raises UserError for results or a run that are damaged."""
    return Results(run).present()


def measured(run: Run) -> dict[Site, set[str]]:
    """{site: the labels of those of its snapshots that can be opened and were measured, on any text}. Raises UserError for
    results or a run that are damaged."""
    labels: dict[Site, set[str]] = {}
    for r in Results(run).present(Damaged):
        labels.setdefault(r.site, set()).add(r.snapshot)
    return labels


def _identity(r: Result) -> tuple[Any, ...]:
    return r.site, r.snapshot, r.file, *r.basis


def _names(results: list[Result]) -> list[str]:
    named: dict[str, None] = {}
    for r in results:
        name = f"layer{r.site.key}_{r.snapshot}"
        named[f"{name}@{'+'.join(map(str, r.basis))}#{r.file}" if name in named else name] = None
    return list(named)


def _csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = [name for name in records[0] if name not in _NO_COLUMNS]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
