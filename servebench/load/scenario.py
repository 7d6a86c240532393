"""The plan of one run in MLPerf's server scenario: every arrival and its sample, before t=0.

An open loop: arrivals never wait for replies, so the whole plan follows from the profile's
``load`` and ``samples`` sections and the size of the sample library. Bad combinations are a
`ProfileError` of one line, before anything large is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servebench.errors import ProfileError
from servebench.load.samples import performance_set, sample_order
from servebench.load.schedule import Arrivals, make_schedule
from servebench.profile import Load, Samples

MAX_ARRIVALS = 200_000_000  #: 1.6 GB of offsets, and some 10 GB of records that their run would write
MAX_SPAN_NS = 2**53  #: about 104 days; beyond it a double cannot count every nanosecond

_WARMUP_STREAM = 1


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one run will issue: query i is due ``offsets_ns[i]`` after t=0 and carries library sample ``sample_index[i]``.

    Both arrays are read-only. ``sha256`` is of the offsets (little-endian int64).
    ``generated_duration_ns`` is LoadGen's ``generated_query_duration``, ``scheduled_qps`` its
    scheduled rate (n - 1) / last offset, 0 where no time passes. `arrival_share` divides a
    plan between workers.
    """

    offsets_ns: npt.NDArray[np.int64]
    sample_index: npt.NDArray[np.int32]
    planned: int
    generated_duration_ns: int
    sha256: str
    arrivals: Arrivals
    target_qps: float
    seed: int
    scheduled_qps: float


def plan_server(load: Load, samples: Samples, library_size: int) -> Plan:
    """Plan a run of ``load`` over a library of ``library_size`` samples, or the first ``performance_sample_count`` of them.

    As in LoadGen, ``equal_issue`` pads the run to whole passes over the performance set, and
    ``unique`` issues each of its samples once, whatever ``min_duration_s`` and
    ``min_query_count`` say. Raises `ProfileError` for a performance set larger than the
    library, a ``same_index`` outside it, and a schedule too large to hold.
    """
    set_size = _set_size(samples, library_size)
    min_duration_ns = round(load.min_duration_s * 1e9)
    min_query_count = load.min_query_count
    if samples.order == "unique":
        min_duration_ns, min_query_count = 0, set_size
    multiple_of = set_size if samples.order == "equal_issue" else 1
    _check_size(load, min_duration_ns, min_query_count, multiple_of)
    schedule = make_schedule(
        load.arrivals,
        target_qps=load.target_qps,
        seed=load.schedule_seed,
        min_duration_ns=min_duration_ns,
        min_query_count=min_query_count,
        multiple_of=multiple_of,
        max_duration_ns=None if load.max_duration_s is None else round(load.max_duration_s * 1e9),
        max_query_count=load.max_query_count,
    )
    planned = len(schedule.offsets_ns)
    order = sample_order(
        samples.order,
        set_size=set_size,
        count=planned,
        min_query_count=min_query_count,
        seed=samples.sample_order_seed,
        same_index=samples.same_index,
    )
    sample_index = performance_set(set_size, seed=samples.sample_set_seed)[order]
    sample_index.setflags(write=False)
    return Plan(
        offsets_ns=schedule.offsets_ns,
        sample_index=sample_index,
        planned=planned,
        generated_duration_ns=schedule.generated_duration_ns,
        sha256=schedule.sha256,
        arrivals=load.arrivals,
        target_qps=load.target_qps,
        seed=load.schedule_seed,
        scheduled_qps=schedule.scheduled_qps,
    )


def warmup_offsets_ns(load: Load) -> npt.NDArray[np.int64]:
    """Offsets of the warm-up's arrivals, in ns from its start, all before ``warmup_s``; empty when that is 0.

    Equal gaps if the run's are equal, else Poisson, from a stream of its own that
    ``schedule_seed`` seeds: the measured arrivals do not repeat those of the warm-up.
    """
    warmup_ns = round(load.warmup_s * 1e9)
    if warmup_ns == 0:
        return np.empty(0, dtype=np.int64)
    if load.target_qps * load.warmup_s > MAX_ARRIVALS:
        raise ProfileError(
            f"load.warmup_s: about {load.target_qps * load.warmup_s:,.0f} arrivals, more than the {MAX_ARRIVALS:,} "
            "a schedule may hold; lower load.warmup_s or load.target_qps"
        )
    own_seed = np.random.SeedSequence(load.schedule_seed, spawn_key=(_WARMUP_STREAM,)).generate_state(1, np.uint64)
    return make_schedule(
        "constant" if load.arrivals == "constant" else "poisson",
        target_qps=load.target_qps,
        seed=int(own_seed[0]),
        min_duration_ns=warmup_ns,
        min_query_count=1,
        max_duration_ns=warmup_ns - 1,
    ).offsets_ns


def arrival_share(plan: Plan, worker: int, workers: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Offsets and samples of worker ``worker`` (from 0) of ``workers``: arrivals worker, worker + workers, ... of the plan.

    Views into the plan, empty if there are more workers than arrivals. The shares are disjoint and complete.
    """
    share = slice(worker, None, workers)
    return plan.offsets_ns[share], plan.sample_index[share]


def _set_size(samples: Samples, library_size: int) -> int:
    if library_size < 1:
        raise ProfileError("samples: the library is empty; it needs at least one sample")
    set_size = samples.performance_sample_count or library_size
    if set_size > library_size:
        raise ProfileError(
            f"samples.performance_sample_count: {set_size}, but the library has {library_size} samples; "
            f"allowed: 1 to {library_size}"
        )
    if samples.order == "same" and samples.same_index >= set_size:
        raise ProfileError(
            f"samples.same_index: {samples.same_index} is outside the loaded set of {set_size} samples; "
            f"allowed: 0 to {set_size - 1}"
        )
    return set_size


def _check_size(load: Load, min_duration_ns: int, min_query_count: int, multiple_of: int) -> None:
    """Refuse a schedule that cannot be held, from its expected size: the stopping rule in the mean."""
    arrivals = math.ceil(max(min_query_count, load.target_qps * min_duration_ns / 1e9) / multiple_of) * multiple_of
    if load.max_duration_s is not None:
        arrivals = min(arrivals, math.ceil(load.target_qps * load.max_duration_s))
    if load.max_query_count is not None:
        arrivals = min(arrivals, load.max_query_count)
    if arrivals > MAX_ARRIVALS:
        raise ProfileError(
            f"load.min_duration_s: about {arrivals:,} arrivals at {load.target_qps:g} per second, more than the "
            f"{MAX_ARRIVALS:,} a schedule may hold; lower load.target_qps or load.min_duration_s, or set load.max_query_count"
        )
    span_ns = (arrivals + 1) / load.target_qps * 1e9
    if span_ns > MAX_SPAN_NS:
        raise ProfileError(
            f"load.target_qps: about {arrivals:,} arrivals at {load.target_qps:g} per second take "
            f"{span_ns / 86_400e9:,.0f} days, more than the {MAX_SPAN_NS / 86_400e9:.0f} a schedule may last; "
            "raise load.target_qps, lower load.min_query_count or set load.max_query_count"
        )
