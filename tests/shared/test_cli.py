import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cli import UserError, format_bytes, format_count, format_layers, format_seconds, parse_count, parse_layers


@given(st.integers(1, 10**13))
def test_counts_survive_a_round_trip(n: int) -> None:
    assert parse_count(format_count(n)) == n


@pytest.mark.parametrize(("text", "n"), [("300M", 300_000_000), ("1.5k", 1500), ("2_000", 2000), ("1B", 10**9)])
def test_counts_as_people_write_them(text: str, n: int) -> None:
    assert parse_count(text) == n


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "abc", "3T", "1e6", "0.0000001M"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a count"):
        parse_count(text)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_layers_survive_a_round_trip(layers: set[int]) -> None:
    assert parse_layers(format_layers(layers)) == tuple(sorted(layers))


@pytest.mark.parametrize("text", ["", "a", "3-1", "-2", "1,,2", "1.5"])
def test_what_names_no_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="does not name layers"):
        parse_layers(text)


def test_layers_the_model_has_not() -> None:
    with pytest.raises(UserError, match="layer 24 does not exist: the model has layers 0-23"):
        parse_layers("3,24", 24)


def test_units() -> None:
    assert [format_bytes(n) for n in (12, 614e9, 14.7e12)] == ["12 B", "614 GB", "14.7 TB"]
    assert [format_seconds(s) for s in (59, 75, 7320)] == ["59s", "1m15s", "2h02m"]
