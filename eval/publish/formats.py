"""The forms in which other tools load SAEs, each a folder of files.

Ours is                       z = relu(W_enc (x − b_pre) + b_enc)      x̂ = W_dec z + b_dec + b_pre
SAELens (standard), sparsify and dictionary_learning (AutoEncoder) have one bias in the place of two:
                              z = relu(W_enc (x − b) + b')             x̂ = W_dec z + b
The same function has b = b_pre + b_dec and b' = b_enc + W_enc (b − b_pre), see `fold`. sparsify keeps the k largest of z: with
k = F all of them, which is ReLU. Those with thresholds are SAELens' jumprelu and, as their kinds are, dictionary_learning's
BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder. Transcoders of SAELens, sparsify and circuit-tracer take nothing
from x, so that b' = b_enc − W_enc b_pre, and b = b_dec − W_skip b_pre where there is a skip connection. Those of circuit-tracer
are a set of all layers of a model, whose MLPs it replaces by them.
"""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.runs.sparsity import prefix_ends
from residual_saes.shared.sites import MLP_IN, MLP_OUT, RESID_MID, RESID_POST, Site, lens_name

SAELENS_FORM = "6.0.0"  # of cfg.json: without it SAELens' loader drops what it does not know, hook_name too
# {tool: {how z follows from relu's values: what the tool calls such an SAE}}
KINDS = {
    "saelens": {"relu": "standard", "threshold": "jumprelu", "topk": "topk"},
    "sparsify": {"relu": "topk", "topk": "topk"},
    "dictionary_learning": {"relu": "AutoEncoder", "threshold": "BatchTopKSAE", "topk": "AutoEncoderTopK"},
}
CIRCUIT_TRACER = "circuit-tracer"
TRANSCODERS = {
    "saelens": {"relu": "transcoder", "threshold": "jumprelu_transcoder"},
    "sparsify": KINDS["sparsify"],
    CIRCUIT_TRACER: {"relu": "relu", "threshold": "jumprelu"},
}
_WORDS = {"threshold": "thresholds, as BatchTopK, JumpReLU and --hold-l0 leave"}
Files = Mapping[str, bytes]


@dataclass(kw_only=True, frozen=True, slots=True)
class Source:
    """The checkpoint that an export was made from."""

    run: str
    file: str
    sha256: str | None = None
    density_tokens: int | None = None  # on how many held-out tokens densities were measured


@dataclass(kw_only=True, frozen=True, slots=True)
class Origin:
    """What an SAE is of. None is unknown, and left out of what is written."""

    site: Site
    source: Source
    model: str | None = None
    family: str | None = None  # of the language model
    n_layers: int | None = None  # that it has
    module: str | None = None  # of the causal language model, and which side of it: "gpt_neox.layers.3.output"
    context: int | None = None
    dataset: str | None = None
    bos: bool | None = None  # whether every context began with the tokeniser's BOS
    log10_density: Tensor | None = None  # float32 [F]


def fold(sae: Sae) -> tuple[Tensor, Tensor]:
    """(b', b), float32: the biases of the same function with b taken from the input and added to the output; of a transcoder
    with nothing taken from it.

    b' makes up for b_dec and for the rounding of b; it is summed in float64 and rounded once.
    """
    before = sae.b_pre.double()
    if sae.transcodes:
        skipped = 0 if sae.skip is None else sae.skip.double() @ before
        return (sae.b_enc.double() - sae.w_enc.double() @ before).float(), (sae.b_dec.double() - skipped).float()
    b = sae.b_pre + sae.b_dec
    return (sae.b_enc.double() + sae.w_enc.double() @ (b.double() - sae.b_pre.double())).float(), b


