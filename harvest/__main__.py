"""`python -m harvest [plan | verify | repair]`: fill an activation cache, or look after one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import click

from harvest.harvest import (
    HarvestConfig,
    harvest,
    make_plan,
    planned_bytes,
    remaining_bytes,
    repair,
    require_space,
    verify,
)
from harvest.text import TextSource, load_tokenizer, require_one_context, tokenizer_hash
from harvest.writer import WriterConfig
from shared.cache import Cache, CacheSpec
from shared.cli import DefaultRun, UserError, format_layers, parse_count, parse_layers, run
from shared.device import pick_device
from shared.files import make_dir
from shared.lm import load_config, model_revision, require_model, unpin
from shared.presets import Preset, get_preset


@dataclass(kw_only=True, frozen=True, slots=True)
class Job:
    """The preset with the command line's options over it."""

    preset: Preset
    cache: Path
    layers: tuple[int, ...]
    precision: str
    seed: int
    threads: int
    bos: bool = False

    @property
    def source(self) -> TextSource:
        p = self.preset
        return TextSource(dataset=p.dataset, revision=p.dataset_revision, split=p.split, column=p.text_column)

    def config(self, device: str | None) -> HarvestConfig:
        return HarvestConfig(
            device=pick_device(device),
            forward_sequences=self.preset.forward_sequences,
            writer=WriterConfig(threads=self.threads),
        )

    def shape(self) -> CacheSpec:
        """The spec as far as it is known without model and text: enough for every size."""
        p = self.preset
        rows = p.block_sequences * p.context
        train, holdout = -(-p.tokens // rows), -(-p.holdout_tokens // rows)
        return CacheSpec(
            model=p.model, model_revision="", dataset=p.dataset, dataset_revision="", split=p.split,
            text_column=p.text_column, tokenizer_sha256="", separator=0, context=p.context, d_model=p.d_model,
            n_layers=p.n_layers, vocab_size=p.vocab_size, block_sequences=p.block_sequences,
            n_blocks=train + holdout, holdout_blocks=holdout, seed=self.seed, precision=self.precision,
            bos=self.bos,
        )  # fmt: skip

    def spec(self) -> CacheSpec:
        """The whole spec. Opens the text and the tokeniser, and refuses those that cannot be harvested."""
        p = self.preset
        tokenizer = load_tokenizer(p.model, p.revision)
        require_one_context(self.source, tokenizer, self.shape())
        return replace(
            self.shape(),
            model_revision=model_revision(p.model, p.revision),
            dataset_revision=self.source.pinned_revision(),
            tokenizer_sha256=tokenizer_hash(tokenizer),
            separator=tokenizer.eos_token_id,
        )


Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the order given."""
    return lambda command: reduce(lambda c, option: option(c), reversed(options), command)


_common = _options(
    click.option("--preset", default="pythia-410m", show_default=True, help="Where all defaults come from."),
    click.option("--cache", type=click.Path(path_type=Path), help="Cache folder [default: data/<preset>]."),
    click.option("--threads", type=click.IntRange(1), default=4, show_default=True, help="Threads for the disk."),
)
_device = click.option("--device", help="cpu, cuda or cuda:1 [default: cuda where there is one].")
_settings = _options(
    click.option("--model", help="Hub id or local folder of a causal language model."),
    click.option("--revision", help="The model's revision on the hub."),
    click.option("--dataset", help="Hub id, local file or folder (jsonl, parquet, text)."),
    click.option("--dataset-revision", help="The dataset's revision on the hub."),
    click.option("--split", help="Split of a hub dataset, or of a folder whose file names say one; all for every file."),
    click.option("--text-column", help="Column that holds the text."),
    click.option("--tokens", help="Tokens to train on, such as 300M."),
    click.option("--holdout-tokens", help="Tokens held out for evaluation."),
    click.option("--context", type=click.IntRange(2), help="Tokens in a context."),
    click.option("--block-sequences", type=click.IntRange(1), help="Contexts in a block."),
    click.option(
        "--forward-sequences", type=click.IntRange(1), help="Contexts in one forward pass; on a CPU 2,048 tokens at most."
    ),
    click.option("--bos", is_flag=True, help="Begin every context with the tokenizer's BOS, as Llama and Gemma expect."),
    click.option("--layers", help="Layers, such as 0-23 or 3,7 [default: all]."),
    click.option("--precision", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order inside blocks."),
)

_PRESET_OPTIONS = (
    "model", "revision", "dataset", "dataset_revision", "split", "text_column", "context", "block_sequences",
    "forward_sequences",
)  # fmt: skip


def _job(options: dict[str, Any]) -> Job:
    preset = get_preset(options["preset"])
    changes = {k: options[k] for k in _PRESET_OPTIONS if options[k] is not None}
    changes |= {k: parse_count(options[k]) for k in ("tokens", "holdout_tokens") if options[k] is not None}
    if "dataset" in changes and "dataset_revision" not in changes:
        changes["dataset_revision"] = None
    if "model" in changes:
        changes.setdefault("revision", None)
        changes |= _model_shape(changes["model"], changes["revision"])
    preset = replace(preset, **changes)
    return Job(
        preset=preset,
        cache=options["cache"] or Path("data") / preset.name,
        layers=parse_layers(options["layers"] or f"0-{preset.n_layers - 1}", preset.n_layers),
        precision=options["precision"],
        seed=options["seed"],
        threads=options["threads"],
        bos=options["bos"],
    )


def _model_shape(model: str, revision: str | None) -> dict[str, int]:
    config = load_config(model, revision)
    return {"n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "vocab_size": config.vocab_size}


@click.group(cls=DefaultRun)
def main() -> None:
    """Harvest residual activations into a cache, and look after it."""


@main.command("run")
@_common
@_settings
@_device
def run_command(device: str | None, **options: Any) -> None:
    """Fill the cache (the default command); run it again to continue, or to add layers."""
    job = _job(options)
    config = job.config(device)
    make_dir(job.cache.parent)
    if not Cache.exists(job.cache):
        require_space(job.cache, planned_bytes(job.shape(), job.layers))
    spec = job.spec()
    if Cache.exists(job.cache):
        cache = Cache.open(job.cache)
        cache.require_same(spec)
        require_space(job.cache, remaining_bytes(cache, job.layers))
        cache.add_layers(job.layers)
    else:
        require_model(job.preset.model, job.preset.revision, job.precision, spec.context)  # before hours of tokenising
        cache = Cache.create(job.cache, spec, job.layers)
    harvest(cache, job.layers, job.source, job.preset.revision, config)
    for layer, totals in cache.totals().items():
        click.echo(f"layer {layer:2d}: {totals}", err=totals.nonfinite > 0)
    click.echo(
        f"{job.cache}: layers {format_layers(job.layers)} complete, {spec.train_tokens:,} tokens to train on and "
        f"{spec.holdout_blocks * spec.block_rows:,} held out"
    )


@main.command("plan")
@_common
@_settings
def plan_command(**options: Any) -> None:
    """Bytes, free disk and time of a harvest, before it is begun. Needs neither weights nor text."""
    job = _job(options)
    click.echo(str(make_plan(job.cache, job.shape(), job.layers, job.threads)))


@main.command("verify")
@_common
def verify_command(preset: str, cache: Path | None, threads: int) -> int:
    """Check every committed block against its checksum; exit code 1 if something is damaged."""
    opened = _open(preset, cache)
    bad, damage = verify(opened, opened.layers, threads)
    for line in [why for _, _, why in bad] + damage:
        click.echo(line)
    click.echo("damaged" if bad or damage else "every committed block is as it was written")
    return 1 if bad or damage else 0


@main.command("repair")
@_common
@_device
@click.option("--blocks", help="Blocks to harvest again, such as 3,7 [default: those that fail verification].")
def repair_command(preset: str, cache: Path | None, threads: int, device: str | None, blocks: str | None) -> None:
    """Harvest named or damaged blocks again, and nothing else."""
    opened = _open(preset, cache)
    spec, tokens = opened.spec, False
    config = HarvestConfig(device=pick_device(device), writer=WriterConfig(threads=threads))
    if blocks:
        chosen = [(layer, block) for block in parse_layers(blocks) for layer in opened.layers]
        if max(block for _, block in chosen) >= spec.n_blocks:
            raise UserError(f"{opened.path} has blocks 0-{spec.n_blocks - 1}")
    else:
        bad, damage = verify(opened, opened.layers, threads)
        chosen, tokens = [(layer, block) for layer, block, _ in bad], bool(damage)
    source = TextSource(dataset=spec.dataset, revision=unpin(spec.dataset_revision), split=spec.split, column=spec.text_column)
    repair(opened, chosen, tokens, source, unpin(spec.model_revision), config)
    click.echo(f"repaired {len(chosen)} layer blocks" + (" and the tokens" if tokens else ""))


def _open(preset: str, cache: Path | None) -> Cache:
    return Cache.open(cache or Path("data") / get_preset(preset).name)


if __name__ == "__main__":
    run(main)
