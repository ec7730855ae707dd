"""Defaults: of the jobs that this project knows by name, and of any other by the shape of its model and cache."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from residual_saes.shared.cli import COUNT, option
from residual_saes.shared.errors import UserError
from residual_saes.shared.stores import Location, folder_name, parse_name
from residual_saes.shared.synthetic.config import WorldConfig
from residual_saes.shared.units import parse_count

DATA = Path("data")  # where caches lie that no place was named for
_DEMO = Path(__file__).resolve().parent.parent / "demo"


@dataclass(kw_only=True, frozen=True, slots=True)
class Training:
    """Defaults of training and evaluation. A command-line option overrides its field."""

    expansion: int
    l1: str
    batch: int
    lr: float
    lr_warmup: int
    window_blocks: int = 16
    ce_tokens: int

    @classmethod
    def of(cls, d_model: int, tokens: int, holdout_tokens: int) -> "Training":
        """Defaults for a model and an amount of text that no preset is for.

        A batch leaves a thousand steps. The rate falls with the square root of features and of steps from what measured best
        for a thousand of each (docs/findings/training.md): where to begin, not where to end.
        """
        expansion = 32 if tokens >= 50_000_000 else 8
        batch = min(32_768, max(256, 1 << int(math.log2(max(1, tokens / 1000)))))
        features, steps = expansion * d_model, max(1, tokens // batch)
        return cls(
            expansion=expansion,
            l1=f"batchtopk:{32 if d_model < 768 else 64}/best",
            batch=batch,
            lr=float(f"{1e-2 * min(1.0, math.sqrt(1024 / features * 1000 / steps)):.2g}"),
            lr_warmup=min(100, steps // 20),
            ce_tokens=min(100_000, holdout_tokens // 8),
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class Preset(Training):
    """Defaults of every command: what `Training` has, and what is harvested."""

    name: str
    # what is read
    model: str = option("Hub id or local folder of a causal language model.", type=parse_name)
    revision: str | None = option("The model's revision on the hub.")
    dataset: str = option("Hub id, local file or folder (jsonl, parquet, text).", type=parse_name)
    dataset_revision: str | None = option("The dataset's revision on the hub.")
    split: str = option("Split of a hub dataset; of a local folder every file is read.")
    text_column: str = option("Column that holds the text.")
    # the shape of the model, so that a plan needs neither model nor hub
    n_layers: int
    d_model: int
    vocab_size: int
    # the cache
    tokens: int = option("Tokens to train on, such as 300M.", type=parse_count)
    holdout_tokens: int = option("Tokens held out for evaluation.", type=parse_count)
    context: int = option("Tokens in a context.", type=click.IntRange(2, 10**9))
    block_sequences: int = option("Contexts in a block.", type=COUNT)
    forward_sequences: int = option("Contexts in one forward pass; on a CPU 2,048 tokens at most.", type=COUNT)

    @classmethod
    def of_model(cls, config: Any, given: Mapping[str, Any]) -> "Preset":
        """Defaults for a model that no preset is for: `given` has model, dataset and tokens, and the shape of the model.

        `config` is the model's own.
        """
        base: dict[str, Any] = {
            "name": short_name(given["model"]),
            "revision": None,
            "dataset_revision": None,
            "split": "train",
            "text_column": "text",
            "context": min(1024, getattr(config, "max_position_embeddings", 1024)),
            "forward_sequences": 32,
            **given,
        }
        context, tokens = base["context"], base["tokens"]
        base.setdefault("holdout_tokens", max(context, min(2_000_000, tokens // 10)))
        base.setdefault("block_sequences", min(32, max(1, tokens // (64 * context))))
        training = Training.of(base["d_model"], tokens, base["holdout_tokens"])
        return cls(**dataclasses.asdict(training), **base)

    def require_files(self) -> None:
        """Raise UserError where the demo's model or text is meant, and this is an installed package, which has neither."""
        for place in (self.model, self.dataset):
            if Path(place).is_relative_to(_DEMO) and not Path(place).exists():
                raise UserError(
                    f"{place} is not there: the demo's model and text come with the repository and not with an installed "
                    "package; clone the repository and run this in it, or name --model and --dataset"
                )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="pythia-410m",
            model="EleutherAI/pythia-410m",
            revision="9879c9b5f8bea9051dcb0e68dff21493d67e9d4f",
            dataset="monology/pile-uncopyrighted",
            dataset_revision="3be90335b66f24456a5d6659d9c8d208c0357119",
            split="train",
            text_column="text",
            n_layers=24,
            d_model=1024,
            vocab_size=50_304,
            context=1024,
            tokens=300_000_000,
            holdout_tokens=2_000_000,
            block_sequences=32,
            forward_sequences=32,
            expansion=32,
            l1="3e-4",
            batch=32_768,
            lr=3e-4,
            lr_warmup=0,
            ce_tokens=100_000,
        ),
        Preset(
            name="demo",
            model=str(_DEMO / "neox-2m"),
            revision=None,
            dataset=str(_DEMO / "text.jsonl.gz"),
            dataset_revision=None,
            split="train",
            text_column="text",
            n_layers=6,
            d_model=128,
            vocab_size=4096,
            context=256,
            tokens=256_000,
            holdout_tokens=24_576,
            block_sequences=32,
            forward_sequences=32,
            expansion=8,
            l1="batchtopk:32/best,adaptive:2e-2@32/best,3e-2",
            batch=512,
            lr=1e-2,
            lr_warmup=100,
            ce_tokens=8_192,
        ),
    )
}


