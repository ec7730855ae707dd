"""The Zarr v3 group of a cache: the keys of its chunks, and its metadata files, which are a pure function of the spec.

Chunks of a layer lie side by side in one folder: no directory, and no fsync of one, for each block.
"""

import json
from typing import Any

from residual_saes.shared.cache.spec import FORMAT, CacheSpec, other_format
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import parse_json
from residual_saes.shared.sites import HOOKS, RESID_POST, Site
from residual_saes.shared.stores import Store, get_or_none

GROUP = "activations.zarr"


def block_key(site: Site, block: int) -> str:
    return f"{GROUP}/{site.array}/c.{block}.0"


def token_key(chunk: int) -> str:
    return f"{GROUP}/tokens/c.{chunk}.0"


def has_group(store: Store) -> bool:
    return store.has(f"{GROUP}/zarr.json")


def stored_sites(store: Store, spec: CacheSpec) -> tuple[Site, ...]:
    """The sites whose arrays are there, in order."""
    names = {hook: set(store.list(f"{GROUP}/{hook}")) for hook in HOOKS}
    sites = (Site(layer, hook) for layer in range(spec.n_layers) for hook in sorted(HOOKS))
    return tuple(site for site in sites if site.array.partition("/")[2] in names[site.hook])


def stored_blocks(store: Store, spec: CacheSpec, site: Site) -> set[int]:
    """The blocks of a site whose chunks are there, by their names."""
    names = set(store.list(f"{GROUP}/{site.array}"))
    return {block for block in range(spec.n_blocks) if f"c.{block}.0" in names}


def stored_token_chunks(store: Store, spec: CacheSpec) -> set[int]:
    """The chunks of the token array that are there, by their names."""
    names = set(store.list(f"{GROUP}/tokens"))
    return {chunk for chunk in range(spec.token_chunks) if f"c.{chunk}.0" in names}


def folders(store: Store) -> list[str]:
    """The folders of the group, whatever lies in them."""
    arrays = (f"{GROUP}/{hook}/{name}" for hook in HOOKS for name in store.list(f"{GROUP}/{hook}"))
    return [GROUP, f"{GROUP}/tokens", *(f"{GROUP}/{hook}" for hook in HOOKS), *arrays]


def metadata_key(site: Site) -> str:
    return f"{GROUP}/{site.array}/zarr.json"


def metadata(spec: CacheSpec, sites: tuple[Site, ...], of_sites: dict[Site, dict[str, Any]] | None = None) -> dict[str, bytes]:
    """{key: content} of every metadata file of the group; `of_sites` are attributes of the sites' arrays."""
    attributes = {"format": FORMAT, "digest": spec.digest, "hook_point": RESID_POST, "spec": spec.to_dict()}
    files = {
        "": _node("group", attributes=attributes),
        "tokens/": _array((spec.sequences, spec.context), (spec.token_chunk, spec.context), spec.token_dtype.name, 0),
    }
    shape, chunk = (spec.n_blocks * spec.block_rows, spec.row_items), (spec.block_rows, spec.row_items)
    files |= {f"{hook}/": _node("group", attributes={}) for hook in sorted({RESID_POST, *(site.hook for site in sites)})}
    fill = 0.0 if spec.store == "float16" else 0
    for site in sites:
        files[f"{site.array}/"] = _array(shape, chunk, spec.store, fill) | {"attributes": (of_sites or {}).get(site, {})}
    return {f"{GROUP}/{folder}zarr.json": (json.dumps(node, indent=1) + "\n").encode() for folder, node in files.items()}


def _node(kind: str, **fields: Any) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": kind, **fields}


def _array(shape: tuple[int, ...], chunk: tuple[int, ...], data_type: str, fill: float) -> dict[str, Any]:
    """Zarr v3 metadata of an array of uncompressed little-endian chunks in files named c.<row>.<column>."""
    return _node(
        "array",
        shape=shape,
        data_type=data_type,
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunk}},
        chunk_key_encoding={"name": "default", "configuration": {"separator": "."}},
        fill_value=fill,
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
        attributes={},
    )


def refuse_foreign(store: Store) -> None:
    """Raises UserError for a Zarr group that is not ours, so that nothing is made or written over it."""
    data = get_or_none(store, f"{GROUP}/zarr.json")
    if data is None:
        return
    try:
        attributes = parse_json(data)["attributes"]
        version, _ = attributes["format"], attributes["spec"]
    except ValueError as error:
        raise UserError(f"{store.root} is not a readable Zarr v3 group ({error}); harvest into another folder") from None
    except (KeyError, TypeError):
        raise UserError(f"{store.root} holds a Zarr group that is not an activation cache; choose another folder") from None
    if version != FORMAT:
        raise other_format(store.root, version)
