import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from residual_saes.eval.measure.features import Features, features_path, load_features, save_features
from residual_saes.eval.measure.heldout import Activations, Moments, heldout_blocks, heldout_tokens
from residual_saes.eval.measure.match import match
from residual_saes.eval.measure.metrics import Measurement, largest_cosine
from residual_saes.eval.measure.predicted import Statistics
from residual_saes.eval.measure.result import Layers, Metrics, Number, Truth
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site
from tests.conftest import Cli, measure_site

D, F, CONTEXT = 16, 50, 7
Blocks = list[tuple[Tensor, Tensor]]


def random_sae(d: int = D, features: int = F) -> Sae:
    return Sae(
        w_enc=torch.randn(features, d),
        w_dec=torch.randn(features, d) / 8,
        b_enc=-torch.linspace(5, 150, features),  # densities from a half to next to nothing
        b_pre=torch.randn(d),
        b_dec=torch.randn(d),
        config={},
        stats={},
    )


def random_blocks(n: int = 3, rows: int = 210) -> Blocks:
    """Activations with first positions ten times as large and a few directions that dominate, permuted within blocks."""
    blocks = []
    for _ in range(n):
        positions = torch.randperm(rows) % CONTEXT
        x = torch.randn(rows, D) * torch.linspace(0.1, 3, D) ** 2 + 2
        blocks.append((torch.where(positions[:, None] == 0, 10 * x, x).half(), positions))
    return blocks


def metrics(sae: Sae, blocks: Blocks, dead_at: float = 1e-5, alive_above: float = 1e-5) -> dict[str, Number]:
    activations, (measurement,) = measure_site(blocks, [sae], CONTEXT)
    return by_name(measurement.finish(activations, dead_at, alive_above)[0])


def by_name(metrics: Metrics) -> dict[str, Number]:
    """All but what only a synthetic world or a crosscoder has."""
    others = {f.name for of in (Truth, Layers) for f in dataclasses.fields(of)}
    values = {name: value for name, value in vars(metrics).items() if name not in others}
    return values | {f"floor_{width}": floor for width, floor in values.pop("floors").items()}


@dataclasses.dataclass
class Direct:
    """Everything at once, in float64, by numpy."""

    def __init__(self, sae: Sae, blocks: Blocks) -> None:
        w = {name: t.double().numpy() for name, t in sae.tensors().items()}
        self.x = torch.cat([x for x, _ in blocks]).double().numpy()
        self.position = torch.cat([p for _, p in blocks]).numpy()
        self.block = np.concatenate([np.full(len(x), i) for i, (x, _) in enumerate(blocks)])
        self.z = np.maximum((self.x - w["b_pre"]) @ w["w_enc"].T + w["b_enc"], 0)
        self.xhat = self.z @ w["w_dec"] + w["b_dec"] + w["b_pre"]
        self.r = self.xhat - self.x
        self.w = w

    def fvu(self, rows: Any, project: Any = None) -> float:
        project = np.eye(D) if project is None else project
        x = self.x[rows]
        return float(((self.r[rows] @ project) ** 2).sum() / (((x - x.mean(0)) @ project) ** 2).sum())


