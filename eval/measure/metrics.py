"""The metrics that result.py defines: one pass over a layer for all of its SAEs, in memory that does not grow with the text."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_saes.eval.measure.active import Dense, Encoder, Listed
from residual_saes.eval.measure.features import Features
from residual_saes.eval.measure.heldout import Activations, Block
from residual_saes.eval.measure.predicted import Statistics, capacity, critical_width, floors, student_widths
from residual_saes.eval.measure.result import (
    DEAD_AT,
    Layers,
    Losses,
    Metrics,
    Predicted,
    Reconstruction,
    Sparsity,
    Truth,
    Weights,
)
from residual_saes.eval.measure.splice import Loss
from residual_saes.eval.measure.truth import Classified
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.synthetic.world import World

_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 27}  # values of z held at once; on a CPU they stay in its cache
_CHUNK_ROWS = 256  # at least: below, the weights are read too often
_COSINES = 1 << 26  # values of a matrix of cosines held at once
_SAMPLED = 4096  # features whose rows are compared with all others on a CPU, where an SAE has more than twice as many


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where that is no number."""
    return finite(part / whole) if whole else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(slots=True)
class _Batch:
    """Some activations, and what every SAE's tally needs of them."""

    x: Tensor  # what is read, float32 [n, d]
    exact: Tensor  # what is to be reconstructed, float64 [n, d]
    norm: Tensor  # its ‖x‖, float64 [n]
    spread: Tensor  # ‖x − mean of the block‖², float64 [n]
    positions: Tensor  # int64 [n]
    fires: Tensor | None  # bool [n, true features]

    @classmethod
    def of(cls, x: Tensor, output: Tensor, positions: Tensor, mean: Tensor, fires: Tensor | None) -> "_Batch":
        exact = output.double()
        return cls(x, exact, exact.norm(dim=1), (exact - mean).square().sum(1), positions, fires)


@dataclass(frozen=True, slots=True)
class Place:
    """A site among those that a crosscoder writes."""

    shares: Tensor  # of each feature's squared decoder norm those of the sites, [F, sites]
    number: int

    @property
    def share(self) -> Tensor:
        return self.shares[:, self.number]

    def among(self, fires: Tensor) -> Layers:
        """What is said of the features that fire, bool [F]."""
        shares = self.shares[fires.to(self.shares.device)].double()
        here = shares.argmax(1) == self.number if len(shares) else shares.new_zeros(0, dtype=torch.bool)
        return Layers(
            decoder_share=_mean(shares[:, self.number]),
            largest_here=_mean(here),
            layers_spanned=_mean(1 / shares[here].square().sum(1)),
        )


