"""How good SAEs are, on held-out tokens: one pass over a layer for all of its SAEs, in memory that does not grow with the text.

x [d] is a held-out activation, x̂ its reconstruction, r = x̂ − x, z [F] the features, ⟨·⟩ the mean over tokens. "SAEBench" is its
core evaluation (Karvonen et al., arXiv:2503.09532; code at version 0.6.0), whose names are used where it has one:

    l0, l1                       ⟨number of z_i > 0⟩, ⟨Σ z_i⟩; SAEBench
    mse                          ⟨‖r‖²⟩ / d. SAEBench's own is ⟨‖r‖²⟩ over the number of tokens in a batch
    fvu, explained_variance      Σ‖r‖² / Σ‖x − ⟨x⟩‖², and 1 − fvu. SAEBench's means this, and takes ⟨x²⟩ where ⟨x⟩ belongs
    fvu_uncentred                Σ‖r‖² / Σ‖x‖², about zero, as some write it: smaller where x has a mean
    explained_variance_legacy    ⟨1 − ‖r‖² / ‖x − m‖²⟩ with m the mean of a batch, here a block; SAEBench's earlier definition
    fvu_without_first            fvu over all positions of a context but the first, about their own mean
    fvu_without_top3             Σ‖Pr‖² / Σ‖P(x − ⟨x⟩)‖², P the projection away from the three largest principal directions
    top3_variance                the share of variance in those three. Both flatter FVU: a few directions and first positions
                                 hold most of a residual stream's variance (Sun et al., arXiv:2402.17762)
    cosine, cossim               ⟨cos(x̂, x)⟩; SAEBench
    l2_norm_in, l2_norm_out      ⟨‖x‖⟩, ⟨‖x̂‖⟩; SAEBench
    l2_ratio                     ⟨‖x̂‖ / ‖x‖⟩; SAEBench
    relative_reconstruction_bias ⟨‖x̂‖²⟩ / ⟨x·x̂⟩: equation 10 of Rajamanoharan et al., arXiv:2404.16014; SAEBench
    freq_over_1_percent, _10_    share of features with density f_i = ⟨z_i > 0⟩ above 0.01, 0.1; SAEBench
    normalized_freq_over_…       share of Σ f_i that is theirs; SAEBench
    frac_alive                   share of features that fired at all; SAEBench
    dead_share                   share of features with f_i ≤ 1e-5 (or --dead-at; 0 is "never fired")
    average_max_decoder_cosine_sim, average_max_encoder_cosine_sim
                                 mean over i of the largest cosine of row i to another; SAEBench
    max_decoder_cosine_sim       the largest cosine of two decoder rows
    average_encoder_decoder_cosine_sim
                                 mean over i of cos(encoder row i, decoder row i); SAEBench has it by feature
    average_max_encoder_decoder_cosine_sim
                                 mean over i of the largest cosine of encoder row i to any decoder row
    alive, alpha, capacity, critical_width, floor_<width>: see eval/measure/predicted.py; alive is f_i > 1e-5 (or --alive-above)

and from the language model (eval/measure/splice.py) with the layer's output replaced by x̂, in nats a token:

    ce, ce_spliced, ce_zero      its cross-entropy as it is, spliced, and with zeros in place of the output; SAEBench's
                                 ce_loss_without_sae, ce_loss_with_sae, ce_loss_with_ablation
    ce_mean_ablation             with ⟨x⟩ in place of the output
    ce_recovered                 (ablated − spliced) / (ablated − ce); ablated is ce_zero, or with --ablation mean the other
    ce_loss_score                the same, always against zeros; SAEBench
    kl_div_with_sae, kl_div_with_ablation
                                 KL(model ‖ spliced) and KL(model ‖ with zeros), over all positions; SAEBench
    kl_div_score                 1 − kl_div_with_sae / kl_div_with_ablation; SAEBench

SAEBench leaves out special tokens; here every held-out token counts. z, x̂ and the language model are float32 or the precision
of the harvest; sums over tokens are float64. What is no number (0/0, or not finite) is None.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from eval.measure.predicted import Statistics, capacity, critical_width, floors, student_widths
from eval.measure.splice import Loss
from shared.cache import Cache
from shared.errors import UserError
from shared.files import make_dir, publish_file
from shared.runs.rows import ALL, Rows
from shared.runs.sae import Sae
from shared.seal import seal, sealed
from shared.sites import Site

DEAD_AT = 1e-5  # density
MATCHED_ABOVE = 0.7  # cosine from which two features are called the same: Paulo & Belrose, arXiv:2501.16615
_TOP = 3  # principal directions
_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 26}  # values of z held at once; on a CPU they stay in its cache
_CHUNK_ROWS = 256  # at least: below, the weights are read too often
_COSINES = 1 << 26  # values of a matrix of cosines held at once

Number = float | int | None
Block = tuple[Tensor, Tensor]  # activations float16 [n, d], and for each its position in its context, int64 [n]


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where that is no number."""
    return finite(part / whole) if whole else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def heldout_blocks(cache: Cache, site: Site, tokens: int, rows: Rows = ALL) -> Iterator[Block]:
    """The held-out activations of a layer, a block at a time, on the CPU: of the first `tokens` those that are among `rows`. A
    block's rows are permuted, so its first are a fair sample. Raises UserError for blocks that are not there or damaged."""
    spec = cache.spec
    for block in range(spec.train_blocks, spec.n_blocks):
        n = min(spec.block_rows, tokens - (block - spec.train_blocks) * spec.block_rows)
        if n <= 0:
            return
        x = torch.from_numpy(cache.whole_block(site, block))[:n]
        positions = torch.from_numpy(cache.block_order(block) % spec.context)[:n]
        kept = slice(None) if rows.all else rows.kept(x, positions)
        yield x[kept], positions[kept]


