"""Which sample each query carries: LoadGen's choice and order of samples, bit for bit.

LoadGen loads the library's first performance-sample-count samples, shuffled with one seed:
the performance set (LoadGen 5 shuffled the whole library and then cut it). A second
generator, from another seed, then gives in this order: the shuffle that issues each sample
once, one further shuffle per pass for equal issue, and one uniform draw per query for the
default order, with replacement. An order uses its own part, but what comes before it is
always drawn.

The C++ standard leaves the algorithms open; these are those of LoadGen's Linux builds
(libstdc++ of GCC 11 and later). `std::uniform_int_distribution` over ``bound`` values is
Lemire's method (ACM TOMACS 29(1), 2019): of the 64-bit product word * bound the high half is
the value, and the word is rejected where the low half is under 2^32 mod bound. `std::shuffle`
swaps item i with a drawn one of 0..i, for i = 1, 2, ...; while size^2 fits in 32 bits one
draw gives the positions of two successive items, after a single one if the size is even.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from servebench.load.schedule import draw_words, std_mt19937

SampleOrder = Literal["with_replacement", "equal_issue", "unique", "same"]
Int32Array = npt.NDArray[np.int32]

_BLOCK = 1 << 16  # draws made at a time
_LARGEST_PAIRED = 65_535  # largest size with (2^32 - 1) // size >= size, where std::shuffle draws positions in pairs


def performance_set(sample_count: int, *, seed: int) -> Int32Array:
    """LoadGen's loaded set: library indices 0 to ``sample_count - 1``, in loaded order; ``seed`` is its ``qsl_rng_seed``."""
    return _permutations(_Words(seed), sample_count, 1).ravel()


def sample_order(
    order: SampleOrder, *, set_size: int, count: int, min_query_count: int, seed: int, same_index: int = 0
) -> Int32Array:
    """For each of ``count`` queries an index into the performance set of ``set_size`` samples.

    ``min_query_count`` is the profile's, before padding: LoadGen prepares one permutation per
    pass of that many queries and starts over when a run is longer. ``unique`` has at most
    ``set_size`` queries. ``seed`` is LoadGen's ``sample_index_rng_seed``.
    """
    if order == "same" or set_size == 1:
        return np.full(count, same_index, dtype=np.int32)
    words = _Words(seed)
    if order == "unique":
        return _permutations(words, set_size, 1).ravel()[:count]
    passes = -(-min_query_count // set_size)
    if order == "equal_issue":
        _skip_shuffles(words, set_size, 1)
        return np.resize(_permutations(words, set_size, min(passes, -(-count // set_size))), count)
    _skip_shuffles(words, set_size, 1 + passes)
    bounds = np.full(_BLOCK, set_size, dtype=np.uint32)
    drawn = [_draw_below(words, bounds[: count - start]) for start in range(0, count, _BLOCK)]
    return np.concatenate(drawn).astype(np.int32)


class _Words:
    """The outputs of one ``std::mt19937``, in order, with look-ahead: how many a draw takes is known only after it."""

    def __init__(self, seed: int) -> None:
        self._generator = std_mt19937(seed)
        self._buffer = np.empty(0, dtype=np.uint32)
        self._position = 0

    def peek(self, count: int) -> npt.NDArray[np.uint32]:
        missing = self._position + count - len(self._buffer)
        if missing > 0:
            fresh = draw_words(self._generator, max(missing, _BLOCK))
            self._buffer = np.concatenate((self._buffer[self._position :], fresh))
            self._position = 0
        return self._buffer[self._position : self._position + count]

    def skip(self, count: int) -> None:
        self._position += count


def _draw_below(words: _Words, bounds: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """One draw of ``std::uniform_int_distribution(0, bound - 1)`` per bound, in order."""
    thresholds = ((1 << 32) % bounds.astype(np.uint64)).astype(np.uint32)
    # A rejected word shifts all that follow against their bounds: so look about as far ahead as one rejection is likely.
    rejected_share = float(thresholds.mean()) / 2**32 if len(bounds) else 0.0
    step = max(64, int(1 / max(rejected_share, 1 / _BLOCK)))
    values = np.empty_like(bounds)
    done = 0
    while done < len(bounds):
        bound = bounds[done : done + step]
        word = words.peek(len(bound))
        rejected = word * bound < thresholds[done : done + step]  # uint32 products wrap: the low halves
        accepted = int(rejected.argmax()) if rejected.any() else len(bound)
        values[done : done + accepted] = (word[:accepted].astype(np.uint64) * bound[:accepted]) >> 32
        words.skip(accepted + (accepted < len(bound)))
        done += accepted
    return values


def _shuffle_positions(words: _Words, size: int, repeats: int) -> Iterator[npt.NDArray[np.uint32]]:
    """Draws ``repeats`` successive shuffles of ``size`` items.

    Yields arrays of shape (shuffles, size - 1): column i - 1 holds where item i goes.
    """
    paired = size <= _LARGEST_PAIRED
    first = 1 + (size + 1) % 2  # the items from here on are drawn in pairs: an even size has one before them
    second_bounds = np.arange(first + 2, size + 2, 2, dtype=np.uint32)
    if paired:
        bounds = np.concatenate((np.full(first - 1, 2, dtype=np.uint32), (second_bounds - 1) * second_bounds))
    else:
        bounds = np.arange(2, size + 1, dtype=np.uint32)
    at_once = max(1, _BLOCK // size)
    for start in range(0, repeats, at_once):
        rows = min(at_once, repeats - start)
        draws = _draw_below(words, np.tile(bounds, rows)).reshape(rows, len(bounds))
        if paired:
            positions = np.empty((rows, size - 1), dtype=np.uint32)
            positions[:, : first - 1] = draws[:, : first - 1]
            positions[:, first - 1 :: 2] = draws[:, first - 1 :] // second_bounds
            positions[:, first::2] = draws[:, first - 1 :] % second_bounds
            yield positions
        else:
            yield draws


def _permutations(words: _Words, size: int, repeats: int) -> Int32Array:
    """The states, shape (repeats, size), of 0..size-1 after each of ``repeats`` successive shuffles."""
    items = list(range(size))
    states = np.empty((repeats, size), dtype=np.int32)
    done = 0
    for block in _shuffle_positions(words, size, repeats):
        for positions in block.tolist():
            for i, j in enumerate(positions, 1):
                items[i], items[j] = items[j], items[i]
            states[done] = items
            done += 1
    return states


def _skip_shuffles(words: _Words, size: int, repeats: int) -> None:
    """Use up the words of ``repeats`` shuffles: rejections make their number known only by drawing."""
    for _ in _shuffle_positions(words, size, repeats):
        pass
