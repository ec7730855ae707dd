"""`rsae harvest [plan | synthetic | import | convert | verify | repair | free]`: fill a cache, or look after one."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import click
from transformers import PretrainedConfig

from residual_saes.harvest.care import Damage, free, notes_on_mixing, repair, verify
from residual_saes.harvest.convert import convert_command
from residual_saes.harvest.fill import fill_cache
from residual_saes.harvest.hub import open_text, refuse_local_split
from residual_saes.harvest.imported import import_command, imported_again
from residual_saes.harvest.origin import Origin, ReadText, Synthetic
from residual_saes.harvest.pieces import TextSource
from residual_saes.harvest.plan import make_plan, prepare_place, whole_blocks
from residual_saes.harvest.run import HarvestConfig
from residual_saes.harvest.synthetic import synthetic_command
from residual_saes.harvest.tokens import require_one_context, separator_id
from residual_saes.harvest.writer import WriterConfig
from residual_saes.shared.cache import Cache, CacheSpec, Precision, Stored
from residual_saes.shared.cli import CACHE, DEVICE, PRESET, SEED, THREADS, DefaultRun, filled, option, options, options_of, run
from residual_saes.shared.device import pick_device
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import Model, as_harvested, harvested_model, open_model, tokenizer_hash, unpin
from residual_saes.shared.lm import load_config, load_tokenizer, require_model, require_site
from residual_saes.shared.presets import DATA, PRESETS, Preset, cache_place, get_preset, short_name
from residual_saes.shared.progress import say
from residual_saes.shared.sites import RESID_POST, Site, format_sites, parse_hooks, parse_sites
from residual_saes.shared.stores import Location, parse_name
from residual_saes.shared.units import ALONE, Shard, format_bytes, parse_layers, parse_shard


@dataclass(kw_only=True, frozen=True, slots=True)
class Job:
    """The preset with the command line's options over it."""

    preset: Preset
    cache: Location
    sites: tuple[Site, ...]
    threads: int = option("Threads for the disk.", 4, type=THREADS)
    bos: bool = option("Begin every context with the tokenizer's BOS, as Llama and Gemma expect.", False, is_flag=True)
    separator: str | None = option("Token that ends a document, by name or number [default: end of text].", None)
    precision: Precision = option("", "bf16", type=click.Choice(["bf16", "fp32"]))
    store: Stored = option("As what values are stored: int8 takes half.", "float16", type=click.Choice(get_args(Stored)))
    seed: int = option("Of the order inside blocks.", 0, type=SEED)
    shard: Shard = option("This process is i of n at work on the same cache, such as 0/8.", ALONE, type=parse_shard)

    def source(self, revision: str | None) -> TextSource:
        p = self.preset
        return open_text(dataset=p.dataset, revision=revision, split=p.split, column=p.text_column)

    def config(self, device: str | None) -> HarvestConfig:
        return HarvestConfig(
            device=pick_device(device),
            forward_sequences=self.preset.forward_sequences,
            writer=WriterConfig(threads=self.threads),
            shard=self.shard,
        )

    def shape(self) -> CacheSpec:
        """The spec as far as it is known without model and text: enough for every size."""
        p = self.preset
        n_blocks, holdout_blocks = whole_blocks(p.tokens, p.holdout_tokens, p.block_sequences * p.context)
        return CacheSpec(
            model=p.model, model_revision="", dataset=p.dataset, dataset_revision="", split=p.split,
            text_column=p.text_column, tokenizer_sha256="", separator=0, context=p.context, d_model=p.d_model,
            n_layers=p.n_layers, vocab_size=p.vocab_size, block_sequences=p.block_sequences,
            n_blocks=n_blocks, holdout_blocks=holdout_blocks, seed=self.seed, precision=self.precision,
            bos=self.bos, store=self.store,
        )  # fmt: skip

    def open(self) -> "Opened":
        """Opens model, tokeniser and text, and refuses those that cannot be harvested."""
        p = self.preset
        model = open_model(p.model, p.revision)
        config = load_config(str(model.folder), None)
        for site in self.sites:
            require_site(config, site)
        shape = replace(self, preset=replace(p, **_model_shape(config))).shape()
        tokenizer = load_tokenizer(str(model.folder), None)
        revision = self.source(p.dataset_revision).pinned_revision()
        source = self.source(unpin(revision))
        shape = replace(shape, separator=separator_id(tokenizer, self.separator))
        require_one_context(source, tokenizer, shape)
        spec = replace(
            shape,
            model_revision=model.sha256,
            model_branch=(p.revision or "") if model.commit else "",
            model_commit=model.commit,
            dataset_revision=revision,
            tokenizer_sha256=tokenizer_hash(tokenizer),
        )
        separator = str(tokenizer.convert_ids_to_tokens(shape.separator))
        return Opened(model=model, source=source, spec=spec, separator=separator)


