"""SAEs as other tools leave them in folders, read as functions of ours: JSON and tensors, and no code.

Ours is                       z = relu(W_enc (x − b_pre) + b_enc), of which a rule keeps some      x̂ = W_dec z + b_dec + b_pre
A transcoder, which takes nothing from x, gives W_dec z + b_dec, and + W_skip x where it has a skip connection.
What is written otherwise and is the same function is folded: activations that are multiplied by decoder norms, and gates. A
gate is open where W x + b_gate > 0, and its feature is m = e^r W x + b_mag: open where m > b_mag − e^r b_gate, a threshold.
What is another function is refused, and so is a folder with one weight more or less than its kind has.
"""

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.sae import Rule
from residual_saes.shared.runs.sparsity import Reading
from residual_saes.shared.seal import parse_json
from residual_saes.shared.sites import RESID_POST
from residual_saes.shared.typed import Count, read

Weights = dict[str, Tensor]
_LINEAR = {"encoder.weight": "Fd", "encoder.bias": "F", "decoder.weight": "dF"}
_PLAIN = {"W_enc": "dF", "b_enc": "F", "W_dec": "Fd", "b_dec": "d"}


@dataclass(kw_only=True, frozen=True, slots=True)
class Function:
    """What a tool's SAE computes, as ours. Float32."""

    w_enc: Tensor  # [F, d]
    b_enc: Tensor  # [F]
    w_dec: Tensor  # [F, d]
    b_pre: Tensor  # [d]
    b_dec: Tensor  # [d]
    skip: Tensor | None = None  # [d, d]
    threshold: Tensor | None = None  # [F]
    k: int | None = None  # that a token keeps
    l0: int | None = None  # that it was trained to have, where its thresholds do not say
    prefixes: tuple[float, ...] | None = None

    def reading(self, words: str) -> Reading:
        k = None if self.k is None or self.k >= len(self.w_enc) else self.k
        rule: Rule = "threshold" if self.threshold is not None else "relu" if k is None else "topk"
        return Reading(words=words, rule=rule, k=k, prefixes=self.prefixes)


@dataclass(kw_only=True, frozen=True, slots=True)
class Foreign:
    """An SAE of another tool."""

    folder: Path
    tool: str
    form: str  # what the tool calls such an SAE
    function: Function
    sha256: dict[str, str]  # {file: hash}
    place: str | None  # the module or hook that it writes, as the tool says it
    model: str | None
    transcodes: bool = False
    reads: str | None = None  # what a transcoder reads, where it is not what goes into the module that it writes


@dataclass(frozen=True, slots=True)
class _Tool:
    config: str  # names of files
    weights: str
    read: Callable[[Path, dict[str, Any], "_Files"], Foreign]


class _Files:
    """The files of one folder, which are read once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sha256 = folder, dict[str, str]()

    def bytes(self, name: str) -> bytes:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.folder} has no {name}: get it again") from None
        except OSError as error:
            raise UserError(f"cannot read {self.folder / name}: {error.strerror}; put that right and run again") from None
        self.sha256[name] = hashlib.sha256(content).hexdigest()
        return content

    def weights(self, name: str, shapes: dict[str, str], d: int, n_features: int, optional: str = "") -> Weights:
        """{name: tensor} of exactly these, of which the optional ones may be missing. Raises UserError."""
        path, content = self.folder / name, self.bytes(name)
        try:
            # never mapped: a bad block, or a file that is cut meanwhile, would end the process
            found: Weights = (
                load(content)
                if name.endswith(".safetensors")
                else dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
            )
        except Exception as error:  # a damaged file, or a pickle of other things than tensors, fails in too many ways
            raise UserError(f"{path} is not a file of tensors ({type(error).__name__}): get it again") from None
        sizes = {"d": d, "F": n_features}
        if missing := sorted(set(shapes) - set(found) - set(optional.split())):
            raise UserError(f"{path} has no {missing[0]}, which such an SAE has: get it again")
        if more := sorted(set(found) - set(shapes)):
            raise UserError(f"{path} has {more[0]}, which no such SAE has: it would be another function, and is not read")
        for key in filter(found.__contains__, shapes):
            tensor = found[key]
            wanted = tuple(sizes[axis] for axis in shapes[key].replace("*", ""))
            if not isinstance(tensor, Tensor) or (shapes[key] != "*" and tuple(tensor.shape) != wanted):
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(f"{path}: {key} is {shape}, where its configuration asks for {wanted}")
        return {key: tensor.float() for key, tensor in found.items()}


def find(folder: Path, tools: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(tool, folder) of all SAEs at or below a folder. Raises UserError if there is none."""
    found = [(tool, path.parent) for tool in tools for path in sorted(folder.rglob(TOOLS[tool].weights)) if path.is_file()]
    if not found:
        names = " or ".join(TOOLS[tool].weights for tool in tools)
        raise UserError(f"there is no SAE of {' or '.join(tools)} in {folder}: no folder in it has {names}")
    return found


