"""The correctness half of `python -m bench gpu`: nothing is worth timing before it is right.

The kernels one by one are checked by tests/train/kernels/test_cuda.py; here the whole step is, by what it is defined to
compute, through the same calls as the trainer makes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import ours
from bench.lab import Lab
from shared.files import PAGE, page_aligned, write_file
from shared.sites import Site
from train.kernels.base import TorchKernels
from train.step import StepConfig, TrainingSae

NO_CLIP = 1e9
L1 = 0.01
Size = tuple[int, int, int]  # tokens, features, d
NAMES = ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec")


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    """What a step can do that the published one does not."""

    decoder_norm: str = "unit"
    keep: float | None = None  # of the nominal L0


RECIPES = {
    "": Recipe(),
    ", free rows": Recipe(decoder_norm="free"),
    ", BatchTopK": Recipe(decoder_norm="free", keep=0.5),
}


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
    got, wanted = got.detach().double(), wanted.detach().double().to(got.device)
    norm = wanted.norm()
    return float((got - wanted).norm() / norm) if norm else float(got.norm())


# ------------------------------------------------------------------------------------------------------- language model


def activations(lab: Lab) -> None:
    """Every layer's activations on the device in fp32 and bf16, against fp32 on the CPU."""
    from harvest.language_model import ResidualModel

    s, cpu = lab.sizes, torch.device("cpu")
    torch.manual_seed(0)
    config = ours.lm_config(d=s.d, layers=s.layers, vocab=s.vocab)
    wide = ours.base_model(config, torch.float32, lab.device)
    bases = {
        "float32": (wide, 1e-4),
        "bfloat16": (ours.base_model(config, torch.bfloat16, lab.device, like=wide), 3e-2),
    }
    reference = copy.deepcopy(wide).to(cpu)
    tokens = torch.randint(0, s.vocab, (2, s.check_context))
    layers = tuple(map(Site, range(s.layers)))

    def run(base: Any, device: torch.device) -> list[Tensor]:
        taken: dict[Site, Tensor] = {}
        ResidualModel(base, layers, device).run(tokens, lambda layer, output: taken.update({layer: output.float().cpu()}))
        return [taken[layer] for layer in layers]

    wanted = run(reference, cpu)
    for dtype, (base, bound) in bases.items():
        errors = [error(got, want) for got, want in zip(run(base, lab.device), wanted, strict=True)]
        worst = max(range(len(errors)), key=lambda layer: errors[layer])
        every = " ".join(f"{e:.1e}" for e in errors)
        lab.check(f"activations {dtype}, worst layer {worst}", errors[worst], bound, note=f"layers: {every}")


def half_range(lab: Lab) -> None:
    """Nothing infinite and no NaN goes into a cache, what did not fit is counted, and every row lies at its place."""
    from harvest.neox import put_rows
    from harvest.writer import FP16_MAX

    x = torch.randn(64, 1024, device=lab.device, dtype=torch.bfloat16)
    x[0, :5] = torch.tensor([1e6, -1e6, torch.inf, -torch.inf, torch.nan], device=lab.device).to(x.dtype)
    wanted = x.half()
    wanted[0, :5] = torch.tensor([FP16_MAX, -FP16_MAX, FP16_MAX, -FP16_MAX, 0.0], device=lab.device).half()
    place = torch.randperm(64).to(lab.device)
    data = torch.zeros(64, 1024, device=lab.device, dtype=torch.float16)
    count = put_rows(x, place, data)
    lab.require("float16: rows at their places", torch.equal(data[place], wanted))
    lab.require("float16: what did not fit is counted", int(count) == 5, f"{int(count)} of 5")