@dataclass(kw_only=True, frozen=True, slots=True)
class Opened:
    """What is harvested, as it was found: the model and the text that the spec is of."""

    model: Model
    source: TextSource
    spec: CacheSpec
    separator: str  # the token


_common = options(PRESET, CACHE, options_of(Job, "threads"))
_settings = options(
    options_of(Preset),
    click.option("--layers", help="Layers, such as 0-23 or 3,7 [default: all]."),
    click.option(
        "--sites", type=parse_hooks, metavar="TEXT", help="Hooks there, such as mlp_in,mlp_out [default: resid_post]."
    ),
    options_of(Job, "bos", "separator", "precision", "store", "seed"),
)


def job_of(options: Mapping[str, Any]) -> Job:
    """The job that the values of all options describe. Raises UserError."""
    preset = _preset(options["preset"], {f.name: options[f.name] for f in fields(Preset) if options.get(f.name) is not None})
    preset.require_files()
    if options["split"] is not None:
        refuse_local_split(preset.dataset)
    hooks = options["sites"] or (RESID_POST,)
    sites = parse_sites(options["layers"] or f"0-{preset.n_layers - 1}", preset.n_layers, hooks)
    cache = options["cache"] or DATA / preset.name
    return filled(Job, {**options, "preset": preset, "cache": cache, "sites": sites})


def _preset(name: str | None, given: dict[str, Any]) -> Preset:
    """The defaults with the command line's values over them."""
    if name is None and (missing := [f"--{option}" for option in ("model", "dataset", "tokens") if option not in given]):
        raise UserError(f"say what to harvest with {', '.join(missing)}, or name a preset: --preset {' or '.join(PRESETS)}")
    if "dataset" in given:
        given.setdefault("dataset_revision", None)
    if "model" in given:
        given.setdefault("revision", None)
        config = load_config(given["model"], given["revision"])
        given |= _model_shape(config)
    if name is None:
        return Preset.of_model(config, given)
    preset = get_preset(name)
    if given.get("model", preset.model) != preset.model:
        given["name"] = short_name(given["model"])
    return replace(preset, **given)