def test_metrics_are_their_formulas_in_float64() -> None:
    torch.manual_seed(0)
    sae, blocks = random_sae(), random_blocks()
    sae.b_enc[:7] = -1e3
    got, want = metrics(sae, blocks), Direct(sae, blocks)
    everything = np.full(630, True)
    assert got["tokens"] == 630
    assert got["mse"] == pytest.approx((want.r**2).mean(), rel=1e-5)
    assert got["fvu"] == pytest.approx(want.fvu(everything), rel=1e-5)
    assert got["fvu_uncentred"] == pytest.approx((want.r**2).sum() / (want.x**2).sum(), rel=1e-5) != got["fvu"]
    assert got["fvu_without_first"] == pytest.approx(want.fvu(want.position != 0), rel=1e-5)
    _, values, directions = np.linalg.svd(want.x - want.x.mean(0), full_matrices=False)
    away = np.eye(D) - directions[:3].T @ directions[:3]
    assert got["fvu_without_top3"] == pytest.approx(want.fvu(everything, away), rel=1e-5)
    assert got["top3_variance"] == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), rel=1e-9)
    assert len({round(float(got[f"fvu{n}"] or 0), 3) for n in ("", "_without_first", "_without_top3")}) == 3
    density = (want.z > 0).mean(0)
    assert got["dead_share"] == (density == 0).mean() == 1 - (got["frac_alive"] or 0)
    assert got["dead_share"] >= 7 / F
    assert metrics(sae, blocks, dead_at=0.02)["dead_share"] == (density <= 0.02).mean() > got["dead_share"]


