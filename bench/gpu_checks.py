"""The correctness half of `python -m bench gpu`: nothing is worth timing before it is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.lab import Lab
from bench.ours import base_model, lm_config, set_l0
from train.kernels import COMPUTE, Active, AdamStep, TorchKernels, Workspace
from train.step import StepConfig, TrainingSae, pick_kernels

WEIGHTS = ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec")
NO_CLIP = 1e9


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic operations, and every new tensor poisoned with NaN (or the largest integer) until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the Euclidean norm, in float64."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    norm = wanted.norm()
    return float((got - wanted).norm() / norm) if norm else float(got.norm())


# ------------------------------------------------------------------------------------------------------- language model


def activations(lab: Lab) -> None:
    """Every layer's activations on the device in fp32 and bf16, against fp32 on the CPU."""
    from harvest.model import ResidualModel

    s, cpu = lab.sizes, torch.device("cpu")
    torch.manual_seed(0)
    config = lm_config(d=s.d, layers=s.layers, vocab=s.vocab)
    reference = base_model(config, torch.float32)
    copies = {dtype: base_model(config, dtype, like=reference) for dtype in (torch.float32, torch.bfloat16)}
    tokens = torch.randint(0, s.vocab, (2, s.check_context))
    layers = tuple(range(s.layers))

    def run(base: nn.Module, device: torch.device) -> list[Tensor]:
        taken: dict[int, Tensor] = {}
        ResidualModel(base, layers, device).run(tokens, lambda layer, output: taken.update({layer: output.float().cpu()}))
        return [taken[layer] for layer in layers]

    wanted = run(reference, cpu)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        errors = [error(got, want) for got, want in zip(run(copies[dtype], lab.device), wanted, strict=True)]
        worst = max(range(len(errors)), key=lambda layer: errors[layer])
        every = " ".join(f"{e:.1e}" for e in errors)
        lab.check(f"activations {str(dtype)[6:]}, worst layer {worst}", errors[worst], bound, note=f"layers: {every}")


def half_range(lab: Lab) -> None:
    """Nothing infinite and no NaN goes into a cache, and what did not fit is counted."""
    from harvest.writer import FP16_MAX, to_float16

    x = torch.randn(64, 128, device=lab.device, dtype=torch.bfloat16)
    bad = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan], device=lab.device)
    x[0, :5] = bad.to(x.dtype)
    half, count = to_float16(x)
    wanted = [FP16_MAX, -FP16_MAX, FP16_MAX, -FP16_MAX, 0.0]
    same = torch.equal(half[1:], x[1:].to(torch.float16)) and half[0, :5].tolist() == wanted
    lab.require("float16: too large and NaN are replaced and counted", same and int(count) == 5)


# ----------------------------------------------------------------------------------------------------------------- step


def problem(lab: Lab, *, precision: str, sparse: bool, seed: int) -> tuple[TrainingSae, Tensor]:
    """An SAE with no weight at a special value, about 5 % active, and a batch."""
    tokens, features, d = lab.sizes.check_step
    torch.manual_seed(seed)
    config = StepConfig(precision=precision, sparse_below=1.0 if sparse else 0.0, clip_norm=NO_CLIP)
    kernels = lab.kernels if precision == "bf16" else pick_kernels(precision, lab.device)
    sae = TrainingSae(d, features, config, kernels, lab.device, seed)
    sae.w_enc.add_(0.2 * torch.randn(features, d, device=lab.device) / d**0.5)
    sae.bias.copy_(0.3 * torch.randn(features + 2 * d, device=lab.device))
    spread = sae.b_enc.clone()
    set_l0(sae, 0.03 * features)
    sae.b_enc.add_(spread)
    sae.load_state(sae.state(), 0)  # the products' copies follow the masters
    return sae, torch.randn(tokens, d, device=lab.device).half()


