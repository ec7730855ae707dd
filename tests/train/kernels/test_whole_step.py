"""The whole step with the kernels that are picked for a device, through the trainer's own calls, by what it is defined to
compute: against float64 autograd, against plain torch, against itself after a kill. On a GPU at the job's width, too, and at
sizes that no tile divides."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.sparsity.base import RELU
from residual_saes.train.sparsity.batchtopk import LargestOfBatch
from residual_saes.train.step import StepConfig, TrainingSae, pick_kernels
from tests.devices import on_gpu

L1 = 0.01
NAMES = ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec")
Size = tuple[int, int, int]  # tokens, features, d
Gradients = dict[str, Tensor]  # by parameter, and "loss"
SMALL: Size = (32, 128, 24)
ODD = ((33, 70, 50), (300, 1003, 200))
WIDE = ((512, 4096, 512), (2048, 32_768, 1024))
sizes = pytest.mark.parametrize(
    ("device", "size"), [("cpu", SMALL), ("cpu", (19, 75, 24)), *(on_gpu(size) for size in (*WIDE, *ODD))]
)
ways = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    decoder_norm: str = "unit"
    keep: float | None = None  # of the nominal L0


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic operations, and every new tensor poisoned with NaN (or the largest integer) until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def nominal_l0(features: int) -> float:
    return min(0.03 * features, 150)


def problem(device: str, size: Size, *, sparse: bool, seed: int, norm: str = "unit") -> tuple[TrainingSae, Tensor]:
    """An SAE with no weight at a special value, about 3 % active (L0 150 at most), and a batch."""
    tokens, features, d = size
    torch.manual_seed(seed)
    config = StepConfig(precision="bf16", sparse_below=float(sparse), clip_norm=1e9, decoder_norm=norm)
    where = torch.device(device)
    sae = TrainingSae(d, features, config, pick_kernels("bf16", where), where, seed)
    state = sae.state()
    state["w_enc"].add_(0.2 * torch.randn(features, d, device=where) / d**0.5)
    state["bias"].copy_(0.3 * torch.randn(features + 2 * d, device=where))
    pre = (torch.randn(64, d, device=where) - sae.b_pre) @ sae.w_enc.t()
    sae.b_enc.sub_(pre.flatten().topk(round(64 * nominal_l0(features))).values[-1])
    if norm == "free":
        state["w_dec"].mul_(0.5 + torch.rand(features, 1, device=where))
    sae.load_state(state, 0)  # the products' copies follow the masters
    return sae, torch.randn(tokens, d, device=where).half()


def workspace(sae: TrainingSae, tokens: int) -> Workspace:
    return Workspace(tokens, sae.d, sae.n_features, "bf16", sae.device)


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
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None} | {"loss": loss.detach()}


def step_gradients(sae: TrainingSae, x: Tensor, recipe: Recipe) -> tuple[Gradients, Tensor]:
    """What the step hands to Adam: its first moment after one step is (1 − β₁) times the gradient. And which entries of z
    are active."""
    room = workspace(sae, len(x))
    hidden = RELU if recipe.keep is None else LargestOfBatch(recipe.keep * nominal_l0(sae.n_features))
    begun = sae.begin(x, room, hidden)
    active = begun.encoded.z > 0
    result = sae.finish(begun, lr=0.0, l1=L1, workspace=room)
    w_enc, w_dec, bias = (10 * sae.state()[f"m.{name}"].double() for name in ("w_enc", "w_dec", "bias"))
    biases = torch.split(bias, [sae.n_features, sae.d, sae.d])
    return dict(zip(NAMES, (w_enc, w_dec, *biases), strict=True)) | {"loss": torch.tensor(result.loss)}, active


def errors(got: Gradients, wanted: Gradients) -> dict[str, float]:
    """Relative, in the Euclidean norm, in float64."""
    pairs = {name: (got[name].double().cpu(), wanted[name].double().cpu()) for name in wanted}
    return {name: float((a - b).norm() / b.norm().clamp(min=1e-300)) for name, (a, b) in pairs.items()}


@ways
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(decoder_norm="free"), Recipe(decoder_norm="free", keep=0.5)],
    ids=["published", "free rows", "BatchTopK"],
)
@sizes
def test_loss_and_gradients_are_as_near_to_float64_as_plain_torchs(
    device: str, size: Size, recipe: Recipe, sparse: bool
) -> None:
    """Pre-activations are held in bfloat16, so a few entries near zero fall on the other side of it: that is the error of a
    bf16 step against float64, larger at tiny sizes. The definition in torch has it too, so ours may be as far off as that.
    At BatchTopK's threshold a whole entry changes sides, and with it a tenth of the gradient: so there float64 is told which
    entries were kept, and the choice is held against the definition's from the same z, where nothing at all may differ.
    """
    sae, x = problem(device, size, sparse=sparse, seed=1, norm=recipe.decoder_norm)
    twin = problem(device, size, sparse=sparse, seed=1, norm=recipe.decoder_norm)[0]
    twin.kernels = TorchKernels()
    with deterministic():
        (got, active), (plain, plainly_active) = (step_gradients(each, x, recipe) for each in (sae, twin))
    allowed = errors(plain, autograd(twin, x, recipe, plainly_active))
    few = size[0] < 100  # one entry on the other side of zero is much among so few
    for name, error in errors(got, autograd(sae, x, recipe, active)).items():
        assert error <= max(0.3 if few else 0.01, 1.5 * allowed[name]), name
    if recipe.keep is None:
        assert max(errors(got, plain).values()) <= (0.3 if few else 0.04)


@pytest.mark.parametrize("keep", [0.5, 2.0], ids=["some", "all"])
@sizes
def test_a_batchs_choice_is_plain_torchs_bit_for_bit(device: str, size: Size, keep: float) -> None:
    """As many as are asked for, of which some are equal to the least; and more than there are."""
    sae, x = problem(device, size, sparse=True, seed=1)
    z = sae.begin(x, workspace(sae, len(x))).encoded.z
    chosen, plainly_chosen = z.clone(), z.clone()
    count = round(keep * float((z > 0).sum()))
    plain = TorchKernels()
    plain.feature_major = sae.kernels.feature_major  # which of equal ones stay goes by their order in memory
    with deterministic():
        got, least = sae.kernels.keep_largest_(chosen, count)
        wanted, plain_least = plain.keep_largest_(plainly_chosen, count)
    assert torch.equal(chosen, plainly_chosen) and torch.equal(least, plain_least)
    assert torch.equal(got.feature_count, wanted.feature_count)


def train(
    device: str, size: Size, *, sparse: bool, steps: int, stop: Path | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Train on batches that depend on the step alone; with `stop` half of the steps, then through that file and a new SAE."""
    tokens, features, d = size
    sae, _ = problem(device, size, sparse=sparse, seed=3)
    room, losses = workspace(sae, tokens), []
    for index in range(steps):
        if stop is not None and index == steps // 2:
            torch.save({"step": sae.step_count, "state": {k: v.cpu() for k, v in sae.state().items()}}, stop)
            saved: dict[str, Any] = torch.load(stop, weights_only=True)
            sae = TrainingSae(d, features, sae.config, sae.kernels, sae.device, seed=99)
            sae.load_state(saved["state"], saved["step"])
        generator = torch.Generator(sae.device).manual_seed(index)
        x = torch.randn(tokens, d, generator=generator, device=sae.device).half()
        losses.append(sae.step(x, lr=1e-3, l1=L1, workspace=room).loss)
    return {name: tensor.clone() for name, tensor in sae.state().items()}, losses


