"""One training step of one SAE: forward, backward by hand, clip, Adam, unit-norm decoder.

    loss = mean((x̂ − x)²) + λ · mean over tokens of Σ z      ("mean" reduction divides the second term by F as well)

A transcoder has other rows y [B, d] to reconstruct than those it reads, and may have an affine map of these beside its features
(Paulo et al., arXiv:2501.18823):  ŷ = W_dec z + b_dec + W_skip (x − b_pre). The map is taken from y before, so that all else is
the step of an SAE whose output has no b_pre.

float32 masters and moments, bfloat16 products. The encoder's product is dense always; it gives the active entries, and
where these are few the other four products run over them alone (about 1 % of the arithmetic at L0 = 150 of 32,768).
Both ways compute the same function. Cost on a CPU and on a GPU: see bench/.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from residual_saes.shared.cli import Number, option
from residual_saes.shared.runs.sae import Sae
from residual_saes.train.kernels.base import COMPUTE, AdamStep, TorchKernels, Workspace, mm, row_norms
from residual_saes.train.kernels.nested import Nested
from residual_saes.train.sparsity.base import RELU, Encoded, Hidden, Own


@dataclass(kw_only=True, frozen=True, slots=True)
class StepConfig:
    """What the step computes. `precision` is of the products; masters are float32 (float64 for fp64)."""

    l1_reduction: str = option("", "sum", type=click.Choice(["sum", "mean"]))
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    precision: str = option("Of the products.", "bf16", type=click.Choice(["bf16", "fp32"]))
    # 0 never follows the active entries alone, None leaves it to the kernels
    sparse_below: float | None = option("Share of active entries under which a step is sparse.", None, type=Number(0, 1))
    decoder: str = option(
        "random: its directions stay as drawn, a baseline in a run of its own.",
        "trained",
        type=click.Choice(["trained", "random"]),
    )
    # "free": the L1 term is λ · Σ z_i ‖w_i‖, which no norm can evade
    decoder_norm: str = option(
        "free: of any norm, by which L1 is weighted.", "unit", preset=True, type=click.Choice(["unit", "free"])
    )


START_ROWS = 1024  # of the first batch, that a kind's own parameters are started from


class Late:
    """Numbers on their way from a device: reading them waits until they have arrived, and for nothing that was queued later."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.Event | None = None
        self._host = values
        if values.device.type != "cpu":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.Event(values.device)
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


@dataclass(kw_only=True, frozen=True, slots=True)
class Begun:
    """The forward half of a step: what its second half needs."""

    x: Tensor  # what is reconstructed, [B, d] as it came
    centred: Tensor  # [B, d] in the products' precision
    hidden: Hidden
    encoded: Encoded
    counts: Late  # see `TorchKernels.counts`; where entries were chosen, the least of them too


@dataclass(kw_only=True, frozen=True, slots=True)
class StepResult:
    """Scalars of one batch, before the update. What is read from `late` waits for the device to reach the step's end.

    If `finite` is false the weights were left as they were, and stay so whatever follows (only `step_count` goes on): a host
    that reads a step late loses nothing.
    """

    step: int  # steps before this one
    l1: float  # the L1 term of the loss, λ included
    l0: float
    sparse: bool
    values: int  # of the batch
    late: Late  # sum of squared errors, norm of the gradient, and the mean of the prefixes' sums of squared errors
    least: float = 0.0  # activation that was kept, where they were chosen

    @property
    def mse(self) -> float:
        return self.late.read()[0] / self.values

    @property
    def loss(self) -> float:
        return self.late.read()[2] / self.values + self.l1

    @property
    def grad_norm(self) -> float:
        return self.late.read()[1]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def pick_kernels(precision: str, device: torch.device) -> TorchKernels:
    """The fastest implementation for this device and precision; plain torch where there is no other."""
    if precision == "bf16" and device.type == "cuda":
        from residual_saes.train.kernels.cuda import TritonKernels
        from residual_saes.train.kernels.hopper import HopperKernels

        return HopperKernels() if torch.cuda.get_device_capability(device) == (9, 0) else TritonKernels()
    if precision == "bf16" and device.type == "cpu":
        from residual_saes.train.kernels.cpu import load_native

        return load_native() or TorchKernels()
    return TorchKernels()


