"""JSON as dataclasses: each value is checked against the type of its field, and against bounds where the type has them.

A key is the field's name, or what its metadata has under "key". Keys that no field has are passed over: a later version's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from residual_saes.shared.sites import Site

_BITS = 64  # of a whole number: a larger one is none for arrays and pictures
T = TypeVar("T")
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", tuple: "a list",
    Site: "a site",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bounds:
    """In an `Annotated` number: the least and the most that it may be."""

    least: float
    most: float


Count = Annotated[int, Bounds(1, 10**15)]


def read(kind: type[T], value: Any) -> T:
    """A dataclass of parsed JSON. Raises ValueError, which names the field and says what it must be."""
    read_one: T = _read(kind, value, "")
    return read_one


@functools.cache
def fields(kind: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """{key: (field, type)} of a dataclass, without what a record keeps of its JSON."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.metadata.get("key", f.name): (f, hints[f.name]) for f in dataclasses.fields(kind) if f.name != "stored"}


def checked(kind: Any, stored: dict[str, Any], name: str = "") -> dict[str, Any]:
    """{name: value} of those fields of a dataclass that are stored. Raises ValueError."""
    given = {}
    for key, (f, of) in fields(kind).items():
        if key in stored:
            value = stored[key]
            given[f.name] = value if type(value) is of and of is not int else _read(of, value, _of(name, key))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{_of(name, key)} is missing")
    return given


def _read(kind: Any, value: Any, name: str) -> Any:
    if hasattr(kind, "__dataclass_fields__") and kind is not Site and isinstance(value, dict):
        own = getattr(kind, "from_dict", None)
        return own(value, name) if own else kind(**checked(kind, value, name))
    of, origin = get_args(kind), get_origin(kind)
    if kind in (int, float) and type(value) is int and value.bit_length() > _BITS:
        raise _wrong(name, value, f"{_WORDS[kind]} of {_BITS} bits at most")
    if kind is Any or kind is type(value) or (kind is float and type(value) is int):
        return value
    if origin in (Union, UnionType):
        left = [each for each in of if each is not NoneType]
        if value is None and len(left) < len(of):
            return None
        return _read(next((each for each in left if each is type(value)), left[0]), value, name)
    if origin is Annotated:
        number, bounds = _read(of[0], value, name), of[1]
        if bounds.least <= number <= bounds.most:  # NaN is not
            return number
        raise _wrong(name, value, f"{_WORDS[of[0]]} from {bounds.least:,} to {bounds.most:,}")
    if origin is Literal and value in of:
        return value
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {of[0](key): _read(of[1], each, _of(name, key)) for key, each in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_read(of[0], each, _of(name, str(n))) for n, each in enumerate(value))
    if kind is Site and type(value) in (int, str):
        return Site.of(value)
    words = " or ".join(map(str, of)) if origin is Literal else _WORDS.get(kind, _WORDS.get(origin, "an object"))
    raise _wrong(name, value, words)


def _of(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _wrong(name: str, value: Any, words: str) -> ValueError:
    shown = f"{value!r:.40}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return ValueError(f"{name or 'it'} is {shown}, and must be {words}")