@pytest.mark.parametrize(("device", "size"), [("cpu", SMALL), on_gpu(WIDE[0])])
def test_thirty_dense_and_sparse_steps_end_alike(device: str, size: Size) -> None:
    (dense, sparse), losses = zip(*(train(device, size, sparse=way, steps=30) for way in (False, True)), strict=True)
    assert max(abs(a / b - 1) for a, b in zip(*losses, strict=True)) <= 1e-3
    # Adam divides by the gradient's own size, so where gradients are tiny the weights differ by more than the losses.
    assert max(errors(sparse, {name: dense[name] for name in ("w_enc", "w_dec")}).values()) <= 0.05


@ways
@pytest.mark.parametrize(
    ("device", "size", "steps"), [("cpu", SMALL, 20), on_gpu(WIDE[0], 60), on_gpu((32_768, 32_768, 1024), 4)]
)
def test_a_training_that_is_killed_and_resumed_has_the_same_bits(
    device: str, size: Size, steps: int, sparse: bool, tmp_path: Path
) -> None:
    with deterministic():
        straight, losses = train(device, size, sparse=sparse, steps=steps)
        resumed, again = train(device, size, sparse=sparse, steps=steps, stop=tmp_path / "state.pt")
    assert losses == again and all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert steps < 10 or losses[-1] < losses[0]
