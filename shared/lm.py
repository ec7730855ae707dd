"""Language models: loading one and its tokenizer, finding its parts, and its products on CPUs without bfloat16."""

import re
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.device import bfloat16_is_slow
from residual_saes.shared.errors import UserError
from residual_saes.shared.hub import retried
from residual_saes.shared.identity import unreachable
from residual_saes.shared.sites import Site, hook_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BLOCKS = ("layers", "h")  # where GPT-NeoX and Llama, and GPT-2, keep their decoder blocks
_SHAPE = ("num_hidden_layers", "hidden_size", "vocab_size")
_NAMED = 3  # weights named in a refusal
# What a checkpoint may hold beyond the model: heads, and what older versions stored of masks and rotations, which is computed.
_COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
_NUMBERED = re.compile(r"\.\d+\.")
# Its load report lists the head that is left out on purpose, so `load_model` reads it; its bars say nothing at this size.
logging.set_verbosity_error()
logging.disable_progress_bar()


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A fast tokenizer for whole documents: nothing cut off or added, special tokens quoted in a text are text."""
    try:
        load = partial(AutoTokenizer.from_pretrained, model, revision=revision, use_fast=True, trust_remote_code=False)
        tokenizer = retried(f"the tokenizer of {model}", load)
    except Exception as error:  # each kind of tokenizer has its own ways of failing
        raise unreachable(f"the tokenizer of {model}", error) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} is not a fast tokenizer with an end-of-text token; use another model")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, spec: CacheSpec, text: str) -> list[int]:
    """Token numbers of a text, behind what begins a document in the cache: the BOS token or the separator."""
    first = tokenizer.bos_token_id if spec.bos else spec.separator
    return [first, *tokenizer.encode(text, add_special_tokens=False)]


def load_config(model: str, revision: str | None) -> PretrainedConfig:
    """The configuration of a plain, unquantised language model. Raises UserError for any other, or where it is not there."""
    try:
        load = partial(AutoConfig.from_pretrained, model, revision=revision, trust_remote_code=False)
        config: PretrainedConfig = retried(f"the model {model}", load)
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
    if faults := [f"{what} {_listed(names)}" for what, names in wrong.items() if names]:
        raise UserError(
            f"the weights of {model} are not those that its config.json describes: {'; '.join(faults)}; save the model again "
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
    return blocks[site.layer].get_submodule(hook_name(site, cast(PretrainedConfig, model.config).model_type))


@cache
def module_name(model: str, revision: str | None, site: Site) -> str | None:
    """The name of the site's module in the causal language model, such as "gpt_neox.layers.3"; None unless the model's
    configuration is on this machine, for a name is not worth waiting for a hub."""
    try:
        load = partial(AutoConfig.from_pretrained, model, revision=revision, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            lm: nn.Module = AutoModelForCausalLM.from_config(load())
        wanted = hook_module(cast(nn.Module, lm.base_model), site)
    except Exception:  # configurations are code of some hundred models, each with its own ways of failing
        return None
    names: dict[nn.Module, str] = {module: name for name, module in lm.named_modules()}
    return names[wanted]


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
