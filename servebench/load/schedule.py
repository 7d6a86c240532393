"""When queries are due: absolute arrival offsets in ns from t=0, as int64 arrays.

Three arrival processes share one stopping rule (`make_schedule`). ``mlperf`` is the server
scenario of MLPerf's LoadGen, bit for bit as its Linux builds (libstdc++) make it:

    U   = (g0 + g1 * 2^32) / 2^64          std::generate_canonical of two mt19937 outputs
    gap = trunc(1e9 * (-ln(1 - U) / qps))  std::exponential_distribution, cast to whole ns

in IEEE doubles, in this order of operations. The first query is due at 0, and each gap is
truncated before it is added, so nothing but integers accumulates. All three processes scale
one seeded sequence by 1/qps: a seed gives the same random numbers at every rate, which lets
a search compare rates without the noise of different draws.

Arrivals are produced block by block and joined once: the peak memory is about twice the
result. A process never ends by itself; only the stopping rule ends it.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Arrivals = Literal["mlperf", "poisson", "constant"]
Int64Array = npt.NDArray[np.int64]

_BLOCK = 1 << 16  # most arrivals made at a time: 512 KiB a temporary, inside a core's cache
_NS_PER_S = 1e9
_LARGEST_CANONICAL = math.nextafter(1.0, 0.0)  # generate_canonical returns this where the quotient rounds to 1

#: How far a gap computed with numpy's logarithm can be from the same with the C library's,
#: relative: numpy allows its SIMD logarithm 4 ulp, and two more roundings follow on either side.
_LOG_UNCERTAINTY = 2.0**-49


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Arrival offsets of one run, in ns from t=0, ascending, the first at 0 (read-only).

    ``generated_duration_ns`` is LoadGen's ``generated_query_duration``: the sum of as many
    gaps as there are queries, that is the offset at which the next one would have been due.
    """

    offsets_ns: Int64Array
    generated_duration_ns: int

    @property
    def sha256(self) -> str:
        """Hex digest of the offsets as little-endian int64 bytes: equal digests, equal schedules."""
        return hashlib.sha256(self.offsets_ns.astype("<i8", copy=False).data).hexdigest()

    @property
    def scheduled_qps(self) -> float:
        """LoadGen's scheduled rate, (n - 1) / last offset: n arrivals enclose n - 1 gaps. 0 where no time passes."""
        last_ns = int(self.offsets_ns[-1])
        return (len(self.offsets_ns) - 1) / (last_ns / _NS_PER_S) if last_ns else 0.0


def make_schedule(
    arrivals: Arrivals,
    *,
    target_qps: float,
    seed: int,
    min_duration_ns: int,
    min_query_count: int,
    multiple_of: int = 1,
    max_duration_ns: int | None = None,
    max_query_count: int | None = None,
) -> Schedule:
    """The schedule of one run: at least one arrival, as many as the stopping rule asks for.

    LoadGen's rule: the smallest count that is no less than ``min_query_count``, whose last
    offset is no earlier than ``min_duration_ns``, and that ``multiple_of`` divides (equal
    issue pads to whole passes over the sample set). Then the maximums cut, whatever the
    minimums say: no offset later than ``max_duration_ns``, no more than ``max_query_count``.

    ``target_qps`` is the mean rate in 1/s. ``seed`` is 64-bit; mt19937 (``mlperf``) sees
    only its low 32 bits, ``constant`` ignores it. The caller bounds the size: see
    `servebench.load.scenario.plan_server`.
    """
    wanted = sys.maxsize  # until the block that reaches min_duration_ns
    limit = sys.maxsize if max_query_count is None else max_query_count
    blocks: list[Int64Array] = []
    made = 0
    for block in _offset_blocks(arrivals, target_qps, seed):
        blocks.append(block)
        last_ns = int(block[-1])
        if wanted == sys.maxsize and last_ns >= min_duration_ns:
            lasting = made + int(np.searchsorted(block, min_duration_ns)) + 1
            wanted = -(-max(lasting, min_query_count) // multiple_of) * multiple_of
        if max_duration_ns is not None and last_ns > max_duration_ns:
            limit = min(limit, made + int(np.searchsorted(block, max_duration_ns, side="right")))
        made += len(block)
        if made > min(wanted, limit):  # one arrival beyond the last closes its gap
            break
    offsets_ns = np.concatenate(blocks)
    offsets_ns.setflags(write=False)
    count = min(wanted, limit)
    return Schedule(offsets_ns[:count], int(offsets_ns[count]))


def std_mt19937(seed: int) -> np.random.RandomState:
    """The generator of C++'s ``std::mt19937(seed)``, whose seed keeps only the low 32 bits of the 64 that LoadGen passes.

    `draw_words` reads it. numpy has frozen this class's streams for good.
    """
    return np.random.RandomState(seed & 0xFFFFFFFF)


def draw_words(generator: np.random.RandomState, count: int) -> npt.NDArray[np.uint32]:
    """The generator's next ``count`` raw 32-bit outputs."""
    return generator.randint(0, 1 << 32, size=count, dtype=np.uint32)


def _offset_blocks(arrivals: Arrivals, target_qps: float, seed: int) -> Iterator[Int64Array]:
    """Consecutive arrival offsets without end, from 0, in blocks."""
    # At very low rates a full block would overflow int64: 1e8 s, about three years, is 1 % of its range.
    size = max(1, min(_BLOCK, int(target_qps * 1e8)))
    if arrivals == "constant":
        yield from _constant_offset_blocks(target_qps, size)
    gap_blocks = _mlperf_gap_blocks if arrivals == "mlperf" else _poisson_gap_blocks
    start_ns = 0
    for gaps_ns in gap_blocks(target_qps, seed, size):
        ends_ns = np.cumsum(gaps_ns)
        ends_ns += start_ns
        yield np.concatenate(([start_ns], ends_ns[:-1]))
        start_ns = int(ends_ns[-1])


def _mlperf_gap_blocks(target_qps: float, seed: int, size: int) -> Iterator[Int64Array]:
    generator = std_mt19937(seed)
    while True:
        words = draw_words(generator, 2 * size)
        # A pair of words, the first low, read as one integer and rounded to a double is g0 + g1 * 2^32 in doubles.
        canonical = words.astype("<u4", copy=False).view("<u8").astype(np.float64) * 2.0**-64
        survival = 1.0 - np.minimum(canonical, _LARGEST_CANONICAL)
        gaps = -np.log(survival) / target_qps * _NS_PER_S
        # numpy's logarithm may differ from the C library's, which LoadGen calls, in the last place. That only
        # shows where it moves a gap across a whole number: redo those few with the C library.
        doubtful = np.flatnonzero(np.abs(gaps - np.rint(gaps)) <= gaps * _LOG_UNCERTAINTY)
        gaps[doubtful] = [-math.log(value) / target_qps * _NS_PER_S for value in survival[doubtful].tolist()]
        yield gaps.astype(np.int64)


def _poisson_gap_blocks(target_qps: float, seed: int, size: int) -> Iterator[Int64Array]:
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield np.rint(generator.standard_exponential(size) / target_qps * _NS_PER_S).astype(np.int64)


def _constant_offset_blocks(target_qps: float, size: int) -> Iterator[Int64Array]:
    """Every offset from its own index, so that no rounding error is carried along."""
    start = 0
    while True:
        yield np.rint(np.arange(start, start + size) * _NS_PER_S / target_qps).astype(np.int64)
        start += size
