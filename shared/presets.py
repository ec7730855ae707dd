"""The jobs this project knows by name: the published one, and one that fits a laptop."""

from dataclasses import dataclass
from pathlib import Path

import click

from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.units import parse_count

_DEMO = Path(__file__).resolve().parent.parent / "demo"


@dataclass(kw_only=True, frozen=True, slots=True)
class Preset:
    """Defaults of every command. A command-line option overrides its field."""

    name: str
    # what is read
    model: str = option("Hub id or local folder of a causal language model.")
    revision: str | None = option("The model's revision on the hub.")
    dataset: str = option("Hub id, local file or folder (jsonl, parquet, text).")
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
    context: int = option("Tokens in a context.", type=click.IntRange(2))
    block_sequences: int = option("Contexts in a block.", type=click.IntRange(1))
    forward_sequences: int = option("Contexts in one forward pass; on a CPU 2,048 tokens at most.", type=click.IntRange(1))
    # the SAEs
    expansion: int
    l1: str
    batch: int
    lr: float
    lr_warmup: int
    window_blocks: int
    # evaluation
    ce_tokens: int

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
            window_blocks=16,
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
            tokens=960_000,
            holdout_tokens=64_000,
            block_sequences=32,
            forward_sequences=32,
            expansion=8,
            l1="3e-2,8e-3,adaptive:2e-2@32",
            batch=1024,
            lr=3e-3,
            lr_warmup=100,
            window_blocks=16,
            ce_tokens=8_192,
        ),
    )
}


def get_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
