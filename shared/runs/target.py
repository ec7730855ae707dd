"""Targets: which sites a dictionary reads and which it writes. An SAE reads and writes one, a transcoder writes another than it
reads, a crosscoder reads and writes several. A shared dictionary is one SAE of the rows of several sites, each for itself.

A run has targets of one form, which its config says: "" for SAEs; "mlp_in>mlp_out" or "resid_post@l-1>resid_post" for
transcoders, with l the layer that is written; "0-5" for a crosscoder of these sites, "shared:0-5" for a dictionary that they
share (MLSAE, Lawson et al., arXiv:2409.04185).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import HOOKS, Site, format_sites, parse_sites

SHARED = "shared:"  # with which the form of a shared dictionary begins


@dataclass(frozen=True, slots=True)
class Target:
    """The sites that are encoded, and those that are reconstructed from it; rows of all of them are of the same tokens. Where
    the sites share a dictionary, each is encoded and reconstructed by itself."""

    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]
    shared: bool = False

    @classmethod
    def itself(cls, site: Site) -> Self:
        return cls((site,), (site,))

    @classmethod
    def at(cls, form: str, place: Site) -> Self:
        """The target with this `place` in a run of this form, of a shared dictionary the site itself. Raises UserError for
        what is no form."""
        if not form or form.startswith(SHARED):
            return cls.itself(place)
        if ">" not in form:
            sites = parse_sites(form)
            return cls(sites, sites)
        transcoder = Transcoder.parse(form)
        return cls((Site(place.layer - transcoder.back, transcoder.read),), (place,))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """That of a checkpoint, by its config."""
        read, written = (map(Site.of, config.get(side, [config.get("layer", 0)])) for side in ("inputs", "outputs"))
        return cls(tuple(read), tuple(written), bool(config.get("shared")))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site once, in order."""
        return tuple(sorted({*self.inputs, *self.outputs}))

    @property
    def place(self) -> Site:
        """The site that names of files have: what is written, or the first of it. No other target of a run has it."""
        return self.outputs[0]

    @property
    def token_rows(self) -> int:
        """Rows that a step has of a token."""
        return len(self.inputs) if self.shared else 1

    @property
    def row_sites(self) -> int:
        """Sites whose activations lie beside each other in a row."""
        return len(self.inputs) // self.token_rows

    @property
    def transcodes(self) -> bool:
        """Whether what is written is not what is read."""
        return self.inputs != self.outputs

    def fields(self) -> dict[str, Any]:
        """What a config says of it beside "layer": nothing for one site to itself, as it was before there were targets."""
        if self == Target.itself(self.place):
            return {}
        sides = {"inputs": [site.json for site in self.inputs], "outputs": [site.json for site in self.outputs]}
        return sides | ({"shared": True} if self.shared else {})

    def __str__(self) -> str:
        return SHARED * self.shared + ">".join(dict.fromkeys(map(format_sites, (self.inputs, self.outputs))))


@dataclass(frozen=True, slots=True)
class Transcoder:
    """The form of targets that read one hook and write another, the same number of layers further on or none."""

    read: str
    back: int
    written: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """'mlp_in>mlp_out', 'resid_post@l-1>resid_post@l'. Raises UserError."""
        match = re.fullmatch(r"\s*([a-z_]+)(?:@l(?:-([0-9]{1,4}))?)?\s*>\s*([a-z_]+)(?:@l)?\s*", text)
        form = cls(match[1], int(match[2] or 0), match[3]) if match else None
        if form is None or not {form.read, form.written} <= set(HOOKS):
            raise UserError(
                f"{text!r} is no target: write HOOK>HOOK or HOOK@l-1>HOOK@l with hooks of {', '.join(HOOKS)}, where l is the "
                f"layer that is written, or several layers such as all, 0,6,12 or {SHARED}all"
            )
        if (form.read, 0) == (form.written, form.back):
            raise UserError(f"{text!r} reads what it writes: leave out --target, and name --layers such as 3.{form.read}")
        return form

    @classmethod
    def between(cls, read: Site, written: Site) -> str:
        """The form of one that reads a site and writes another."""
        return str(cls(read.hook, written.layer - read.layer, written.hook))

    def __str__(self) -> str:
        return f"{self.read}{f'@l-{self.back}' if self.back else ''}>{self.written}"


def dictionaries(form: str) -> str:
    """What the dictionaries of a run of this form are called in its name, where a setting has no other of the same name."""
    if not form:
        return "saes"
    if ">" in form:
        return "transcoders-" + form.replace("@l-", "-").replace(">", "-")
    kind, sites = ("mlsae-", form.removeprefix(SHARED)) if form.startswith(SHARED) else ("crosscoder-", form)
    return kind + sites.replace(",", "_")


def members(form: str, place: Site) -> tuple[Site, ...]:
    """The sites of which a checkpoint of this place has an SAE of each: several in a run of shared dictionaries."""
    return parse_sites(form.removeprefix(SHARED)) if form.startswith(SHARED) else (place,)


def named(targets: Iterable[Target]) -> str:
    """What they read and write, in a few words; of SAEs their layers."""
    targets = tuple(targets)
    if all(target == Target.itself(target.place) for target in targets):
        return format_sites(target.place for target in targets)
    return ", ".join(map(str, targets))
