"""Language models: which one it is, loading it, and finding its decoder blocks."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from shared.cli import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCKS = ("layers", "h")  # where GPT-NeoX and Llama, and GPT-2, keep their decoder blocks
_HASHED_WHOLE = 1 << 32  # local files up to this size together are identified by content, larger ones by name and size

# Its load report lists the head that is left out on purpose, and its bars say nothing at this size.
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
    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise unreachable(f"the model {model}", error) from None


def load_model(model: str, revision: str | None, precision: str, *, head: bool) -> nn.Module:
    """A causal language model, or without `head` its base model; on the CPU, in evaluation mode. Raises UserError."""
    kind = AutoModelForCausalLM if head else AutoModel
    try:
        loaded: nn.Module = kind.from_pretrained(model, revision=revision, dtype=DTYPES[precision], use_safetensors=True)
    except (OSError, ValueError) as error:
        raise unreachable(f"the model {model}", error) from None
    return loaded.eval().requires_grad_(False)


def find_blocks(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """(attribute, decoder blocks) of a base model of the NeoX, GPT-2 or Llama families. Raises UserError for others."""
    for name in _BLOCKS:
        blocks = getattr(base, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return name, blocks
    raise UserError(
        f"{type(base).__name__} is not of the NeoX, GPT-2 or Llama families (its decoder blocks were not found); use another"
    )