def _model_shape(config: PretrainedConfig) -> dict[str, Any]:
    return {"n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "vocab_size": config.vocab_size}


@click.group(cls=DefaultRun)
def main() -> None:
    """Harvest residual activations into a cache, and look after it."""


@main.command("run")
@_common
@_settings
@DEVICE
@options_of(Job, "shard")
def run_command(**options: Any) -> None:
    """Fill the cache (the default command); run it again to continue, or to add layers."""
    fill(**options)


def fill(device: str | None, **options: Any) -> Cache:
    """Harvest the job that the values of all options describe, and return its cache. Raises UserError."""
    job = job_of(options)
    config = job.config(device)
    prepare_place(job.cache, job.shape(), job.sites)
    opened = job.open()
    spec = opened.spec
    if Cache.exists(job.cache):
        spec = replace(spec, model_revision=as_harvested(Cache.open(job.cache).spec, opened.model).sha256)
    else:
        require_model(str(opened.model.folder), None, job.precision, spec.context)  # before hours of tokenising
        say(f"note: every document ends with token {spec.separator} ({opened.separator}); --separator names another", err=True)
    origin = ReadText(text=opened.source, model=opened.model)
    again = options["layers"] is not None or options["sites"] is not None  # whoever names a layer wants all of it
    return fill_cache(job.cache, spec, job.sites, origin, config, again=again)


main.add_command(synthetic_command)
main.add_command(convert_command)
main.add_command(import_command)


@main.command("plan")
@_common
@_settings
@click.option("--json", "as_json", is_flag=True, help="Layers and shape for a program, without the probe of the disk.")
def plan_command(as_json: bool, **options: Any) -> None:
    """Bytes, free disk and time of a harvest, before it is begun. Needs neither weights nor text."""
    job = job_of(options)
    if as_json:
        return say(json.dumps({"layers": [site.json for site in job.sites], "shape": asdict(job.shape())}), asked=True)
    say(str(make_plan(job.cache, job.shape(), job.sites, job.threads)), asked=True)


@main.command("verify")
@_common
def verify_command(preset: str | None, cache: Location | None, threads: int) -> int:
    """Check every committed block against its checksum; exit code 1 if something is damaged."""
    opened = _open(preset, cache)
    lines = verify(opened, opened.sites, threads).lines
    for line in lines:
        say(line)
    say("damaged" if lines else "every committed block is as it was written")
    if left := opened.leftovers():
        say(
            f"note: {opened.path} has {len(left)} half-written files, {format_bytes(sum(left))}, of a harvest at work or of "
            "one that was killed, whose files the next harvest removes",
            err=True,
        )
    for line in () if lines else notes_on_mixing(opened.totals()):
        say(line, err=True)
    return 1 if lines else 0


@main.command("repair")
@_common
@DEVICE
@click.option("--blocks", help="Blocks to harvest again, such as 3,7 [default: those that fail verification].")
@click.option("--model", type=parse_name, metavar="TEXT", help="Where the model lies now, if not where it lay.")
@click.option("--revision", help="The model's revision on the hub.")
@click.option(
    "--dataset", type=parse_name, metavar="TEXT", help="Where the text, or what was imported, lies now, if not where it lay."
)
def repair_command(
    preset: str | None,
    cache: Location | None,
    threads: int,
    device: str | None,
    blocks: str | None,
    model: str | None,
    revision: str | None,
    dataset: str | None,
) -> None:
    """Harvest named or damaged blocks again, and nothing else."""
    opened = _open(preset, cache)
    config = HarvestConfig(device=pick_device(device), writer=WriterConfig(threads=threads))
    opened.remove_leftovers()
    damage = _named(opened, blocks) if blocks else verify(opened, opened.sites, threads)
    if not damage.lines:
        say("repaired nothing: every committed block is as it was written")
        return
    n = 0
    if damage.blocks or damage.chunks:
        n = repair(opened, damage, _origin(opened, model, revision, dataset), config)
    else:  # the arrays' metadata alone: neither model nor text is needed
        opened.add_sites(())
    say(f"repaired {n} layer blocks" + (" and the tokens" if damage.chunks else ""))


def _origin(cache: Cache, model: str | None, revision: str | None, dataset: str | None) -> Origin:
    """What the cache was made from, where it lies now. Raises UserError for another model."""
    spec = cache.spec
    if spec.world is not None:
        return Synthetic()
    if spec.imported is not None:
        return imported_again(cache, dataset)
    text = open_text(
        dataset=dataset or spec.dataset, revision=unpin(spec.dataset_revision), split=spec.split, column=spec.text_column
    )
    return ReadText(text=text, model=harvested_model(cache, model, revision))


def _named(cache: Cache, blocks: str) -> Damage:
    """These blocks of every layer, whatever state they are in. Raises UserError."""
    chosen = parse_layers(blocks)
    if max(chosen) >= cache.spec.n_blocks:
        raise UserError(f"{cache.path} has blocks 0-{cache.spec.n_blocks - 1}")
    return Damage(blocks={(site, block): "named" for site in cache.sites for block in chosen if block in cache.wanted(site)})


@main.command("free")
@_common
@click.option("--layers", required=True, help="Layers, such as 0-5 or 3,7.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def free_command(preset: str | None, cache: Path | None, threads: int, layers: str, yes: bool) -> None:
    """Remove the training blocks of layers whose SAEs are made. Held-out blocks stay, so that they can still be evaluated."""
    opened = _open(preset, cache)
    chosen = parse_sites(layers)
    if absent := set(chosen).difference(opened.sites):
        raise UserError(f"layers {format_sites(absent)} are not in {opened.path}, which has {format_sites(opened.sites)}")
    room = sum(len(opened.freeable(site)) for site in chosen) * opened.spec.block_bytes
    what = f"the training blocks of layers {format_sites(chosen)} of {opened.path}, {format_bytes(room)}"
    if not yes:
        with contextlib.suppress(click.Abort):  # nobody to answer
            yes = click.confirm(f"Remove {what}? Held-out blocks stay, all else is harvested again if it is wanted.", err=True)
    if not yes:
        raise UserError("nothing was removed: answer y, or say --yes")
    opened.remove_leftovers()
    free(opened, chosen)
    say(f"removed {what}")


def _open(preset: str | None, cache: Location | None) -> Cache:
    return Cache.open(cache_place(cache, preset))


if __name__ == "__main__":
    run(main)
