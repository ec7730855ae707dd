"""What modules and hooks of other tools are here."""

import re

from residual_saes.shared.sites import ANY, HOOKS, RESID_POST, Place, Site, lens_name

# A site as a module or a hook: gpt_neox.layers.3, layers.3.mlp, blocks.3.hook_resid_post, layer_3.mlp_out
_PLACE = re.compile(r"(?:\w+\.)*?(?:layers?|blocks?|h)[._](\d{1,9})(?:\.([\w.]+))?")


def site_of(place: str, family: str | None = None) -> Site | None:
    """What a module or hook of another tool is here, in a language model of this family: None where it has no name here. The
    residual stream before a block is that after the one before."""
    if (match := _PLACE.fullmatch(place)) is None:
        return None
    layer, rest = int(match[1]), match[2]
    if rest is None or rest.endswith("resid_pre"):
        return Site(layer) if rest is None else Site(layer - 1) if layer else None
    for hook, rows in HOOKS.items():
        modules = rows.values() if family is None else [rows.get(ANY, rows.get(family))]
        if rest == hook or place == lens_name(Site(layer, hook), family) or Place(rest) in modules:
            return Site(layer, hook)
    return None


def read_before(written: Site, family: str | None) -> Site | None:
    """What goes into the module that gives a site, which is Llama's where the family is not known: None where it has no name
    here."""
    if written.hook == RESID_POST:
        return Site(written.layer - 1) if written.layer else None
    family = family or "llama"
    module = HOOKS[written.hook].get(family)
    into = None if module is None else Place(module.module, "input")
    return next((Site(written.layer, hook) for hook, rows in HOOKS.items() if into and rows.get(family) == into), None)
