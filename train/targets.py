"""Which targets are trained: what --target and --layers mean on a cache."""

from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import say
from residual_saes.shared.runs.target import SHARED, Target, Transcoder
from residual_saes.shared.sites import RESID_POST, Site, format_sites, parse_sites


def parse_targets(text: str, layers: str | None, cache: Cache) -> tuple[str, tuple[Target, ...]]:
    """The form as a run's config has it, and the targets, in order. Raises UserError."""
    if not text:
        return "", tuple(map(Target.itself, _chosen(layers, cache)))
    if ">" in text:
        form = Transcoder.parse(text)
        places = sorted({Site(site.layer, form.written) for site in _chosen(layers, cache)})
        if layers and places[0].layer < form.back:
            raise UserError(f"there is no layer {form.back} before {places[0].layer}: begin --layers at {form.back}")
        targets = [Target.at(str(form), place) for place in places if place.layer >= form.back]
        trainable = [target for target in targets if layers or set(target.sites) <= set(cache.sites)]
        if not trainable:
            raise UserError(f"{cache.path} has no layer with what {text!r} reads and writes: harvest those hooks")
        return str(form), tuple(trainable)
    shared, text = text.startswith(SHARED), text.removeprefix(SHARED)
    if text != "all" and layers:
        raise UserError("--target names the layers already: leave out --layers, or write all in place of them")
    sites = parse_sites(text) if text != "all" else _chosen(layers, cache)
    if text == "all" and not layers:
        sites = tuple(site for site in sites if site.hook == RESID_POST) or sites
    if len(sites) < 2:
        raise UserError(f"one dictionary is to be of several layers, and {format_sites(sites)} is one: name more")
    return SHARED * shared + format_sites(sites), (Target(sites, sites, shared),)


def _chosen(layers: str | None, cache: Cache) -> tuple[Site, ...]:
    """Those that are named, or all that can be trained. Raises UserError if there is none."""
    if layers:
        return parse_sites(layers)
    freed = cache.freed()
    if freed == cache.sites:
        raise cache.ledger.freed_error(freed)
    if freed:
        say(f"note: layers {format_sites(freed)} were freed and are left out", err=True)
    return tuple(site for site in cache.sites if site not in freed)
