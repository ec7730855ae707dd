"""The step against float64 autograd on the loss as DESIGN writes it, and as the papers of other kinds do."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.train.kernels.base import Activation, TorchKernels, Workspace
from residual_saes.train.kernels.cpu import load_native
from residual_saes.train.sparsity.base import RELU, RISE, Hidden, Revivable, Unfused
from residual_saes.train.sparsity.batchtopk import LargestOfBatch
from residual_saes.train.sparsity.jumprelu import BANDWIDTH, FALL, LOG, LOWEST, Jump
from residual_saes.train.sparsity.matryoshka import LargestNested
from residual_saes.train.sparsity.topk import TopK
from residual_saes.train.step import Begun, StepConfig, TrainingSae

CPU = torch.device("cpu")
D, F, B = ODD = 24, 100, 37
EVEN = 32, 128, 64  # multiples of 32: the sizes for which AMX has products of its own
K = 3  # activations a token that the others keep
HIDDEN: dict[str, Hidden] = {
    "relu": RELU,
    "batchtopk": LargestOfBatch(K),
    "topk": Unfused(TopK(k=K)),
    "jumprelu": Jump(factor=0.8),
    "matryoshka": LargestNested(K, (0.2, 0.5)),
}
WEIGHTS = ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec")
# bfloat16 keeps 8 bits: an entry is off by 0.4 %, and an activation near zero can fall on the other side of it, which alone
# makes an error of up to 8 % of the worst gradient in one of 30 draws, in plain torch as well; and up to 18 % where it moves
# entries over the edge of a choice. Draws are other ones on processors with other vectors.
PRECISIONS = [("fp32", False, ODD, 1e-5), ("bf16", False, ODD, 0.1), ("bf16", True, ODD, 0.1), ("bf16", True, EVEN, 0.1)]


def problem(
    seed: int,
    precision: str,
    sparse_below: float,
    *,
    reduction: str = "sum",
    native: bool = False,
    size: tuple[int, int, int] = ODD,
    norm: str = "unit",
    kind: str = "relu",
    **target: bool,
) -> tuple[TrainingSae, Tensor]:
    """An SAE with nothing at a special value, about 5 % active, and a batch."""
    d, f, b = size
    torch.manual_seed(seed)
    kernels = load_native() if native else TorchKernels()
    assert kernels is not None
    config = StepConfig(
        precision=precision, sparse_below=sparse_below, l1_reduction=reduction, clip_norm=1e9, decoder_norm=norm
    )
    sae = TrainingSae(d, f, config, kernels, CPU, seed, (LOG,) if kind == "jumprelu" else (), **target)
    for thresholds in sae.own.values():
        thresholds.copy_(0.3 * torch.randn(f) - 0.7)
    sae.w_enc.add_(0.2 * torch.randn(f, d))
    sae.bias.copy_(0.3 * torch.randn(f + 2 * d))
    sae.b_enc.sub_(1.6)
    if sae.w_skip is not None:
        sae.w_skip.copy_(0.1 * torch.randn(d, d))
    if norm == "free":
        sae.w_dec.mul_(0.5 + torch.rand(f, 1))
    sae.load_state(sae.state(), 0)  # the products' copies follow the masters
    return sae, torch.randn(b, d).half()


class Jumps(torch.autograd.Function):
    """(JumpReLU, step) of h at θ, with the gradients that the paper gives them: arXiv:2407.14435, equations 11 and 12."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, threshold, width)
        return h * (h > threshold), (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold, width = ctx.saved_tensors
        kernel = (((h - threshold) / width).abs() < 0.5).to(h.dtype) / width
        return grads[0] * (h > threshold), -(kernel * (threshold * grads[0] + grads[1])).sum(0), None


def autograd(
    sae: TrainingSae, x: Tensor, l1: float, reduction: str, kind: str = "relu", y: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, from the formula and nothing else; of a transcoder with y to make of x."""
    names = WEIGHTS if sae.w_skip is None else (*WEIGHTS, "w_skip")
    leaves = {name: getattr(sae, name).double().clone().requires_grad_() for name in names}
    x = x.double()
    z = torch.relu((x - leaves["b_pre"]) @ leaves["w_enc"].t() + leaves["b_enc"])
    sizes = z * leaves["w_dec"].norm(dim=1) if sae.config.decoder_norm == "free" else z
    loss: Any = 0
    if kind == "jumprelu":
        leaves[LOG] = sae.own[LOG].double().clone().requires_grad_()
        threshold = 0.8 * leaves[LOG].exp()
        jumps: Any = Jumps.apply(sizes, threshold, BANDWIDTH * threshold.detach())  # type: ignore[no-untyped-call]
        sizes, steps = jumps
        z = sizes / leaves["w_dec"].norm(dim=1) if sae.config.decoder_norm == "free" else sizes
        (counts,) = torch.autograd.grad(steps.sum(), leaves[LOG], retain_graph=True)
    elif kind != "relu":
        rows = sizes if kind == "topk" else sizes.flatten()[None]
        chosen = torch.zeros_like(rows).scatter(1, rows.topk(K * len(x) // len(rows)).indices, 1.0).view_as(z)
        z, sizes = z * chosen, sizes * chosen
    parts = (z[:, None] * nested(sae.n_features, kind)) @ leaves["w_dec"] + leaves["b_dec"]
    if y is None:
        parts = parts + leaves["b_pre"]
    if sae.w_skip is not None:
        parts = parts + ((x - leaves["b_pre"]) @ leaves["w_skip"].t())[:, None]
    wanted = x if y is None else y.double()
    sparsity = sizes.sum(1).mean() / (sae.n_features if reduction == "mean" else 1)
    loss = loss + (parts - wanted[:, None]).square().mean() + l1 * sparsity
    loss.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    if kind == "jumprelu":  # what leaves L0 as it is
        grads[LOG] = grads[LOG] - grads[LOG].sum() / counts.sum() * counts
    return float(loss.detach()), grads


def nested(n_features: int, kind: str) -> Tensor:
    """[prefixes, F] of 1 and 0: which features each prefix has."""
    ends = (
        [20, 50, 100] if kind == "matryoshka" and n_features == F else [26, 64, 128] if kind == "matryoshka" else [n_features]
    )
    return torch.stack([(torch.arange(n_features) < end).double() for end in ends])


def gradients(
    sae: TrainingSae, x: Tensor, l1: float, kind: str = "relu", y: Tensor | None = None
) -> tuple[float, bool, dict[str, Tensor]]:
    """What the step hands to Adam: from the first moment after one step, which is (1 − β₁) times the gradient."""
    workspace = Workspace(len(x), sae.d, sae.n_features, sae.config.precision, CPU)
    result = sae.step(x, lr=0.0, l1=l1, workspace=workspace, hidden=HIDDEN[kind], y=y)
    m = {name.removeprefix("m."): 10 * tensor.double() for name, tensor in sae.moments.items() if name.startswith("m.")}
    parts = torch.split(m.pop("bias"), [sae.n_features, sae.d, sae.d])
    return result.loss, result.sparse, m | dict(zip(("b_enc", "b_pre", "b_dec"), parts, strict=True))


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_float64_step_is_autograd_exactly(sparse_below: float, reduction: str) -> None:
    sae, x = problem(1, "fp64", sparse_below, reduction=reduction)
    wanted_loss, wanted = autograd(sae, x, 0.05, reduction)
    loss, sparse, got = gradients(sae, x, 0.05)
    assert sparse == bool(sparse_below)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert worst(got, wanted) < 1e-12


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_every_option_in_float64_is_autograd_exactly(sparse_below: float, norm: str, kind: str) -> None:
    """Free rows and every hidden layer, in every combination."""
    sae, x = problem(1, "fp64", sparse_below, norm=norm, kind=kind)
    l1 = 0.0 if kind == "jumprelu" else 0.05
    wanted_loss, wanted = autograd(sae, x, l1, "sum", kind)
    loss, sparse, got = gradients(sae, x, l1, kind)
    assert sparse == bool(sparse_below)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert worst(got, wanted) < 1e-12


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize(("precision", "native", "size", "bound"), PRECISIONS)
def test_free_rows_in_other_precisions_are_near_float64(
    precision: str, native: bool, size: tuple[int, int, int], bound: float, sparse_below: float, kind: str
) -> None:
    sae, x = problem(2, precision, sparse_below, native=native, size=size, norm="free", kind=kind)
    l1 = 0.0 if kind == "jumprelu" else 0.05
    wanted_loss, wanted = autograd(sae, x, l1, "sum", kind)
    loss, _, got = gradients(sae, x, l1, kind)
    assert loss == pytest.approx(wanted_loss, rel=bound / 5)
    # which entries are chosen, or near to a threshold, hangs on their rounding
    assert worst(got, wanted) < bound * {"relu": 1, "jumprelu": 5}.get(kind, 3)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize(("precision", "native", "size", "bound"), PRECISIONS)
def test_other_precisions_are_near_float64(
    precision: str, native: bool, size: tuple[int, int, int], bound: float, sparse_below: float, seed: int
) -> None:
    sae, x = problem(seed, precision, sparse_below, native=native, size=size)
    wanted_loss, wanted = autograd(sae, x, 0.05, "sum")
    loss, _, got = gradients(sae, x, 0.05)
    assert loss == pytest.approx(wanted_loss, rel=bound / 5)
    assert worst(got, wanted) < bound


@pytest.mark.parametrize("native", [False, True])
def test_dense_and_sparse_steps_train_the_same_sae(native: bool) -> None:
    ends = []
    for sparse_below in (0.0, 1.0):
        sae, _ = problem(5, "bf16", sparse_below, native=native)
        workspace = Workspace(B, D, F, "bf16", CPU)
        torch.manual_seed(9)
        for _ in range(30):
            sae.step(torch.randn(B, D).half(), lr=1e-3, l1=0.01, workspace=workspace)
        ends.append({k: v.double() for k, v in sae.state().items() if k in ("w_enc", "w_dec", "bias")})
    assert worst(ends[0], ends[1]) < 5e-3


@pytest.mark.parametrize("norm", ["unit", "free"])
def test_adam_is_torchs_adam(norm: str) -> None:
    """Thirty steps against torch.optim.Adam with clipping, renormalising after every step."""
    sae, _ = problem(6, "fp64", 0.0, norm=norm)
    sae.config = StepConfig(precision="fp64", sparse_below=0.0, clip_norm=0.05)
    leaves = {name: getattr(sae, name).clone().requires_grad_() for name in WEIGHTS}
    optimiser = torch.optim.Adam(leaves.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    workspace = Workspace(B, D, F, "fp64", CPU)
    for _ in range(30):
        x = torch.randn(B, D).half()
        z = torch.relu((x.double() - leaves["b_pre"]) @ leaves["w_enc"].t() + leaves["b_enc"])
        residual = z @ leaves["w_dec"] + leaves["b_dec"] + leaves["b_pre"] - x.double()
        penalty = (z * leaves["w_dec"].norm(dim=1) if norm == "free" else z).sum(1).mean()
        optimiser.zero_grad()
        (residual.square().mean() + 0.05 * penalty).backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 0.05)
        optimiser.step()
        if norm == "unit":
            with torch.no_grad():
                leaves["w_dec"] /= leaves["w_dec"].norm(dim=1, keepdim=True)
        sae.step(x, lr=1e-2, l1=0.05, workspace=workspace)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(sae, name), leaf.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("keep", [None, 5])
def test_a_snapshot_with_rows_folded_to_unit_norm_reconstructs_as_before(keep: int | None) -> None:
    sae, x = problem(13, "fp64", 1.0, norm="free")
    workspace, wide = Workspace(B, D, F, "fp64", CPU), x.double()
    hidden = RELU if keep is None else LargestOfBatch(keep)
    for _ in range(5):
        result = sae.step(x, lr=0.05, l1=0.0, workspace=workspace, hidden=hidden)
    spread = sae.w_dec.norm(dim=1)
    assert float(spread.max() / spread.min()) > 1.05
    threshold = None if keep is None else 0.999 * result.least
    saved = sae.snapshot({}, {}, threshold)
    torch.testing.assert_close(saved.w_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    z = torch.relu((wide - sae.b_pre) @ sae.w_enc.t() + sae.b_enc)
    if keep is not None:
        z = z * (z * spread > threshold)
        assert 0 < int((z > 0).sum()) < keep * B * 1.2
    assert torch.equal(saved.encode(wide) > 0, z > 0)
    torch.testing.assert_close(saved.decode(saved.encode(wide)), z @ sae.w_dec + sae.b_dec + sae.b_pre)


@pytest.mark.parametrize("kernels", [TorchKernels(), load_native()], ids=["torch", "native"])
@pytest.mark.parametrize("count", [1, 37, 1000, 2000, B * F])
def test_exactly_as_many_entries_are_kept_as_are_asked_for(kernels: TorchKernels | None, count: int) -> None:
    """Of bfloat16 numbers among which there are many equal ones, half of them zero; and what is counted is what is there."""
    assert kernels is not None
    generator = torch.Generator().manual_seed(count)
    h = torch.randn(B, F, generator=generator).bfloat16().mul(8).round().div(8)
    z = h.t().contiguous().t() if kernels.feature_major else h
    z.relu_()
    before = z.clone()
    activation, least = kernels.keep_largest_(z, count)
    kept = z > 0
    assert int(kept.sum()) == min(count, int((before > 0).sum()))
    assert torch.equal(z[kept], before[kept]) and float(before[~kept].max()) <= float(z[kept].min())
    assert float(least) == float(before.flatten().sort(descending=True).values[count - 1])
    assert torch.equal(activation.feature_count, kept.sum(0).int())
    assert float(activation.total) == pytest.approx(float(z.double().sum()))


@pytest.mark.parametrize("hidden", [LargestOfBatch(1), Jump(factor=1.0)], ids=["batchtopk", "jumprelu"])
@pytest.mark.parametrize("kernels", [TorchKernels(), load_native()], ids=["torch", "native"])
def test_a_feature_without_an_entry_keeps_its_largest_where_features_are_revived(
    kernels: TorchKernels | None, hidden: Revivable
) -> None:
    assert kernels is not None
    sae, x = problem(14, "bf16", 1.0)
    sae.kernels = kernels
    sae.b_enc.add_(1.6)
    room = Workspace(B, D, F, "bf16", CPU)
    before = sae.begin(x, room).encoded.z.float()
    sae.own[LOG] = torch.full((F,), float(before.quantile(0.95).log()))
    plain = sae.begin(x, room, hidden).encoded.z.float()
    got = sae.begin(x, room, hidden.reviving()).encoded
    idle = (plain == 0).all(0) & (before > 0).any(0)
    assert idle.any() and not idle.all()
    wanted = torch.where(idle & (before == before.amax(0)), before, plain)
    assert torch.equal((got.z > 0).sum(0)[idle], torch.ones(int(idle.sum()), dtype=torch.int64))
    assert torch.equal(got.z.float().amax(0), wanted.amax(0)) and torch.equal(got.z[:, ~idle].float(), plain[:, ~idle])
    assert torch.equal(got.activation.feature_count, (got.z > 0).sum(0).int())
    assert torch.equal(got.kept, (plain > 0).sum(0).int())  # by which features are known to be silent
    assert RELU.reviving() is RELU


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_silent_features_are_woken_and_no_others(decoder_norm: str) -> None:
    """Of twins one wakes: they differ in the bias of features that were silent for more than two steps, which then fire."""
    config = StepConfig(precision="fp64", decoder_norm=decoder_norm)
    plain, woken = (TrainingSae(D, F, config, TorchKernels(), CPU, 5, wake_after=after) for after in (None, 2))
    x, room = torch.randn(B, D, generator=torch.Generator().manual_seed(3)), Workspace(B, D, F, "fp64", CPU)
    for sae in (plain, woken):
        sae.b_enc[::3] = -1.0
    silent = (plain.begin(x, room).encoded.kept == 0).clone()
    assert silent.any() and not silent.all()
    for _ in range(3):
        assert torch.equal(plain.b_enc, woken.b_enc)
        for sae in (plain, woken):
            result = sae.step(x, lr=1e-9, l1=0.0, workspace=room)
    risen = woken.b_enc - plain.b_enc
    mean = float(torch.relu(x.double() @ plain.w_enc.t() + plain.b_enc).sum()) / (result.l0 * B)
    torch.testing.assert_close(risen[silent], torch.full_like(risen[silent], RISE * mean), rtol=1e-4, atol=0.0)
    assert (risen[~silent] == 0).all()
    for _ in range(1000):
        woken.step(x, lr=1e-9, l1=0.0, workspace=room)
    assert (woken.last_active > 900).all()


def test_a_silent_features_threshold_falls_and_no_further_than_to_a_share_of_the_others() -> None:
    """Where all its activations are 0, it fires on nothing however low that is, and later on everything."""
    own, silent = {LOG: torch.tensor([1.0, 0.0, 2.0, -9.0])}, torch.tensor([True, False, False, True])
    bias, activation = torch.zeros(4), Activation(feature_count=torch.ones(4, dtype=torch.int32), total=torch.tensor(4.0))
    seen = []
    for _ in range(100):
        Jump(factor=1.0).wake_(silent, activation, bias, own, torch.ones(4))
        seen.append(own[LOG].tolist())
    assert seen[0] == pytest.approx([1 - FALL, 0, 2, -9]) and seen[-1] == pytest.approx([1 - LOWEST, 0, 2, -9])
    assert torch.equal(bias > 0, silent)


def test_decoder_rows_keep_unit_norm() -> None:
    sae, x = problem(7, "bf16", 0.0, native=True)
    for _ in range(5):
        sae.step(x, lr=0.1, l1=0.01, workspace=Workspace(B, D, F, "bf16", CPU))
        torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
def test_a_random_decoder_stays_as_it_was_drawn_and_all_else_is_trained_on_its_own_gradient(sparse_below: float) -> None:
    """Clipping included: the norm is that of what is trained."""
    config = StepConfig(precision="fp64", sparse_below=sparse_below, decoder="random", clip_norm=1e-3)
    sae, x = TrainingSae(D, F, config, TorchKernels(), CPU, 11), torch.randn(B, D, generator=torch.Generator().manual_seed(3))
    drawn = sae.w_dec.clone()
    _, wanted = autograd(sae, x, 0.05, "sum")
    result = sae.step(x, lr=1e-2, l1=0.05, workspace=Workspace(B, D, F, "fp64", CPU))
    norm = torch.cat([wanted[name].flatten() for name in WEIGHTS if name != "w_dec"]).norm()
    assert norm > 1e-3 and result.grad_norm == pytest.approx(float(norm))
    torch.testing.assert_close(10 * sae.moments["m.w_enc"], wanted["w_enc"] * (1e-3 / (norm + 1e-6)))
    assert torch.equal(sae.w_dec, drawn)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert not torch.equal(sae.w_enc, drawn * (2 * D / F))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("sparse_below", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, sparse_below: float, native: bool) -> None:
    sae, x = problem(8, "bf16", sparse_below, native=native)
    before = {k: v.clone() for k, v in sae.state().items()}
    x[3, 4] = bad
    result = sae.step(x, lr=0.1, l1=0.01, workspace=Workspace(B, D, F, "bf16", CPU))
    assert not result.finite and result.step == 0
    for name, tensor in sae.state().items():
        assert torch.equal(tensor, before[name]), name


def test_what_a_step_reports() -> None:
    sae, x = problem(9, "fp64", 0.0)
    z = torch.relu((x.double() - sae.b_pre) @ sae.w_enc.t() + sae.b_enc)
    result = sae.step(x, lr=0.0, l1=0.05, workspace=Workspace(B, D, F, "fp64", CPU))
    assert result.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    assert result.l1 == pytest.approx(0.05 * float(z.sum(1).mean()))
    assert result.loss == pytest.approx(result.mse + result.l1)
    assert torch.equal(sae.last_active > 0, (z > 0).any(0))


@pytest.mark.parametrize("native", [False, True])
def test_nothing_is_changed_after_a_step_that_was_not_finite_either(native: bool) -> None:
    """Its loss overflows where nobody looks before the next step is under way."""
    sae, x = problem(10, "bf16", 0.0, native=native)
    workspace = Workspace(B, D, F, "bf16", CPU)
    sae.b_dec.fill_(1e30)
    before = {k: v.clone() for k, v in sae.state().items()}
    failed = sae.step(x, lr=0.1, l1=0.01, workspace=workspace)
    sae.b_dec.fill_(0.0)
    before["bias"][F + D :] = 0.0
    assert sae.step(x, lr=0.1, l1=0.01, workspace=workspace).finite
    assert not failed.finite and failed.step == 0
    for name, tensor in sae.state().items():
        assert torch.equal(tensor, before[name]), name
    sae.load_state(sae.state(), 0)
    sae.step(x, lr=0.1, l1=0.01, workspace=workspace)
    assert not torch.equal(sae.w_enc, before["w_enc"])


def test_steps_that_are_under_way_together_are_those_that_follow_one_another() -> None:
    """Each SAE is a batch ahead of its update, as on a GPU."""
    ends = []
    for slots in (1, 2):
        saes = [problem(seed, "bf16", below)[0] for seed, below in ((11, 0.0), (12, 1.0))]
        workspace = Workspace(B, D, F, "bf16", CPU, slots=slots)
        finish = functools.partial(TrainingSae.finish, lr=1e-3, l1=0.01, workspace=workspace)
        begun: dict[int, Begun] = {}
        losses = []
        for step in range(3):
            x = torch.randn(B, D, generator=torch.Generator().manual_seed(step)).half()
            for which, sae in enumerate(saes):
                if which in begun:
                    losses.append(finish(sae, begun[which]).loss)
                begun[which] = sae.begin(x, workspace)
                if slots == 1:
                    losses.append(finish(sae, begun.pop(which)).loss)
        losses += [finish(saes[which], last).loss for which, last in begun.items()]
        ends.append((losses, [sae.w_dec for sae in saes]))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(one, other) for one, other in zip(ends[0][1], ends[1][1], strict=True))
