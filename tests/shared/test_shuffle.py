import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from residual_saes.shared.shuffle import block_rows, block_turns, epoch_slices, permutation, window_rows

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


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 5))
def test_an_epoch_takes_every_slice_once_and_one_of_every_block_a_round(blocks: int, slices: int, epoch: int) -> None:
    order = epoch_slices(blocks, slices, seed=1, epoch=epoch)
    assert sorted(order.tolist()) == list(range(blocks * slices))
    for visited in (order // slices).reshape(slices, blocks):
        assert sorted(visited.tolist()) == list(range(blocks))


def test_which_slice_comes_when_differs_between_blocks_and_epochs() -> None:
    turns = [[tuple(b % 16 for b in order if b // 16 == block) for block in range(20)] for order in map(epoch_of, range(2))]
    assert len({*turns[0], *turns[1]}) == 40
    assert (epoch_of(0) // 16).tolist() != (epoch_of(1) // 16).tolist()


def epoch_of(epoch: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    return epoch_slices(20, 16, seed=0, epoch=epoch)


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 16))
def test_blocks_are_harvested_as_training_will_read_them_and_held_out_ones_before(train: int, held: int, slices: int) -> None:
    turns = block_turns(train + held, train, slices, seed=3).tolist()
    assert turns[:held] == list(range(train, train + held))
    first_read = list(dict.fromkeys((epoch_slices(train, slices, seed=3, epoch=0) // slices).tolist()))
    assert turns[held:] == first_read


def test_orders_never_change() -> None:
    """A cache written years ago must still be read in the order it was written: these values are part of the format."""
    assert permutation(8, 1, 2, 3).tolist() == PINNED["permutation"]
    assert block_rows(6, seed=0, block=5).tolist() == PINNED["block_rows"]
    assert epoch_slices(3, 4, seed=0, epoch=1).tolist() == PINNED["epoch_slices"]
    assert window_rows(6, seed=0, epoch=1, window=2).tolist() == PINNED["window_rows"]


PINNED = {
    "permutation": [1, 2, 4, 6, 5, 0, 7, 3],
    "block_rows": [1, 2, 3, 4, 5, 0],
    "epoch_slices": [4, 11, 3, 6, 1, 10, 2, 5, 8, 0, 9, 7],
    "window_rows": [4, 0, 3, 5, 2, 1],
}