def direct_io(lab: Lab) -> None:
    """Does the disk read straight into pinned memory and write straight from it, past the page cache?"""
    data = torch.ones(64 * PAGE * lab.sizes.sequences, dtype=torch.uint8, pin_memory=lab.cuda)
    path = lab.scratch / "probe"
    write_file(path, memoryview(data.numpy().data))
    name = f"direct {{}} {'pinned' if lab.cuda else 'page-aligned'} memory"
    if not lab.cuda:  # torch aligns its own to 64 bytes; pinned memory is the driver's
        data = page_aligned(data.numel() // 2).view(torch.uint8)
    for word, flags, move in (("reads into", os.O_RDONLY, os.readv), ("writes from", os.O_WRONLY, os.writev)):
        try:
            with ours.raw_file(path, flags, direct=True) as fd:
                works = move(fd, [memoryview(data.numpy().data)]) > 0
            lab.keep(name.format(word), float(works), "", "1: they work; else everything goes through the page cache")
        except OSError as refused:
            lab.keep(name.format(word), 0.0, "", f"refused, the page cache is used: {refused}")
    path.unlink()


# ----------------------------------------------------------------------------------------------------------------- step


def nominal_l0(features: int) -> float:
    return min(0.03 * features, 150)


def problem(lab: Lab, size: Size, *, sparse: bool, seed: int, norm: str = "unit") -> tuple[TrainingSae, Tensor]:
    """An SAE with no weight at a special value, about 3 % active (L0 150 at most), and a batch."""
    tokens, features, d = size
    torch.manual_seed(seed)
    config = StepConfig(precision="bf16", sparse_below=1.0 if sparse else 0.0, clip_norm=NO_CLIP, decoder_norm=norm)
    sae = TrainingSae(d, features, config, lab.kernels, lab.device, seed)
    state = sae.state()
    state["w_enc"].add_(0.2 * torch.randn(features, d, device=lab.device) / d**0.5)
    state["bias"].copy_(0.3 * torch.randn(features + 2 * d, device=lab.device))
    spread = sae.b_enc.clone()
    ours.set_l0(sae, nominal_l0(features))
    sae.b_enc.add_(spread)
    if norm == "free":
        state["w_dec"].mul_(0.5 + torch.rand(features, 1, device=lab.device))
    sae.load_state(state, 0)  # the products' copies follow the masters
    return sae, torch.randn(tokens, d, device=lab.device).half()


Gradients = dict[str, Tensor]  # by parameter; "loss" among them


def autograd(sae: TrainingSae, x: Tensor, recipe: Recipe, kept: Tensor) -> Gradients:
    """Loss and gradients in float64, from the formula and nothing else; of BatchTopK, given which entries it kept."""
    leaves = {name: getattr(sae, name).double().clone().requires_grad_() for name in NAMES}
    wide = x.double()
    pre = (wide - leaves["b_pre"]) @ leaves["w_enc"].t() + leaves["b_enc"]
    z = torch.relu(pre) if recipe.keep is None else pre * kept
    out = z @ leaves["w_dec"] + leaves["b_dec"] + leaves["b_pre"]
    weighted = z * leaves["w_dec"].norm(dim=1) if recipe.decoder_norm == "free" else z
    loss = (out - wide).square().mean() + L1 * weighted.sum(1).mean()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None} | {"loss": loss}


def step_gradients(sae: TrainingSae, x: Tensor, recipe: Recipe) -> tuple[Gradients, Tensor]:
    """What the step hands to Adam: its first moment after one step is (1 − β₁) times the gradient. And which entries of z
    are active."""
    workspace = ours.workspace(len(x), sae.d, sae.n_features, sae.device)
    keep = None if recipe.keep is None else recipe.keep * nominal_l0(sae.n_features)
    begun = sae.begin(x, workspace, keep)
    result = sae.finish(begun, lr=0.0, l1=L1, workspace=workspace)
    w_enc, w_dec, bias = (10 * sae.state()[f"m.{name}"].double() for name in ("w_enc", "w_dec", "bias"))
    biases = torch.split(bias, [sae.n_features, sae.d, sae.d])
    gradients = dict(zip(NAMES, (w_enc, w_dec, *biases), strict=True))
    return gradients | {"loss": torch.tensor(result.loss)}, begun.z > 0


def step(lab: Lab) -> None:
    """Loss and every gradient, dense and sparse, at the job's width too; then thirty steps of both ways.

    Pre-activations are held in bfloat16, so a few entries near zero fall on the other side of it: that is the error of a
    bf16 step against float64, larger at tiny sizes. The definition in torch has it too, so ours may be as far off as that.
    At BatchTopK's threshold a whole entry changes sides, and with it a tenth of the gradient: so there float64 is told which
    entries were kept, and the choice is held against the definition's from the same z, where nothing at all may differ.
    """
    for size in lab.sizes.check_steps:
        _compare_both(lab, size)
    size = lab.sizes.check_steps[0]
    (dense, sparse), losses = zip(*(train(lab, size, sparse=way, steps=30) for way in (False, True)), strict=True)
    lab.check("thirty steps, sparse against dense: losses", max(abs(a / b - 1) for a, b in zip(*losses, strict=True)), 1e-3)
    # Adam divides by the gradient's own size, so where gradients are tiny the weights differ by more than the losses.
    lab.check("thirty steps, sparse against dense: weights", max(error(sparse[k], dense[k]) for k in ("w_enc", "w_dec")), 0.05)


def odd_steps(lab: Lab) -> None:
    """Sizes that no tile divides. Late, because what reads or writes out of bounds loses the device."""
    for size in lab.sizes.odd_steps:
        _compare_both(lab, size)


def _compare_both(lab: Lab, size: Size) -> None:
    for words, recipe in RECIPES.items():
        for sparse in (False, True):
            name = f"{'sparse' if sparse else 'dense'} step{words}, B F d {' '.join(map(str, size))}"
            lab.attempt(name, partial(_compare_step, lab, name, size, sparse, recipe))
            lab.free()
    name = f"keep_largest_, B F d {' '.join(map(str, size))}"
    lab.attempt(name, partial(_compare_choice, lab, name, size))


