"""JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435): every feature learns the threshold below which it is silent.

    h = relu(W_enc (x − b_pre) + b_enc)      z_i = h_i where h_i > θ_i, else 0      θ = c · exp(log_threshold)

The loss is the squared error alone. A step has no gradient by θ, so that one stands in for it, of a kernel K about the
threshold as wide as ε (here a rectangle, and a share of each θ, so that no layer need be scaled):

    ∂z_i/∂θ_i = −θ_i/ε K((h_i − θ_i)/ε)      ∂[h_i > θ_i]/∂θ_i = −1/ε K((h_i − θ_i)/ε)

L0 is not paid for but held: c, one factor for all features, is steered from batch to batch, and of the gradient by log θ only
that part is taken which leaves L0 as it is, with μ the price of an entry, so that the parts have the sum 0:

    ∂/∂ log θ_i = −θ_i (Σ ∂loss/∂z_i + μ) K/ε      over the entries near to θ_i

L0 falls to its target over the first half of a run: features that have learnt among many are purer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from residual_saes.shared.runs.sparsity import Reading
from residual_saes.train.kernels.base import Activation, TorchKernels, Workspace
from residual_saes.train.sparsity.base import Control, ControllerConfig, Encoded, Hidden, Own, Revivable, Sparsity, parse_k

BANDWIDTH = 0.1  # ε over θ
ABOVE, UNTIL = 8.0, 0.5  # times the target: L0 at the start; share of the run after which it is at its target
MOST = 0.9  # of what is above 0 in the first batch: what the first thresholds leave at most
GAIN, LAST_GAIN = 0.2, 0.02  # of ln c by ln L0, falling over the run so that the last thresholds are a mean over batches
FALL, LOWEST = 0.03, math.log(4)  # of the log of a silent feature's threshold: a step; below the mean of the others
LOG = "log_threshold"


@dataclass(kw_only=True, frozen=True, slots=True)
class Jump(Revivable):
    factor: float  # c

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        z, _ = kernels.encode(xc, w_enc, bias, out)
        threshold = own[LOG].exp() * self.factor
        low, middle, high = ((threshold * (1 + side * BANDWIDTH / 2)).to(z.dtype) for side in (-1, 0, 1))
        largest = self.largest(z)
        activation, near = kernels.jump_(z, low, middle, high)
        return self.revived(kernels, Encoded(z=z, activation=activation, near=near), largest)

    def wake_(self, silent: Tensor, activation: Activation, b_enc: Tensor, own: Own, norms: Tensor) -> None:
        """A silent feature's threshold falls, but not far below the others', or it fires everywhere once its activations are
        above 0 again; so that they come to be, its bias rises."""
        log, active = own[LOG], ~silent
        least = (log * active).sum() / active.sum().clamp(min=1) - LOWEST
        log.copy_(torch.where(silent & (log > least), torch.maximum(log - FALL, least), log))
        super(Jump, self).wake_(silent, activation, b_enc, own, norms)  # slots make another class of this one

    def own_grads(self, kernels: TorchKernels, encoded: Encoded, own: Own, g: Tensor, w_dec: Tensor) -> Own:
        near, n_features = encoded.near, len(w_dec)
        if kernels.feature_major:
            start = _starts(near.feature, n_features)
            pulls = kernels.dots(start, near.token, w_dec, g)
        else:
            pulls = kernels.dots(_starts(near.token, len(g)), near.feature, g, w_dec)
            order = torch.sort(near.feature, stable=True)
            start, pulls = _starts(order.values, n_features), pulls[order.indices]
        pull: Tensor = torch.segment_reduce(pulls.to(own[LOG].dtype), "sum", offsets=start)
        pull, count = own[LOG].exp() * self.factor * pull, start.diff().to(pull.dtype)
        return {LOG: (pull.sum() / count.sum().clamp(min=1) * count - pull) / BANDWIDTH}


def _starts(groups: Tensor, n: int) -> Tensor:
    """Where each of n groups begins in a list that has them in order; int64 [n + 1]."""
    return torch.searchsorted(groups.contiguous(), torch.arange(n + 1, device=groups.device))


@dataclass(kw_only=True, frozen=True, slots=True)
class JumpRelu(Sparsity):
    FORMS: ClassVar[str] = "jumprelu:64"
    KIND: ClassVar[str | None] = "jumprelu"
    OWN: ClassVar[tuple[str, ...]] = (LOG,)
    BETA2: ClassVar[float] = 0.99  # gradients grow as L0 falls, and are not to be held against what was before

    l0: int

    @property
    def name(self) -> str:
        return f"jumprelu-{self.l0}"

    @property
    def target(self) -> float:
        return self.l0

    @property
    def reading(self) -> Reading:
        return Reading(words=f"JumpReLU, thresholds learnt for an L0 of {self.l0}", rule="threshold")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls(l0=l0) if (l0 := parse_k("jumprelu", text)) else None

    def own(self, h: Tensor) -> Own:
        count = min(round(ABOVE * self.l0 * len(h)), int(MOST * int((h > 0).sum())))
        return {LOG: torch.full((h.shape[1],), float(TorchKernels().kth_largest(h, max(1, count)).log()))}

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> "JumpReluControl":
        return JumpReluControl(self.l0, steps)


@dataclass(slots=True)
class JumpReluState:
    first: float = 0.0  # L0 of the first batch
    level: float = 0.0  # ln c


class JumpReluControl(Control):
    """ln c ← ln c + gain · ln(L0 / aim), the aim falling from the first batch's L0 to the target by the same factor a step."""

    def __init__(self, target: float, steps: int) -> None:
        super().__init__(Jump(factor=1.0), JumpReluState())
        self._target, self._steps = target, max(1, steps)

    def hidden_at(self, step: int) -> Hidden:
        return Jump(factor=math.exp(self.state.level))

    def update(self, step: int, l0: float, least: float) -> None:
        now, target, done = self.state, self._target, step / self._steps
        now.first = now.first if step else max(l0, target)
        aim = target * (now.first / target) ** max(0.0, 1 - done / UNTIL)
        error = math.log(max(l0, 1e-3) / aim)
        now.level += (GAIN + (LAST_GAIN - GAIN) * min(1.0, done)) * min(1.0, max(-1.0, error))

    def thresholds(self, own: Own) -> Tensor:
        return own[LOG].exp() * math.exp(self.state.level)