@dataclass(kw_only=True, frozen=True, slots=True)
class WorldPreset(Training):
    """Defaults of every command for a cache of synthetic worlds."""

    name: str
    world: WorldConfig
    d_model: int = option("Dimensions of a row.", type=COUNT, preset=True)
    tokens: int = option("Rows to train on, such as 1.2M.", type=parse_count, preset=True)
    holdout_tokens: int = option("Rows held out for evaluation.", type=parse_count, preset=True)
    context: int = option("Rows of a sequence, which are drawn together.", type=click.IntRange(2, 10**9), preset=True)
    block_sequences: int = option("Sequences in a block.", type=COUNT, preset=True)


WORLDS = {
    preset.name: preset
    for preset in (
        WorldPreset(
            name="synthetic-small",
            world=WorldConfig(features=1024, roots=8),
            d_model=128,
            tokens=1_200_000,
            holdout_tokens=131_072,
            context=1024,
            block_sequences=8,
            expansion=4,
            l1="matryoshka:8/best,jumprelu:8/best,batchtopk:8/best",
            batch=1024,
            lr=1e-2,
            lr_warmup=100,
            ce_tokens=0,
        ),
        WorldPreset(
            name="synthetic-16k",
            world=WorldConfig(),
            d_model=768,
            tokens=20_000_000,
            holdout_tokens=262_144,
            context=1024,
            block_sequences=32,
            expansion=5,
            l1="batchtopk:25/best",
            batch=16_384,
            lr=2.6e-3,
            lr_warmup=61,
            ce_tokens=0,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """Look up a preset of a language model and a text. Raises UserError for a name that there is none of."""
    if name in WORLDS:
        raise UserError(f"{name} is a synthetic world and no language model: `rsae harvest synthetic --preset {name}`")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join((*PRESETS, *WORLDS))}")
    return PRESETS[name]


def world_preset(name: str | None) -> WorldPreset:
    """Look up a preset of synthetic worlds. Raises UserError where none of these is named."""
    if name not in WORLDS:
        raise UserError(f"name a world with --preset {' or '.join(WORLDS)}; the other options say what is to be different")
    return WORLDS[name]


def any_preset(name: str) -> Preset | WorldPreset:
    """Look up a preset of either kind. Raises UserError for a name that there is none of."""
    return WORLDS[name] if name in WORLDS else get_preset(name)


def training_defaults(preset: str | None, d_model: int, tokens: int, holdout_tokens: int) -> Training:
    """Those of a preset, or else those that follow the model and the amount of text. Raises UserError."""
    return any_preset(preset) if preset is not None else Training.of(d_model, tokens, holdout_tokens)


def short_name(model: str) -> str:
    """What caches and runs of a model are called: the last part of its name on the hub, or its folder's name."""
    return folder_name(Path(model).resolve()) if Path(model).is_dir() else Path(model).name


def cache_place(cache: Location | None, preset: str | None) -> Location:
    """Find the cache that is meant: the one named, else the preset's, else the only one in data/. Raises UserError."""
    if cache is not None:
        return cache
    if preset is not None:
        return DATA / any_preset(preset).name
    caches = sorted(file.parent for file in DATA.glob("*/cache.json"))
    if len(caches) == 1:
        return caches[0]
    cure = (
        f"{DATA} holds several: {', '.join(map(str, caches))}"
        if caches
        else f"there is none in {DATA}: `rsae harvest` makes one"
    )
    raise UserError(f"name the activation cache with --cache; {cure}")


def table() -> str:
    """The defaults of every command as text: a column for each preset, and one for a model without."""
    without = {
        "context": "1,024 or the model's positions",
        "holdout_tokens": "a tenth, at most 2,000,000",
        "block_sequences": "32, fewer for little text",
        "expansion": "8, from 50M tokens on 32",
        "l1": "batchtopk:32/best, from d 768 on :64",
        "batch": "a thousand steps, 256 to 32,768",
        "lr": "1e-2 * sqrt(1,024,000 / features / steps), at most 1e-2",
        "lr_warmup": "100, in short runs 5 %",
        "ce_tokens": "an eighth of those held out, at most 100,000",
    }
    presets: tuple[Preset | WorldPreset, ...] = (*PRESETS.values(), *WORLDS.values())
    rows = [("", *(preset.name for preset in presets), "without a preset")]
    for name in (f.name for f in dataclasses.fields(Preset) if f.name != "name"):
        values = [getattr(preset, name, None) for preset in presets]
        shown = ["-" if v is None else f"{v:,}" if isinstance(v, int) else str(v) for v in values]
        rows.append((name.replace("_", "-"), *shown, without.get(name, "16" if name == "window_blocks" else "-")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
