"""The stub's queue: first come, first served, by one server; no I/O and no clock.

`QueueModel` is told of arrivals as they happen and says when batches depart; the stub server
sends its replies by it, and `simulate` runs the same model over a whole array of arrivals, so
what a client should have seen can be computed. Times are integers, nanoseconds of any one clock.

Rules. An arrival at an idle server starts service at once. When a batch departs, the server
takes the longest-waiting queries as the next one: one query, or up to ``max_batch`` for a batch
service. A departure and an arrival in the same nanosecond: the departure comes first. The k-th
arrival gets the k-th draw of the service stream, whether it is refused or not, so the stream
never depends on timing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

IntArray = npt.NDArray[np.int64]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]

_NS_PER_MS = 1e6
_CHUNK = 4096

#: Which settings each kind of service needs.
_NEEDS = {
    "constant": {"mean_ms"},
    "exponential": {"mean_ms"},
    "lognormal": {"mean_ms", "sigma"},
    "batch": {"batch_base_ms", "batch_per_query_ms", "max_batch"},
}


class Service(BaseModel):
    """How long the stub works on a query, or on a batch of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["constant", "exponential", "lognormal", "batch"]
    """`constant`, `exponential`, `lognormal`, or `batch` (n queries take `batch_base_ms` + n * `batch_per_query_ms`)."""
    mean_ms: Milliseconds | None = None
    """Mean service time; for `constant`, every service time. For every kind but `batch`."""
    sigma: Annotated[float, Field(ge=0, le=10)] | None = None
    """Standard deviation of the logarithm of the service time. For `lognormal`."""
    batch_base_ms: Milliseconds | None = None
    """Time every batch costs, whatever its size. For `batch`."""
    batch_per_query_ms: Milliseconds | None = None
    """Time that each query adds to its batch. For `batch`."""
    max_batch: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Most queries in one batch. For `batch`."""
    seed: Seed = 0
    """Seed of the random service times (numpy's PCG64)."""

    @model_validator(mode="after")
    def _settings_match_kind(self) -> Service:
        given = {name for name in set().union(*_NEEDS.values()) if getattr(self, name) is not None}
        if missing := _NEEDS[self.kind] - given:
            raise ValueError(f"{self.kind} needs {', '.join(sorted(missing))}")
        if unused := given - _NEEDS[self.kind]:
            raise ValueError(f"{self.kind} does not use {', '.join(sorted(unused))}")
        return self

    def __str__(self) -> str:
        """One line for reports."""
        if self.kind == "batch":
            return f"batch of n <= {self.max_batch} in {self.batch_base_ms:g} + {self.batch_per_query_ms:g} n ms"
        sigma = "" if self.sigma is None else f", sigma {self.sigma:g}"
        return f"{self.kind}, mean {self.mean_ms:g} ms{sigma}"


class ServiceStream:
    """The service times of a non-batch service, one arrival after the other."""

    def __init__(self, service: Service) -> None:
        if service.mean_ms is None:
            raise ValueError("a batch service has no time per query: it depends on the batch")
        self._mean_ms = service.mean_ms
        self._service = service
        self._rng = np.random.Generator(np.random.PCG64(service.seed))
        self._drawn: deque[int] = deque()

    def next_ns(self) -> int:
        """Service time of the next arrival."""
        if not self._drawn:  # numpy draws one by one or by the thousand from the same stream; the latter is cheap
            self._drawn.extend(self.take_ns(_CHUNK).tolist())
        return self._drawn.popleft()

    def take_ns(self, count: int) -> IntArray:
        """The next ``count`` draws at once, shape (count,); not to be mixed with `next_ns`."""
        mean_ms, sigma = self._mean_ms, self._service.sigma
        if self._service.kind == "exponential":
            times_ms = self._rng.exponential(mean_ms, count)
        elif sigma is not None:
            # A lognormal's mean is exp(mu + sigma^2 / 2).
            times_ms = mean_ms * np.exp(-0.5 * sigma * sigma + sigma * self._rng.standard_normal(count))
        else:
            times_ms = np.full(count, mean_ms)
        times_ns: IntArray = np.rint(times_ms * _NS_PER_MS).astype(np.int64)
        return times_ns


def service_times_ns(service: Service, count: int) -> IntArray:
    """The service times of the first ``count`` arrivals after a start or a reset, shape (count,).

    Raises ValueError for a batch service, whose times depend on the batches.
    """
    return ServiceStream(service).take_ns(count)


class Batch(NamedTuple):
    """Queries served together (just one, unless the service is a batch service)."""

    #: Numbers of the arrivals, the first one being 0.
    arrivals: tuple[int, ...]
    start_ns: int
    service_ns: int
    departure_ns: int


class QueueModel:
    """The queue, event by event.

    ``queue_limit`` is the most queries that may wait (those in service do not count); an
    arrival beyond it is refused. Times given must not decrease.
    """

    def __init__(self, service: Service, queue_limit: int | None = None) -> None:
        self._limit = queue_limit
        self._max_batch = service.max_batch or 1
        self._base_ns = round((service.batch_base_ms or 0.0) * _NS_PER_MS)
        self._per_query_ns = round((service.batch_per_query_ms or 0.0) * _NS_PER_MS)
        self._stream = None if service.kind == "batch" else ServiceStream(service)
        self._waiting: deque[tuple[int, int]] = deque()  # (number of the arrival, its service time)
        self._serving: Batch | None = None
        self._arrivals = 0

    @property
    def next_departure_ns(self) -> int | None:
        """When the batch in service departs; None when the server is idle."""
        return None if self._serving is None else self._serving.departure_ns

    def arrive(self, now_ns: int) -> bool:
        """A query arrives; False when it is refused. Every departure up to ``now_ns`` must have been taken before."""
        number = self._arrivals
        self._arrivals += 1
        service_ns = 0 if self._stream is None else self._stream.next_ns()
        if self._serving is not None and self._limit is not None and len(self._waiting) >= self._limit:
            return False
        self._waiting.append((number, service_ns))
        if self._serving is None:
            self._start(now_ns)
        return True

    def depart(self, now_ns: int) -> Batch | None:
        """The batch in service if it departs by ``now_ns``; the next one is then in service. None if there is no such batch."""
        batch = self._serving
        if batch is None or batch.departure_ns > now_ns:
            return None
        self._serving = None
        if self._waiting:
            self._start(batch.departure_ns)
        return batch

    def _start(self, start_ns: int) -> None:
        taken = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
        service_ns = taken[0][1] if self._stream is not None else self._base_ns + self._per_query_ns * len(taken)
        self._serving = Batch(tuple(number for number, _ in taken), start_ns, service_ns, start_ns + service_ns)


@dataclass(frozen=True, slots=True)
class Trace:
    """What the queue did to each arrival, arrays of shape (arrivals,), int64; a refused one has zeros throughout."""

    start_ns: IntArray
    service_ns: IntArray
    departure_ns: IntArray
    batch_size: IntArray


def simulate(arrivals_ns: IntArray, service: Service, queue_limit: int | None = None) -> Trace:
    """Run the queue over non-decreasing arrival times, shape (n,), from an empty start until it is empty again."""
    queue = QueueModel(service, queue_limit)
    rows = np.zeros((4, len(arrivals_ns)), dtype=np.int64)

    def take_departures(until_ns: int) -> None:
        while (batch := queue.depart(until_ns)) is not None:
            for number in batch.arrivals:
                rows[:, number] = (batch.start_ns, batch.service_ns, batch.departure_ns, len(batch.arrivals))

    for arrival_ns in arrivals_ns.tolist():
        take_departures(arrival_ns)
        queue.arrive(arrival_ns)
    while (departure_ns := queue.next_departure_ns) is not None:
        take_departures(departure_ns)
    return Trace(*rows)
