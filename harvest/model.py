"""Tokens → residual activations: the language model without its head, cut off after the last wanted layer.

Activations are the outputs of the decoder blocks, taken by forward hooks. (`output_hidden_states` will not do: the last
of them is taken after the final layer norm.) One pass serves all wanted layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from harvest.text import hash_files
from shared.cli import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCKS = ("layers", "h")  # where GPT-NeoX and Llama, and GPT-2, keep their decoder blocks
_FINAL_NORMS = ("final_layer_norm", "norm", "ln_f")

# Its load report lists the head that is left out on purpose, and its bars say nothing at this size.
logging.set_verbosity_error()
logging.disable_progress_bar()

Sink = Callable[[int, Tensor], None]


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one. Raises UserError if it is not there."""
    device = torch.device(name) if name else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for, but no CUDA device is available here; use --device cpu or install a CUDA build")
    return device


def model_revision(model: str, revision: str | None) -> str:
    """The hub's commit, or a hash of a local folder's configuration and weights."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
        return hash_files(files)
    if revision is not None:
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(model).sha)
    except Exception as error:
        raise _no_model(model, error) from None


def load_config(model: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise _no_model(model, error) from None


def _no_model(model: str, error: Exception) -> UserError:
    reason = str(error).split("\n")[0][:200]
    return UserError(f"cannot load the model {model}: {reason}; give a local folder or check the name and connection")


class ResidualModel:
    """Runs a base model up to the last of `layers` and hands each wanted block's output to a sink."""

    def __init__(self, model: str, revision: str | None, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        try:
            base = AutoModel.from_pretrained(model, revision=revision, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise _no_model(model, error) from None
        self._init(base, layers, device)

    @classmethod
    def from_model(cls, base: nn.Module, layers: tuple[int, ...], device: torch.device) -> "ResidualModel":
        """The same over a base model in memory, which is cut short in place."""
        self = cls.__new__(cls)
        self._init(base, layers, device)
        return self

    def _init(self, base: nn.Module, layers: tuple[int, ...], device: torch.device) -> None:
        self.device, self.layers = device, layers
        self._sink: Sink | None = None
        name, blocks = find_blocks(base)
        if max(layers) >= len(blocks):
            raise UserError(f"layer {max(layers)} does not exist: the model has layers 0-{len(blocks) - 1}")
        kept = blocks[: max(layers) + 1]
        setattr(base, name, nn.ModuleList(kept))
        config = cast(PretrainedConfig, base.config)
        config.num_hidden_layers, self.d_model = len(kept), int(config.hidden_size)
        for norm in _FINAL_NORMS:
            if isinstance(getattr(base, norm, None), nn.Module):
                setattr(base, norm, nn.Identity())
        for layer in layers:
            kept[layer].register_forward_hook(self._hook(layer))
        self.model = base.to(device).eval().requires_grad_(False)

    def _hook(self, layer: int) -> Callable[..., None]:
        def take(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            # transformers 5 returns a tensor from a block, transformers 4 a tuple that begins with it
            if self._sink is not None:
                self._sink(layer, output if isinstance(output, Tensor) else output[0])

        return take

    @torch.inference_mode()
    def run(self, tokens: Tensor, sink: Sink) -> None:
        """tokens int64 [sequences, context] → sink(layer, float [sequences, context, d_model]) in layer order."""
        self._sink = sink
        try:
            self.model(input_ids=tokens.to(self.device, non_blocking=True), use_cache=False)
        finally:
            self._sink = None


def find_blocks(base: nn.Module) -> tuple[str, list[nn.Module]]:
    """(attribute, decoder blocks) of a base model of the NeoX, GPT-2 or Llama families. Raises UserError for others."""
    for name in _BLOCKS:
        blocks = getattr(base, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return name, list(blocks)
    raise UserError(f"{type(base).__name__} is not of the NeoX, GPT-2 or Llama families: its decoder blocks were not found")