def read_sae(tool: str, folder: Path) -> Foreign:
    """Raises UserError for what is no SAE of the tool, or one whose function is none of ours."""
    files, of = _Files(folder), TOOLS[tool]
    try:
        config = parse_json(files.bytes(of.config))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
        return of.read(folder, config, files)
    except ValueError as error:
        raise UserError(f"{folder / of.config} is not of an SAE of {tool}: {error}") from None


def _only(config: Any, folder: Path, **allowed: tuple[Any, ...]) -> None:
    """Raises UserError for a field that asks for a transform of which nothing is known here."""
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            raise UserError(
                f"{folder} asks for {name} {value!r}, which no SAE here computes: fold it into the weights with the tool that "
                "wrote it, if it can be"
            )


def _unknown(folder: Path, what: str, known: dict[str, Any]) -> UserError:
    return UserError(f"{folder} is of kind {what!r}, which is none of ours: {', '.join(known)} can be read")


def _function(weights: Weights, b: Tensor, *, subtract: bool, scale: Tensor | None = None, **more: Any) -> Function:
    """Of encoder and decoder in either way to write them; `b` is added to the output, and taken from the input if `subtract`.
    A feature's activation is multiplied by its `scale` [F], and its decoder row divided."""
    plain = "W_enc" in weights
    w_enc = weights["W_enc"].t() if plain else weights["encoder.weight"]
    w_dec = weights["W_dec"] if "W_dec" in weights else weights["decoder.weight"].t()
    b_enc, zero = weights["b_enc" if plain else "encoder.bias"], torch.zeros_like(b)
    if scale is not None:
        w_enc, w_dec, b_enc = w_enc * scale[:, None], w_dec / scale[:, None], b_enc * scale
    return Function(
        w_enc=w_enc.contiguous(), b_enc=b_enc, w_dec=w_dec.contiguous(), b_pre=b if subtract else zero,
        b_dec=zero if subtract else b, **more,
    )  # fmt: skip


def _gated(weights: Weights, gate: Tensor, magnitude: Tensor, b: Tensor, *, subtract: bool) -> Function:
    """Encoder rows that are multiplied by e^r, and a feature's gate as its threshold."""
    size = weights["r_mag"].exp()
    plain = _function(weights | {"b_enc": magnitude, "encoder.bias": magnitude}, b, subtract=subtract)
    return replace(plain, w_enc=plain.w_enc * size[:, None], threshold=magnitude - size * gate)


# --- SAELens ---


@dataclass(kw_only=True, frozen=True, slots=True)
class _Metadata:
    hook_name: str | None = None
    hook_name_out: str | None = None
    model_name: str | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class _SaeLens(_Metadata):
    """cfg.json; of versions before 6 it has the metadata's fields itself."""

    d_in: Count
    d_sae: Count
    d_out: Count | None = None
    architecture: str = "standard"
    apply_b_dec_to_input: bool = True
    normalize_activations: str | bool | None = None
    reshape_activations: str | None = None
    finetuning_scaling_factor: bool | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    k: Count | None = None
    rescale_acts_by_decoder_norm: bool = False
    metadata: _Metadata | None = None


