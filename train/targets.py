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


def awaited(text: str, layers: str | None, cache: Cache) -> str:
    """What a training that follows a harvest is to wait for, in words: sites that are named and not in the cache yet, or, where
    none are, one layer that a transcoder can be of; "" for nothing. Raises UserError for what the model has not."""
    n, there = cache.spec.n_layers, set(cache.sites)
    if ">" not in text:
        sites = layers or text.removeprefix(SHARED)
        named = set() if sites in ("", "all") else set(parse_sites(sites, n))
    else:
        form = Transcoder.parse(text)
        numbers = [site.layer for site in parse_sites(layers, n)] if layers else range(n)
        each = [set(Target.at(str(form), Site(layer, form.written)).sites) for layer in numbers if layer >= form.back]
        if not layers:
            return str(form) if each and not any(sites <= there for sites in each) else ""
        named = set().union(*each)
    return f"layers {format_sites(named - there)}" if named - there else ""


def added(text: str, before: Cache, now: Cache) -> set[Site]:
    """Sites that a harvest has added meanwhile, and that the same training without named layers would be of."""
    new = set(now.sites) - set(before.sites)
    if ">" in text:
        return {site for site in new if site.hook == Transcoder.parse(text).written}
    return new if text.removeprefix(SHARED) in ("", "all") else set()


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
