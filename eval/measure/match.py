"""How many of one SAE's features another has: two seeds of a setting, or a snapshot and the SAE that it became.

For each decoder row of the one, the largest cosine to a decoder row of the other: its mean (mean maximum cosine similarity,
Sharkey et al., 2022), and the share above 0.7 (the threshold of Paulo & Belrose, arXiv:2501.16615, who pair features one to
one; here two may find the same partner). Directions of features that never fire are what they were drawn as, so where an
evaluation has left densities only features that are alive are looked for and among.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from residual_saes.eval.measure.features import measured_features
from residual_saes.eval.measure.metrics import finite, largest_cosine, unit
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, publish_json
from residual_saes.shared.records import Record
from residual_saes.shared.runs.run import FINAL, Run, Snapshot
from residual_saes.shared.seal import SEAL, seal
from residual_saes.shared.sites import Site

MATCHED_ABOVE = 0.7  # cosine
_Sae = tuple[Run, Snapshot]


@dataclass(kw_only=True, frozen=True, slots=True)
class Match(Record):
    """One SAE's features among another's."""

    site: Site = field(metadata={"key": "layer"})
    snapshot: str
    among: str  # which SAE the features were looked for in
    alive_only: bool  # of both; else densities of one were not there
    features: int  # that were looked for
    mean_max_cosine: float | None  # mean over them of the largest cosine to a decoder row of the other
    matched: float | None  # share of them for which it is above 0.7


def match_to_final(run: Run, alive_above: float, device: torch.device) -> list[Match]:
    """Each earlier snapshot's features among those of the layer's final SAE. Raises UserError if no layer has both."""
    finals = {s.site: s for s in run.snapshots() if s.label == FINAL}
    pairs = [(s, finals[s.site]) for s in run.snapshots() if s.label != FINAL and s.site in finals]
    if not pairs:
        raise UserError(f"{run.path} has no layer with an earlier snapshot and a final one: train it to its end first")
    matches = [_match((run, earlier), (run, final), FINAL, alive_above, device) for earlier, final in pairs]
    return _write(run, "match_final", matches)


def match_runs(run: Run, other: Run, alive_above: float, device: torch.device) -> list[Match]:
    """The features of every snapshot among those of the other run's snapshot of the same layer and name. Raises UserError if
    there is none."""
    others = {(s.site, s.label): s for s in other.snapshots()}
    pairs = [(s, others[s.site, s.label]) for s in run.snapshots() if (s.site, s.label) in others]
    if not pairs:
        raise UserError(f"{run.path} and {other.path} have no snapshot of the same layer and name: there is nothing to match")
    name = f"{other.name}-seed{other.config.train.seed}"
    return _write(run, f"match_{name}", [_match((run, a), (other, b), name, alive_above, device) for a, b in pairs])


def _match(one: _Sae, other: _Sae, among: str, alive_above: float, device: torch.device) -> Match:
    (rows, alive), (other_rows, other_alive) = (_decoder(*side, alive_above, device) for side in (one, other))
    if rows.shape[1] != other_rows.shape[1]:
        sizes = f"{one[1].path} is over {rows.shape[1]} dimensions, {other[1].path} over {other_rows.shape[1]}"
        raise UserError(f"{sizes}: match SAEs of one language model")
    if alive_only := alive is not None and other_alive is not None:
        rows, other_rows = rows[alive], other_rows[other_alive]
    mean, matched = match(rows, other_rows)
    return Match(
        site=one[1].site, snapshot=one[1].label, among=among, alive_only=alive_only, features=len(rows),
        mean_max_cosine=mean, matched=matched,
    )  # fmt: skip


def match(rows: Tensor, others: Tensor) -> tuple[float | None, float | None]:
    """Mean over decoder rows [n, d] of the largest cosine to other rows [m, d], and the share above 0.7; of any norm."""
    if not len(rows) or not len(others):
        return None, None
    best = largest_cosine(unit(rows), unit(others)).double()
    return finite(float(best.mean())), float((best > MATCHED_ABOVE).double().mean())


def _decoder(run: Run, snapshot: Snapshot, alive_above: float, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Decoder rows [F, d], and which of them are alive [F] if that was measured."""
    sae = run.load(snapshot)
    measured = measured_features(run, snapshot.site, snapshot.label, sae.stats[SEAL])
    return sae.w_dec.to(device), None if measured is None else (measured[0].density > alive_above).to(device)


def _write(run: Run, name: str, matches: list[Match]) -> list[Match]:
    run.remove_leftovers()
    publish_json(make_dir(run.path / "results") / f"{name}.json", [seal(m.to_dict()) for m in matches])
    return matches


def match_table(matches: list[Match]) -> str:
    """For a terminal."""
    lines = [f"{'layer':>5}  {'snapshot':>10}  {'features':>8}  {'mean max cosine':>15}  {'above 0.7':>9}  among"]
    for m in matches:
        mean, share = (
            ("-" if v is None else form.format(v)) for v, form in ((m.mean_max_cosine, "{:.4f}"), (m.matched, "{:.2%}"))
        )
        note = "" if m.alive_only else " (dead features included: not evaluated yet)"
        lines.append(f"{m.site!s:>5}  {m.snapshot:>10}  {m.features:>8}  {mean:>15}  {share:>9}  {m.among}{note}")
    return "\n".join(lines)
