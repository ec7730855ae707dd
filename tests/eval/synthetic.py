"""Runs as large as the published job's (24 layers, three settings, six snapshots) in their real files, without training them.

Checkpoints are of 8 features and belong where they lie, one a layer, the latest; records, curves and feature statistics are
made up to look like the real ones: numbers follow the layer, the setting and the age.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from residual_saes.eval.measure.features import Features, features_path, save_features
from residual_saes.eval.measure.predicted import Statistics, capacity, critical_width, floors, student_widths
from residual_saes.eval.measure.result import Result
from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.runs.run import Run, run_config, snapshot_tokens
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site
from residual_saes.train.config import TrainConfig
from residual_saes.train.sparsity.l1 import L1Setting

SETTINGS = {"3e-4-fixed": (3e-4, 90.0), "8e-5-fixed": (8e-5, 320.0), "adaptive": (5e-4, 150.0)}  # λ and the L0 it ends at
TOKENS, D_MODEL, FEATURES = 300_000_000, 1024, 4096
Record = dict[str, Any]


def make_runs(folder: Path, *, layers: int = 24, model: str = "EleutherAI/pythia-410m") -> dict[str, list[Result]]:
    """{run: results} of the three run folders that it makes. The last layer of the last run is not finished."""
    spec = CacheSpec(
        model=model,
        model_revision="sha256:" + "0" * 64,
        model_commit="9879c9b5f8bea9051dcb0e68dff21493d67e9d4f",
        dataset="monology/pile-uncopyrighted",
        dataset_revision="3be90335b66f24456a5d6659d9c8d208c0357119",
        split="train",
        text_column="text",
        tokenizer_sha256="0" * 64,
        separator=0,
        context=1024,
        d_model=D_MODEL,
        n_layers=layers,
        vocab_size=50_304,
        block_sequences=32,
        n_blocks=9217,
        holdout_blocks=62,
        seed=0,
        precision="bf16",
    )
    cache = {"digest": spec.digest, "spec": dataclasses.asdict(spec)}
    results = {}
    for number, (setting, (l1, l0)) in enumerate(SETTINGS.items()):
        run = Run(folder / f"pythia-410m-saes-x32-l1-{setting}")
        run.path.mkdir(parents=True)
        target = l0 if setting == "adaptive" else None
        train = TrainConfig(tokens=TOKENS).fields() | {"l1": dataclasses.asdict(L1Setting(init=l1, target=target))}
        run.create(run_config(train, cache), {"device": "cpu", "threads": 2, "torch": torch.__version__})
        made: list[Result] = []
        for layer in range(layers):
            until = TOKENS // 2 if number == len(SETTINGS) - 1 and layer == layers - 1 else TOKENS
            _curve(run, layer, l1, l0)
            made += [
                _snapshot(run, layer, layer / max(1, layers - 1), label, tokens, l1, l0, latest=tokens == until)
                for label, tokens in snapshot_tokens(TOKENS).items()
                if tokens <= until
            ]
        path = run.path / "results" / "metrics.json"
        path.write_text(json.dumps({f"layer{r.site.key}_{r.snapshot}": seal(r.to_dict()) for r in made}, indent=1))
        results[run.name] = made
    return results


def _curve(run: Run, layer: int, l1: float, l0: float) -> None:
    path = run.metrics_path(Site(layer))
    path.parent.mkdir(exist_ok=True)
    steps = 9155
    lines = []
    for step in range(150, steps + 1, 150):
        done = step / steps
        record = {
            "step": step,
            "tokens": step * 32_768,
            "mse": (0.02 + 0.3 * math.exp(-8 * done)) * (1 + layer / 4),
            "l0": l0 * (1 + 20 * math.exp(-12 * done)) * (1 + 0.02 * layer),
            "lambda": l1,
            "alive": int(FEATURES * (1 - 0.3 * done * layer / 24)),
        }
        lines.append(json.dumps(seal(record)))
    path.write_text("\n".join(lines) + "\n")


def _snapshot(run: Run, layer: int, depth: float, label: str, tokens: int, l1: float, l0: float, *, latest: bool) -> Result:
    age = tokens / TOKENS
    generator = torch.Generator().manual_seed(layer)
    sae = Sae(
        **{n: torch.randn(8, 4, generator=generator) for n in ("w_enc", "w_dec")},
        b_enc=torch.zeros(8),
        b_pre=torch.zeros(4),
        b_dec=torch.zeros(4),
        config=run.belongs(Site(layer), label) | {"cache": run.config.stored["cache"]},
        stats={"tokens": tokens, "lambda": l1, "age": age},
    )
    file = f"{layer:04x}{tokens // 1_000_000:04x}"
    if latest:  # the others cost a second of fsync, and nobody opens them
        sae.save(run.snapshot_path(Site(layer), label))
        file = Sae.checksum(run.snapshot_path(Site(layer), label))
    l0 *= (1 + math.exp(-6 * age)) * (0.8 + 0.5 * depth)
    density = torch.exp(torch.randn(FEATURES, generator=generator, dtype=torch.float64) * 1.8)
    density = (density * (l0 / density.sum())).clamp(max=0.9)
    density[: int(FEATURES * 0.15 * depth * age)] = 0
    square = torch.exp(torch.randn(FEATURES, generator=generator, dtype=torch.float64)) * density * (1 + 9 * depth)
    features = Features(
        density=density.float(),
        mean=(density * 0.8).float(),
        mean_square=square.float(),
        max_decoder_cosine_sim=torch.full((FEATURES,), 0.4),
        encoder_decoder_cosine_sim=torch.full((FEATURES,), 0.7),
        l0_by_position=torch.full((1024,), l0),
    )
    if latest:
        save_features(features_path(run, Site(layer), label), features, tokens=2_031_616, file=file)
    statistics = Statistics.measured(density, square)
    assert statistics.alpha is not None
    fvu = (0.02 + 0.11 * depth) * (150 / l0) ** 0.5 * (1 + math.exp(-5 * age))
    recovered = 1 - fvu / 4
    record = {
        "run": run.config.stored["digest"],
        "layer": layer,
        "snapshot": label,
        "trained_tokens": tokens,
        "lambda": l1,
        "tokens": 2_031_616,
        "l0": l0,
        "l1": l0 * 0.8,
        "dead_share": float((density <= 1e-5).double().mean()),
        "frac_alive": float((density > 0).double().mean()),
        "freq_over_1_percent": float((density > 0.01).double().mean()),
        "freq_over_10_percent": float((density > 0.1).double().mean()),
        "normalized_freq_over_1_percent": float(density[density > 0.01].sum() / density.sum()),
        "normalized_freq_over_10_percent": float(density[density > 0.1].sum() / density.sum()),
        "mse": fvu * (1 + 3 * depth),
        "fvu": fvu,
        "fvu_uncentred": fvu * 0.8,
        "fvu_without_first": min(1.2, fvu * 2.5),
        "fvu_without_top3": min(1.2, fvu * 3.5),
        "top3_variance": 0.7 + 0.2 * depth,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": 1 - 1.3 * fvu,
        "cosine": 1 - fvu / 2,
        "cossim": 1 - fvu / 2,
        "l2_norm_in": 20 + 100 * depth,
        "l2_norm_out": 19 + 95 * depth,
        "l2_ratio": 0.95,
        "relative_reconstruction_bias": 0.97,
        "max_decoder_cosine_sim": 0.99,
        "average_max_decoder_cosine_sim": 0.4 + 0.1 * depth,
        "average_max_encoder_cosine_sim": 0.35,
        "average_encoder_decoder_cosine_sim": 0.6,
        "average_max_encoder_decoder_cosine_sim": 0.62,
        "alive": statistics.features,
        "alpha": statistics.alpha,
        "capacity": capacity(statistics.alpha),
        "critical_width": critical_width(statistics),
        **{f"floor_{w}": v for w, v in floors(statistics, student_widths(D_MODEL)).items()},
        "ce": 2.2,
        "ce_spliced": 2.2 + fvu * 2,
        "ce_zero": 10.2,
        "ce_mean_ablation": 9.8,
        "ce_recovered": recovered,
        "ce_loss_without_sae": 2.2,
        "ce_loss_with_sae": 2.2 + fvu * 2,
        "ce_loss_with_ablation": 10.2,
        "ce_loss_score": recovered,
        "kl_div_with_sae": fvu * 2.1,
        "kl_div_with_ablation": 8.0,
        "kl_div_score": 1 - fvu * 2.1 / 8,
        "eval_tokens": 2_031_616,
        "ce_tokens": 99_328,
        "dead_at": 1e-5,
        "alive_above": 1e-5,
        "ablation": "zero",
        "file": file,
    }
    return Result.from_dict(record)


def make_distilled(folder: Path, results: dict[str, list[Result]]) -> None:
    """distilled.json beside the runs, in the form of eval/floors/distill.py: five widths, three seeds, a fit for each SAE."""
    config = Run(folder / next(iter(results))).config.stored
    widths = (128, 256, 384, 512, 768)
    students = [
        {"width": w, "seed": s, "heads": 16, "parameters": w * w, "steps": 900, "floor": 90 / w + 0.01 * s, "kl": 1.1,
         "ce": 3.3, "device": "cpu"}
        for w in widths
        for s in range(3)
    ]  # fmt: skip
    floors_ = [{"width": w, "seeds": 3, "floor": 90 / w + 0.01, "spread": 0.01, "kl": 1.1, "ce": 3.3} for w in widths]

    def fit(r2: float) -> Record:
        return {
            "C": 0.01, "B": 0.1, "C_se": 0.002, "B_se": 0.03, "r2": r2 + 0.1, "r2_low": r2, "r2_high": r2 + 0.1,
            "left_out_r2": r2, "points": [],
            "near_critical": {"width": 384, "ratio": 0.9, "error": -0.3, "left_out_error": -0.5},
        }  # fmt: skip

    predictions = [
        {
            "run": name, "run_digest": r.run, "layer": r.site.json, "snapshot": r.snapshot, "file": r.file, "tokens": r.tokens,
            "alive_above": 1e-5, "F": r.alive, "alpha": r.alpha, "capacity": r.capacity, "critical_width": r.critical_width,
            "widths": {}, "fits": {"predicted": fit(0.8 - r.site.layer / 40), "naive": None, "log_width": fit(0.7)},
        }
        for name, records in results.items()
        for r in {r.site: r for r in records}.values()
    ]  # fmt: skip
    experiment = {
        "digest": "0" * 64, "cache": config["cache"]["digest"], "model": "EleutherAI/pythia-410m",
        "setting": {"temperature": 2.0, "tokens": 10_000_000}, "teacher": {"width": 1024, "ce": 2.2}, "students": students,
        "floors": floors_, "predictions": predictions,
    }  # fmt: skip
    (folder / "distilled.json").write_text(json.dumps([seal(experiment)]))
