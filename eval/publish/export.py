"""SAEs in the forms that other tools load: one folder an SAE, whole or not there at all.

Ours is                       z = relu(W_enc (x − b_pre) + b_enc)      x̂ = W_dec z + b_dec + b_pre
SAELens (standard), sparsify and dictionary_learning (AutoEncoder) have one bias in the place of two:
                              z = relu(W_enc (x − b) + b')             x̂ = W_dec z + b
The same function has b = b_pre + b_dec and b' = b_enc + W_enc (b − b_pre), see `fold`. sparsify keeps the k largest of z: with
k = F all of them, which is ReLU. Those with thresholds are SAELens' jumprelu and dictionary_learning's BatchTopKSAE.
"""

import errno
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from eval.measure.evaluate import measured_features
from shared.errors import UserError
from shared.files import make_dir, remove_leftovers, sync_dir, temporary, write_file
from shared.lm import unpin
from shared.progress import Progress, say
from shared.runs.run import FINAL, Run
from shared.runs.sae import Sae
from shared.seal import SEAL
from shared.units import format_layers

SAELENS_FORM = (
    "6.0.0"  # the form of cfg.json. Without it, or before it, SAELens' loader drops what it does not know, hook_name too
)
_FILE = re.compile(r"sae_layer(\d+)_(\w+)\.pt")
_KEYS = ("b_pre", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
Files = dict[str, bytes]


@dataclass(kw_only=True, frozen=True, slots=True)
class ExportConfig:
    """What to export, and what the checkpoints do not say."""

    form: str  # a key of FORMS
    out: Path
    layers: tuple[int, ...] | None = None  # None: all there are
    snapshot: str = FINAL
    model: str | None = None  # the language model's name, where a checkpoint does not know it or knows it by another


@dataclass(kw_only=True, frozen=True, slots=True)
class Checkpoint:
    """A file and what is said of it where it lies; `run` is None for files of others."""

    path: Path
    layer: int
    label: str
    run: Run | None = None

    @property
    def folder(self) -> Path:
        """Where it goes, in the folder of exports: <run>/layer_12, or layer_12_50M for an earlier snapshot."""
        name = f"layer_{self.layer}" + ("" if self.label == FINAL else f"_{self.label}")
        return Path(self.path.resolve().parent.name) / name


@dataclass(kw_only=True, frozen=True, slots=True)
class Origin:
    """What an SAE is of. None is unknown, and left out of what is written."""

    layer: int
    source: dict[str, Any]  # which file it was made from
    model: str | None = None
    context: int | None = None
    dataset: str | None = None
    log10_density: Tensor | None = None  # float32 [F], of how many of the held-out tokens `source` says


def fold(sae: Sae) -> tuple[Tensor, Tensor]:
    """(b', b), float32: the biases of the same function with b taken from the input and added to the output.

    b' makes up for b_dec and for the rounding of b; it is summed in float64 and rounded once.
    """
    b = sae.b_pre + sae.b_dec
    return (sae.b_enc.double() + sae.w_enc.double() @ (b.double() - sae.b_pre.double())).float(), b


def saelens(sae: Sae, origin: Origin) -> Files:
    """SAELens ≥ 6: `SAE.load_from_disk(folder)`, and `SAE.from_pretrained(repository, folder)` where it is on the hub."""
    b_enc, b_dec = fold(sae)
    metadata = {
        "sae_lens_version": SAELENS_FORM,
        "model_name": origin.model,
        "model_class_name": "HookedTransformer",
        # TransformerLens centres what is written to the residual stream unless told not to, and x would not be our x
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "hook_name": f"blocks.{origin.layer}.hook_resid_post",
        "prepend_bos": False,
        "context_size": origin.context,
        "dataset_path": origin.dataset,
        "source": origin.source,
    }
    config = {
        "architecture": "standard" if sae.threshold is None else "jumprelu",
        "d_in": sae.w_enc.shape[1],
        "d_sae": sae.w_enc.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _known(metadata),
    }
    weights = {"W_enc": sae.w_enc.t(), "b_enc": b_enc, "W_dec": sae.w_dec, "b_dec": b_dec}
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    files = {"cfg.json": _json(config), "sae_weights.safetensors": _safetensors(weights)}
    if origin.log10_density is not None:
        files["sparsity.safetensors"] = _safetensors({"sparsity": origin.log10_density})
    return files


def sparsify(sae: Sae, origin: Origin) -> Files:
    """EleutherAI's sparsify: `SparseCoder.load_from_disk(folder)`."""
    if sae.threshold is not None:
        raise UserError(
            f"{origin.source['run']}/{origin.source['file']} has thresholds, as BatchTopK and --refit-kind topk leave, "
            "and sparsify has no such SAEs: export it to saelens or dictionary_learning"
        )
    n_features, d = sae.w_enc.shape
    b_enc, b_dec = fold(sae)
    config = {
        "activation": "topk",
        "expansion_factor": n_features // d,
        "normalize_decoder": False,
        "num_latents": n_features,
        "k": n_features,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
        "layer": origin.layer,
        "model": origin.model,
        "source": origin.source,
    }
    weights = {"encoder.weight": sae.w_enc, "encoder.bias": b_enc, "W_dec": sae.w_dec, "b_dec": b_dec}
    return {"cfg.json": _json(_known(config)), "sae.safetensors": _safetensors(weights)}


def dictionary_learning(sae: Sae, origin: Origin) -> Files:
    """dictionary_learning: `load_dictionary(folder, device)`, and `from_pretrained(folder/ae.pt)` of AutoEncoder or, with
    thresholds, of BatchTopKSAE. That has one threshold for all features: they are scaled so that it is the same one."""
    b_enc, bias = fold(sae)
    trainer = {
        "dict_class": "AutoEncoder",
        "activation_dim": sae.w_enc.shape[1],
        "dict_size": sae.w_enc.shape[0],
        "layer": origin.layer,
        "lm_name": origin.model,
        "submodule_name": f"resid_post_layer_{origin.layer}",
    }
    weights = {"bias": bias, "encoder.weight": sae.w_enc, "encoder.bias": b_enc, "decoder.weight": sae.w_dec.t()}
    more: dict[str, Tensor] = {}
    if sae.threshold is not None:
        common = sae.threshold.mean()
        scale = torch.where(sae.threshold > 0, common / sae.threshold, 1.0)[:, None]
        weights = {
            "b_dec": bias,
            "encoder.weight": sae.w_enc * scale,
            "encoder.bias": b_enc * scale[:, 0],
            "decoder.weight": (sae.w_dec / scale).t(),
            "threshold": common,
        }
        k = round(sae.stats["l0"])  # as many of its last batch were kept
        trainer |= {"dict_class": "BatchTopKSAE", "k": k}
        more["k"] = torch.tensor(k, dtype=torch.int32)
    config = {"trainer": _known(trainer), "buffer": _known({"ctx_len": origin.context}), "source": origin.source}
    content = io.BytesIO()
    torch.save({name: _own(tensor) for name, tensor in weights.items()} | more, content)
    return {"config.json": _json(config), "ae.pt": content.getvalue()}


FORMS: dict[str, Callable[[Sae, Origin], Files]] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}