def saelens(sae: Sae, origin: Origin) -> Files:
    """SAELens ≥ 6: `SAE.load_from_disk(folder)`, and `SAE.from_pretrained(repository, folder)` where it is on the hub."""
    b_enc, b_dec = fold(sae)
    read, written = (sae.target.inputs[0], sae.target.place) if sae.transcodes else (origin.site, None)
    metadata = {
        "sae_lens_version": SAELENS_FORM,
        "model_name": origin.model,
        "model_class_name": "HookedTransformer",
        # TransformerLens centres what is written to the residual stream unless told not to, and x would not be our x
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "hook_name": lens_name(read, origin.family),
        "hook_name_out": written and lens_name(written, origin.family),
        "hf_hook_name": origin.module,
        "prepend_bos": origin.bos,
        "context_size": origin.context,
        "dataset_path": origin.dataset,
        "source": _source(origin),
    }
    config = {
        "architecture": _kind("saelens", sae, origin),
        "d_in": sae.w_enc.shape[1],
        **({"d_out": sae.w_dec.shape[1]} if sae.transcodes else {}),
        "d_sae": sae.w_enc.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not sae.transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _known(metadata),
    } | ({} if sae.k is None else {"k": sae.k, "rescale_acts_by_decoder_norm": False})
    weights = {"W_enc": sae.w_enc.t(), "b_enc": b_enc, "W_dec": sae.w_dec, "b_dec": b_dec}
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    if sae.skip is not None:
        weights["W_skip"] = sae.skip
    files = {"cfg.json": _json(config), "sae_weights.safetensors": _safetensors(weights)}
    if origin.log10_density is not None:
        files["sparsity.safetensors"] = _safetensors({"sparsity": origin.log10_density})
    return files


def sparsify(sae: Sae, origin: Origin) -> Files:
    """EleutherAI's sparsify: `SparseCoder.load_from_disk(folder)`."""
    n_features, d = sae.w_enc.shape
    config = {
        "activation": _kind("sparsify", sae, origin),
        "expansion_factor": n_features // d,
        "normalize_decoder": False,
        "num_latents": n_features,
        "k": n_features if sae.k is None else sae.k,
        "multi_topk": False,
        "skip_connection": sae.skip is not None,
        "transcode": sae.transcodes,
        "d_in": d,
        "layer": origin.site.layer,
        "hook": None if origin.site.hook == RESID_POST else origin.site.hook,
        "read": sae.target.inputs[0].json if sae.transcodes else None,
        "model": origin.model,
        "source": _source(origin),
    }
    b_enc, b_dec = fold(sae)
    weights = {"encoder.weight": sae.w_enc, "encoder.bias": b_enc, "W_dec": sae.w_dec, "b_dec": b_dec}
    if sae.skip is not None:
        weights["W_skip"] = sae.skip
    return {"cfg.json": _json(_known(config)), "sae.safetensors": _safetensors(weights)}


def dictionary_learning(sae: Sae, origin: Origin) -> Files:
    """dictionary_learning: `load_dictionary(folder, device)`, and `from_pretrained(folder/ae.pt)` of AutoEncoder, with k of
    AutoEncoderTopK, with one threshold of BatchTopKSAE or, after prefixes, MatryoshkaBatchTopKSAE, and with a threshold for
    each feature of JumpReluAutoEncoder."""
    kind, k = _dictionary(sae, origin), sae.k
    b_enc, bias = fold(sae)
    linear = {"b_dec": bias, "encoder.weight": sae.w_enc, "encoder.bias": b_enc, "decoder.weight": sae.w_dec.t()}
    plain = {"W_enc": sae.w_enc.t(), "b_enc": b_enc, "W_dec": sae.w_dec, "b_dec": bias}
    whole: dict[str, Tensor] = {}
    if sae.rule == "relu":
        weights = {"bias": linear.pop("b_dec")} | linear
    elif sae.threshold is None:
        weights = linear | {"threshold": torch.tensor(-1.0)}  # as where it has learnt none
    elif kind == "JumpReluAutoEncoder":  # which takes nothing from x
        b_enc = (sae.b_enc.double() - sae.w_enc.double() @ sae.b_pre.double()).float()
        weights = plain | {"b_enc": b_enc, "threshold": sae.threshold}
    else:
        k = round(sae.stats["l0"])  # as many of its last batch were kept
        nested = kind == "MatryoshkaBatchTopKSAE"
        weights = (plain if nested else linear) | {"threshold": sae.threshold[0]}
        ends = prefix_ends(sae.prefixes, len(sae.w_enc))
        whole = {"group_sizes": torch.tensor([0, *ends]).diff()} if nested else {}
    if k is not None:
        whole["k"] = torch.tensor(k, dtype=torch.int32)
    trainer = {
        "dict_class": kind,
        "activation_dim": sae.w_enc.shape[1],
        "dict_size": sae.w_enc.shape[0],
        "layer": origin.site.layer,
        "lm_name": origin.model,
        "submodule_name": f"{origin.site.hook}_layer_{origin.site.layer}",
        "k": k,
    }
    config = {"trainer": _known(trainer), "buffer": _known({"ctx_len": origin.context}), "source": _source(origin)}
    content = io.BytesIO()
    torch.save({name: _own(tensor) for name, tensor in weights.items()} | whole, content)
    return {"config.json": _json(config), "ae.pt": content.getvalue()}


