"""What is measured of one SAE, every number beside its definition.

x [d] is a held-out activation (of what a transcoder writes), x̂ its reconstruction, r = x̂ − x, z [F] the features, ⟨·⟩ the mean
over tokens, and f_i = ⟨z_i > 0⟩ the density of a feature. "SAEBench" is its core evaluation (Karvonen et al., arXiv:2503.09532;
code at version 0.6.0), whose names are used where it has one; it leaves out special tokens, and here every held-out token
counts. z, x̂ and the language model are float32 or the precision of the harvest; sums over tokens are float64. What is no number
(0/0, or not finite) is None. A crosscoder has a result for each layer that it writes.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import click

from residual_saes.eval.measure.predicted import ALIVE_ABOVE
from residual_saes.shared.cli import Number, option
from residual_saes.shared.records import Record
from residual_saes.shared.runs.run import FINAL
from residual_saes.shared.sites import Site
from residual_saes.shared.typed import read
from residual_saes.shared.units import parse_count

DEAD_AT = 1e-5  # density
Value = float | None


@dataclass(kw_only=True, frozen=True)
class Subject:
    """The SAE that was measured."""

    run: str  # digest
    site: Site = field(metadata={"key": "layer"})
    snapshot: str  # label
    trained_tokens: int | None  # None: not known
    l1_weight: Value = field(default=None, metadata={"key": "lambda"})


@dataclass(kw_only=True, frozen=True)
class Sparsity:
    """How often features fire."""

    tokens: int  # activations that were counted
    l0: Value = None  # ⟨number of z_i > 0⟩; SAEBench
    l1: Value = None  # ⟨Σ z_i⟩; SAEBench
    dead_share: Value = None  # share of features with f_i ≤ 1e-5 (or --dead-at; 0 is "never fired")
    frac_alive: Value = None  # share of features that fired at all; SAEBench
    freq_over_1_percent: Value = None  # share of features with f_i > 0.01; SAEBench
    freq_over_10_percent: Value = None
    normalized_freq_over_1_percent: Value = None  # share of Σ f_i that is theirs; SAEBench
    normalized_freq_over_10_percent: Value = None


@dataclass(kw_only=True, frozen=True)
class Reconstruction:
    """How near x̂ comes to x. P projects away from the three largest principal directions: a few directions and first positions
    hold most of a residual stream's variance (Sun et al., arXiv:2402.17762), and both flatter FVU."""

    mse: Value = None  # ⟨‖r‖²⟩ / d. SAEBench's own is ⟨‖r‖²⟩ over the number of tokens in a batch
    fvu: Value = None  # Σ‖r‖² / Σ‖x − ⟨x⟩‖²
    fvu_uncentred: Value = None  # Σ‖r‖² / Σ‖x‖², about zero, as some write it: smaller where x has a mean
    fvu_without_first: Value = None  # FVU over all positions of a context but the first, about their own mean
    fvu_without_top3: Value = None  # Σ‖Pr‖² / Σ‖P(x − ⟨x⟩)‖²
    top3_variance: Value = None  # share of variance in those three directions
    explained_variance: Value = None  # 1 − FVU. SAEBench's means this, and takes ⟨x²⟩ where ⟨x⟩ belongs
    explained_variance_legacy: Value = None  # ⟨1 − ‖r‖² / ‖x − m‖²⟩, m the mean of a batch, here a block; SAEBench's earlier
    cosine: Value = None  # ⟨cos(x̂, x)⟩
    cossim: Value = None  # the same; SAEBench
    l2_norm_in: Value = None  # ⟨‖x‖⟩; SAEBench
    l2_norm_out: Value = None  # ⟨‖x̂‖⟩; SAEBench
    l2_ratio: Value = None  # ⟨‖x̂‖ / ‖x‖⟩; SAEBench
    relative_reconstruction_bias: Value = None  # ⟨‖x̂‖²⟩ / ⟨x·x̂⟩: Rajamanoharan et al., arXiv:2404.16014, eq. 10; SAEBench


@dataclass(kw_only=True, frozen=True)
class Weights:
    """How alike the rows of the weights are; on a CPU over 4,096 rows i where there are more than twice as many."""

    max_decoder_cosine_sim: Value = None  # largest cosine of two decoder rows
    average_max_decoder_cosine_sim: Value = None  # mean over i of the largest cosine of row i to another; SAEBench
    average_max_encoder_cosine_sim: Value = None  # the same of encoder rows; SAEBench
    average_encoder_decoder_cosine_sim: Value = None  # mean over i of cos(encoder row i, decoder row i); SAEBench: by feature
    average_max_encoder_decoder_cosine_sim: Value = None  # mean over i of the largest cosine of encoder row i to a decoder row


@dataclass(kw_only=True, frozen=True)
class Predicted:
    """Predicted loss floors and what they are made from: see predicted.py."""

    alive: int | None = None  # features with f_i > 1e-5 (or --alive-above): F of the prediction
    alpha: Value = None
    capacity: Value = None
    critical_width: Value = None
    floors: Mapping[int, Value] = field(default_factory=dict)  # {student width: L*}; "floor_<width>" in JSON


