"""Targets: which sites a dictionary reads and which it writes. An SAE reads and writes one, a transcoder writes another than it
reads, a crosscoder reads and writes several.

A run has targets of one form, which its config says: "" for SAEs; "mlp_in>mlp_out" or "resid_post@l-1>resid_post" for
transcoders, with l the layer that is written; "0-5" for a crosscoder of these sites.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import HOOKS, Site, format_sites, parse_sites


@dataclass(frozen=True, slots=True)
class Target:
    """The sites that are encoded, and those that are reconstructed from it; rows of all of them are of the same tokens."""

    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]

    @classmethod
    def itself(cls, site: Site) -> Self:
        return cls((site,), (site,))

    @classmethod
    def at(cls, form: str, place: Site) -> Self:
        """The target with this `place` in a run of this form. Raises UserError for what is no form."""
        if not form:
            return cls.itself(place)
        if ">" not in form:
            sites = parse_sites(form)
            return cls(sites, sites)
        transcoder = Transcoder.parse(form)
        return cls((Site(place.layer - transcoder.back, transcoder.read),), (place,))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """That of a checkpoint, by its config."""
        sides = (config.get(side, [config.get("layer", 0)]) for side in ("inputs", "outputs"))
        return cls(*(tuple(map(Site.of, side)) for side in sides))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site once, in order."""
        return tuple(sorted({*self.inputs, *self.outputs}))

    @property
    def place(self) -> Site:
        """The site that names of files have: what is written, or the first of it. No other target of a run has it."""
        return self.outputs[0]

    @property
    def transcodes(self) -> bool:
        """Whether what is written is not what is read."""
        return self.inputs != self.outputs

    def fields(self) -> dict[str, Any]:
        """What a config says of it beside "layer": nothing for one site to itself, as it was before there were targets."""
        if self == Target.itself(self.place):
            return {}
        return {"inputs": [site.json for site in self.inputs], "outputs": [site.json for site in self.outputs]}

    def __str__(self) -> str:
        return ">".join(dict.fromkeys(map(format_sites, (self.inputs, self.outputs))))


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
                "layer that is written, or several layers such as all or 0,6,12"
            )
        if (form.read, 0) == (form.written, form.back):
            raise UserError(f"{text!r} reads what it writes: leave out --target, and name --layers such as 3.{form.read}")
        return form

    def __str__(self) -> str:
        return f"{self.read}{f'@l-{self.back}' if self.back else ''}>{self.written}"


def dictionaries(form: str) -> str:
    """What the dictionaries of a run of this form are called in its name, where a setting has no other of the same name."""
    if not form:
        return "saes"
    if ">" in form:
        return "transcoders-" + form.replace("@l-", "-").replace(">", "-")
    return "crosscoder-" + form.replace(",", "_")


def named(targets: Iterable[Target]) -> str:
    """What they read and write, in a few words; of SAEs their layers."""
    targets = tuple(targets)
    if all(target == Target.itself(target.place) for target in targets):
        return format_sites(target.place for target in targets)
    return ", ".join(map(str, targets))
