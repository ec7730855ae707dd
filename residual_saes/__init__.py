"""Sparse autoencoders on every layer of a language model, from one pass over the text.

    import residual_saes as rs

    cache = rs.harvest(model="my-model", dataset="text.jsonl", tokens="10M")
    rs.train(cache, "batchtopk:64", layers=[3])
    sae = rs.saes("runs")[0].load()
    sae.encode(cache.layer(3)[:100])
    sae.features("The quick brown fox")

The packages lie beside this folder in the repository, and in it once they are installed, so that nothing else than this name
is added to anybody's Python.
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from residual_saes.api import Features, LoadedSae, SaeFile, load, open_cache, saes

# Before torch is loaded: threads that spin while they wait slow everything down on a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    __version__ = version("residual-saes")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"

__all__ = ["Features", "LoadedSae", "SaeFile", "load", "open_cache", "saes"]


def __getattr__(name: str) -> Any:
    """Import what is used alone: torch takes seconds."""
    if name in ("harvest", "train"):
        return import_module(f"residual_saes.{name}")
    if name in __all__:
        return getattr(import_module("residual_saes.api"), name)
    raise AttributeError(f"module 'residual_saes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "harvest", "train"])
