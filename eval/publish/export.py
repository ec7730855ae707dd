"""SAEs in the forms of other tools (formats.py), found in runs and files of others: one folder an SAE, or a set of transcoders,
whole or not there."""

import errno
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from residual_saes.eval.measure.features import measured_features
from residual_saes.eval.publish.formats import (
    CIRCUIT_TRACER,
    FORMS,
    Files,
    Origin,
    Source,
    circuit_tracer_config,
    circuit_tracer_hooks,
    circuit_tracer_layer,
)
from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, publish_file, read_if_there, sync_dir, write_file, writing
from residual_saes.shared.identity import unpin
from residual_saes.shared.lm import family_of, known_model, module_name
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.run import FINAL, Run, snapshot_name
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import SEAL, parse_json
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.stores import folder_name, parse_folder
from residual_saes.shared.temporaries import discard, place, remove_leftovers, temporary

_KEYS = ("b_pre", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


@dataclass(kw_only=True, frozen=True, slots=True)
class ExportConfig:
    """What to export, and what the checkpoints do not say."""

    to: str = option("The tool that is to load them.", type=click.Choice([*FORMS, CIRCUIT_TRACER]), required=True)
    out: Path = option(
        "Gets <run>/layer_<N> for each SAE, or <run> for a set.", type=parse_folder, metavar="PATH", required=True
    )
    layers: tuple[Site, ...] | None = option("Such as 0-5,12 [default: all there are].", None, type=parse_sites)
    snapshot: str = option("Which of each layer's snapshots.", FINAL)
    model: str | None = option("Name of the language model [default: the run's, if it is a name and not a folder].", None)


@dataclass(kw_only=True, frozen=True, slots=True)
class Checkpoint:
    """A file and what is said of it where it lies; `run` is None for files of others."""

    path: Path
    site: Site
    label: str
    run: Run | None = None

    @property
    def folder(self) -> Path:
        """Where it goes, in the folder of exports: <run>/layer_12, or layer_12_50M for an earlier snapshot."""
        return Path(folder_name(self.path.parent)) / f"layer_{self.site}{self._earlier}"

    @property
    def set(self) -> Path:
        """Where it goes with the other layers: <run>, or <run>_50M."""
        return Path(folder_name(self.path.parent) + self._earlier)

    @property
    def _earlier(self) -> str:
        return "" if self.label == FINAL else f"_{self.label}"


def export(places: tuple[Path, ...], config: ExportConfig) -> list[Path]:
    """Write every SAE found in `places` (runs, folders of runs, folders of files, files); the folder of each, in order.

    What cannot be exported is said and left out; what is there already is kept. Raises UserError at the end if anything was
    left out, and before anything is written if there is nothing to export or two SAEs would go to one place.
    """
    found = find_checkpoints(places, config)
    targets = [config.out / (checkpoint.set if config.to == CIRCUIT_TRACER else checkpoint.folder) for checkpoint in found]
    groups: dict[Path, dict[Site, Checkpoint]] = {}
    for checkpoint, target in zip(found, targets, strict=True):
        if groups.setdefault(target, {}).setdefault(checkpoint.site, checkpoint) is not checkpoint:
            raise UserError(f"two SAEs would be written to {target}; export their runs to different --out folders")
    failed, without_name, without_density = 0, False, False
    with Progress("exporting", len(found), "SAEs") as progress:
        for target, group in groups.items():
            try:
                if config.to == CIRCUIT_TRACER:
                    files, origin = _set(group, config)
                else:
                    (checkpoint,) = group.values()
                    sae, origin = open_checkpoint(checkpoint, config)
                    files = FORMS[config.to](sae, origin)
                without_name |= origin.model is None
                without_density |= origin.log10_density is None
                publish_folder(target, files)
            except UserError as error:
                failed += len(group)
                say(f"left out: {error}", err=True)
            progress.advance(len(group), str(target.relative_to(config.out)))
    if without_name:
        say("the language model's name is left out where only its folder is known: give it with --model", err=True)
    if config.to == "saelens" and without_density:
        say("sparsity.safetensors is left out where `rsae eval` has not measured how often features fire", err=True)
    if failed:
        raise UserError(f"{failed} of {len(found)} SAEs are left out, as said above; the others are in {config.out}")
    return targets


class _MadeWhenAsked(Mapping[str, bytes]):
    """Files by name, each made when its bytes are wanted: a set of full size is larger than memory."""

    def __init__(self, makers: dict[str, Callable[[], bytes]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> bytes:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _set(layers: dict[Site, Checkpoint], config: ExportConfig) -> tuple[Files, Origin]:
    """The files of one, and what its first layer is of. Raises UserError for what circuit-tracer cannot hold."""
    origins, hooks, makers = dict[int, Origin](), dict[str, str](), dict[str, Callable[[], bytes]]()
    for site, checkpoint in layers.items():
        sae, origin = open_checkpoint(checkpoint, config)
        origins[site.layer], hooks = origin, circuit_tracer_hooks(sae, origin)
        makers[f"layer_{site.layer}.safetensors"] = partial(_layer, checkpoint, config)
    wanted = set(range(origin.n_layers or max(origins) + 1))
    if missing := wanted - set(origins):
        raise UserError(
            f"{checkpoint.set} lacks layers {format_sites(map(Site, missing))}, and circuit-tracer wants all of a model's: "
            "train them, and leave out --layers"
        )
    return _MadeWhenAsked(makers | {"config.yaml": partial(circuit_tracer_config, hooks, origins)}), origins[0]


def _layer(checkpoint: Checkpoint, config: ExportConfig) -> bytes:
    return circuit_tracer_layer(open_checkpoint(checkpoint, config)[0])


def find_checkpoints(places: tuple[Path, ...], config: ExportConfig) -> list[Checkpoint]:
    """What there is of the wanted layers and snapshot; of a file that is named, itself. Raises UserError if it is nothing, or
    a wanted layer is nowhere."""
    if absent := [place for place in places if not place.exists()]:
        raise UserError(f"there is no {absent[0]}: name runs, folders or .pt files with --runs")
    found = [c for place in places for c in _found_at(place, config) if config.layers is None or c.site in config.layers]
    missing = set(config.layers or ()) - {c.site for c in found}
    if missing or not found:
        what = f"{config.snapshot!r} snapshot" + (f" of layers {format_sites(missing)}" if missing else "")
        raise UserError(
            f"there is no {what} in {', '.join(map(str, places))}; name another with --runs, --layers or --snapshot"
        )
    return found


def _found_at(place: Path, config: ExportConfig) -> list[Checkpoint]:
    if place.is_file():
        run = Run(place.parent) if _is_run(place.parent) else None
        named = snapshot_name(place.name)
        return [Checkpoint(path=place, site=_site_of(place, config), label=named[1] if named else place.stem, run=run)]
    if _is_run(place):
        run = Run(place)
        return [
            Checkpoint(path=s.path, site=s.site, label=s.label, run=run) for s in run.snapshots() if s.label == config.snapshot
        ]
    names = [(path, snapshot_name(path.name)) for path in sorted(place.glob("sae_layer*.pt"))]
    if names:
        return [Checkpoint(path=p, site=n[0], label=n[1]) for p, n in names if n and n[1] == config.snapshot]
    inside = sorted({path.parent for pattern in ("*/config.json", "*/sae_layer*.pt") for path in place.glob(pattern)})
    return [c for folder in inside for c in _found_at(folder, config)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours, in whatever state: then everything in it must pass the run's checks."""
    if (stored := read_if_there(folder / "config.json")) is None:
        return False
    try:
        content = parse_json(stored)
    except ValueError:
        return True
    return isinstance(content, dict) and "format" in content


def _site_of(path: Path, config: ExportConfig) -> Site:
    if named := snapshot_name(path.name):
        return named[0]
    if config.layers is None or len(config.layers) != 1:
        raise UserError(f"the name of {path} does not say which layer it is of: name it with --layers")
    return config.layers[0]


def open_checkpoint(checkpoint: Checkpoint, config: ExportConfig) -> tuple[Sae, Origin]:
    """An SAE and what it is of. Raises UserError for a file that is no SAE, is damaged, or is of another layer or cache."""
    sae = _load(checkpoint)
    if not all(bool(tensor.isfinite().all()) for tensor in sae.tensors().values()):
        raise UserError(f"{checkpoint.path} holds values that are not finite; export an earlier --snapshot")
    with checkpoint.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    measured = None
    if checkpoint.run and config.to == "saelens":
        measured = measured_features(checkpoint.run, checkpoint.site, checkpoint.label, sae.stats[SEAL])
    of = RunConfig.of(sae.config, checkpoint.path) if sae.config else None
    spec = of.cache.spec if of else None
    # on what texts others trained their SAEs, or took their activations, is not known
    text = of.cache.spec if of and of.train.source is None and of.cache.spec.has_model else None
    lm = known_model(spec.model, spec.model_commit or None) if spec else None
    origin = Origin(
        site=checkpoint.site,
        source=Source(
            run=checkpoint.folder.parent.name,
            file=checkpoint.path.name,
            sha256=sha256,
            density_tokens=measured[1] if measured else None,
        ),
        # what lies in a folder is known by its hash, and nobody else has that folder
        model=config.model or (spec.model if spec and spec.model_commit else None),
        family=family_of(lm),
        n_layers=spec.n_layers if spec else None,
        module=module_name(lm, sae.target.inputs[0] if sae.transcodes else checkpoint.site),
        dataset=text.dataset if text and unpin(text.dataset_revision) else None,
        context=text.context if text else None,
        bos=text.bos if text else None,
        # SAELens' own way to write it
        log10_density=(measured[0].density.double() + 1e-10).log10().float() if measured else None,
    )
    return sae, origin


def _load(checkpoint: Checkpoint) -> Sae:
    """Ours by its own rules; a published file of the same names by what it holds, whatever else is in it left aside."""
    content = None if checkpoint.run is not None else _content(checkpoint.path)
    if content is not None and "format" not in _dictionary(content.get("config")):
        return _foreign(checkpoint.path, _dictionary(content.get("model_state", content)))
    run, site = checkpoint.run, checkpoint.site
    belongs = {"layer": site.json} if run is None else run.belongs(site, checkpoint.label)
    return Sae.load(checkpoint.path, belongs=belongs).at(site)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip, pickle or dictionary fails in too many ways to name them
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch meets where a zip ends before its end
            raise UserError(f"cannot read {path}: {error.strerror or error}; put that right and try again") from None
        raise UserError(f"{path} is not a readable SAE checkpoint ({type(error).__name__}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an SAE's weights by name; name another file")
    return content


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _foreign(path: Path, state: dict[str, Any]) -> Sae:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if set(tensors) != set(_KEYS):  # one weight more, and it may be another function
        raise UserError(
            f"{path} is not an SAE of this kind: it holds {', '.join(sorted(tensors)) or 'no weights'}, not {_KEYS}"
        )
    d, n_features = tensors["b_pre"].numel(), tensors["encoder.bias"].numel()
    shapes = {"b_pre": (d,), "encoder.weight": (n_features, d), "encoder.bias": (n_features,)}
    for name, shape in (shapes | {"decoder.weight": (d, n_features), "decoder.bias": (d,)}).items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, where the other weights ask for {shape}")
    return Sae(
        w_enc=tensors["encoder.weight"].float(),
        w_dec=tensors["decoder.weight"].t().contiguous().float(),
        b_enc=tensors["encoder.bias"].float(),
        b_pre=tensors["b_pre"].float(),
        b_dec=tensors["decoder.bias"].float(),
        config={},
        stats={},
    )


def publish_folder(folder: Path, files: Files, *, ours: bool = False) -> None:
    """Make the folder with all its files in one move. In one that is there already and says the same of itself, what is
    missing or damaged is made again; one that is `ours` may say something else, of which nothing stays."""
    said = next(name for name in ("cfg.json", "config.json", "config.yaml") if name in files)
    remove_leftovers(folder.parent)
    if folder.exists():
        remove_leftovers(folder)
        same = (folder / said).is_file() and (folder / said).read_bytes() == files[said]
        if not (same or ours):
            raise UserError(f"{folder} holds something else already: remove it, or move it elsewhere")
        for path in () if same else set(folder.iterdir()) - {folder / name for name in files}:
            path.unlink()
        for name in sorted(files, key=lambda name: name == said):  # by which the folder is ours, last
            content = files[name]
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                if same:
                    say(f"{folder / name} is missing or damaged: it is made again", err=True)
                publish_file(folder / name, content)
        return
    make_dir(folder.parent)
    with writing(folder):
        new = temporary(folder, folder=True)
        try:
            for name, content in files.items():
                write_file(new / name, content)
            sync_dir(new)
            try:
                place(new, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return publish_folder(folder, files, ours=ours)  # another process has just made it
        finally:
            discard(new)
        sync_dir(folder.parent)