class Measurement:
    """Sums over tokens of one SAE, or of one of the sites that it writes, float64, on its device."""

    _TOKEN_SUMS = ("error", "error_later", "cosine", "legacy", "norm_in", "norm_out", "l2_ratio", "square_out", "dot")

    def __init__(self, sae: Sae, context: int, world: World | None = None, place: Place | None = None) -> None:
        """`place` is that of the site among those that are written, where there are several."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=sae.b_enc.device)

        features, d_model = sae.w_dec.shape
        self.sae, self.tokens, self._place = sae, 0, place
        self._fired, self._sum, self._square = zeros(features), zeros(features), zeros(features)
        self._active_at, self._seen_at = zeros(context), zeros(context)
        self._residual = zeros(d_model, d_model)  # Σ r rᵀ
        self._sums = zeros(len(self._TOKEN_SUMS))
        self._classified = None if world is None else Classified(sae, world)

    def add(self, batch: _Batch, z: Dense | Listed) -> None:
        xhat = self.sae.completed(batch.x, z.decoded(self.sae.w_dec)).double()
        self._add_features(z, batch)
        r = xhat - batch.exact
        error, norm_out, dot = r.square().sum(1), xhat.norm(dim=1), (xhat * batch.exact).sum(1)
        per_token = (
            error,
            error * (batch.positions != 0),
            dot / (batch.norm * norm_out).clamp(min=1e-8),
            1 - error / batch.spread,
            batch.norm,
            norm_out,
            norm_out / torch.where(batch.norm < 1e-4, 1.0, batch.norm),
            norm_out.square(),
            dot,
        )
        self._sums += torch.stack(per_token).sum(1)
        self._residual.addmm_(r.t(), r)
        self.tokens += len(r)

    def _add_features(self, z: Dense | Listed, batch: _Batch) -> None:
        counted, positions = z.counted(), batch.positions
        if self._classified is not None and batch.fires is not None:
            self._classified.add(*z.entries(), batch.fires)
        self._fired += counted.fired
        self._sum += counted.sum
        self._square += counted.square
        self._active_at.index_add_(0, positions, counted.active.double())
        self._seen_at.index_add_(0, positions, torch.ones_like(positions, dtype=torch.float64))

    def density(self) -> Tensor:
        """f_i, float64 [F] on the CPU."""
        return self._fired.cpu() / self.tokens

    def mean_square(self) -> Tensor:
        """E[z²], float64 [F] on the CPU."""
        return self._square.cpu() / self.tokens

    def reconstruction(self, activations: Activations) -> Reconstruction:
        n, d_model = self.tokens, self._residual.shape[0]
        sums = dict(zip(self._TOKEN_SUMS, self._sums.tolist(), strict=True))
        mean = {name: finite(value / n) for name, value in sums.items()}
        total = activations.all.variance
        lesser, directions = activations.lesser_directions()
        error_lesser = float(((self._residual @ directions) * directions).sum())
        fvu = ratio(sums["error"], total)
        return Reconstruction(
            mse=finite(sums["error"] / n / d_model),
            fvu=fvu,
            fvu_uncentred=ratio(sums["error"], activations.all.square),
            fvu_without_first=ratio(sums["error_later"], activations.without_first.variance),
            fvu_without_top3=ratio(error_lesser, float(lesser.sum())),
            top3_variance=_complement(ratio(float(lesser.sum()), total)),
            explained_variance=_complement(fvu),
            explained_variance_legacy=mean["legacy"],
            cosine=mean["cosine"],
            cossim=mean["cosine"],
            l2_norm_in=mean["norm_in"],
            l2_norm_out=mean["norm_out"],
            l2_ratio=mean["l2_ratio"],
            relative_reconstruction_bias=ratio(sums["square_out"], sums["dot"]),
        )

    def sparsity(self, dead_at: float = DEAD_AT) -> Sparsity:
        f = self.density()
        total = math.fsum(f.tolist())
        return Sparsity(
            tokens=self.tokens,
            l0=total,
            l1=finite(float(self._sum.sum()) / self.tokens),
            dead_share=_share(f <= dead_at),
            frac_alive=_share(f > 0),
            freq_over_1_percent=_share(f > 0.01),
            freq_over_10_percent=_share(f > 0.1),
            normalized_freq_over_1_percent=ratio(float(f[f > 0.01].sum()), total) or 0.0,
            normalized_freq_over_10_percent=ratio(float(f[f > 0.1].sum()), total) or 0.0,
        )

    def predicted(self, alive_above: float) -> Predicted:
        """Floors at the published fractions of d_model, and what they are made from."""
        statistics = Statistics.measured(self.density(), self.mean_square(), alive_above)
        alpha = statistics.alpha
        return Predicted(
            alive=statistics.features,
            alpha=alpha,
            capacity=None if alpha is None else finite(capacity(alpha)),
            critical_width=critical_width(statistics),
            floors={w: finite(v) for w, v in floors(statistics, student_widths(len(self._residual))).items()},
        )

    def weights(self) -> tuple[Weights, Tensor, Tensor]:
        """Cosines between the SAE's rows; of each feature [F] the largest to another decoder row, NaN where it was not looked
        for, and encoder to decoder, NaN where these are of different sites."""
        encoder, decoder = unit(self.sae.w_enc), unit(self.sae.w_dec)
        rows = _looked_at(len(decoder), decoder.device)
        nearest, transcodes = largest_cosine(decoder, decoder, rows=rows, others=True), self.sae.transcodes
        own = torch.full_like(self.sae.b_enc, math.nan) if transcodes else (encoder * decoder).sum(1)
        weights = Weights(
            max_decoder_cosine_sim=finite(float(nearest.max())),
            average_max_decoder_cosine_sim=_mean(nearest),
            average_max_encoder_cosine_sim=_mean(largest_cosine(encoder, encoder, rows=rows, others=True)),
            average_encoder_decoder_cosine_sim=_mean(own),
            average_max_encoder_decoder_cosine_sim=None if transcodes else _mean(largest_cosine(encoder, decoder, rows=rows)),
        )
        return weights, torch.full_like(own, math.nan).index_copy_(0, rows, nearest), own

    def finish(self, activations: Activations, dead_at: float, alive_above: float) -> tuple[Metrics, Features]:
        weights, nearest, own = self.weights()
        truth = Truth() if self._classified is None else self._classified.finish(self._fired.cpu(), self.tokens)
        layers = Layers() if self._place is None else self._place.among(self.density() > 0)
        parts = (self.sparsity(dead_at), self.reconstruction(activations), weights, self.predicted(alive_above), truth, layers)
        features = Features(
            density=self.density().float(),
            mean=(self._sum / self.tokens).float().cpu(),
            mean_square=self.mean_square().float(),
            max_decoder_cosine_sim=nearest.cpu(),
            encoder_decoder_cosine_sim=own.cpu(),
            l0_by_position=(self._active_at / self._seen_at).float().cpu(),
            decoder_share=None if self._place is None else self._place.share.float().cpu(),
        )
        return Metrics(**{name: value for part in parts for name, value in vars(part).items()}), features


@torch.inference_mode()
def measure(
    blocks: Iterable[Block | tuple[Tensor, Tensor]],
    saes: Sequence[Sae],
    context: int,
    after: Callable[[], object] = lambda: None,
    world: World | None = None,
) -> tuple[list[Activations], list[list[Measurement]]]:
    """One pass over held-out activations for all SAEs, which have the same target and are on one device; that of a `world` has
    the truth of its blocks. Returns the activations of each site that is written, and for each SAE its sums at each of them.
    `after` is called after every block."""
    device = saes[0].b_enc.device
    encoders, tallies = [Encoder(sae) for sae in saes], [_of_outputs(sae, context, world) for sae in saes]
    activations = [Activations(len(tally.sae.b_dec), device) for tally in tallies[0]]
    rows = max(_CHUNK_ROWS, _CHUNK_VALUES[device.type] // max(len(sae.b_enc) for sae in saes))
    for stored, at, fires, written in (Block(*block) for block in blocks):
        x, positions = stored.to(device), at.to(device)
        outputs = [output.to(device) for output in written] or [x]
        means = [one.add(output, positions).mean for one, output in zip(activations, outputs, strict=True)]
        for begin in range(0, len(x), rows):
            end = min(begin + rows, len(x))
            true = None if fires is None else fires.dense(begin, end, device)
            wide = x[begin:end].float()
            batches = [
                _Batch.of(wide, output[begin:end], positions[begin:end], mean, true)
                for output, mean in zip(outputs, means, strict=True)
            ]
            for encoder, of_outputs in zip(encoders, tallies, strict=True):
                z = encoder(wide)
                for tally, batch in zip(of_outputs, batches, strict=True):
                    tally.add(batch, z)
        after()
    return activations, tallies


def _of_outputs(sae: Sae, context: int, world: World | None) -> list[Measurement]:
    """A measurement of each site that it writes."""
    parts = sae.parts()
    if len(parts) == 1:
        return [Measurement(sae, context, world)]
    shares = sae.shares()
    return [Measurement(part, context, place=Place(shares, number)) for number, part in enumerate(parts)]


def losses(clean: float, zero: Loss, mean: Loss, spliced: Loss, ablation: str) -> Losses:
    """Losses of one SAE; `ablation` ("zero" or "mean") is what `ce_recovered` is measured against."""
    ablated = {"zero": zero, "mean": mean}[ablation]
    return Losses(
        ce=finite(clean),
        ce_spliced=finite(spliced.ce),
        ce_zero=finite(zero.ce),
        ce_mean_ablation=finite(mean.ce),
        ce_recovered=ratio(ablated.ce - spliced.ce, ablated.ce - clean),
        ce_loss_without_sae=finite(clean),
        ce_loss_with_sae=finite(spliced.ce),
        ce_loss_with_ablation=finite(zero.ce),
        ce_loss_score=ratio(zero.ce - spliced.ce, zero.ce - clean),
        kl_div_with_sae=finite(spliced.kl),
        kl_div_with_ablation=finite(zero.kl),
        kl_div_score=ratio(zero.kl - spliced.kl, zero.kl),
    )


def largest_cosine(a: Tensor, b: Tensor, *, rows: Tensor | None = None, others: bool = False) -> Tensor:
    """The cosines of `nearest_rows`, float32."""
    return nearest_rows(a, b, rows=rows, others=others)[0]


@torch.inference_mode()
def nearest_rows(a: Tensor, b: Tensor, *, rows: Tensor | None = None, others: bool = False) -> tuple[Tensor, Tensor]:
    """For each of these `rows` of a [n, d], or all, the largest cosine to a row of b [m, d], float32, and that row's number;
    rows are of unit norm or zero. With `others`, not to the row of the same number. The [n, m] matrix is never held whole."""
    found, numbers = [], torch.arange(len(a), device=a.device) if rows is None else rows
    for part in torch.split(numbers, max(1, _COSINES // len(b))):
        cosines = a[part] @ b.t()
        if others:
            cosines[torch.arange(len(part), device=a.device), part] = -math.inf
        found.append(cosines.max(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def unit(rows: Tensor) -> Tensor:
    """Rows [n, d] scaled to unit norm; zeros stay zeros."""
    return torch.nn.functional.normalize(rows, dim=1)


def _looked_at(features: int, device: torch.device) -> Tensor:
    """The features whose rows are compared with all: evenly spread, where all would take a CPU a minute an SAE."""
    n = features if device.type != "cpu" or features <= 2 * _SAMPLED else _SAMPLED
    return torch.arange(n, device=device) * features // n


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def _mean(values: Tensor) -> float | None:
    return finite(float(values.double().mean()))


def _complement(share: float | None) -> float | None:
    return None if share is None else 1 - share
