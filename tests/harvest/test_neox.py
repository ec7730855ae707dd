"""The fast forward against the model it stands in for, both measured from float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, GPTNeoXConfig

from residual_saes.harvest import neox as native
from residual_saes.harvest.language_model import LanguageModel
from residual_saes.shared import lm
from residual_saes.shared.compile import load
from residual_saes.shared.sites import Site, parse_sites
from tests.conftest import ROOT

CPU = torch.device("cpu")
DEMO = ROOT / "demo" / "neox-2m"
HOOKS = ("attn_out", "mlp_in", "mlp_out", "resid_post")
needs_library = pytest.mark.skipif(load(ROOT / "harvest/neox.c") is None, reason="neox.c does not compile here")


def neox(dtype: torch.dtype = torch.bfloat16, **options: object) -> nn.Module:
    """Three layers in which every weight, bias and norm has a say."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200, vocab_size=50, **options
    )  # fmt: skip
    model: nn.Module = AutoModel.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.15)
        if "layernorm" in name and name.endswith("weight"):
            parameter += 1
    return model.to(torch.bfloat16).to(dtype)


def demo(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model: nn.Module = AutoModel.from_pretrained(DEMO, dtype=torch.bfloat16).eval().requires_grad_(False)
    return model.to(dtype)


def outputs(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    activations: list[Tensor] = []
    model.run(tokens, lambda layer, output: activations.append(output))
    return activations


def plain(base: nn.Module) -> LanguageModel:
    model = LanguageModel(base, parse_sites(f"0-{len(base.layers) - 1}", hooks=HOOKS), CPU)
    model.fast = None
    return model


def fast(base: nn.Module) -> LanguageModel:
    model = LanguageModel(base, parse_sites(f"0-{len(base.layers) - 1}", hooks=HOOKS), CPU)
    assert model.fast is not None
    return model


@pytest.fixture(params=[False, True], ids=["bfloat16 products", "float32 products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways on every processor."""
    monkeypatch.setattr(lm, "bfloat16_is_slow", lambda _: request.param)


@needs_library
@pytest.mark.parametrize(
    "make",
    [
        neox,
        lambda dtype=torch.bfloat16: neox(dtype, rotary_pct=1.0),
        lambda dtype=torch.bfloat16: neox(dtype, rotary_pct=0.5, rotary_emb_base=100),
        demo,
    ],
    ids=["pythia's options", "rotary_pct 1", "rotary_pct 0.5", "demo"],
)
def test_no_further_from_float64_than_transformers(make: Callable[..., nn.Module], products: None) -> None:
    tokens = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(1))
    exact, theirs, ours = (outputs(m, tokens) for m in (plain(make(torch.float64)), plain(make()), fast(make())))
    kinds = [torch.float32, torch.bfloat16] * 2  # what attention adds, what the MLP reads and adds, the stream
    assert [our.dtype for our in ours] == kinds * (len(ours) // 4)
    for i, (want, their, our) in enumerate(zip(exact, theirs, ours, strict=True)):
        assert our.shape == want.shape
        # queries and keys that are not turned are rounded once more; in the stream, in which more is added up, it does not show
        assert (our - want).norm() <= (1.05 if i % 4 else 1.3) * (their - want).norm()
        assert (our - want).abs().max() <= 2 * (their - want).abs().max()


@needs_library
@pytest.mark.parametrize("sites", ["0,2", "1.mlp_out", "0,2,0.mlp_out", "1.mlp_in,2.attn_out"])
def test_wanted_sites_alone_reach_the_sink(sites: str) -> None:
    """And the values of one do not depend on which others are wanted."""
    tokens, model, every = torch.arange(40).reshape(2, 20), LanguageModel(neox(), parse_sites(sites), CPU), fast(neox())
    assert model.fast is not None
    outputs: dict[Site, Tensor] = {}
    model.run(tokens, lambda site, output: outputs.update({site: output}))
    assert tuple(outputs) == parse_sites(sites)
    every.run(tokens, lambda site, output: torch.testing.assert_close(outputs.get(site, output), output, rtol=0, atol=0))


@needs_library
def test_the_split_into_passes_changes_no_bit(products: None) -> None:
    tokens, model = torch.arange(160).reshape(8, 20) % 50, fast(neox())
    whole = outputs(model, tokens)
    for step in (1, 2, 3):
        pieces = [outputs(model, piece) for piece in tokens.split(step)]
        for layer, output in enumerate(whole):
            assert torch.equal(torch.cat([piece[layer] for piece in pieces]), output)


@pytest.mark.parametrize(
    "options", [{"use_parallel_residual": False}, {"attention_bias": False}, {"hidden_act": "relu"}], ids=str
)
def test_other_options_take_the_hooks(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "bfloat16_is_slow", lambda _: False)  # else products are widened, which rounds otherwise
    tokens, base = torch.arange(24).reshape(2, 12), neox(**options)
    want = base(input_ids=tokens, output_hidden_states=True).hidden_states
    model = LanguageModel(base, parse_sites("0,1,2"), CPU)
    assert model.fast is None
    for layer in (0, 1):
        assert torch.equal(outputs(model, tokens)[layer], want[layer + 1])


def test_float32_takes_the_hooks_and_is_near_float64() -> None:
    tokens = torch.arange(24).reshape(2, 12)
    model, exact = (LanguageModel(neox(dtype), parse_sites("0,1,2"), CPU) for dtype in (torch.float32, torch.float64))
    assert model.fast is None
    for got, want in zip(outputs(model, tokens), outputs(exact, tokens), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@needs_library
def test_a_model_it_does_not_fit_is_said_and_takes_the_hooks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    angles = native.NeoxForward._angles
    monkeypatch.setattr(native.NeoxForward, "_angles", lambda self, context: angles(self, context)[::-1])
    assert LanguageModel(neox(), parse_sites("0,1,2"), CPU).fast is None
    assert "note: the fast forward does not fit this model (results " in capsys.readouterr().err
    base = neox()
    base.rotary_emb = nn.Identity()  # as after a rename inside transformers: the fast way cannot even begin
    assert native.neox_forward(base) is None
    assert "note: the fast forward does not fit this model (" in capsys.readouterr().err


def test_without_a_compiler_the_hooks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda source: None)
    assert LanguageModel(neox(), parse_sites("0"), CPU).fast is None
