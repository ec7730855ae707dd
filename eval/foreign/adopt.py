"""Runs made of other tools' SAEs, after which everything that runs are measured, shown and compared by is the same for them.

Such a run has SAEs of one kind, one a site and final, and says where they come from in place of how they were trained. The same
command continues it: what is there is compared with the files, and what is missing or damaged is made.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import click

from residual_saes.eval.foreign.forms import TOOLS, Foreign, find, read_sae
from residual_saes.eval.foreign.places import read_before, site_of
from residual_saes.eval.measure.runs import Skipped
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import family_of, known_model
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.run import FINAL, Run, cache_identity, run_config
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.runs.target import Target, Transcoder
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.stores import folder_name, parse_folder

_TITLES = {"saelens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}


@dataclass(kw_only=True, frozen=True, slots=True)
class AdoptConfig:
    """SAEs that another tool trained, if there are any."""

    saes: Path | None = option("Take over another tool's SAEs in this folder first.", None, type=parse_folder, metavar="PATH")
    from_: str | None = option("That tool [default: by the names of files].", None, type=click.Choice(list(TOOLS)))
    layers: tuple[Site, ...] | None = option("Which of them; of a single one, its layer.", None, type=parse_sites)


def adopt(cache: Cache, runs: Path, config: AdoptConfig, skipped: Skipped) -> None:
    """Make runs in the folder `runs` of all SAEs below a folder. What cannot be read is left out with a line. Raises UserError
    if there is nothing, and where there is one SAE for what is wrong with it."""
    if config.saes is None:
        if config.from_ or config.layers:
            raise UserError("--from and --layers are of other tools' SAEs: name their folder by --saes")
        return
    if (runs / "config.json").exists():
        raise UserError(
            f"{runs} is a run, beside which other tools' SAEs become runs: name the folder that it lies in by --runs"
        )
    found = find(config.saes, (config.from_,) if config.from_ else tuple(TOOLS))
    only = config.layers[0] if config.layers and len(config.layers) == len(found) == 1 else None
    family = None if cache.spec.world else family_of(known_model(cache.spec.model, cache.spec.model_commit or None))
    left, taken = set(config.layers or ()), dict[Path, Path]()  # {checkpoint: the folder that it is of}
    with Progress("reading", len(found), "SAEs") as progress:
        for tool, folder in found:
            with skipped.leaving_out() if len(found) > 1 else contextlib.nullcontext():
                foreign = read_sae(tool, folder)
                target = _target(foreign, only, family)
                if config.layers is None or target.place in config.layers:
                    left.discard(target.place)
                    _require_cached(foreign, target, cache)
                    path = _take(foreign, target, cache, runs, taken)
                    progress.advance(0, str(path.relative_to(runs)))
            progress.advance(1)
    if not taken:
        raise UserError(f"no SAE in {config.saes} can be taken over, as said above")
    if left:
        raise UserError(f"there is no SAE of layers {format_sites(left)} in {config.saes}: name others with --layers")


def _target(foreign: Foreign, site: Site | None, family: str | None) -> Target:
    """The site that it reads and writes, or those; `site` is what it writes if that is said to be known better."""
    if (site := site or site_of(foreign.place or "", family)) is None:
        where = f"is of {foreign.place}, which has no name here" if foreign.place else "does not say which layer it is of"
        raise UserError(f"{foreign.folder} {where}: give it alone, with its layer by --layers")
    if not foreign.transcodes:
        return Target.itself(site)
    read = site_of(foreign.reads, family) if foreign.reads else read_before(site, family)
    if read is None or read.layer > site.layer:
        raise UserError(
            f"{foreign.folder} reads {foreign.reads or f'what gives {site}'}, which no transcoder here reads: leave it out"
        )
    return Target((read,), (site,))


def _require_cached(foreign: Foreign, target: Target, cache: Cache) -> None:
    """Raises UserError for an SAE of other activations than the cache's; says so where it only seems to be."""
    spec, d = cache.spec, len(foreign.function.b_pre)
    if not set(target.sites) <= set(cache.sites):
        there = f"{cache.path} has {format_sites(cache.sites)}"
        raise UserError(f"{foreign.folder} is of layer {target}, and {there}: harvest it, or name another by --layers")
    if d != spec.d_model:
        raise UserError(f"{foreign.folder} is over {d} dimensions, and {cache.path} has {spec.d_model}: name its model's cache")
    names = [name.rpartition("/")[2].lower() for name in (foreign.model or "", spec.model)]
    if foreign.model and names[0] != names[1]:
        say(f"note: {foreign.folder} says that it is of {foreign.model}, and the cache is of {spec.model}", err=True)


def _take(foreign: Foreign, target: Target, cache: Cache, runs: Path, taken: dict[Path, Path]) -> Path:
    """Write an SAE into its run, unless it is there; its path. Raises UserError for another one in its place."""
    function, form, tool, site = foreign.function, foreign.form, foreign.tool, target.place
    name = folder_name(foreign.folder)
    if site_of(foreign.folder.name) is not None:  # a folder for each layer, and one above them
        name = folder_name(foreign.folder.absolute().parent)
    elif name == foreign.folder.name:
        name = f"{folder_name(Path(os.path.abspath(foreign.folder)).parent)}-{name}"
    run = Run(runs / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{tool}")
    path = run.snapshot_path(site, FINAL)
    if (before := taken.setdefault(path, foreign.folder)) != foreign.folder:
        raise UserError(f"{foreign.folder} would be {path}, as {before} is: rename the folder that it lies in")
    numbers = {name: n for name, n in (("k", function.k), ("l0", function.l0)) if n is not None}
    train = {
        "expansion": len(function.w_enc) / len(function.b_pre),
        "l1": {"kind": f"{tool} {form}"} | numbers,
        "source": {"tool": tool, "form": form, "name": name},
        "target": Transcoder.between(target.inputs[0], site) if target.transcodes else "",
        "skip": function.skip is not None,
    }
    reading = function.reading(f"{form} of {_TITLES[tool]}" + "".join(f", {k} {v}" for k, v in numbers.items()))
    with run.claim([site]):
        run.create(run_config(train, cache_identity(cache, run.path)) | {"sparsity": reading.fields()}, {})
        belongs, files = run.belongs(site, FINAL), {"files": foreign.sha256}
        sae = Sae(
            w_enc=function.w_enc, w_dec=function.w_dec, b_enc=function.b_enc, b_pre=function.b_pre, b_dec=function.b_dec,
            threshold=function.threshold, skip=function.skip,
            config=run.config.portable | belongs | target.fields() | files,
            stats={"tokens": None, "lambda": None} | ({} if function.l0 is None else {"l0": float(function.l0)}),
        )  # fmt: skip
        try:
            there = Sae.load(path, belongs=belongs).config["files"]
        except Damaged as error:
            if path.exists():
                say(f"{error}: it is made again", err=True)
            sae.save(path)
        else:
            if there != foreign.sha256:
                raise UserError(f"{path} was made of other files than {foreign.folder} has: remove it, or name other --runs")
    return path
