"""Language models: which one it is, loading it and its tokeniser, and finding its parts."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from shared.cache import Cache
from shared.device import bfloat16_is_slow
from shared.errors import UserError
from shared.sites import ANY, HOOKS, Site

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCKS = ("layers", "h")  # where GPT-NeoX and Llama, and GPT-2, keep their decoder blocks
_SHAPE = ("num_hidden_layers", "hidden_size", "vocab_size")
_NAMED = 3  # weights named in a refusal
# What a checkpoint may hold beyond the model: heads, and what older versions stored of masks and rotations, which is computed.
_COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
_NUMBERED = re.compile(r"\.\d+\.")
_HASHED_WHOLE = 1 << 32  # files up to this size together are hashed whole, of larger ones samples
_PIECE = 8 << 20  # bytes hashed in one go
_SAMPLES = 64  # of a large file that is not weights
_SAMPLE = 1 << 20
_TENSOR_SAMPLE = 4 << 10  # at the beginning, the middle and the end of every tensor: a fine-tuned layer shows
_LONGEST_HEADER = 100 << 20  # of a safetensors file, by its definition
_COMMIT = re.compile("[0-9a-f]{40}")
_IS_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json")  # the files that make a model what it is
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")

# Its load report lists the head that is left out on purpose, so `load_model` reads it; its bars say nothing at this size.
logging.set_verbosity_error()
logging.disable_progress_bar()


def hash_files(files: list[Path]) -> str:
    """'sha256:…' of files by content, in this order, wherever they lie and whatever they are called.

    Of more than 4 GiB only samples of every file are read: the header of weights and parts of each tensor, or places spread
    over the file. Raises UserError.
    """
    digest = hashlib.sha256()
    try:
        whole = sum(f.stat().st_size for f in files) <= _HASHED_WHOLE
        for path in files:
            kind = "".join(suffix for suffix in path.suffixes[-2:] if suffix[1:].isalpha())
            digest.update(f"{kind} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for start, size in [(0, path.stat().st_size)] if whole else _sampled(path):
                    file.seek(start)
                    while size > 0 and (piece := file.read(min(size, _PIECE))):
                        digest.update(piece)
                        size -= len(piece)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; put that right and run again") from None
    return f"sha256:{digest.hexdigest()}"


def _sampled(path: Path) -> Iterator[tuple[int, int]]:
    """(start, bytes) of what is read of a large file."""
    size = path.stat().st_size
    tensors = _tensors(path, size) if path.suffix == ".safetensors" else None
    if tensors is None:
        yield from ((i * max(0, size - _SAMPLE) // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES))
        return
    header, spans = tensors
    yield 0, header
    for start, end in spans:
        n = min(_TENSOR_SAMPLE, end - start)
        yield from ((header + at, n) for at in sorted({start, (start + end - n) // 2, end - n}))


def _tensors(path: Path, size: int) -> tuple[int, list[tuple[int, int]]] | None:
    """(bytes before the first tensor, where each one begins and ends after that); None where the file is no safetensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            entries = json.loads(file.read(length)) if length <= min(size, _LONGEST_HEADER) else {}
            spans = [tuple(map(int, v["data_offsets"])) for k, v in entries.items() if k != "__metadata__"]
            return (8 + length, sorted((start, end) for start, end in spans)) if spans else None
        except (ValueError, AttributeError, TypeError, KeyError):
            return None


def unpin(revision: str) -> str | None:
    """A recorded revision as the hub takes it: None for something local, which is known by its hash."""
    return None if revision.startswith("sha256:") else revision


@dataclass(kw_only=True, frozen=True, slots=True)
class Model:
    """A language model that was looked at: what is loaded from its folder is what the hash is of."""

    name: str  # as it was asked for
    folder: Path
    commit: str  # of the hub; "" for a local folder
    sha256: str  # of configuration and weights, 'sha256:…'