def export(places: tuple[Path, ...], config: ExportConfig) -> list[Path]:
    """Write every SAE found in `places` (runs, folders of runs, folders of files, files); the folders, in order.

    What cannot be exported is said and left out; what is there already is kept. Raises UserError at the end if anything was
    left out, and before anything is written if there is nothing to export or two SAEs would go to one place.
    """
    found = find_checkpoints(places, config)
    targets = [config.out / checkpoint.folder for checkpoint in found]
    if twice := sorted({str(t) for t in targets if targets.count(t) > 1}):
        raise UserError(f"two SAEs would be written to {twice[0]}; export their runs to different --out folders")
    failed, without_name, without_density = 0, False, False
    with Progress("exporting", len(found), "SAEs") as progress:
        for checkpoint, target in zip(found, targets, strict=True):
            try:
                sae, origin = open_checkpoint(checkpoint, config)
                without_name |= origin.model is None
                without_density |= origin.log10_density is None
                publish_folder(target, FORMS[config.form](sae, origin))
            except UserError as error:
                failed += 1
                say(f"left out: {error}", err=True)
            progress.advance(1, str(checkpoint.folder))
    if without_name:
        say("the language model's name is left out where only its folder is known: give it with --model", err=True)
    if config.form == "saelens" and without_density:
        say("sparsity.safetensors is left out where `python -m eval` has not measured how often features fire", err=True)
    if failed:
        raise UserError(f"{failed} of {len(found)} SAEs are left out, as said above; the others are in {config.out}")
    return targets


def find_checkpoints(places: tuple[Path, ...], config: ExportConfig) -> list[Checkpoint]:
    """What there is of the wanted layers and snapshot; of a file that is named, itself. Raises UserError if it is nothing, or
    a wanted layer is nowhere."""
    found = [c for place in places for c in _found_at(place, config) if config.layers is None or c.layer in config.layers]
    missing = set(config.layers or ()) - {c.layer for c in found}
    if missing or not found:
        what = f"{config.snapshot!r} snapshot" + (f" of layers {format_layers(missing)}" if missing else "")
        raise UserError(
            f"there is no {what} in {', '.join(map(str, places))}; name another with --runs, --layers or --snapshot"
        )
    return found


