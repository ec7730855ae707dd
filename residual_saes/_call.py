"""Packages that are calls as well: `residual_saes.train(cache, "batchtopk:64")`, beside `residual_saes.train.config`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(import_module("residual_saes.api"), self.__name__.rpartition(".")[2])(*args, **options)


def callable_package(name: str) -> None:
    """Make a call of a package the function of its name in residual_saes.api, which is imported by the first call."""
    sys.modules[name].__class__ = _Callable