def open_model(model: str, revision: str | None) -> Model:
    """Find a model, and download it where it is on the hub; a branch's name becomes its commit. Raises UserError."""
    folder, commit = Path(model), ""
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise UserError(f"there is no model at {model}: name the folder where it lies now with --model")
        folder = _download(model, revision)
        commit = folder.name
    files = sorted({f for pattern in _IS_MODEL for f in folder.glob(pattern) if f.is_file() and not f.name.startswith(".")})
    return Model(name=model, folder=folder, commit=commit, sha256=hash_files(files))


def _download(model: str, revision: str | None) -> Path:
    """The folder of one commit of a hub model, named after it."""
    from huggingface_hub import snapshot_download

    try:
        wanted = [*_IS_MODEL, *_TOKENIZER]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client has a dozen of them, all meaning "not there"
        raise unreachable(f"the model {model}", error) from None


def harvested_model(cache: Cache, model: str | None = None, revision: str | None = None) -> Model:
    """The model that a cache was harvested from, where it lay then or where it is said to lie now. Raises UserError."""
    spec = cache.spec
    opened = open_model(model, revision) if model else open_model(spec.model, spec.model_branch or None)
    if spec.differences(replace(spec, model_revision=opened.sha256)):
        was = f" (that was commit {spec.model_commit})" if spec.model_commit else ""
        raise UserError(f"{opened.name} is not the model {cache.path} was harvested from{was}: name its folder with --model")
    return opened


def dataset_commit(dataset: str, revision: str | None) -> str:
    """The commit of a hub dataset that a branch's name, or none, stands for now. Raises UserError."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset, revision=revision).sha)
    except Exception as error:
        raise unreachable(f"the dataset {dataset}", error) from None


def unreachable(what: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200]
    return UserError(f"cannot load {what}: {reason}; give a local path, or check the name, revision and connection")


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A fast tokeniser for whole documents: nothing cut off or added, special tokens quoted in a text are text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, use_fast=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokeniser has its own ways of failing
        raise unreachable(f"the tokenizer of {model}", error) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} is not a fast tokenizer with an end-of-text token; use another model")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def load_config(model: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a plain, unquantised language model. Raises UserError for any other, or where it is not there."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # configurations are code of some hundred models, each with its own ways of failing
        raise unreachable(f"the model {model}", error) from None
    if config.get_text_config() is not config or not all(isinstance(getattr(config, name, None), int) for name in _SHAPE):
        raise UserError(
            f"{model} is not a plain language model: its config.json has no {', '.join(_SHAPE)} of its own, or another "
            "model's inside it; save the language model by itself and name that"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{model} is quantised: activations of rounded weights are another model's; name the original one")
    return config


def require_context(model: str, config: PretrainedConfig, context: int) -> None:
    """Raises UserError where a context is longer than the positions that the model has or was trained on."""
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and context > positions:
        raise UserError(f"contexts of {context} tokens do not fit the {positions} positions of {model}: lower --context")


def require_model(model: str, revision: str | None, precision: str, context: int) -> None:
    """All that can be wrong with a model, before hours are spent on its text: loads it once. Raises UserError."""
    require_context(model, load_config(model, revision), context)
    find_blocks(load_model(model, revision, precision, head=False))


def load_model(model: str, revision: str | None, precision: str, *, head: bool) -> nn.Module:
    """A causal language model, or without `head` its base model; on the CPU, in evaluation mode.

    Raises UserError where it is not there, cannot be read, or is not, weight by weight, what its configuration describes.
    """
    load_config(model, revision)
    kind = AutoModelForCausalLM if head else AutoModel
    loaded: nn.Module
    try:
        loaded, report = kind.from_pretrained(
            model,
            revision=revision,
            dtype=DTYPES[precision],
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            output_loading_info=True,
        )
    except Exception as error:  # cut files, pointers to files, packages that are missing: each library has its own kinds
        raise unreachable(f"the model {model}", error) from None
    _require_all_weights(model, report)
    return loaded.eval().requires_grad_(False)


def _require_all_weights(model: str, report: dict[str, Any]) -> None:
    """Raises UserError where weights were left random or unused: transformers goes on with a warning."""
    shapes = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    unused = [k for k in report["unexpected_keys"] if _NUMBERED.search(k) and not _COMPUTED.search(k)]
    errors = [str(message) for message in report.get("error_msgs", ())]
    wrong = {
        "it lacks": sorted(set(report["missing_keys"]) - set(shapes)),
        "of another shape are": sorted(shapes),
        "no part of the model are": sorted(unused),
        "transformers says": errors,
    }
    found = [f"{what} {_listed(names)}" for what, names in wrong.items() if names]
    if found:
        raise UserError(
            f"the weights of {model} are not those that its config.json describes: {'; '.join(found)}; save the model again "
            "with save_pretrained (of a compiled model: its `_orig_mod`), or download it again"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def find_blocks(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """(attribute, decoder blocks) of a base model of the NeoX, GPT-2 or Llama families. Raises UserError for others."""
    for name in _BLOCKS:
        blocks = getattr(base, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return name, blocks
    raise UserError(
        f"{type(base).__name__} is not of the NeoX, GPT-2 or Llama families (its decoder blocks were not found); use another"
    )


def hook_module(model: nn.Module, site: Site) -> nn.Module:
    """The module of a base model whose output is the site's activations. Raises UserError where the model has none."""
    blocks = find_blocks(model)[1]
    if site.layer >= len(blocks):
        raise UserError(f"layer {site.layer} does not exist: the model has layers 0-{len(blocks) - 1}")
    rows, family = HOOKS[site.hook], cast(PretrainedConfig, model.config).model_type
    name = rows.get(ANY, rows.get(family))
    if name is None:
        known = ", ".join(sorted(rows))
        raise UserError(f"{site.hook} is not known of a {family} model: harvest another hook, or a model of {known}")
    return blocks[site.layer].get_submodule(name)