def _found_at(place: Path, config: ExportConfig) -> list[Checkpoint]:
    if place.is_file():
        run = Run(place.parent) if _is_run(place.parent) else None
        named = _FILE.fullmatch(place.name)
        return [Checkpoint(path=place, layer=_layer_of(place, config), label=named[2] if named else place.stem, run=run)]
    if _is_run(place):
        run = Run(place)
        return [
            Checkpoint(path=s.path, layer=s.layer, label=s.label, run=run)
            for s in run.snapshots()
            if s.label == config.snapshot
        ]
    names = [(path, _FILE.fullmatch(path.name)) for path in sorted(place.glob("sae_layer*.pt"))]
    if names:
        return [Checkpoint(path=p, layer=int(m[1]), label=m[2]) for p, m in names if m and m[2] == config.snapshot]
    inside = sorted({path.parent for pattern in ("*/config.json", "*/sae_layer*.pt") for path in place.glob(pattern)})
    return [c for folder in inside for c in _found_at(folder, config)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours, in whatever state: then everything in it must pass the run's checks."""
    try:
        content = json.loads((folder / "config.json").read_text())
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(content, dict) and "format" in content


def _layer_of(path: Path, config: ExportConfig) -> int:
    if named := _FILE.fullmatch(path.name):
        return int(named[1])
    if config.layers is None or len(config.layers) != 1:
        raise UserError(f"the name of {path} does not say which layer it is of: name it with --layers")
    return config.layers[0]


def open_checkpoint(checkpoint: Checkpoint, config: ExportConfig) -> tuple[Sae, Origin]:
    """An SAE and what it is of. Raises UserError for a file that is no SAE, is damaged, or is of another layer or cache."""
    sae = _load(checkpoint)
    if not all(bool(tensor.isfinite().all()) for tensor in sae.tensors().values()):
        raise UserError(f"{checkpoint.path} holds values that are not finite; export an earlier --snapshot")
    source: dict[str, Any] = {"run": checkpoint.folder.parent.name, "file": checkpoint.path.name}
    with checkpoint.path.open("rb") as file:
        source["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    log10_density = None
    if checkpoint.run and config.form == "saelens":
        measured = measured_features(checkpoint.run, checkpoint.layer, checkpoint.label, sae.stats[SEAL])
        if measured is not None:
            log10_density = (measured[0].density.double() + 1e-10).log10().float()  # SAELens' own way to write it
            source["density_tokens"] = measured[1]
    spec: dict[str, Any] = sae.config["cache"]["spec"] if sae.config else {}
    # What lies in a folder is known by its hash, and nobody else has that folder.
    commits = {"model": spec.get("model_commit"), "dataset": unpin(str(spec.get("dataset_revision", "sha256:")))}
    hub = {name: spec[name] for name, commit in commits.items() if commit}
    origin = Origin(
        layer=checkpoint.layer,
        source=source,
        model=config.model or hub.get("model"),
        dataset=hub.get("dataset"),
        context=spec.get("context"),
        log10_density=log10_density,
    )
    return sae, origin


def _load(checkpoint: Checkpoint) -> Sae:
    """Ours by its own rules; a published file of the same names by what it holds, whatever else is in it left aside."""
    content = None if checkpoint.run is not None else _content(checkpoint.path)
    if content is not None and "format" not in _dictionary(content.get("config")):
        return _foreign(checkpoint.path, _dictionary(content.get("model_state", content)))
    run, layer = checkpoint.run, checkpoint.layer
    return Sae.load(checkpoint.path, belongs={"layer": layer} if run is None else run.belongs(layer, checkpoint.label))


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


def publish_folder(folder: Path, files: Files) -> None:
    """Make the folder with all its files in one move. One that is there already is kept if it says the same of itself."""
    said = "cfg.json" if "cfg.json" in files else "config.json"
    if folder.exists():
        if (folder / said).is_file() and (folder / said).read_bytes() == files[said]:
            return
        raise UserError(f"{folder} holds something else already; remove it or choose another --out")
    make_dir(folder.parent)
    remove_leftovers(folder.parent)
    mine = temporary(folder)
    try:
        mine.mkdir()
        for name, content in files.items():
            write_file(mine / name, content)
        sync_dir(mine)
        mine.rename(folder)
        sync_dir(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another --out or make room") from None
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _own(tensor: Tensor) -> Tensor:
    """A copy with its numbers in order and nothing else behind it, as files want it."""
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    content: bytes = save({name: _own(tensor) for name, tensor in tensors.items()}, metadata={"format": "pt"})
    return content