def test_metrics_are_saebenchs_where_it_has_them() -> None:
    """Its formulas, as its core evaluation (0.6.0) has them, on one batch of everything."""
    torch.manual_seed(1)
    sae, blocks = random_sae(), random_blocks(1)
    sae.b_enc[:3] = -1e3
    got, direct = metrics(sae, blocks), Direct(sae, blocks)
    x, xhat, z = (torch.from_numpy(v) for v in (direct.x, direct.xhat, direct.z))
    rss, tss = (x - xhat).pow(2).sum(-1), (x - x.mean(0)).pow(2).sum(-1)
    norm_in, norm_out = torch.norm(x, dim=-1), torch.norm(xhat, dim=-1)
    density = (z > 0).double().mean(0)

    def largest(rows: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        return (unit @ unit.T).fill_diagonal_(-math.inf).max(1).values

    wanted = {
        "explained_variance": 1 - rss.mean() / (x.pow(2).sum(-1).mean() - x.mean(0).pow(2).sum()),
        "explained_variance_legacy": (1 - rss / tss).mean(),
        "cossim": ((x / norm_in[:, None]) * (xhat / norm_out[:, None])).sum(-1).mean(),
        "l2_norm_in": norm_in.mean(),
        "l2_norm_out": norm_out.mean(),
        "l2_ratio": (norm_out / norm_in).mean(),
        "relative_reconstruction_bias": norm_out.pow(2).mean() / (x * xhat).sum(-1).mean(),
        "l0": (z != 0).sum(-1).double().mean(),
        "l1": z.sum(-1).mean(),
        "frac_alive": (density > 0).double().mean(),
        "freq_over_1_percent": (density > 0.01).double().mean(),
        "freq_over_10_percent": (density > 0.1).double().mean(),
        "normalized_freq_over_1_percent": density[density > 0.01].sum() / density.sum(),
        "normalized_freq_over_10_percent": density[density > 0.1].sum() / density.sum(),
        "average_max_encoder_cosine_sim": largest(sae.w_enc).mean(),
        "average_max_decoder_cosine_sim": largest(sae.w_dec).mean(),
    }
    assert {name: got[name] for name in wanted} == pytest.approx({k: float(v) for k, v in wanted.items()}, rel=1e-5)
    assert 0 < (got["freq_over_10_percent"] or 0) < (got["freq_over_1_percent"] or 0) < (got["frac_alive"] or 0) < 1
    assert got["max_decoder_cosine_sim"] == pytest.approx(float(largest(sae.w_dec).max()), rel=1e-5)
    unit = [torch.nn.functional.normalize(w.double(), dim=1) for w in (sae.w_enc, sae.w_dec)]
    cosines = unit[0] @ unit[1].T
    assert got["average_encoder_decoder_cosine_sim"] == pytest.approx(float(cosines.diagonal().mean()), rel=1e-4)
    assert got["average_max_encoder_decoder_cosine_sim"] == pytest.approx(float(cosines.max(1).values.mean()), rel=1e-5)


def test_statistics_of_features_and_positions() -> None:
    torch.manual_seed(2)
    sae, blocks = random_sae(), random_blocks()
    activations, (tally,) = measure_site(blocks, [sae], CONTEXT)
    features, want = tally.finish(activations, 1e-5, 1e-5)[1], Direct(sae, blocks)
    assert features.density.tolist() == (want.z > 0).mean(0).astype(np.float32).tolist()
    assert features.mean.numpy() == pytest.approx(want.z.mean(0), rel=1e-4, abs=1e-7)
    assert features.mean_square.numpy() == pytest.approx((want.z**2).mean(0), rel=1e-4, abs=1e-7)
    by_position = [(want.z[want.position == p] > 0).sum(1).mean() for p in range(CONTEXT)]
    assert features.l0_by_position.numpy() == pytest.approx(by_position, rel=1e-6)
    assert by_position[0] > 2 * by_position[1]
    assert {len(tensor) for name, tensor in features.tensors().items() if name != "l0_by_position"} == {F}


def test_predicted_floors_are_those_of_the_statistics() -> None:
    torch.manual_seed(3)
    sae, blocks = random_sae(), random_blocks()
    got, want = metrics(sae, blocks, alive_above=0.05), Direct(sae, blocks)
    density = (want.z > 0).mean(0)
    alive = density > 0.05
    count, l0 = int(alive.sum()), density[alive].sum()
    alpha = 1 - l0 / count
    g = 1 / ((1 - alpha) * math.log(1 / (1 - alpha)))
    importance = np.sort((want.z**2).mean(0)[alive])[::-1]
    assert 0 < count < (density > 0).sum()
    assert (got["alive"], got["alpha"]) == (count, pytest.approx(alpha))
    assert (got["capacity"], got["critical_width"]) == (pytest.approx(g), pytest.approx(count / g))
    floors = {name: value for name, value in got.items() if name.startswith("floor_")}
    assert list(floors) == ["floor_2", "floor_4", "floor_6", "floor_8", "floor_12", "floor_16"]
    assert floors == pytest.approx({f"floor_{w}": importance[int(w * g) :].sum() for w in (2, 4, 6, 8, 12, 16)}, rel=1e-5)
    assert floors["floor_2"] > 0 == floors["floor_16"]


def test_chunks_blocks_and_company_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    sae, other, blocks = random_sae(), random_sae(features=31), random_blocks(2)
    whole = metrics(sae, blocks)
    monkeypatch.setattr("residual_saes.eval.measure.metrics._CHUNK_ROWS", 1)
    monkeypatch.setattr("residual_saes.eval.measure.metrics._CHUNK_VALUES", {"cpu": 33 * F})
    activations, (first, second) = measure_site(iter(blocks), [other, sae], CONTEXT)
    assert by_name(second.finish(activations, 1e-5, 1e-5)[0]) == pytest.approx(whole, rel=1e-6)
    assert by_name(first.finish(activations, 1e-5, 1e-5)[0]) == pytest.approx(metrics(other, blocks), rel=1e-6)
    x, positions = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    one = metrics(sae, [(x, positions)])
    by_block = {"explained_variance_legacy"}  # about the mean of a block
    assert {k: v for k, v in one.items() if k not in by_block} == pytest.approx(
        {k: v for k, v in whole.items() if k not in by_block}, rel=1e-6
    )


def test_the_mean_explains_nothing_and_the_truth_everything() -> None:
    blocks = random_blocks(2)
    x = torch.cat([x for x, _ in blocks])
    sae = random_sae()
    sae.w_dec.zero_()
    sae.b_pre.zero_()
    sae.b_dec.copy_(x.double().mean(0).float())
    got = metrics(sae, blocks)
    assert got["fvu"] == pytest.approx(1.0, rel=1e-5)
    assert got["fvu_without_top3"] == pytest.approx(1.0, rel=1e-5)
    assert got["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    exact = Sae(
        w_enc=both, w_dec=both, b_enc=torch.zeros(2 * D), b_pre=torch.zeros(D), b_dec=torch.zeros(D), config={}, stats={}
    )
    got = metrics(exact, blocks)
    assert (got["fvu"], got["fvu_without_first"], got["fvu_without_top3"]) == (0, 0, 0)
    assert got["cossim"] == pytest.approx(1.0, rel=1e-12)
    whole = {name: got[name] for name in ("l2_ratio", "relative_reconstruction_bias", "explained_variance")}
    assert whole == pytest.approx(dict.fromkeys(whole, 1.0), rel=1e-12)


@pytest.mark.parametrize(
    "spoil", [lambda s: s.w_enc.fill_(math.nan), lambda s: s.w_dec.fill_(1e38), lambda s: s.b_enc.fill_(-1e9)]
)
def test_a_broken_or_silent_sae_gives_numbers_or_none(spoil: Callable[[Sae], object]) -> None:
    sae = random_sae()
    spoil(sae)
    got = metrics(sae, random_blocks(1))
    assert all(v is None or math.isfinite(v) for v in got.values())
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_constant_activations_have_no_variance_to_explain() -> None:
    x = torch.ones(20, D).half()
    got = metrics(random_sae(), [(x, torch.arange(20) % CONTEXT)])
    assert got["fvu"] is got["explained_variance"] is got["fvu_without_first"] is got["top3_variance"] is None
    assert got["mse"] is not None


def test_three_dimensions_have_nothing_outside_the_three_largest() -> None:
    got = metrics(random_sae(3, 5), [(torch.randn(20, 3).half(), torch.arange(20) % CONTEXT)])
    assert got["fvu_without_top3"] is None
    assert got["top3_variance"] == 1
    assert got["fvu"] is not None


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 1000))
def test_moments_in_pieces_are_those_of_all(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes), 4, dtype=torch.float64) * 3 + 1e4
    positions = torch.arange(len(x)) % 3
    activations = Activations(4, torch.device("cpu"))
    for part, at in zip(torch.split(x, sizes), torch.split(positions, sizes), strict=True):
        activations.add(part, at)
    for got, want in ((activations.all, Moments.of(x)), (activations.without_first, Moments.of(x[positions != 0]))):
        assert got.n == want.n
        assert torch.allclose(got.mean, want.mean, rtol=1e-13)
        assert torch.allclose(got.scatter, want.scatter, rtol=1e-7, atol=1e-7)


