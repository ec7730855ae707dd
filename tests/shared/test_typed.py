from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from residual_saes.shared.sites import Site
from residual_saes.shared.typed import Bounds, read


@dataclass(kw_only=True, frozen=True)
class Part:
    size: Annotated[int, Bounds(1, 9)]


@dataclass(kw_only=True, frozen=True)
class Whole:
    name: str
    share: Annotated[float, Bounds(0, 1)] = 0.5
    most: Annotated[int, Bounds(1, 9)] | None = None
    weight: float | None = field(default=None, metadata={"key": "lambda"})
    kind: Literal["a", "b"] = "a"
    sites: tuple[Site, ...] = ()
    parts: dict[int, Part] = field(default_factory=dict)
    either: int | str = 0
    anything: dict[str, Any] = field(default_factory=dict)


def test_json_becomes_what_the_fields_say() -> None:
    stored = {
        "name": "x", "share": 1, "most": 3, "lambda": float("inf"), "kind": "b", "sites": [1, "2.mlp_out"],
        "parts": {"7": {"size": 2, "later": 1}}, "either": "y", "anything": {"a": [None]}, "later": {},
    }  # fmt: skip
    assert read(Whole, stored) == Whole(
        name="x", share=1, most=3, weight=float("inf"), kind="b", sites=(Site(1), Site(2, "mlp_out")),
        parts={7: Part(size=2)}, either="y", anything={"a": [None]},
    )  # fmt: skip
    assert read(Whole, {"name": "x", "most": None}) == Whole(name="x")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "name is missing"),
        ({"name": None}, "name is None, and must be text"),
        ({"share": float("nan")}, "share is nan, and must be a number from 0 to 1"),
        ({"share": "x" * 99}, "share is 'x{39}, and must be a number"),
        ({"most": 0}, "most is 0, and must be a whole number from 1 to 9"),
        ({"lambda": True}, "lambda is True, and must be a number"),
        ({"lambda": 10**400}, "lambda is 10{39}, and must be a number of 64 bits at most"),
        ({"either": 1 << 64}, "either is 18446744073709551616, and must be a whole number of 64 bits at most"),
        ({"kind": "c"}, "kind is 'c', and must be a or b"),
        ({"kind": ["a"]}, "kind is a list, and must be a or b"),
        ({"sites": {}}, "sites is a dict, and must be a list"),
        ({"sites": [1.5]}, "sites.0 is 1.5, and must be a site"),
        ({"sites": [{"layer": 1}]}, "sites.0 is a dict, and must be a site"),
        ({"sites": ["1.nowhere"]}, "'1.nowhere' is not a site"),
        ({"parts": {"7": {"size": 10}}}, "parts.7.size is 10, and must be"),
        ({"parts": {"7": {}}}, "parts.7.size is missing"),
        ({"parts": {"x": {"size": 1}}}, "invalid literal"),
        ({"parts": {"7": 1}}, "parts.7 is 1, and must be an object"),
        ({"either": 1.5}, "either is 1.5, and must be a whole number"),
        ({"anything": []}, "anything is a list, and must be an object"),
    ],
)
def test_what_is_of_another_type_or_out_of_bounds_is_refused_by_name(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        read(Whole, ({"name": "x"} if stored else {}) | stored)
