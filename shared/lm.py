"""Language models: which one it is, loading it, and finding its decoder blocks."""

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from shared.cli import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCKS = ("layers", "h")  # where GPT-NeoX and Llama, and GPT-2, keep their decoder blocks
_SHAPE = ("num_hidden_layers", "hidden_size", "vocab_size")
_NAMED = 3  # weights named in a refusal
# What a checkpoint may hold beyond the model: heads, and what older versions stored of masks and rotations, which is computed.
_COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
_NUMBERED = re.compile(r"\.\d+\.")
_HASHED_WHOLE = 1 << 32  # local files up to this size together are identified by content, larger ones by name and size

# Its load report lists the head that is left out on purpose, so `load_model` reads it; its bars say nothing at this size.
logging.set_verbosity_error()
logging.disable_progress_bar()


def hash_files(files: list[Path]) -> str:
    """'sha256:…' of files by content, or by name and size where they are too large to read for that."""
    digest = hashlib.sha256()
    whole = sum(f.stat().st_size for f in files) <= _HASHED_WHOLE
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if whole:
            digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def unpin(revision: str) -> str | None:
    """A recorded revision as the hub takes it: None for something local, which is known by its hash."""
    return None if revision.startswith("sha256:") else revision


def unreachable(what: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200]
    return UserError(f"cannot load {what}: {reason}; give a local path, or check the name, revision and connection")


def model_revision(model: str, revision: str | None) -> str:
    """The hub's commit, or a hash of a local folder's configuration and weights. Raises UserError."""
    folder = Path(model)
    if folder.is_dir():
        return hash_files(sorted(p for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors"))
    if revision is not None:
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(model).sha)
    except Exception as error:  # the hub's client has a dozen of them, all meaning "not there"
        raise unreachable(f"the model {model}", error) from None


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