_SAELENS = {
    "standard": _PLAIN,
    "topk": _PLAIN,
    "jumprelu": _PLAIN | {"threshold": "F"},
    "gated": {"W_enc": "dF", "r_mag": "F", "b_gate": "F", "b_mag": "F", "W_dec": "Fd", "b_dec": "d"},
    "transcoder": _PLAIN,
    "skip_transcoder": _PLAIN | {"W_skip": "dd"},
    "jumprelu_transcoder": _PLAIN | {"threshold": "F"},
    "jumprelu_skip_transcoder": _PLAIN | {"threshold": "F", "W_skip": "dd"},
}


def _saelens(folder: Path, stored: dict[str, Any], files: _Files) -> Foreign:
    """BatchTopK and Matryoshka are jumprelu as SAELens saves them for inference."""
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}  # since then
    config = read(_SaeLens, {renamed.get(key, key): value for key, value in stored.items()})
    said, form, k = config.metadata or config, config.architecture, config.k
    if form == "standard" and config.activation_fn == "topk":  # before 6
        form, k = "topk", (config.activation_fn_kwargs or {}).get("k")
    _only(
        config, folder, normalize_activations=("none", False, None), reshape_activations=("none", None),
        finetuning_scaling_factor=(False, None), activation_fn=("relu", "topk", None),
    )  # fmt: skip
    if form not in _SAELENS:
        raise _unknown(folder, form, _SAELENS)
    if config.d_out not in (None, config.d_in):
        raise UserError(f"{folder} reads {config.d_in} dimensions and writes {config.d_out}: sites of a cache have one width")
    transcodes = form.endswith("transcoder")
    shapes = _SAELENS[form] | {"scaling_factor": "F"}
    weights = files.weights("sae_weights.safetensors", shapes, config.d_in, config.d_sae, "scaling_factor")
    if bool((weights.pop("scaling_factor", torch.ones(1)) != 1).any()):  # which some versions wrote without a use for it
        raise UserError(f"{folder} has a scaling_factor that is not 1, which no SAE here computes")
    b, subtract = weights["b_dec"], config.apply_b_dec_to_input and not transcodes
    if form == "gated":
        function = _gated(weights, weights["b_gate"], weights["b_mag"], b, subtract=subtract)
    else:
        if form == "topk" and not isinstance(k, int):
            raise UserError(f"{folder / 'cfg.json'} does not say how many activations a token keeps, k: get it again")
        rescaled = form == "topk" and config.rescale_acts_by_decoder_norm
        function = _function(
            weights, b, subtract=subtract, scale=weights["W_dec"].norm(dim=1).clamp(min=1e-8) if rescaled else None,
            k=k if form == "topk" else None, threshold=weights.get("threshold"), skip=weights.get("W_skip"),
        )  # fmt: skip
    return Foreign(
        folder=folder, tool="saelens", form=form, function=function, sha256=files.sha256, model=said.model_name,
        place=said.hook_name_out if transcodes else said.hook_name, transcodes=transcodes,
        reads=said.hook_name if transcodes else None,
    )  # fmt: skip


# --- sparsify ---


@dataclass(kw_only=True, frozen=True, slots=True)
class _Sparsify:
    """cfg.json. `layer`, `hook`, `read` and `model` are of our exports: sparsify itself names its folders by modules, and what
    transcodes reads what goes into one and writes what comes out."""

    d_in: Count
    k: Count
    activation: str = "topk"
    expansion_factor: Count = 32
    num_latents: int = 0
    signed: bool = False
    skip_connection: bool = False
    transcode: bool = False
    layer: int | None = None
    hook: str = RESID_POST
    read: int | str | None = None
    model: str | None = None


def _sparsify(folder: Path, stored: dict[str, Any], files: _Files) -> Foreign:
    config = read(_Sparsify, stored)
    _only(config, folder, activation=("topk",), signed=(False,), skip_connection=(False, config.transcode))
    shapes = {"encoder.weight": "Fd", "encoder.bias": "F", "W_dec": "Fd", "b_dec": "d"}
    shapes |= {"W_skip": "dd"} if config.skip_connection else {}
    n_features = config.num_latents or config.d_in * config.expansion_factor
    weights = files.weights("sae.safetensors", shapes, config.d_in, n_features)
    function = _function(weights, weights["b_dec"], subtract=not config.transcode, k=config.k, skip=weights.get("W_skip"))
    form = ("skip transcoder" if config.skip_connection else "transcoder") if config.transcode else "topk"
    return Foreign(
        folder=folder, tool="sparsify", form=form, function=function, sha256=files.sha256, model=config.model,
        place=folder.name if config.layer is None else f"layer_{config.layer}.{config.hook}", transcodes=config.transcode,
        reads=None if config.read is None else f"layer_{config.read}",
    )  # fmt: skip


