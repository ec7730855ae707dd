"""Sites: the places in a language model whose activations are harvested, each a layer and a hook.

A site is written "12" for the residual stream after block 12, and "12.mlp_out" for another hook of it. In JSON and in names of
files the residual stream is its layer's number alone, as it was before there were other hooks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from residual_saes.shared.errors import UserError
from residual_saes.shared.units import format_layers, parse_layers

RESID_POST = "resid_post"  # the output of a decoder block: the residual stream after it
MLP_OUT = "mlp_out"  # what a block's MLP adds to the residual stream
_PLAIN = ("gpt_neox", "gpt2", "gptj", "llama", "mistral", "qwen2", "qwen3", "phi", "gemma", "olmo", "stablelm")
_NORMED = ("gemma2", "gemma3_text", "olmo2", "olmo3")  # these norm what a sublayer adds to the residual stream
ANY = "any"

# {hook: {model_type of a family: the module of a decoder block whose output the hook is}}; "" is the block itself
HOOKS: dict[str, dict[str, str]] = {
    RESID_POST: {ANY: ""},
    MLP_OUT: dict.fromkeys(_PLAIN, "mlp") | dict.fromkeys(_NORMED, "post_feedforward_layernorm"),
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


def hook_name(site: Site, family: str) -> str:
    """The module of a decoder block whose output the site is. Raises UserError where the table has no row of this family."""
    rows = HOOKS[site.hook]
    name = rows.get(ANY, rows.get(family))
    if name is None:
        known = ", ".join(sorted(rows))
        raise UserError(f"{site.hook} is not known of a {family} model: harvest another hook, or a model of {known}")
    return name


def parse_sites(text: str, n_layers: int | None = None) -> tuple[Site, ...]:
    """'0-23', '3,7' or '0-3,8.mlp_out' → sorted distinct sites. Raises UserError, also for layers that the model has not."""
    ranges: dict[str, list[str]] = {}
    for part in text.split(","):
        layers, dot, hook = part.strip().partition(".")
        if dot and hook not in HOOKS:
            raise UserError(f"{hook!r} is not a hook: write 12, or {', '.join(f'12.{h}' for h in HOOKS if h != RESID_POST)}")
        ranges.setdefault(hook or RESID_POST, []).append(layers)
    return tuple(sorted(Site(n, hook) for hook, parts in ranges.items() for n in parse_layers(",".join(parts), n_layers)))


def format_sites(sites: Iterable[Site]) -> str:
    """(0, 1, 2, 5) → '0-2,5'; the inverse of `parse_sites`, hook by hook."""
    layers: dict[str, list[int]] = {}
    for site in sites:
        layers.setdefault(site._suffix, []).append(site.layer)
    parts = [(suffix, part) for suffix in sorted(layers) for part in format_layers(layers[suffix]).split(",")]
    return ",".join(part + suffix for suffix, part in parts)