def test_only_held_out_rows_are_read_each_with_its_position(cache: Cache) -> None:
    spec, blocks = cache.spec, list(heldout_blocks(cache, Site(1), 10**9))
    assert len(blocks) == spec.holdout_blocks
    tokens = heldout_tokens(cache, 10**9)
    assert torch.equal(tokens[: spec.block_sequences], torch.from_numpy(cache.block_tokens(spec.train_blocks)))
    assert len(tokens) == spec.holdout_blocks * spec.block_sequences
    for i, (rows, positions, *_) in enumerate(blocks):
        stored = np.empty((spec.block_rows, spec.d_model), dtype=np.float16)
        cache.read_block(Site(1), spec.train_blocks + i, stored)
        assert torch.equal(rows, torch.from_numpy(stored))
        in_order = np.empty_like(positions)
        in_order[cache.block_order(spec.train_blocks + i)] = positions
        assert in_order.tolist() == list(range(spec.context)) * spec.block_sequences
    assert [len(block.x) for block in heldout_blocks(cache, Site(1), spec.block_rows + 100)] == [spec.block_rows, 100]


def test_a_damaged_held_out_block_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Cache.read_block

    def flip(self: Cache, site: Site, block: int, out: Any) -> None:
        read(self, site, block, out)
        out[5, 3] += 1

    monkeypatch.setattr(Cache, "read_block", flip)
    with pytest.raises(UserError, match="layer 1 block 40 .* checksum"):
        next(heldout_blocks(cache, Site(1), 100))


