"""One training step of one SAE: forward, backward by hand, clip, Adam, unit-norm decoder.

    loss = mean((x̂ − x)²) + λ · mean over tokens of Σ z      ("mean" reduction divides the second term by F as well)

float32 masters and moments, bfloat16 products. The encoder's product is dense always; it gives the active entries, and
where these are few the other four products run over them alone (about 1 % of the arithmetic at L0 = 150 of 32,768).
Both ways compute the same function. Cost on a CPU and on a GPU: see bench/.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.kernels import COMPUTE, AdamStep, TorchKernels, Workspace, adam_update_
from train.sae import Sae


@dataclass(kw_only=True, frozen=True, slots=True)
class StepConfig:
    """What the step computes. `precision` is of the products; masters are float32 (float64 for fp64)."""

    l1_reduction: str = "sum"
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    precision: str = "bf16"
    sparse_below: float = 1 / 64  # share of active entries under which the step follows them alone; 0 never does


@dataclass(kw_only=True, frozen=True, slots=True)
class StepResult:
    """Scalars of one batch, before the update. If `finite` is false the weights were left as they were."""

    loss: float
    mse: float
    l1: float  # the L1 term of the loss, λ included
    l0: float
    grad_norm: float
    sparse: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def pick_kernels(precision: str, device: torch.device) -> TorchKernels:
    """The fastest implementation for this device and precision; plain torch where there is no other."""
    if precision == "bf16" and device.type == "cuda":
        from train.triton_kernels import TritonKernels

        return TritonKernels()
    if precision == "bf16" and device.type == "cpu":
        from train.native import load_native

        return load_native() or TorchKernels()
    return TorchKernels()


class TrainingSae:
    """Weights, moments and the step of one SAE. Shapes as in `kernels`; everything lies on one device."""

    def __init__(
        self, d_model: int, n_features: int, config: StepConfig, kernels: TorchKernels, device: torch.device, seed: int
    ) -> None:
        self.config, self.kernels, self.device = config, kernels, device
        self.d, self.n_features = d_model, n_features
        self._compute = COMPUTE[config.precision]
        self._master = torch.float64 if config.precision == "fp64" else torch.float32
        # Drawn on the CPU, so that every device starts from the same SAE.
        directions = torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(seed), dtype=self._master)
        directions /= directions.norm(dim=1, keepdim=True)
        # With relu(a) = a/2 + |a|/2 over F random directions, an encoder 2d/F times the decoder starts at x̂ ≈ x.
        self.w_enc, self.w_dec = (directions * (2 * d_model / n_features)).to(device), directions.to(device)
        self.bias = torch.zeros(n_features + 2 * d_model, dtype=self._master, device=device)
        self.moments = {f"{k}.{n}": torch.zeros_like(w) for n, w in self._parameters().items() for k in "mv"}
        self.step_count = 0
        self.last_active = torch.zeros(n_features, dtype=torch.int32, device=device)  # step of each feature's last firing
        # What the products read; Adam writes them in the pass in which it has the row at hand.
        self._enc, self._dec = self.w_enc.to(self._compute, copy=True), self.w_dec.to(self._compute, copy=True)

    def _parameters(self) -> dict[str, Tensor]:
        return {"w_enc": self.w_enc, "w_dec": self.w_dec, "bias": self.bias}

    @property
    def b_enc(self) -> Tensor:
        return self.bias[: self.n_features]

    @property
    def b_pre(self) -> Tensor:
        return self.bias[self.n_features : self.n_features + self.d]

    @property
    def b_dec(self) -> Tensor:
        return self.bias[self.n_features + self.d :]

    def init_centre(self, x: Tensor) -> None:
        """Start b_pre at the mean of some activations [tokens, d]."""
        self.b_pre.copy_(x.double().mean(0))

    def step(self, x: Tensor, *, lr: float, l1: float, workspace: Workspace) -> StepResult:
        """Train on x [B, d] (float16 as cached, or wider) with this λ. Nothing is changed if loss or gradient is not finite."""
        batch = x.shape[0]
        l1_scale = l1 / batch / (self.n_features if self.config.l1_reduction == "mean" else 1)
        centred = (x.to(self._master) - self.b_pre).to(self._compute)
        z, activation = self.kernels.encode(centred, self._enc, self.b_enc, workspace)
        active, total = torch.stack([activation.row_count.sum().double(), activation.total.double()]).tolist()
        if not math.isfinite(total):  # a NaN in the batch; what follows could not even list the active entries
            return StepResult(
                loss=total, mse=math.nan, l1=l1_scale * total, l0=active / batch, grad_norm=math.nan, sparse=False
            )
        sparse = active < self.config.sparse_below * z.numel()
        scale = 2 / (batch * self.d)
        bias = self.b_pre + self.b_dec
        if sparse:
            entries = self.kernels.compact(z, activation, int(active))
            g, g_hidden, square = self.kernels.sparse_residual(entries, self._dec, x, bias, scale, l1_scale)
            grads = self.kernels.sparse_weight_grads(entries, g, centred, g_hidden, workspace)
        else:
            g, square = self.kernels.dense_residual(z, self._dec, x, bias, scale)
            grads = self.kernels.dense_weight_grads(z, self._dec, g, centred, l1_scale, workspace)
        dw_enc, dw_dec, db_enc = grads
        db_dec = g.sum(0, dtype=self._master)
        d_bias = torch.cat([db_enc, db_dec - db_enc @ self.w_enc, db_dec])
        norm = (self.kernels.square_sum(dw_enc) + self.kernels.square_sum(dw_dec) + d_bias.double().square().sum()).sqrt()
        square_sum, grad_norm = torch.stack([square.double(), norm]).tolist()
        result = StepResult(
            loss=square_sum / (batch * self.d) + l1_scale * total,
            mse=square_sum / (batch * self.d),
            l1=l1_scale * total,
            l0=active / batch,
            grad_norm=grad_norm,
            sparse=sparse,
        )
        if result.finite:
            self.last_active.masked_fill_(activation.feature_count > 0, self.step_count + 1)
            self._update(dw_enc, dw_dec, d_bias, grad_norm, lr)
        return result

    def _update(self, dw_enc: Tensor, dw_dec: Tensor, d_bias: Tensor, grad_norm: float, lr: float) -> None:
        self.step_count += 1
        c, m = self.config, self.moments
        clip = min(1.0, c.clip_norm / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
        adam = AdamStep(step=self.step_count, lr=lr, clip=clip, beta1=c.beta1, beta2=c.beta2)
        update = self.kernels.adam_
        update(self.w_enc, m["m.w_enc"], m["v.w_enc"], dw_enc, adam, unit_norm=False, copy=self._enc)
        update(self.w_dec, m["m.w_dec"], m["v.w_dec"], dw_dec, adam, unit_norm=True, copy=self._dec)
        adam_update_(self.bias, m["m.bias"], m["v.bias"], d_bias.to(self._master), adam)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on bit for bit; tensors on the training device."""
        return self._parameters() | self.moments | {"last_active": self.last_active}

    def load_state(self, state: dict[str, Tensor], step_count: int) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.step_count = step_count
        self._enc.copy_(self.w_enc)
        self._dec.copy_(self.w_dec)

    def snapshot(self, config: dict[str, Any], stats: dict[str, Any]) -> Sae:
        """The SAE as it is now; shares memory with this one."""
        return Sae(
            w_enc=self.w_enc, w_dec=self.w_dec, b_enc=self.b_enc, b_pre=self.b_pre, b_dec=self.b_dec, config=config, stats=stats
        )