def wide_weights(model: nn.Module) -> dict[nn.Linear, Tensor]:
    """{linear layer: its weight as float32, four bytes each} of a bfloat16 model on a CPU that emulates it; else empty."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.bfloat16]
    return {m: m.weight.float() for m in linear if m.weight.device.type == "cpu" and bfloat16_is_slow()}


def widen(model: nn.Module) -> None:
    """Products in float32 where bfloat16 is emulated. What goes into each and what comes out is rounded to bfloat16 as before,
    and bfloat16 instructions add up in float32 too: it is the same model."""
    for linear, weight in wide_weights(model).items():
        linear.__dict__["forward"] = partial(_wide_product, weight, linear.bias)  # found before the class's own


def _wide_product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


class Unembedding(nn.Module):
    """The way from the last block's output to the logits: final norm, output head, and whatever else a family has there.

    It is the language model's own forward pass, in which each block gives back what it is told to, so no part is looked for by
    its name. The model is used up: its blocks lose their weights, which nothing needs any more.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        blocks = find_blocks(cast(nn.Module, lm.base_model))[1]
        wrapped: list[bool] = []  # whether the last block's output is the first of a tuple
        with blocks[-1].register_forward_hook(lambda _block, _args, output: wrapped.append(isinstance(output, tuple))):
            lm(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        self._lm, self._wrapped, self._x = lm, wrapped[0], torch.empty(0)
        for block in blocks:
            block.__dict__["forward"] = self._give  # found before the class's own
            for part in block.modules():
                part._parameters.clear()

    def _give(self, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor]:
        return (self._x,) if self._wrapped else self._x

    def forward(self, x: Tensor) -> Tensor:
        """Last block's outputs [n, d] → logits [n, vocabulary]."""
        self._x = x[:, None]
        tokens = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return cast(Tensor, self._lm(input_ids=tokens, use_cache=False).logits[:, 0])
