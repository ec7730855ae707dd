"""Every random order in the project, as pure functions of integers.

An order must be the same on every machine, in every process and after every resume, so it comes from raw Philox bits
(whose stream NumPy guarantees, unlike `Generator.permutation`) and a stable sort.
"""

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(n) that depends on nothing but n and the non-negative integers of `key`.

    Equal 64-bit draws (probability below n² / 2⁶⁵) are ordered by index, so the result is a bijection always.
    """
    seed = np.random.SeedSequence(key)
    draws = np.random.Philox(key=seed.generate_state(2, np.uint64)).random_raw(n)
    return np.argsort(draws, kind="stable").astype(np.int64)


def block_rows(n_rows: int, *, seed: int, block: int) -> NDArray[np.int64]:
    """Which row of a block, in reading order, is stored at each place: stored[j] = activations[order[j]]."""
    return permutation(n_rows, seed, 0, block)


def epoch_slices(n_blocks: int, slices: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the slices of the training blocks, as numbers block · slices + slice.

    `slices` rounds, each of which takes one slice of every block, blocks and slices in random order: any run of as many
    slices as there are blocks then holds about as much of each block, the last run of an epoch as much as the first.
    """
    n = n_blocks * slices
    blocks = np.argsort(permutation(n, seed, 3, epoch).reshape(slices, n_blocks), axis=1)  # [round, place in it]
    turns = np.argsort(permutation(n, seed, 4, epoch).reshape(n_blocks, slices), axis=1)  # [block, round]: which slice
    order: NDArray[np.int64] = blocks * slices + turns[blocks, np.arange(slices)[:, None]]
    return order.ravel()


def block_turns(n_blocks: int, train_blocks: int, slices: int, *, seed: int) -> NDArray[np.int64]:
    """All blocks of a cache in the order in which they are harvested: the held-out ones, then as training first reads them."""
    first_round = epoch_slices(train_blocks, slices, seed=seed, epoch=0)[:train_blocks] // slices
    return np.concatenate([np.arange(train_blocks, n_blocks), first_round])


def window_rows(n_rows: int, *, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """The order in which the rows of one shuffle window are handed out."""
    return permutation(n_rows, seed, 2, epoch, window)


def text_order(n_sequences: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which students of one seed read an epoch's sequences."""
    return permutation(n_sequences, seed, 3, epoch)
