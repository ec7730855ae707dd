"""JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435): every feature learns the threshold below which it is silent.

    h = relu(W_enc (x − b_pre) + b_enc)      z_i = h_i where h_i > θ_i, else 0      θ = exp(log_threshold)
    loss = mean((x̂ − x)²) + λ (L0 / target − 1)²

The second term is the paper's loss for a given L0, with which Gemma Scope 2 was trained, too. A step has no gradient by θ, so
that one stands in for it, of a kernel K about the threshold as wide as ε (here a rectangle):

    ∂z_i/∂θ_i = −θ_i/ε K((h_i − θ_i)/ε)      ∂[h_i > θ_i]/∂θ_i = −1/ε K((h_i − θ_i)/ε)

The weights have the gradient of what is above its threshold, and none from L0. The paper takes one ε for activations of one
scale; here ε is a share of each θ, and λ one of the variance of the first batch, so that no layer need be scaled.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from residual_saes.shared.runs.sparsity import Reading
from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.sparsity.base import Control, ControllerConfig, Encoded, Hidden, Own, Sparsity, parse_k

BANDWIDTH = 0.5  # ε over θ
WEIGHT = 1.0  # λ over the variance
START = 4.0  # times the target: what the first thresholds leave of L0
LOG = "log_threshold"


@dataclass(kw_only=True, frozen=True, slots=True)
class Jump(Hidden):
    target: float
    weight: float  # λ

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        z, _ = kernels.encode(xc, w_enc, bias, out)
        threshold = own[LOG].exp()
        low, middle, high = ((threshold * (1 + side * BANDWIDTH / 2)).to(z.dtype) for side in (-1, 0, 1))
        activation, near = kernels.jump_(z, low, middle, high)
        return Encoded(z=z, activation=activation, near=near)

    def penalty(self, l0: float) -> float:
        return self.weight * (l0 / self.target - 1) ** 2

    def own_grads(self, kernels: TorchKernels, encoded: Encoded, own: Own, l0: float, g: Tensor, w_dec: Tensor) -> Own:
        near, n_features = encoded.near, len(w_dec)
        by_l0 = 2 * self.weight * (l0 / self.target - 1) / self.target / len(g)  # of one entry more
        if kernels.feature_major:
            start = _starts(near.feature, n_features)
            pulls = kernels.dots(start, near.token, w_dec, g)
        else:
            pulls = kernels.dots(_starts(near.token, len(g)), near.feature, g, w_dec)
            order = torch.sort(near.feature, stable=True)
            start, pulls = _starts(order.values, n_features), pulls[order.indices]
        pull: Tensor = torch.segment_reduce(pulls.to(own[LOG].dtype), "sum", offsets=start)
        return {LOG: -(own[LOG].exp() * pull + by_l0 * start.diff().to(pull.dtype)) / BANDWIDTH}


def _starts(groups: Tensor, n: int) -> Tensor:
    """Where each of n groups begins in a list that has them in order; int64 [n + 1]."""
    return torch.searchsorted(groups.contiguous(), torch.arange(n + 1, device=groups.device))


@dataclass(kw_only=True, frozen=True, slots=True)
class JumpRelu(Sparsity):
    FORMS: ClassVar[str] = "jumprelu:64"
    KIND: ClassVar[str | None] = "jumprelu"
    OWN: ClassVar[tuple[str, ...]] = (LOG,)

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
        count = min(round(START * self.l0 * len(h)), int((h > 0).sum()))
        return {LOG: torch.full((h.shape[1],), float(TorchKernels().kth_largest(h, count).log()))}

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> "JumpReluControl":
        return JumpReluControl(self.l0)


@dataclass(slots=True)
class JumpReluState:
    variance: float = 0.0  # of the first batch, about b_pre


class JumpReluControl(Control):
    def __init__(self, l0: float) -> None:
        super().__init__(Jump(target=l0, weight=0.0), JumpReluState())
        self._l0 = l0

    def start(self, variance: float) -> None:
        self.state.variance = variance

    def hidden_at(self, step: int) -> Hidden:
        return Jump(target=self._l0, weight=WEIGHT * self.state.variance)

    def thresholds(self, own: Own) -> Tensor:
        return own[LOG].exp()