def test_largest_cosines_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.eval.measure.metrics._COSINES", 40)
    a = torch.nn.functional.normalize(torch.randn(23, 5), dim=1)
    whole = (a @ a.T).fill_diagonal_(-2)
    assert torch.allclose(largest_cosine(a, a, others=True), whole.max(1).values)
    assert torch.allclose(largest_cosine(a, a), torch.ones(23))
    assert largest_cosine(a[:1], a[:1], others=True).tolist() == [-math.inf]


def test_of_many_features_some_are_compared_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; which ones follows from how many there are."""
    sae = random_sae()
    whole, nearest, own = Measurement(sae, 10).weights()
    monkeypatch.setattr("residual_saes.eval.measure.metrics._SAMPLED", F // 2 - 1)
    weights, some, same = Measurement(sae, 10).weights()
    rows = [i * F // (F // 2 - 1) for i in range(F // 2 - 1)]
    assert some[rows].tolist() == pytest.approx(nearest[rows].tolist()) and int(some.isnan().sum()) == F - len(rows)
    assert torch.equal(own, same) and weights.average_encoder_decoder_cosine_sim == whole.average_encoder_decoder_cosine_sim
    assert weights.average_max_decoder_cosine_sim == pytest.approx(float(nearest[rows].mean()), rel=1e-5)


def test_matching_finds_features_that_moved_and_changed_norm() -> None:
    torch.manual_seed(5)
    mine = torch.randn(40, 64)
    theirs = torch.cat([torch.randn(30, 64), 7 * mine[torch.randperm(40)[:10]]])
    mean, matched = match(mine, theirs)
    assert matched == 10 / 40
    unit = [torch.nn.functional.normalize(w.double(), dim=1) for w in (mine, theirs)]
    assert mean == pytest.approx(float((unit[0] @ unit[1].T).max(1).values.mean()), rel=1e-6)
    assert match(mine, mine)[1] == 1
    assert match(mine[:0], theirs) == (None, None)


def some_features() -> Features:
    return Features(**{name: torch.rand(5) for name in Features.__slots__})


def test_saved_features_come_back_and_more_text_wins(tmp_path: Path) -> None:
    path, first, second = tmp_path / "features" / "layer00_final.safetensors", some_features(), some_features()
    save_features(path, first, tokens=100, file="a")
    got, facts = load_features(path)
    assert all(torch.equal(getattr(got, name), getattr(first, name)) for name in Features.__slots__)
    assert (facts["tokens"], facts["file"]) == ("100", "a")
    for tokens, file, wins in ((99, "a", first), (100, "a", second), (7, "b", first)):
        save_features(path, wins if tokens != 99 else second, tokens=tokens, file=file)
        assert torch.equal(load_features(path)[0].density, wins.density)


def test_damaged_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(UserError, match="missing or damaged"):
        load_features(path)
    save_features(path, some_features(), tokens=100, file="a")
    content = bytearray(path.read_bytes())
    tensors = some_features().tensors()
    odd = [save(tensors, metadata=seal({"tokens": n, "file": "a"}, tensors)) for n in ("x", "nan", "-1", "0", "9" * 5000)]
    for damaged in (content[:-1], content[:9], b"", content[:-1] + bytes([content[-1] ^ 1]), *odd):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="missing or damaged"):
            load_features(path)
    save_features(path, some_features(), tokens=1, file="b")
    assert load_features(path)[1]["file"] == "b"


@pytest.fixture
def one_run(runs_path: Path, tmp_path: Path) -> Run:
    """One run with its last two snapshots of layer 1, and nothing else."""
    source = next(p for p in sorted(runs_path.iterdir()) if p.is_dir())
    run = Run(tmp_path / "runs" / source.name)
    run.path.mkdir(parents=True)
    for file in (source / "config.json", *[s.path for s in Run(source).snapshots() if s.site == Site(1)][-2:]):
        shutil.copy2(file, run.path)
    shutil.copytree(source / "metrics", run.path / "metrics")
    return run


def test_records_of_an_evaluation(
    cli: Cli, cache: Cache, one_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, read, blocks = cache.spec, Cache.read_block, []

    def count(self: Cache, site: Site, block: int, out: Any) -> None:
        blocks.append((site, block))
        read(self, site, block, out)

    monkeypatch.setattr(Cache, "read_block", count)
    args = ("--preset", "demo", "--cache", cache.path, "--runs", one_run.path, "--device", "cpu", "--ce-tokens", 320)
    command = ("eval", "--numbers-only", *args)
    assert cli(*command).code == 0
    held_out = [(Site(1), block) for block in range(spec.train_blocks, spec.n_blocks)]
    assert blocks == held_out, "each held-out block is read once for all SAEs of a layer"

    records = json.loads((one_run.path / "results" / "metrics.json").read_text())
    assert len(records) == 2
    record = records["layer01_final"]
    assert record["tokens"] == record["eval_tokens"] == spec.holdout_tokens
    sae = Sae.load(one_run.snapshot_path(Site(1), "final"))
    direct = measure_site(heldout_blocks(cache, Site(1), 10**9), [sae], spec.context)
    direct_metrics, features = direct[1][0].finish(direct[0], 1e-5, 1e-5)
    wanted = by_name(direct_metrics)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert 0 < record["kl_div_with_sae"] < record["kl_div_with_ablation"]
    assert record["ce_recovered"] == record["ce_loss_score"]
    saved, facts = load_features(features_path(one_run, Site(1), "final"))
    assert torch.allclose(saved.mean_square, features.mean_square, rtol=1e-6)
    assert (int(facts["tokens"]), facts["file"]) == (record["tokens"], record["file"])

    # the floors in the record are those of the command, from the saved statistics of each feature
    statistics = Statistics.measured(saved.density.double(), saved.mean_square.double())
    content = {"alpha": statistics.alpha, "F": statistics.features, "sorted_importance": statistics.importance}
    (tmp_path / "s.json").write_text(json.dumps(content))
    floors = cli("eval", "floor", "--statistics", tmp_path / "s.json", "--widths", "4,8,12,16,24,32").out
    assert [float(line.split()[1]) for line in floors.splitlines()] == pytest.approx(
        [record[f"floor_{w}"] for w in (4, 8, 12, 16, 24, 32)], rel=1e-6
    )
    assert record["floor_4"] > 0

    # other definitions are other records; SAEs that do not fit into memory together are read for one after the other
    blocks.clear()
    monkeypatch.setattr("residual_saes.shared.device._HOST_MEMORY", 1)
    middle = float(saved.density.median())
    options = ("--dead-at", middle, "--alive-above", middle, "--ablation", "mean", "--eval-tokens", 1000)
    assert cli(*command, *options).code == 0
    assert blocks == held_out[:2] * 2
    records = json.loads((one_run.path / "results" / "metrics.json").read_text())
    assert len(records) == 4 and records["layer01_final"] == record
    (again,) = [r for r in records.values() if r["snapshot"] == "final" and r["eval_tokens"] == 1000]
    assert (again["tokens"], again["ce"]) == (1000, record["ce"])
    assert again["alive"] < record["alive"]
    assert again["dead_share"] > record["dead_share"]
    assert again["ce_recovered"] != again["ce_loss_score"] == pytest.approx(record["ce_loss_score"], rel=1e-6)
    assert load_features(features_path(one_run, Site(1), "final"))[1]["tokens"] == str(record["tokens"])
    blocks.clear()
    assert cli(*command, *options).code == 0
    assert blocks == []
    features_path(one_run, Site(1), "final").unlink()
    assert cli(*command, *options).code == 0
    assert blocks == held_out[:2]