@dataclass(kw_only=True, frozen=True)
class Truth:
    """How features stand to the true ones, where these are known (truth.py): means over all F, dead ones counted as 0."""

    f1: Value = None  # 2 · precision · recall / (precision + recall) of each feature
    precision: Value = None  # of the rows in which it fires the share in which the true feature that it stands for does
    recall: Value = None  # of the rows in which that fires the share in which it does
    mcc: Value = None  # mean |cosine| of decoder rows and true directions, matched one to one as well as can be
    uniqueness: Value = None  # number of true features that any stands for, over F
    true_l0: Value = None  # mean number of true features that fire


@dataclass(kw_only=True, frozen=True)
class Layers:
    """Of one of the layers that a crosscoder writes, over the features that fired: p is a layer's share of a feature's squared
    decoder norm, where the rows of each layer are divided by its scale (Lindsey et al., 2024, take norms)."""

    decoder_share: Value = None  # mean p of this layer
    largest_here: Value = None  # share of features whose largest p is this layer's
    layers_spanned: Value = (
        None  # mean of 1 / Σ p² over these features: 1 for one layer alone, and as many as there are for all
    )


@dataclass(kw_only=True, frozen=True)
class Probing:
    """Mean AUC of probes over sets of labelled texts; kept in records of its own (probed.py), not in these."""

    probe_sets: int = 0
    probe_1: Value = None  # of probes on one feature
    probe_5: Value = None
    probe_16: Value = None


@dataclass(kw_only=True, frozen=True)
class Metrics(Layers, Truth, Predicted, Weights, Reconstruction, Sparsity):
    """All but the losses. Dataclasses take the fields of their bases from the last base to the first."""


@dataclass(kw_only=True, frozen=True)
class Losses:
    """From the language model with the layer's output replaced by x̂ (splice.py), in nats a token."""

    ce: Value = None  # cross-entropy of the model as it is
    ce_spliced: Value = None
    ce_zero: Value = None  # with zeros in place of the output
    ce_mean_ablation: Value = None  # with ⟨x⟩ in place of the output
    ce_recovered: Value = None  # (ablated − spliced) / (ablated − ce); ablated is ce_zero, or with --ablation mean the other
    ce_loss_without_sae: Value = None  # ce; SAEBench
    ce_loss_with_sae: Value = None  # ce_spliced; SAEBench
    ce_loss_with_ablation: Value = None  # ce_zero; SAEBench
    ce_loss_score: Value = None  # ce_recovered, always against zeros; SAEBench
    kl_div_with_sae: Value = None  # KL(model ‖ spliced) over all positions; SAEBench
    kl_div_with_ablation: Value = None  # KL(model ‖ with zeros); SAEBench
    kl_div_score: Value = None  # 1 − kl_div_with_sae / kl_div_with_ablation; SAEBench


@dataclass(kw_only=True, frozen=True)
class Basis:
    """The amount of held-out text, and the definitions: what another measurement must agree in to be the same."""

    eval_tokens: int = option("Held-out activations to measure reconstruction on [default: all].", type=parse_count)
    ce_tokens: int = option("Held-out tokens to measure the language model's loss on.", type=parse_count)
    dead_at: float = option("Dead: density up to this.", DEAD_AT, type=Number(0, 1))
    alive_above: float = option("Alive, for floors: density above.", ALIVE_ABOVE, type=Number(0, 1))
    ablation: str = option("CE recovered is against this.", "zero", type=click.Choice(["zero", "mean"]))

    @property
    def basis(self) -> tuple[int, int, float, float, str]:
        return self.eval_tokens, self.ce_tokens, self.dead_at, self.alive_above, self.ablation


@dataclass(kw_only=True, frozen=True)
class Result(Probing, Basis, Losses, Metrics, Subject, Record):
    """Everything that was measured of one SAE: a record of results/metrics.json, whose order of keys is that of the fields."""

    file: str  # checksum of the checkpoint

    @property
    def final(self) -> bool:
        return self.snapshot == FINAL

    def values(self) -> dict[str, Any]:
        floors = {f"floor_{width}": floor for width, floor in self.floors.items()}
        known = {Truth: self.f1, Layers: self.decoder_share, Probing: None}
        unknown = {f.name for of, value in known.items() if value is None for f in dataclasses.fields(of)}
        values: dict[str, Any] = {}
        for key, value in super().values().items():
            values |= floors if key == "floors" else {key: value} if key not in unknown else {}
        return values

    @classmethod
    def from_dict(cls, stored: dict[str, Any], name: str = "") -> Self:
        floors = read(dict[int, Value], {k.removeprefix("floor_"): stored[k] for k in stored if k.startswith("floor_")})
        return dataclasses.replace(super().from_dict(stored, name), floors=floors)


def latest(results: Iterable[Result]) -> list[Result]:
    """The last snapshot of each site, of results by site and age."""
    return list({r.site: r for r in results}.values())


def finished(results: Iterable[Result]) -> list[Result]:
    return [r for r in latest(results) if r.final]
