"""Language models: loading one and its tokenizer, finding its parts, and its products on CPUs without bfloat16."""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.device import bfloat16_is_slow
from residual_saes.shared.errors import UserError
from residual_saes.shared.hub import retried
from residual_saes.shared.identity import unreachable
from residual_saes.shared.sites import RESID_MID, Place, Side, Site, place_of

Values = Tensor | tuple[Tensor, ...]  # what goes into a module, or comes out
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
    if getattr(loaded, "_hf_peft_config_loaded", False):  # where the package peft is there
        raise UserError(f"{model} has an adapter beside its weights: save it with them (merge_and_unload), or move it away")
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


class Hook(NamedTuple):
    """A module of a model, and whether what goes into it or what comes out is meant: first in a tuple, or alone."""

    module: nn.Module
    side: Side

    def take(self, sink: Callable[[Values], Values | None]) -> RemovableHandle:
        """Give `sink` what goes in or comes out, whenever a pass comes there; the pass goes on with what it returns, if any."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(lambda _module, args: sink(args))
        return self.module.register_forward_hook(lambda _module, _args, output: sink(output))


def first(values: Values) -> Tensor:
    """The activations in what goes into a module or comes out of it. (Blocks and attention give tuples in some versions.)"""
    return values if isinstance(values, Tensor) else values[0]


def changed(values: Values, change: Callable[[Tensor], Tensor]) -> Values:
    """The same with other activations."""
    return change(values) if isinstance(values, Tensor) else (change(values[0]), *values[1:])


def require_site(config: PretrainedConfig, site: Site) -> Place:
    """Where the site is in a decoder block. Raises UserError where a model of this configuration has none."""
    return place_of(site, config.model_type, parallel=bool(getattr(config, "use_parallel_residual", False)))


def hook_of(model: nn.Module, site: Site) -> Hook:
    """Where a base model has the site's activations. Raises UserError where it has none."""
    blocks = find_blocks(model)[1]
    if site.layer >= len(blocks):
        raise UserError(f"layer {site.layer} does not exist: the model has layers 0-{len(blocks) - 1}")
    place = require_site(cast(PretrainedConfig, model.config), site)
    return Hook(blocks[site.layer].get_submodule(place.module), place.side)


@contextlib.contextmanager
def changing(model: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, a base model goes on with change(x) in the place of the site's activations x.

    The stream inside a block is read by its MLP and goes around it; no module gives it to both, so what the change adds to it
    is added to what comes out of the block as well.
    """
    added: list[Tensor] = []

    def put(values: Values) -> Values:
        new = changed(values, change)
        added[:] = [first(new) - first(values)]
        return new

    handles = [hook_of(model, site).take(put)]
    if site.hook == RESID_MID:
        after = hook_of(model, Site(site.layer))
        handles.append(after.take(lambda output: changed(output, lambda x: x + added[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def known_model(model: str, revision: str | None) -> nn.Module | None:
    """The causal language model without its weights; None unless its configuration is on this machine, for what it is needed
    for is not worth waiting for a hub."""
    try:
        load = partial(AutoConfig.from_pretrained, model, revision=revision, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return cast(nn.Module, AutoModelForCausalLM.from_config(load()))
    except Exception:  # configurations are code of some hundred models, each with its own ways of failing
        return None


def family_of(lm: nn.Module | None) -> str | None:
    return None if lm is None else str(cast(PretrainedConfig, lm.config).model_type)


def module_name(lm: nn.Module | None, site: Site) -> str | None:
    """What the site is of a causal language model, such as "gpt_neox.layers.3.output". Raises UserError where it has none."""
    if lm is None:
        return None
    hook = hook_of(cast(nn.Module, lm.base_model), site)
    names: dict[nn.Module, str] = {module: name for name, module in lm.named_modules()}
    return f"{names[hook.module]}.{hook.side}"


def wide_weights(model: nn.Module) -> dict[nn.Linear, Tensor]:
    """{linear layer: its weight as float32, four bytes each} of a bfloat16 model on a CPU that emulates it; else empty."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.bfloat16]
    return {m: m.weight.float() for m in linear if bfloat16_is_slow(m.weight.device)}


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
        outputs: list[Values] = []
        with torch.no_grad(), blocks[-1].register_forward_hook(lambda _block, _args, output: outputs.append(output)):
            logits = lm(input_ids=torch.tensor([[1, 2]]), use_cache=False).logits[0]
        self._lm, self._wrapped, self._x = lm, isinstance(outputs[0], tuple), torch.empty(0)
        for block in blocks:
            block.__dict__["forward"] = self._give  # found before the class's own
            for part in block.modules():
                part._parameters.clear()
        self._require_same(first(outputs[0])[0], logits)

    @torch.no_grad()
    def _require_same(self, x: Tensor, logits: Tensor) -> None:
        """Raises UserError for a model whose logits depend on more than the last block's output, or that calls it otherwise."""
        with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            if torch.allclose(self(x), logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
                return
        raise UserError(
            f"how a {type(self._lm).__name__} comes from its last block to logits is not known here: there are neither feature "
            "pages nor promoted tokens of its SAEs; all else can be done with them"
        )

    def _give(self, *_args: object, **_kwargs: object) -> Tensor | tuple[Tensor]:
        return (self._x,) if self._wrapped else self._x

    def forward(self, x: Tensor) -> Tensor:
        """Last block's outputs [n, d] → logits [n, vocabulary]."""
        self._x = x[:, None]
        tokens = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return cast(Tensor, self._lm(input_ids=tokens, use_cache=False).logits[:, 0])
