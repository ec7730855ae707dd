"""What the values of each site of an int8 cache are stored relative to: settled once, before its first block is committed.

A record lies in the ledger and, for other tools, in the attributes of the site's array; each is made again from the other.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from residual_saes.shared.cache.int8 import Reference
from residual_saes.shared.cache.spec import CacheSpec
from residual_saes.shared.cache.zarr import metadata_key
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import parse_json, seal, sealed, to_bytes, unsealed
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Store, get_or_none

Record = dict[str, Any]  # JSON: cache, site, mean, scale; sealed where it is written


class References:
    """The references of a cache; float16 caches have none."""

    def __init__(self, store: Store, spec: CacheSpec) -> None:
        self._store, self._spec, self._digest = store, spec, spec.digest
        self._known: dict[Site, Record] = {}
        self._opened: dict[Site, Reference] = {}

    def of(self, site: Site) -> Reference:
        """Raises UserError where nothing is settled yet, or both records are damaged."""
        if site not in self._opened:
            record = self._record(site)
            if record is None:
                raise UserError(
                    f"{self._store.root} has no scales of layer {site}, neither in {_key(site)} nor in its array's zarr.json: "
                    "put one of them back, or harvest into another folder"
                )
            try:
                self._opened[site] = Reference.from_json(record, self._spec.d_model)
            except ValueError as error:
                raise UserError(
                    f"{self._store.path(_key(site))} holds no scales that can be ({error}): put back what was there, or "
                    "harvest into another folder"
                ) from None
        return self._opened[site]

    def settle(self, site: Site, block: Tensor, committed: Callable[[], object]) -> bool:
        """Make the reference from a block, float16 [rows, d], unless there is one; whether it is new. Where blocks of the site
        are committed none is made, for those were stored relative to another. Raises UserError."""
        if self._record(site) is not None or committed():
            self.of(site)
            return False
        facts = {"cache": self._digest, "site": site.json, **Reference.of(block).to_json()}
        self._store.create(_key(site), to_bytes(facts))  # or another harvest of the site was faster
        self.of(site)
        return True

    def attributes(self, sites: Iterable[Site]) -> dict[Site, Record]:
        """The records of the sites that have one, sealed, for the metadata of their arrays."""
        return {site: seal(record) for site, record in self._records(sites)}

    def files(self, sites: Iterable[Site]) -> dict[str, bytes]:
        """{key in the ledger: content} of the records of the sites that have one."""
        return {_key(site): to_bytes(record) for site, record in self._records(sites)}

    def _records(self, sites: Iterable[Site]) -> Iterator[tuple[Site, Record]]:
        for site in sites if self._spec.store == "int8" else ():
            if (record := self._record(site)) is not None:
                yield site, record

    def _record(self, site: Site) -> Record | None:
        """From the ledger or else from the array; None where neither has a right one."""
        if site not in self._known:
            stored = (get_or_none(self._store, _key(site)), get_or_none(self._store, metadata_key(site)))
            records = map(_parse, filter(None, stored))
            wanted = (self._digest, site.json)
            right = (r for r in records if sealed(r) and (r.get("cache"), r.get("site")) == wanted)
            if (record := next(right, None)) is None:
                return None
            self._known[site] = unsealed(record)
        return self._known[site]


def _key(site: Site) -> str:
    return f"ledger/references/{site.key}.json"


def _parse(data: bytes) -> Any:
    """A record of the ledger, or in the metadata of an array."""
    try:
        value = parse_json(data)
        return value.get("attributes", value)
    except (ValueError, AttributeError):
        return None