class TrainingSae:
    """Weights, moments and the step of one SAE. Shapes as in `kernels`; everything lies on one device."""

    def __init__(
        self,
        d_model: int,
        n_features: int,
        config: StepConfig,
        kernels: TorchKernels,
        device: torch.device,
        seed: int,
        own: tuple[str, ...] = (),
        *,
        transcodes: bool = False,
        skip: bool = False,
        wake_after: int | None = None,
    ) -> None:
        """`own` names parameters [F] that a kind has beside the weights; `start_own` gives them values. One that `transcodes`
        reconstructs other rows than it reads, with `skip` from an affine map of these as well. A kind wakes
        features that were silent for more than `wake_after` steps."""
        self.config, self.kernels, self.device = config, kernels, device
        self.d, self.n_features = d_model, n_features
        self._compute = COMPUTE[config.precision]
        self._trains_decoder = config.decoder == "trained"
        self._free = config.decoder_norm == "free"
        self._transcodes, self._wake_after = transcodes, wake_after
        self._master = torch.float64 if config.precision == "fp64" else torch.float32
        # Drawn on the CPU, so that every device starts from the same SAE.
        directions = torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(seed), dtype=self._master)
        directions /= directions.norm(dim=1, keepdim=True)
        # With relu(a) = a/2 + |a|/2 over F random directions, an encoder 2d/F times the decoder starts at x̂ ≈ x.
        self.w_enc, self.w_dec = (directions * (2 * d_model / n_features)).to(device), directions.to(device)
        self.bias = torch.zeros(n_features + 2 * d_model, dtype=self._master, device=device)
        self.own: Own = {name: torch.zeros(n_features, dtype=self._master, device=device) for name in own}
        self.w_skip = torch.zeros(d_model, d_model, dtype=self._master, device=device) if skip else None  # [d, d], y from x
        self.moments = {f"{k}.{n}": torch.zeros_like(w) for n, w in self._parameters().items() for k in "mv"}
        self.step_count = 0
        self._whole = torch.ones((), dtype=torch.bool, device=device)  # no step so far was other than finite
        self.last_active = torch.zeros(n_features, dtype=torch.int32, device=device)  # step of each feature's last firing
        # What the products read; Adam writes them in the pass in which it has the row at hand.
        self._enc, self._dec = self.w_enc.to(self._compute, copy=True), self.w_dec.to(self._compute, copy=True)
        self._skip = None if self.w_skip is None else self.w_skip.to(self._compute, copy=True)
        self._norms = torch.ones(n_features, dtype=self._master, device=device)  # of the rows, where they are free

    def _parameters(self) -> dict[str, Tensor]:
        skip = {} if self.w_skip is None else {"w_skip": self.w_skip}
        return {"w_enc": self.w_enc, "w_dec": self.w_dec, "bias": self.bias} | self.own | skip

    @property
    def b_enc(self) -> Tensor:
        return self.bias[: self.n_features]

    @property
    def b_pre(self) -> Tensor:
        return self.bias[self.n_features : self.n_features + self.d]

    @property
    def b_dec(self) -> Tensor:
        return self.bias[self.n_features + self.d :]

    def init_centre(self, x: Tensor, y: Tensor | None = None) -> None:
        """Start b_pre at the mean of some activations [tokens, d]; of a transcoder b_dec at the mean of what it reconstructs,
        and the encoder where the output is about the best linear map of what is read."""
        self.b_pre.copy_(x.double().mean(0))
        if y is not None:
            self.b_dec.copy_(y.double().mean(0))
            started = self.w_enc.double() @ _linear_map(x.double() - self.b_pre, y.double() - self.b_dec)
            if bool(torch.isfinite(started).all()) and started.any():  # or x or y is the same in every row, or holds a NaN
                self.w_enc.copy_(started)
            self._enc.copy_(self.w_enc)

    def start_own(self, x: Tensor, start: Callable[[Tensor], Own]) -> None:
        """Start a kind's own parameters where it says of relu's values for rows of a batch x [B, d], after `init_centre`."""
        centred = x[:START_ROWS].to(self._master) - self.b_pre
        for name, values in start(torch.relu(centred @ self.w_enc.t() + self.b_enc)).items():
            self.own[name].copy_(values)

    def step(
        self, x: Tensor, *, lr: float, l1: float, workspace: Workspace, hidden: Hidden = RELU, y: Tensor | None = None
    ) -> StepResult:
        """Train on x [B, d] (float16 as cached, or wider) with this λ and hidden layer; y [B, d] is what a transcoder
        is to make of it. Nothing is changed if loss or gradient is not finite."""
        return self.finish(self.begin(x, workspace, hidden, y), lr=lr, l1=l1, workspace=workspace)

    def begin(self, x: Tensor, workspace: Workspace, hidden: Hidden = RELU, y: Tensor | None = None) -> Begun:
        """Encode a batch. As many steps as the workspace has slots may be begun before the first of them is finished: then the
        device has work while the host reads the counts."""
        centred = self.kernels.centre(x, self.b_pre, self._compute)
        b_enc = self.b_enc * self._norms if self._free else self.b_enc
        encoded = hidden.encode(self.kernels, centred, self._enc, b_enc, self.own, workspace)
        counts = self.kernels.counts(encoded.activation)
        if encoded.least is not None:
            counts = torch.cat([counts, encoded.least.double()[None]])
        return Begun(x=x if y is None else y, centred=centred, hidden=hidden, encoded=encoded, counts=Late(counts))

    def finish(self, begun: Begun, *, lr: float, l1: float, workspace: Workspace) -> StepResult:
        """Decode, go back, and update; see `step`."""
        x, centred, z, activation = begun.x, begun.centred, begun.encoded.z, begun.encoded.activation
        batch, below = x.shape[0], self.config.sparse_below
        active, total, listed, frequent, *least = begun.counts.read()
        l0, prefixes = active / batch, begun.hidden.prefixes(self.n_features)
        nested = Nested(self.kernels, prefixes) if len(prefixes) > 1 else None
        kernels = nested or self.kernels
        if nested is not None:
            listed, frequent = active, 0.0
        l1_scale = l1 / batch / (self.n_features if self.config.l1_reduction == "mean" else 1)
        # A frequent feature costs its share of the dense products, which leaves that much less to the entries.
        room = (self.kernels.sparse_below if below is None else below) * z.numel()
        sparse = listed < room * (1 - frequent / self.n_features)
        report = partial(
            StepResult,
            step=self.step_count,
            l1=l1_scale * total,
            l0=l0,
            sparse=sparse,
            values=x.numel(),
            least=sum(least),
        )
        if not math.isfinite(total):  # a NaN in the batch; what follows could not even list the active entries
            self._whole.fill_(False)
            self.step_count += 1
            return report(late=Late(torch.full((3,), math.nan)))
        scale = 2 / x.numel()
        bias = self.b_dec if self._transcodes else self.b_pre + self.b_dec
        if self._skip is not None:
            x = x.to(self._master) - mm(centred, self._skip.t())
        if sparse:
            entries = kernels.compact(z, activation, int(listed), int(frequent))
            g, g_hidden, square = kernels.sparse_residual(entries, self._dec, x, bias, scale, l1_scale)
            grads = kernels.sparse_weight_grads(entries, self._dec, g, centred, g_hidden, l1_scale, workspace)
        else:
            g, square = kernels.dense_residual(z, self._dec, x, bias, scale)
            grads = kernels.dense_weight_grads(z, activation, self._dec, g, centred, l1_scale, workspace)
        dw_enc, dw_dec, db_enc = grads
        if self._free:
            db_enc = self.kernels.unfold_(dw_enc, dw_dec, db_enc, self.w_enc, self.w_dec, self.b_enc, self._norms)
        db_dec = g.sum(0, dtype=self._master)
        db_pre = -(db_enc @ self.w_enc) if self._transcodes else db_dec - db_enc @ self.w_enc
        if self.w_skip is not None:
            db_pre -= db_dec @ self.w_skip
        d_bias = torch.cat([db_enc, db_pre, db_dec])
        d_own = begun.hidden.own_grads(self.kernels, begun.encoded, self.own, g, self._dec)
        d_skip = None if self._skip is None else mm(g.t(), centred)
        matrices = [dw_enc] + [dw_dec] * self._trains_decoder + ([] if d_skip is None else [d_skip])
        square_norm = sum(self.kernels.square_sum(grad) for grad in matrices)
        norm = (square_norm + d_bias.double().square().sum()).sqrt()
        late = torch.stack([(square if nested is None else nested.last_square).double(), norm, square.double()])
        self._whole.logical_and_(torch.isfinite(late).all())
        self._update(dw_enc, dw_dec, d_skip, d_bias, d_own, begun, norm, lr)
        return report(late=Late(late))

    def _update(
        self,
        dw_enc: Tensor,
        dw_dec: Tensor,
        d_skip: Tensor | None,
        d_bias: Tensor,
        d_own: Own,
        begun: Begun,
        grad_norm: Tensor,
        lr: float,
    ) -> None:
        """Clip, Adam and the unit norm, or nothing where a step was not finite: that is settled on the device."""
        self.step_count += 1
        self.last_active.masked_fill_((begun.encoded.kept > 0) & self._whole, self.step_count)
        c, m = self.config, self.moments
        clip = (c.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        clip = torch.where(self._whole, clip, math.nan)
        adam = AdamStep(step=self.step_count, lr=lr, clip=clip, beta1=c.beta1, beta2=c.beta2)
        update = self.kernels.adam_
        update(self.w_enc, m["m.w_enc"], m["v.w_enc"], dw_enc, adam, copy=self._enc)
        if self._trains_decoder:
            update(self.w_dec, m["m.w_dec"], m["v.w_dec"], dw_dec, adam, unit_norm=not self._free, copy=self._dec)
        if self.w_skip is not None and d_skip is not None:
            update(self.w_skip, m["m.w_skip"], m["v.w_skip"], d_skip, adam, copy=self._skip)
        for name, w, grad in (("bias", self.bias, d_bias), *((name, self.own[name], d_own[name]) for name in d_own)):
            update(w[None], m[f"m.{name}"][None], m[f"v.{name}"][None], grad.to(self._master)[None], adam)
        if self._wake_after is not None:
            silent = (self.step_count - self.last_active > self._wake_after) & self._whole
            begun.hidden.wake_(silent, begun.encoded.activation, self.b_enc, self.own, self._norms)
        if self._free:
            self._fold()

    def _fold(self) -> None:
        """What the products read where rows are free: the same function with rows of unit norm, in which the L1 term is the
        plain one. Σ z_i ‖w_i‖ of (w_enc, b_enc, w_dec) is Σ z_i of (‖w‖ · w_enc, ‖w‖ · b_enc, w_dec / ‖w‖)."""
        self._norms = self.kernels.fold_(self.w_enc, self.w_dec, self._enc, self._dec)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on bit for bit; tensors on the training device."""
        return self._parameters() | self.moments | {"last_active": self.last_active}

    def load_state(self, state: dict[str, Tensor], step_count: int) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.step_count = step_count
        self._whole.fill_(True)
        if self._skip is not None and self.w_skip is not None:
            self._skip.copy_(self.w_skip)
        if self._free:
            self._fold()
        else:
            self._enc.copy_(self.w_enc)
            self._dec.copy_(self.w_dec)

    def snapshot(self, config: dict[str, Any], stats: dict[str, Any], threshold: Tensor | float | None = None) -> Sae:
        """The SAE as it is now, with decoder rows of unit norm; shares memory with this one where they are kept at it. As a
        function of its own, without a batch, it leaves out activations up to `threshold`, of all features or of each."""
        sae = Sae(
            w_enc=self.w_enc, w_dec=self.w_dec, b_enc=self.b_enc, b_pre=self.b_pre, b_dec=self.b_dec, skip=self.w_skip,
            config=config, stats=stats,
        )  # fmt: skip
        if threshold is not None:
            sae.threshold = torch.zeros_like(self.b_enc) + threshold  # of what the products see
        if self._free:
            norms = row_norms(self.w_dec)
            sae.w_enc, sae.w_dec, sae.b_enc = sae.w_enc * norms[:, None], sae.w_dec / norms[:, None], sae.b_enc * norms
        return sae


def _linear_map(x: Tensor, y: Tensor) -> Tensor:
    """M [d, d] by which M x is nearest to y, both [B, d] about their means; a ridge of the size of its own error keeps few rows
    from deciding."""
    square = x.t() @ x
    ridge = square.trace() / len(x) * torch.eye(len(square), dtype=x.dtype, device=x.device)
    across: Tensor = torch.linalg.solve_ex(square + ridge, x.t() @ y).result
    return across.t()