def circuit_tracer_hooks(sae: Sae, origin: Origin) -> dict[str, str]:
    """Where a transcoder reads and writes, in circuit-tracer's words. Raises UserError for one that it cannot hold."""
    _kind(CIRCUIT_TRACER, sae, origin)
    (read,), written = sae.target.inputs, sae.target.place
    if read.layer != written.layer or read.hook not in (MLP_IN, RESID_MID) or written.hook != MLP_OUT:
        raise UserError(
            f"{_name(origin)} is of {sae.target}, and circuit-tracer puts transcoders in the place of MLPs: train with "
            f"--target '{MLP_IN}>{MLP_OUT}' or '{RESID_MID}>{MLP_OUT}'"
        )
    names = [lens_name(site, origin.family).split(".", 2)[2] for site in (read, written)]
    if names[1] != "hook_mlp_out":
        raise UserError(
            f"{_name(origin)} writes behind a norm of {origin.family} models, where circuit-tracer has no hook: export it to "
            "saelens"
        )
    if origin.family == "qwen3":
        names[1] = "mlp.hook_out"  # the same, and the one that circuit-tracer's nnsight side knows it by
    return dict(zip(("feature_input_hook", "feature_output_hook"), names, strict=True))


def circuit_tracer_config(hooks: dict[str, str], origins: dict[int, Origin]) -> bytes:
    """config.yaml of a set, as JSON, which YAML has within it."""
    first = origins[0]
    scan = {"scan": first.source.run, "sources": [_source(origins[layer]) for layer in sorted(origins)]}
    return _json(_known({"model_kind": "transcoder_set", "model_name": first.model} | hooks | scan))


def circuit_tracer_layer(sae: Sae) -> bytes:
    """layer_<N>.safetensors of a set."""
    b_enc, b_dec = fold(sae)
    weights = {"W_enc": sae.w_enc, "b_enc": b_enc, "W_dec": sae.w_dec, "b_dec": b_dec}
    if sae.threshold is not None:
        weights["activation_function.threshold"] = sae.threshold.clamp(min=0)  # there is no relu before it
    if sae.skip is not None:
        weights["W_skip"] = sae.skip
    return _safetensors(weights)


FORMS: dict[str, Callable[[Sae, Origin], Files]] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}


def _dictionary(sae: Sae, origin: Origin) -> str:
    """dictionary_learning's class for it: by its rule, by its thresholds and by its prefixes. Where thresholds are all the same
    it wants a k, which SAEs of other tools may not have."""
    kind = _kind("dictionary_learning", sae, origin)
    if sae.threshold is not None and ("l0" not in sae.stats or bool((sae.threshold != sae.threshold[0]).any())):
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if sae.prefixes else kind


def _kind(tool: str, sae: Sae, origin: Origin) -> str:
    """What a tool calls an SAE of this rule. Raises UserError where it has none."""
    rule, name = sae.rule, _name(origin)
    if len(sae.target.inputs) > 1:
        raise UserError(f"{name} is a crosscoder, and no tool that is known here loads one: it stays as it is")
    if tool not in KINDS and not sae.transcodes:
        raise UserError(f"{name} is an SAE, and {tool} loads transcoders: export it to {' or '.join(KINDS)}")
    tools, what = (TRANSCODERS, "transcoders") if sae.transcodes else (KINDS, "SAEs")
    if rule not in tools.get(tool, {}):
        others = " or ".join(name for name, kinds in tools.items() if rule in kinds)
        has = f"is a transcoder with {rule}" if sae.transcodes else f"has {_WORDS[rule]}"
        raise UserError(f"{name} {has}, and {tool} has no such {what}: export it to {others}")
    kind = tools[tool][rule]
    return kind if sae.skip is None else kind.replace("transcoder", "skip_transcoder")


def _name(origin: Origin) -> str:
    return f"{origin.source.run}/{origin.source.file}"


def _source(origin: Origin) -> dict[str, Any]:
    return _known(dataclasses.asdict(origin.source))


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
