"""Sites: the places in a language model whose activations are harvested, each a layer and a hook.

A site is written "12" for the residual stream after block 12, and "12.mlp_out" for another hook of it. In JSON and in names of
files the residual stream is its layer's number alone, as it was before there were other hooks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from residual_saes.shared.errors import UserError
from residual_saes.shared.units import format_layers, parse_layers

RESID_POST = "resid_post"  # the residual stream after a decoder block: what comes out of it
RESID_MID = "resid_mid"  # the stream between attention and MLP, where the one comes after the other
MLP_IN = "mlp_in"  # what a block's MLP reads: after its norm, where it has one in front
MLP_OUT, ATTN_OUT = "mlp_out", "attn_out"  # what each adds to the stream: after a norm, where what is added goes through one
ANY = "any"
Side = Literal["input", "output"]


class Place(NamedTuple):
    """A module of a decoder block, "" for the block itself, and whether what goes into it or what comes out is meant."""

    module: str
    side: Side = "output"


_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo", "stablelm")
_GEMMA, _OLMO = ("gemma2", "gemma3_text"), ("olmo2", "olmo3")  # these norm what is added; the second norm nothing before
_GPT = ("gpt2", "gptj")
_ALL = ("gpt_neox", *_GPT, "phi", *_LLAMA, *_GEMMA, *_OLMO)
_PARALLEL = ("gptj", "phi")  # attention and MLP side by side; gpt_neox and stablelm where their configurations say so

# {hook: {model_type of a family: where it is}}
HOOKS: dict[str, dict[str, Place]] = {
    RESID_POST: {ANY: Place("")},
    RESID_MID: dict.fromkeys(("gpt_neox", *_LLAMA), Place("post_attention_layernorm", "input"))
    | dict.fromkeys(_GEMMA, Place("pre_feedforward_layernorm", "input"))
    | dict.fromkeys(_OLMO, Place("mlp", "input"))
    | {"gpt2": Place("ln_2", "input")},
    MLP_IN: dict.fromkeys(_ALL, Place("mlp", "input")),
    MLP_OUT: dict.fromkeys(_ALL, Place("mlp")) | dict.fromkeys((*_GEMMA, *_OLMO), Place("post_feedforward_layernorm")),
    ATTN_OUT: dict.fromkeys(_ALL, Place("self_attn"))
    | dict.fromkeys((*_GEMMA, *_OLMO), Place("post_attention_layernorm"))
    | dict.fromkeys(_GPT, Place("attn"))
    | {"gpt_neox": Place("attention")},
}


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """A hook of one decoder block; ordered by layer, then by hook."""

    layer: int
    hook: str = RESID_POST

    @classmethod
    def of(cls, value: int | str) -> Self:
        """The site that `json`, `str` or `key` gave. Raises ValueError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9})(?:\.([a-z_]+))?", str(value))
        site = cls(int(match[1]), match[2] or RESID_POST) if match else None
        if site is None or site.hook not in HOOKS:
            raise ValueError(f"{value!r} is not a site")
        return site

    def __str__(self) -> str:
        return f"{self.layer}{self._suffix}"

    @property
    def json(self) -> int | str:
        return self.layer if self.hook == RESID_POST else str(self)

    @property
    def key(self) -> str:
        """For names of files, which then sort by layer: '03', '12.mlp_out'."""
        return f"{self.layer:02d}{self._suffix}"

    @property
    def array(self) -> str:
        """The path of its array in the cache's Zarr group."""
        return f"{self.hook}/{self.layer:02d}"

    @property
    def _suffix(self) -> str:
        return "" if self.hook == RESID_POST else f".{self.hook}"


def place_of(site: Site, family: str, *, parallel: bool) -> Place:
    """Where a site is in its decoder block. `parallel` says that attention and MLP stand side by side, as far as the
    configuration tells. Raises UserError where the table has no row of this family, or the model no such place."""
    rows = HOOKS[site.hook]
    if site.hook == RESID_MID and (parallel or family in _PARALLEL):
        raise UserError(
            f"this {family} model has no {RESID_MID}: its attention and MLP stand side by side; harvest another hook"
        )
    place = rows.get(ANY, rows.get(family))
    if place is None:
        known = ", ".join(sorted(rows))
        raise UserError(f"{site.hook} is not known of a {family} model: harvest another hook, or a model of {known}")
    return place


def lens_name(site: Site, family: str | None = None) -> str:
    """The site's name in TransformerLens, whose hooks on what OLMo 2 and 3 add to the stream come before the norm."""
    names = {MLP_IN: "mlp.hook_in"} | ({ATTN_OUT: "ln1.hook_out", MLP_OUT: "ln2.hook_out"} if family in _OLMO else {})
    return f"blocks.{site.layer}.{names.get(site.hook, f'hook_{site.hook}')}"


def parse_hooks(text: str) -> tuple[str, ...]:
    """'mlp_in,mlp_out' → those hooks. Raises UserError for others."""
    hooks = tuple(part.strip() for part in text.split(","))
    if unknown := [hook for hook in hooks if hook not in HOOKS]:
        raise UserError(f"{unknown[0]!r} is not a hook: write some of {','.join(HOOKS)}")
    return hooks


def parse_sites(text: str, n_layers: int | None = None, hooks: Iterable[str] = (RESID_POST,)) -> tuple[Site, ...]:
    """'0-23', '3,7' or '0-3,8.mlp_out' → sorted distinct sites: of a layer without a hook each of `hooks`. Raises UserError,
    also for layers that the model has not."""
    ranges: dict[str, list[str]] = {}
    for part in text.split(","):
        layers, dot, hook = part.strip().partition(".")
        if dot and hook not in HOOKS:
            raise UserError(f"{hook!r} is not a hook: write 12, or {', '.join(f'12.{h}' for h in HOOKS if h != RESID_POST)}")
        for each in (hook,) if dot else hooks:
            ranges.setdefault(each, []).append(layers)
    return tuple(sorted(Site(n, hook) for hook, parts in ranges.items() for n in parse_layers(",".join(parts), n_layers)))


def format_sites(sites: Iterable[Site]) -> str:
    """(0, 1, 2, 5) → '0-2,5'; the inverse of `parse_sites`, hook by hook."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site._suffix, []).append(site.layer)
    parts = [(suffix, part) for suffix in sorted(layers) for part in format_layers(layers[suffix]).split(",")]
    return ",".join(part + suffix for suffix, part in parts)