def _compare_step(lab: Lab, name: str, size: Size, sparse: bool, recipe: Recipe) -> None:
    sae, x = problem(lab, size, sparse=sparse, seed=1, norm=recipe.decoder_norm)
    twin = problem(lab, size, sparse=sparse, seed=1, norm=recipe.decoder_norm)[0]
    twin.kernels = TorchKernels()
    with deterministic():
        (got, kept), (definition, its_kept) = (step_gradients(each, x, recipe) for each in (sae, twin))
    exact = autograd(sae, x, recipe, kept)
    allowed = _errors(definition, autograd(twin, x, recipe, its_kept))
    # One entry on the other side of zero is much among so few, and Triton's interpreter rounds where the device does not.
    few = size[0] < 100
    lab.check(f"{name}: of float64 autograd", *_worst(got, exact, 0.3 if few else 0.01, allowed))
    if recipe.keep is None:
        lab.check(f"{name}: of the definition in torch", *_worst(got, definition, 0.3 if few else 0.04))


def _compare_choice(lab: Lab, name: str, size: Size) -> None:
    """As many as are asked for, of which some are equal to the least; and more than there are."""
    sae, x = problem(lab, size, sparse=True, seed=1)
    workspace = ours.workspace(len(x), sae.d, sae.n_features, sae.device)
    for words, keep in (("some", 0.5), ("all", 2.0)):
        z = sae.begin(x, workspace).z
        z, its_z = z.clone(), z.clone()
        count = round(keep * float((z > 0).sum()))
        with deterministic():
            (got, least), (wanted, its_least) = (
                kernels.keep_largest_(each, count) for kernels, each in ((lab.kernels, z), (TorchKernels(), its_z))
            )
        right = all(map(torch.equal, (z, least, got.feature_count), (its_z, its_least, wanted.feature_count)))
        note = f"{count:,} of {z.numel():,}, least {float(least):.4g}, equal to it and kept {int((z == least).sum()):,}"
        lab.require(f"{name}, {words}: as the definition, bit for bit", right, note)


def _errors(got: Gradients, wanted: Gradients) -> dict[str, float]:
    return {name: error(got[name], wanted[name]) for name in wanted}


def _worst(
    got: Gradients, wanted: Gradients, least: float, allowed: dict[str, float] | None = None
) -> tuple[float, float, str]:
    """The error that is nearest to its bound, or furthest above: one and a half of what is allowed, or the least bound."""
    errors = _errors(got, wanted)
    bounds = {name: max(least, 1.5 * allowed[name]) if allowed else least for name in errors}
    worst = max(errors, key=lambda name: errors[name] / bounds[name])
    return errors[worst], bounds[worst], f"worst: {worst}"


# --------------------------------------------------------------------------------------------------------------- resume


def train(lab: Lab, size: Size, *, sparse: bool, steps: int, stop: int | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """Train on batches that depend on the step alone; with `stop`, through a file and a new SAE after that many steps."""
    tokens, features, d = size
    sae, _ = problem(lab, size, sparse=sparse, seed=3)
    workspace = ours.workspace(tokens, d, features, lab.device)
    losses = []
    for index in range(steps):
        if index == stop:
            sae = _through_a_file(lab, sae)
        generator = torch.Generator(lab.device).manual_seed(index)
        x = torch.randn(tokens, d, generator=generator, device=lab.device).half()
        losses.append(sae.step(x, lr=1e-3, l1=L1, workspace=workspace).loss)
    return {name: tensor.clone() for name, tensor in sae.state().items()}, losses


def _through_a_file(lab: Lab, sae: TrainingSae) -> TrainingSae:
    """A killed run as the next one finds it: an SAE of another seed, filled from what was saved."""
    path = lab.memory / "state.pt"
    torch.save({"step": sae.step_count, "state": {k: v.cpu() for k, v in sae.state().items()}}, path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    path.unlink()
    fresh = TrainingSae(sae.d, sae.n_features, sae.config, sae.kernels, lab.device, seed=99)
    fresh.load_state(found["state"], found["step"])
    return fresh


def resume(lab: Lab) -> None:
    """Trained straight through, and with a kill half way: the same bits. Long at a small size, short at full size."""
    s = lab.sizes
    for size, steps in ((s.check_steps[0], s.resume_steps), ((s.tokens, s.features, s.d), 4)):
        for sparse in (False, True):
            name = f"{steps} {'sparse' if sparse else 'dense'} steps of {size[0]} tokens, F {size[1]}"
            lab.attempt(name, partial(_resume, lab, name, size, sparse, steps))
            lab.free()


def _resume(lab: Lab, name: str, size: Size, sparse: bool, steps: int) -> None:
    with deterministic():
        straight, losses = train(lab, size, sparse=sparse, steps=steps)
        resumed, again = train(lab, size, sparse=sparse, steps=steps, stop=steps // 2)
    same = losses == again and all(torch.equal(straight[key], resumed[key]) for key in straight)
    lab.require(f"{name}: killed and resumed, bit for bit", same)
    if steps > 10:
        lab.require(f"{name}: the loss fell", losses[-1] < losses[0], f"{losses[0]:.4g} to {losses[-1]:.4g}")
