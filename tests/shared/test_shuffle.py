from hypothesis import given
from hypothesis import strategies as st

from shared.shuffle import block_rows, epoch_blocks, permutation, window_rows

keys = st.lists(st.integers(0, 2**40), max_size=4)


@given(st.integers(0, 3000), keys)
def test_is_a_bijection(n: int, key: list[int]) -> None:
    assert sorted(permutation(n, *key).tolist()) == list(range(n))


@given(st.integers(20, 200), keys, keys)
def test_depends_on_its_key_and_on_nothing_else(n: int, a: list[int], b: list[int]) -> None:
    assert (permutation(n, *a) == permutation(n, *a)).all()
    # SeedSequence pads its entropy with zeros, so keys count as equal up to trailing zeros.
    trimmed_a, trimmed_b = ("".join(f"{k:016x}" for k in key).rstrip("0") for key in (a, b))
    if trimmed_a != trimmed_b:
        assert (permutation(n, *a) != permutation(n, *b)).any()


def test_orders_never_change() -> None:
    """A cache written years ago must still be read in the order it was written: these values are part of the format."""
    assert permutation(8, 1, 2, 3).tolist() == PINNED["permutation"]
    assert block_rows(6, seed=0, block=5).tolist() == PINNED["block_rows"]
    assert epoch_blocks(6, seed=0, epoch=1).tolist() == PINNED["epoch_blocks"]
    assert window_rows(6, seed=0, epoch=1, window=2).tolist() == PINNED["window_rows"]


PINNED = {
    "permutation": [1, 2, 4, 6, 5, 0, 7, 3],
    "block_rows": [1, 2, 3, 4, 5, 0],
    "epoch_blocks": [1, 2, 4, 5, 3, 0],
    "window_rows": [4, 0, 3, 5, 2, 1],
}
