"""Finding active entries in float16 and computing them in float32, against encoding in float32. A CPU's products of float16 add
up in float32 and are rounded once, as a GPU's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.eval.measure import active, metrics
from residual_saes.eval.measure.active import Dense, Encoder, Finder, Listed
from residual_saes.shared.runs.sae import Sae
from tests.conftest import measure_site
from tests.devices import DEVICES
from tests.train.kernels.test_cuda import INTERPRETED, compiled, mend_interpreter, needs_triton, run_in_its_own_process

D, F, N, CONTEXT = 64, 512, 192, 8
KINDS: dict[str, dict[str, Any]] = {
    "l1": {},
    "topk": {"sparsity": {"kind": "topk", "k": 5}},
    "batchtopk": {"threshold": 0.25},
    "jumprelu": {"threshold": "each"},
    "matryoshka": {"threshold": 0.125, "sparsity": {"kind": "matryoshka", "prefixes": [64, 0.5]}},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def exact(kind: str) -> tuple[Sae, Tensor]:
    """An SAE and rows all of whose sums are exact in float32, in any order, but not in float16. A third of its features have
    one row each for which they are at their threshold, 2^-24 above or as much below. Some rows are very long or short, or 0."""
    torch.manual_seed(0)
    x = torch.randint(-4096, 4097, (N, D)) * 2.0**-18
    w = torch.randint(-8, 9, (F, D)) * 2.0**-3
    fields = KINDS[kind]
    threshold = fields.get("threshold", 0.0)
    least = torch.randint(0, 4, (F,)) / 8 if threshold == "each" else torch.full((F,), float(threshold))
    b = -torch.full((F,), 0.03125)
    b_pre = torch.randint(-4096, 4097, (D,)) * 2.0**-18
    at, feature = torch.arange(F // 3) % N, torch.arange(F // 3)
    b[feature] = least[feature] - (x[at] * w[feature]).sum(1) + torch.tensor([2.0**-24, 0, -(2.0**-24)])[feature % 3]
    x[180:184], x[184:186], x[186:188], x[188] = x[180:184] * 2.0**9, x[184:186] * 2.0**-9, 0, x[188] * 2.0**4
    sae = Sae(
        w_enc=w, w_dec=w / 32, b_enc=b, b_pre=torch.zeros(D), b_dec=torch.randn(D) / 64,
        config={k: v for k, v in fields.items() if k == "sparsity"}, stats={},
        threshold=least if "threshold" in fields else None,
    )  # fmt: skip
    sae.b_pre = b_pre
    return sae, x + b_pre


@pytest.mark.parametrize("device", DEVICES)
@kinds
def test_what_is_found_is_what_float32_finds(kind: str, device: str) -> None:
    sae, x = exact(kind)
    sae, x = sae.to(torch.device(device)), x.to(device)
    wanted = sae.encode(x)
    row, feature, value = Finder(sae).active(x)
    assert torch.equal(row, row.sort().values)
    got = torch.zeros_like(wanted).index_put_((row, feature), value)
    assert len(row) == int((got > 0).sum()) == int((wanted > 0).sum()) > 100
    if kind == "topk":  # of equal ones any may be taken
        got, wanted = got.sort(1).values, wanted.sort(1).values
    assert torch.equal(got, wanted)
    if kind != "topk":
        near = [int((wanted[torch.arange(F // 3) % N, torch.arange(F // 3)][i::3] > 0).sum()) for i in range(3)]
        assert near[0] > 50 and near[1] == near[2] < 10, "all that are above their threshold, of the others changed rows"


@kinds
def test_every_metric_is_that_of_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = exact(kind)
    blocks = [(x[:100], torch.arange(100) % CONTEXT), (x[100:], torch.arange(N - 100) % CONTEXT)]

    def measured(share: float, finder: bool) -> dict[str, float]:
        monkeypatch.setattr(active, "_FEW", {"cpu": share})
        monkeypatch.setattr(metrics, "Encoder", lambda sae: Encoder(sae, Finder(sae) if finder else None))
        activations, (tally,) = measure_site(blocks, [sae], CONTEXT)
        found, features = tally.finish(activations, 1e-3, 1e-3)
        lists = {f"{name} {i}": v for name, t in features.tensors().items() for i, v in enumerate(t.tolist())}
        floors = {f"floor {width}": v for width, v in found.floors.items()}
        return {k: v for k, v in (vars(found) | lists | floors).items() if v is not None and k != "floors"}

    dense, listed, found = measured(-1, False), measured(2, False), measured(2, True)
    assert listed == pytest.approx(dense, rel=1e-6, nan_ok=True)
    assert found == pytest.approx(dense, rel=1e-6, nan_ok=True)
    assert dense["fvu"] and dense["l0"]


@kinds
def test_few_are_computed_in_vain(kind: str) -> None:
    """Where rows and features are random, as far as float16 can tell them apart."""
    torch.manual_seed(1)
    x, w = torch.randn(300, 256) * 20 + 3, torch.nn.functional.normalize(torch.randn(1024, 256), dim=1)
    sae = exact(kind)[0]
    sae = Sae(
        w_enc=w, w_dec=w, b_enc=torch.full((1024,), -40.0), b_pre=torch.full((256,), 3.0), b_dec=torch.zeros(256),
        config=sae.config, stats={}, threshold=None if sae.threshold is None else torch.full((1024,), 3.0),
    )  # fmt: skip
    finder, asked = Finder(sae), []
    values = finder._values
    finder._values = lambda x, row, feature: asked.append(len(row)) or values(x, row, feature)  # type: ignore
    row, feature, _ = finder.active(x)
    z = sae.encode(x)
    missed = z.clone().index_put_((row, feature), torch.zeros(len(row)))
    assert float(missed.max()) < 1e-3, "none but what two sums of 256 products may differ in"
    assert 0 < asked[0] < 1.2 * len(row) if sae.k is None else asked[0] == 300 * 23


def test_rows_that_float16_cannot_order_are_encoded_throughout() -> None:
    torch.manual_seed(2)
    sae, x = exact("topk")
    sae.w_enc[:] = sae.w_enc[:1] + torch.randn(F, D) * 2.0**-14
    sae.b_enc[:] = 0.5
    row, feature, value = Finder(sae).active(x)
    got = torch.zeros(N, F).index_put_((row, feature), value)
    torch.testing.assert_close(got.sort(1).values, sae.encode(x).sort(1).values, rtol=1e-6, atol=1e-7)


def test_the_first_rows_tell_whether_there_are_many() -> None:
    sae, x = exact("l1")
    few, many = Encoder(sae), Encoder(sae)
    sparse = x[:100][(sae.encode(x[:100]) > 0).float().mean(1) < 1 / 12]
    dense = (100 * sae.w_enc[:5]) + sae.b_pre
    assert isinstance(few(sparse), Listed) and isinstance(few(sparse), Listed)
    many(dense)
    assert isinstance(many(sparse), Dense)
    assert torch.equal(few.matrix(x), sae.encode(x)) and torch.equal(Encoder(sae, Finder(sae)).matrix(x), sae.encode(x))
    reconstructed = Encoder(sae, Finder(sae)).reconstruct(x.view(2, -1, D))
    torch.testing.assert_close(reconstructed, sae.reconstruct(x, sae.encode(x)).view(2, -1, D), rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize(("functions", "interpret"), [("check_*", "1"), ("compile_*", "0")])
@pytest.mark.slow
def test_in_its_own_process(functions: str, interpret: str, tmp_path: Path) -> None:
    run_in_its_own_process(__file__, functions, interpret, tmp_path)


def lists(n: int, d: int, features: int) -> tuple[Tensor, Tensor, Listed]:
    torch.manual_seed(3)
    z = torch.randn(n, features).relu() * (torch.rand(n, features) < 0.3)
    z[n // 2] = 0
    row, feature = z.nonzero().unbind(1)
    return torch.randn(n, d), torch.randn(features, d), Listed.of(row, feature, z[row, feature], n, features)


@pytest.mark.parametrize(("n", "d", "features"), [(9, 200, 70), (5, 16, 3)])
def check_along_the_entries(n: int, d: int, features: int) -> None:
    if INTERPRETED:
        mend_interpreter()
    from residual_saes.eval.measure import active_cuda

    x, w, of = lists(n, d, features)
    got = active_cuda.dots(x, w, of.start, of.feature)
    torch.testing.assert_close(got, active.dots(x, w, of.row, of.feature), rtol=1e-5, atol=1e-5)
    got = active_cuda.weighted_rows(of.start, of.feature, of.value, w)
    torch.testing.assert_close(got, of.decoded(w), rtol=1e-5, atol=1e-5)
    assert not got[n // 2].any()


@pytest.mark.parametrize("d", [1024, 77])
def compile_every_kernel(monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    from residual_saes.eval.measure import active_cuda

    launches: list[Any] = []
    monkeypatch.setattr(active_cuda, "launch", lambda kernel, grid, *args, **meta: launches.append((kernel, args, meta)))
    x, w, of = lists(32, d, 64)
    active_cuda.dots(x, w, of.start, of.feature)
    active_cuda.weighted_rows(of.start, of.feature, of.value, w)
    assert [bool(compiled(launch, 90).asm["ptx"]) for launch in launches] == [True, True]