def autograd(sae: TrainingSae, x: Tensor, l1: float) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in float64, from the formula and nothing else."""
    leaves = {name: getattr(sae, name).double().clone().requires_grad_() for name in WEIGHTS}
    wide = x.double()
    z = torch.relu((wide - leaves["b_pre"]) @ leaves["w_enc"].t() + leaves["b_enc"])
    out = z @ leaves["w_dec"] + leaves["b_dec"] + leaves["b_pre"]
    loss = (out - wide).square().mean() + l1 * z.sum(1).mean()
    loss.backward()
    return float(loss.detach()), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _step_gradients(sae: TrainingSae, x: Tensor, l1: float) -> tuple[float, dict[str, Tensor]]:
    """What the step hands to Adam: its first moment after one step is (1 − β₁) times the gradient."""
    workspace = Workspace(len(x), sae.d, sae.n_features, sae.config.precision, sae.device)
    result = sae.step(x, lr=0.0, l1=l1, workspace=workspace)
    m = {n.removeprefix("m."): 10 * t.double() for n, t in sae.moments.items() if n.startswith("m.")}
    f, d = sae.n_features, sae.d
    parts = torch.split(m.pop("bias"), [f, d, d])
    return result.loss, m | dict(zip(("b_enc", "b_pre", "b_dec"), parts, strict=True))


def step(lab: Lab) -> None:
    """Loss and every gradient, dense and sparse, against float64 autograd; then thirty steps of both ways.

    Pre-activations are held in bfloat16, so a few entries near zero fall on the other side of it: that is the error of
    the bf16 steps against float64, larger at tiny sizes. The definition in torch rounds at the same places and must be
    met much closer.
    """
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.08 if lab.dry else 0.04)):
        for sparse in (False, True):
            way = f"{precision} {'sparse' if sparse else 'dense'}"
            sae, x = problem(lab, precision=precision, sparse=sparse, seed=1)
            wanted = autograd(sae, x, 0.01)
            twin = problem(lab, precision=precision, sparse=sparse, seed=1)[0]
            twin.kernels = TorchKernels()
            with deterministic():
                got, definition = (_step_gradients(each, x, 0.01) for each in (sae, twin))
            lab.check(f"step {way} against float64 autograd", *_worst(got, wanted, bound))
            # Triton's interpreter cuts float32 down to bfloat16 where the device rounds.
            lab.check(f"step {way} against the definition in torch", *_worst(got, definition, 5e-3 if lab.cuda else 2e-2))
    ends = [_train(lab, sparse=sparse, steps=30, stop=None)[0] for sparse in (False, True)]
    worst_end = max(error(ends[1][k], ends[0][k]) for k in ("w_enc", "w_dec", "bias"))
    lab.check("thirty bf16 steps, sparse against dense", worst_end, 5e-3)


Gradients = tuple[float, dict[str, Tensor]]


def _worst(got: Gradients, wanted: Gradients, bound: float) -> tuple[float, float, str]:
    errors = {name: error(got[1][name], wanted[1][name]) for name in WEIGHTS}
    errors["loss"] = abs(got[0] / wanted[0] - 1)
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], bound, f"worst: {worst}"


# --------------------------------------------------------------------------------------------------------------- resume


def _train(lab: Lab, *, sparse: bool, steps: int, stop: int | None) -> tuple[dict[str, Tensor], list[float]]:
    """Train on batches that depend on the step alone; with `stop`, through a file and a new SAE after that many steps."""
    tokens, features, d = lab.sizes.check_step
    sae, _ = problem(lab, precision="bf16", sparse=sparse, seed=3)
    workspace = Workspace(tokens, d, features, "bf16", lab.device)
    losses = []
    for index in range(steps):
        if index == stop:
            sae = _through_a_file(lab, sae)
        x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(index)).half().to(lab.device)
        losses.append(sae.step(x, lr=1e-3, l1=0.01, workspace=workspace).loss)
    return {name: tensor.clone() for name, tensor in sae.state().items()}, losses


def _through_a_file(lab: Lab, sae: TrainingSae) -> TrainingSae:
    """A killed run as the next one finds it: an SAE of another seed, filled from what was saved."""
    path: Path = lab.scratch / "state.pt"
    torch.save({"step": sae.step_count, "state": {k: v.cpu() for k, v in sae.state().items()}}, path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    path.unlink()
    fresh = TrainingSae(sae.d, sae.n_features, sae.config, sae.kernels, lab.device, seed=99)
    fresh.load_state(found["state"], found["step"])
    return fresh


def resume(lab: Lab) -> None:
    """Trained straight through, twice, and with a kill half way: the same bits."""
    steps = lab.sizes.resume_steps
    with deterministic():
        for sparse in (False, True):
            runs = [_train(lab, sparse=sparse, steps=steps, stop=stop) for stop in (None, None, steps // 2)]
            same = all(
                one[1] == other[1] and all(torch.equal(one[0][k], other[0][k]) for k in one[0]) for one, other in pairwise(runs)
            )
            fell = runs[0][1][-1] < runs[0][1][0]
            way = "sparse" if sparse else "dense"
            lab.require(f"{steps} {way} steps: repeated, and killed and resumed, bit for bit", same)
            lab.require(f"{steps} {way} steps: the loss fell", fell, f"{runs[0][1][0]:.4g} to {runs[0][1][-1]:.4g}")


# -------------------------------------------------------------------------------------------------------------- kernels


def kernels(lab: Lab) -> None:
    """Every method against the definition in torch, from the same inputs, at odd and at full sizes."""
    # The interpreter cuts float32 down to bfloat16 where the device rounds, so it is compared in float32.
    dtype = torch.bfloat16 if lab.cuda else torch.float32
    for tokens, features, d in lab.sizes.check_kernels:
        torch.manual_seed(tokens)
        with deterministic():
            errors = _kernel_errors(lab, tokens, features, d, dtype)
        worst = max(errors, key=lambda name: errors[name])
        name = f"{type(lab.kernels).__name__} B={tokens} F={features} d={d}"
        lab.check(name, errors[worst], 3e-3, note=f"worst of {len(errors)} results: {worst}")


def _kernel_errors(lab: Lab, tokens: int, features: int, d: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors; for lists and counts 0 if they are the same, else 1."""
    ours, torchs = lab.kernels, TorchKernels()
    device = lab.device
    h = torch.randn(tokens, features, device=device).to(dtype)
    bias = torch.randn(features, device=device) / 2 - 2
    bias[features // 2], bias[features // 3], bias[[0, -1]] = -60.0, 60.0, 1.0  # never, always and often active
    w = (torch.randn(features, d, device=device) / d**0.5).to(dtype)
    x = torch.randn(tokens, d, device=device).half()
    centred = x.to(dtype)
    gz = torch.randn(tokens, features, device=device).to(dtype)
    found: dict[str, float] = {}
    z, their_z = h.clone(), h.clone()
    act, their_act = ours.activate_(z, bias), torchs.activate_(their_z, bias)
    found["z"] = error(z, their_z)
    found["total"] = error(act.total, their_act.total)
    found["counts"] = float(
        not (torch.equal(act.row_count, their_act.row_count) and torch.equal(act.feature_count, their_act.feature_count))
    )
    nnz = int(their_act.row_count.sum())
    active, theirs = ours.compact(z, act, nnz, 0), torchs.compact(their_z, their_act, nnz, 0)
    lists = [n for n in Active.__dataclass_fields__ if n != "frequent"]
    found["lists"] = float(not all(torch.equal(getattr(active, n), getattr(theirs, n)) for n in lists))
    masked, their_masked = gz.clone(), gz.clone()
    l1_grad = 0.3125  # exact in bfloat16
    found["mask sums"] = error(ours.mask_(masked, their_z, act, l1_grad), torchs.mask_(their_masked, their_z, act, l1_grad))
    found["masked"] = error(masked, their_masked)
    b_dec = torch.randn(d, device=device)
    got = ours.sparse_residual(theirs, w, x, b_dec, 1e-2, 1e-3)
    wanted = torchs.sparse_residual(theirs, w, x, b_dec, 1e-2, 1e-3)
    found |= {n: error(a, b) for n, a, b in zip(("g", "g_hidden", "squares"), got, wanted, strict=True)}
    precision = next(name for name, one in COMPUTE.items() if one == dtype)
    rooms = [Workspace(1, d, features, precision, device) for _ in range(3)]
    grads, again, their_grads = (
        kernels.sparse_weight_grads(theirs, w, wanted[0], centred, wanted[1], 1e-3, room)
        for kernels, room in zip((ours, ours, torchs), rooms, strict=True)
    )
    found |= {n: error(a, b) for n, a, b in zip(("dw_enc", "dw_dec", "db_enc"), grads, their_grads, strict=True)}
    found["weight_grads twice"] = float(not all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)))
    for unit_norm in (False, True):
        one, other = (_adam(k, w, their_grads[1], unit_norm) for k in (ours, torchs))
        found[f"adam_ unit_norm={unit_norm}"] = max(error(a, b) for a, b in zip(one, other, strict=True))
    return found


def _adam(kernels: TorchKernels, w: Tensor, grad: Tensor, unit_norm: bool) -> list[Tensor]:
    """Masters and moments after two steps, and the copy, which lies feature-last."""
    master = w.to(torch.float32, copy=True)
    m, v = torch.zeros_like(master), torch.zeros_like(master)
    copy = torch.empty(w.shape[1], w.shape[0], dtype=w.dtype, device=w.device).t()
    for number in (1, 2):
        adam = AdamStep(step=number, lr=1e-3, clip=0.5)
        kernels.adam_(master, m, v, grad, adam, unit_norm=unit_norm, copy=copy)
    return [master, m, v, copy]