def heldout_tokens(cache: Cache, tokens: int) -> Tensor:
    """Held-out sequences with at least one and about `tokens` tokens, int64 [n, context]."""
    spec = cache.spec
    first = spec.train_blocks * spec.block_sequences
    n = min(spec.sequences - first, max(1, tokens // spec.context))
    return torch.from_numpy(cache.read_tokens(first, first + n))


@dataclass(slots=True)
class Moments:
    """Count, mean [d] and sum of outer products about the mean [d, d] of activations, float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """x [n, d] float64; of nothing, zeros."""
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).t() @ (x - mean))

    def plus(self, other: "Moments") -> "Moments":
        """Of both together: Chan, Golub & LeVeque (1979)."""
        n = self.n + other.n
        delta, weight = other.mean - self.mean, other.n / max(n, 1)
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * weight)
        return Moments(n, self.mean + delta * weight, scatter)

    @property
    def variance(self) -> float:
        """Σ ‖x − mean‖² over everything."""
        return float(self.scatter.trace())

    @property
    def square(self) -> float:
        """Σ ‖x‖² over everything."""
        return self.variance + self.n * float(self.mean.square().sum())


class Activations:
    """What the metrics of every SAE need to know of a layer's activations."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        nothing = Moments.of(torch.zeros(0, d_model, dtype=torch.float64, device=device))
        self._first, self._rest = nothing, nothing
        self._lesser: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, positions: Tensor) -> Moments:
        """Moments of these activations [n, d] alone; they are added to those of all."""
        first, rest = Moments.of(x[positions == 0].double()), Moments.of(x[positions != 0].double())
        self._first, self._rest = self._first.plus(first), self._rest.plus(rest)
        self._lesser = None
        return first.plus(rest)

    @property
    def all(self) -> Moments:
        return self._first.plus(self._rest)

    @property
    def without_first(self) -> Moments:
        """Of all positions but the first."""
        return self._rest

    def lesser_directions(self) -> tuple[Tensor, Tensor]:
        """All but the three largest principal directions: Σ of squares along each, and the directions as columns [d, d − 3]."""
        if self._lesser is None:  # the same for every SAE
            self._lesser = _all_but_largest(self.all.scatter)
        return self._lesser


def _all_but_largest(scatter: Tensor) -> tuple[Tensor, Tensor]:
    if not scatter.isfinite().all():
        return scatter.new_full((1,), math.nan), scatter.new_zeros(len(scatter), 0)
    values, directions = torch.linalg.eigh(scatter)
    keep = max(0, len(values) - _TOP)
    return values[:keep].clamp(min=0), directions[:, :keep]


@dataclass(slots=True)
class _Batch:
    """Some activations, and what every SAE's tally needs of them."""

    x: Tensor  # float32 [n, d]
    exact: Tensor  # x as float64
    norm: Tensor  # ‖x‖, float64 [n]
    spread: Tensor  # ‖x − mean of the block‖², float64 [n]
    positions: Tensor  # int64 [n]

    @classmethod
    def of(cls, x: Tensor, positions: Tensor, mean: Tensor) -> "_Batch":
        exact = x.double()
        return cls(x.float(), exact, exact.norm(dim=1), (exact - mean).square().sum(1), positions)


@dataclass(kw_only=True, frozen=True, slots=True)
class Features:
    """What is known of each feature, float32 [F], and of each position of a context, float32 [context]; on the CPU."""

    density: Tensor
    mean: Tensor  # E[z]
    mean_square: Tensor  # E[z²]
    max_decoder_cosine_sim: Tensor
    encoder_decoder_cosine_sim: Tensor
    l0_by_position: Tensor


class Tally:
    """Sums over tokens of one SAE, float64, on its device."""

    _TOKEN_SUMS = ("error", "error_later", "cosine", "legacy", "norm_in", "norm_out", "l2_ratio", "square_out", "dot")

    def __init__(self, sae: Sae, context: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=sae.b_enc.device)

        features, d_model = sae.w_enc.shape
        self.sae, self.tokens = sae, 0
        self._fired, self._sum, self._square = zeros(features), zeros(features), zeros(features)
        self._active_at, self._seen_at = zeros(context), zeros(context)
        self._residual = zeros(d_model, d_model)  # Σ r rᵀ
        self._sums = zeros(len(self._TOKEN_SUMS))

    def add(self, batch: _Batch) -> None:
        z = self.sae.encode(batch.x)
        xhat = self.sae.decode(z).double()
        self._add_features(z, batch.positions)
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

    def _add_features(self, z: Tensor, positions: Tensor) -> None:
        on = (z > 0).float()  # sums of it are exact
        self._fired += on.sum(0)
        self._active_at.index_add_(0, positions, on.sum(1).double())
        self._seen_at.index_add_(0, positions, torch.ones_like(positions, dtype=torch.float64))
        exact = z.double()
        self._sum += exact.sum(0)
        self._square += exact.square_().sum(0)

    def density(self) -> Tensor:
        """f_i, float64 [F] on the CPU."""
        return self._fired.cpu() / self.tokens

    def mean_square(self) -> Tensor:
        """E[z²], float64 [F] on the CPU."""
        return self._square.cpu() / self.tokens

    def reconstruction(self, activations: Activations) -> dict[str, Number]:
        """How near x̂ comes to x."""
        n, d_model = self.tokens, self._residual.shape[0]
        sums = dict(zip(self._TOKEN_SUMS, self._sums.tolist(), strict=True))
        mean = {name: finite(value / n) for name, value in sums.items()}
        total = activations.all.variance
        lesser, directions = activations.lesser_directions()
        error_lesser = float(((self._residual @ directions) * directions).sum())
        fvu = ratio(sums["error"], total)
        return {
            "mse": finite(sums["error"] / n / d_model),
            "fvu": fvu,
            "fvu_uncentred": ratio(sums["error"], activations.all.square),
            "fvu_without_first": ratio(sums["error_later"], activations.without_first.variance),
            "fvu_without_top3": ratio(error_lesser, float(lesser.sum())),
            "top3_variance": _complement(ratio(float(lesser.sum()), total)),
            "explained_variance": _complement(fvu),
            "explained_variance_legacy": mean["legacy"],
            "cosine": mean["cosine"],
            "cossim": mean["cosine"],
            "l2_norm_in": mean["norm_in"],
            "l2_norm_out": mean["norm_out"],
            "l2_ratio": mean["l2_ratio"],
            "relative_reconstruction_bias": ratio(sums["square_out"], sums["dot"]),
        }

    def sparsity(self, dead_at: float = DEAD_AT) -> dict[str, Number]:
        """How often features fire."""
        f = self.density()
        total = math.fsum(f.tolist())
        return {
            "l0": total,
            "l1": finite(float(self._sum.sum()) / self.tokens),
            "dead_share": float((f <= dead_at).double().mean()),
            "frac_alive": float((f > 0).double().mean()),
            "freq_over_1_percent": float((f > 0.01).double().mean()),
            "freq_over_10_percent": float((f > 0.1).double().mean()),
            "normalized_freq_over_1_percent": ratio(float(f[f > 0.01].sum()), total) or 0.0,
            "normalized_freq_over_10_percent": ratio(float(f[f > 0.1].sum()), total) or 0.0,
        }

    def floors(self, alive_above: float) -> dict[str, Number]:
        """Predicted floors at the published fractions of d_model, and what they are made from: see predicted.py."""
        statistics = Statistics.measured(self.density(), self.mean_square(), alive_above)
        alpha = statistics.alpha
        return {
            "alive": statistics.features,
            "alpha": alpha,
            "capacity": None if alpha is None else finite(capacity(alpha)),
            "critical_width": critical_width(statistics),
            **{f"floor_{w}": finite(v) for w, v in floors(statistics, student_widths(len(self._residual))).items()},
        }

    def weights(self) -> tuple[dict[str, Number], Tensor, Tensor]:
        """Cosines between the SAE's rows; of each feature [F] the largest to another decoder row, and encoder to decoder."""
        encoder, decoder = _unit(self.sae.w_enc), _unit(self.sae.w_dec)
        nearest, own = largest_cosine(decoder, decoder, others=True), (encoder * decoder).sum(1)
        metrics = {
            "max_decoder_cosine_sim": float(nearest.max()),
            "average_max_decoder_cosine_sim": float(nearest.double().mean()),
            "average_max_encoder_cosine_sim": float(largest_cosine(encoder, encoder, others=True).double().mean()),
            "average_encoder_decoder_cosine_sim": float(own.double().mean()),
            "average_max_encoder_decoder_cosine_sim": float(largest_cosine(encoder, decoder).double().mean()),
        }
        return {name: finite(value) for name, value in metrics.items()}, nearest, own

    def finish(self, activations: Activations, dead_at: float, alive_above: float) -> tuple[dict[str, Number], Features]:
        """All metrics but those of the language model."""
        weights, nearest, own = self.weights()
        metrics = {
            "tokens": self.tokens,
            **self.sparsity(dead_at),
            **self.reconstruction(activations),
            **weights,
            **self.floors(alive_above),
        }
        features = Features(
            density=self.density().float(),
            mean=(self._sum / self.tokens).float().cpu(),
            mean_square=self.mean_square().float(),
            max_decoder_cosine_sim=nearest.cpu(),
            encoder_decoder_cosine_sim=own.cpu(),
            l0_by_position=(self._active_at / self._seen_at).float().cpu(),
        )
        return metrics, features


@torch.inference_mode()
def measure(
    blocks: Iterable[Block], saes: Sequence[Sae], context: int, after: Callable[[], object] = lambda: None
) -> tuple[Activations, list[Tally]]:
    """One pass over held-out activations for all SAEs, which are over the same layer and on one device. `after` is called after
    every block."""
    device, d_model = saes[0].b_enc.device, len(saes[0].b_pre)
    activations, tallies = Activations(d_model, device), [Tally(sae, context) for sae in saes]
    rows = max(_CHUNK_ROWS, _CHUNK_VALUES[device.type] // max(len(sae.b_enc) for sae in saes))
    for stored, at in blocks:
        x, positions = stored.to(device), at.to(device)
        mean = activations.add(x, positions).mean
        for part, part_at in zip(torch.split(x, rows), torch.split(positions, rows), strict=True):
            batch = _Batch.of(part, part_at, mean)
            for tally in tallies:
                tally.add(batch)
        after()
    return activations, tallies


def loss_metrics(clean: float, zero: Loss, mean: Loss, spliced: Loss, ablation: str) -> dict[str, Number]:
    """The language model's part; `ablation` ("zero" or "mean") is what `ce_recovered` is measured against."""
    ablated = {"zero": zero, "mean": mean}[ablation]
    metrics = {
        "ce": clean,
        "ce_spliced": spliced.ce,
        "ce_zero": zero.ce,
        "ce_mean_ablation": mean.ce,
        "ce_recovered": ratio(ablated.ce - spliced.ce, ablated.ce - clean),
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": spliced.ce,
        "ce_loss_with_ablation": zero.ce,
        "ce_loss_score": ratio(zero.ce - spliced.ce, zero.ce - clean),
        "kl_div_with_sae": spliced.kl,
        "kl_div_with_ablation": zero.kl,
        "kl_div_score": ratio(zero.kl - spliced.kl, zero.kl),
    }
    return {name: None if value is None else finite(value) for name, value in metrics.items()}


@torch.inference_mode()
def largest_cosine(a: Tensor, b: Tensor, *, others: bool = False) -> Tensor:
    """For each row of a [n, d] the largest cosine to a row of b [m, d], float32 [n]; rows are of unit norm or zero. With
    `others`, not to the row of the same number. The [n, m] matrix is never held whole."""
    found = []
    for start in range(0, len(a), rows := max(1, _COSINES // len(b))):
        cosines = a[start : start + rows] @ b.t()
        if others:
            cosines.diagonal(start).fill_(-math.inf)
        found.append(cosines.amax(1))
    return torch.cat(found)


@dataclass(kw_only=True, frozen=True, slots=True)
class Match:
    """How many of one SAE's features another has."""

    features: int  # that were looked for
    mean_max_cosine: float | None  # mean over them of the largest cosine to a decoder row of the other: Sharkey et al. (2022)
    matched: float | None  # share of them for which it is above 0.7: Paulo & Belrose, arXiv:2501.16615


def match(mine: Tensor, theirs: Tensor) -> Match:
    """Decoder rows [n, d] looked for among others [m, d]; of any norm."""
    if not len(mine) or not len(theirs):
        return Match(features=len(mine), mean_max_cosine=None, matched=None)
    best = largest_cosine(_unit(mine), _unit(theirs)).double()
    return Match(
        features=len(mine),
        mean_max_cosine=finite(float(best.mean())),
        matched=float((best > MATCHED_ABOVE).double().mean()),
    )


def save_features(path: Path, features: Features, *, tokens: int, file: str) -> None:
    """Publish as safetensors, with how many tokens it rests on and which checkpoint `file` it is of. What is there of the same
    checkpoint from more tokens stays. Raises UserError where nothing can be written."""
    there = _feature_facts(path)
    if there.get("file") == file and int(there.get("tokens", 0)) > tokens:
        return
    tensors = {name: getattr(features, name).contiguous() for name in Features.__slots__}
    facts = seal({"tokens": str(tokens), "file": file}, tensors)
    make_dir(path.parent)
    publish_file(path, save(tensors, metadata=facts))


def load_features(path: Path) -> tuple[Features, dict[str, str]]:
    """Raises UserError if it is missing or damaged. Beside the features, what they rest on: `tokens` and `file`."""
    facts = _feature_facts(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in Features.__slots__}
    except Exception:  # safetensors raises its own type, and OSError
        facts = {}
    if not facts or not sealed(facts, tensors):
        raise UserError(f"{path} is missing or damaged: delete what is there, and run `python -m eval` again")
    return Features(**tensors), facts


def _feature_facts(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # safetensors raises its own type, and OSError
        return {}


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _complement(share: float | None) -> Any:
    return None if share is None else 1 - share