# --- dictionary_learning ---


@dataclass(kw_only=True, frozen=True, slots=True)
class _Trainer:
    dict_class: str
    activation_dim: Count
    dict_size: Count
    k: Count | None = None
    layer: int | str | None = None
    submodule_name: str | None = None
    lm_name: str | None = None

    @property
    def place(self) -> str | None:
        """By the submodule's name, "resid_post_layer_3"; the residual stream where there is none, as the tool's own
        `get_submodule` has it."""
        if self.submodule_name is None:
            return None if self.layer is None else f"layer_{self.layer}"
        match = re.fullmatch(r"(\w+?)_layer_?(\d+)", self.submodule_name)
        return f"layer_{match[2]}.{match[1]}" if match else self.submodule_name


@dataclass(kw_only=True, frozen=True, slots=True)
class _Dictionary:
    trainer: _Trainer


_TOPK = _LINEAR | {"b_dec": "d", "k": "", "threshold": ""}
_DICTIONARIES = {
    "AutoEncoder": _LINEAR | {"bias": "d"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias": "d"},
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "MatryoshkaBatchTopKSAE": _PLAIN | {"k": "", "threshold": "", "group_sizes": "*"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "F"},
    "GatedAutoEncoder": {
        "encoder.weight": "Fd", "decoder.weight": "dF", "decoder_bias": "d", "r_mag": "F", "gate_bias": "F", "mag_bias": "F",
    },
}  # fmt: skip


def _dictionary(folder: Path, stored: dict[str, Any], files: _Files) -> Foreign:
    config = read(_Dictionary, stored).trainer
    form, n_features = config.dict_class, config.dict_size
    if form not in _DICTIONARIES:
        raise _unknown(folder, form, _DICTIONARIES)
    optional = "k threshold" if form == "AutoEncoderTopK" else "k"
    weights = files.weights("ae.pt", _DICTIONARIES[form], config.activation_dim, n_features, optional)
    k = int(weights["k"]) if "k" in weights else config.k
    if form.endswith(("TopK", "TopKSAE")) and (k is None or config.k not in (k, None)):
        raise UserError(f"{folder} says that k is {config.k} in config.json and {k} in ae.pt: get it again")
    every = weights["threshold"].expand(n_features).clone() if "threshold" in weights else None  # one for all of them
    if form == "AutoEncoder":
        norms = weights["decoder.weight"].norm(dim=0)
        scale = None if torch.allclose(norms, torch.ones_like(norms)) else norms  # as the tool does where it loads one
        function = _function(weights, weights["bias"], subtract=True, scale=scale)
    elif form == "AutoEncoderNew":
        function = _function(weights, weights["decoder.bias"], subtract=False)
    elif form == "AutoEncoderTopK":
        function = _function(weights, weights["b_dec"], subtract=True, k=k)
    elif form == "GatedAutoEncoder":
        gate, magnitude = weights["gate_bias"], weights["mag_bias"]
        function = _gated(weights, gate, magnitude, weights["decoder_bias"], subtract=True)
    else:
        sizes = weights["group_sizes"].cumsum(0).tolist()[:-1] if form == "MatryoshkaBatchTopKSAE" else None
        function = _function(
            weights, weights["b_dec"], subtract=form != "JumpReluAutoEncoder", threshold=every, l0=k,
            prefixes=None if sizes is None else tuple(sizes),
        )  # fmt: skip
    return Foreign(
        folder=folder, tool="dictionary_learning", form=form, function=function, sha256=files.sha256, place=config.place,
        model=config.lm_name,
    )  # fmt: skip


TOOLS = {
    "saelens": _Tool("cfg.json", "sae_weights.safetensors", _saelens),
    "sparsify": _Tool("cfg.json", "sae.safetensors", _sparsify),
    "dictionary_learning": _Tool("config.json", "ae.pt", _dictionary),
}
