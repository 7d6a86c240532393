"""How a run is going, read from the workers' mapped columns while they write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servebench.clock import now_ns
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.histogram import Histogram
from servebench.record.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a phase. Rates are since the look before; percentiles are of all ok queries so far."""

    elapsed_s: float
    planned: int
    issued: int
    ok: int
    failed: int
    in_flight: int
    offered_qps: float
    completed_qps: float
    p50_ns: int | None
    p99_ns: int | None
    delay_p99_ns: int | None


class ProgressReader:
    """Looks at the columns of all workers, each row once or until it has ended."""

    def __init__(self, columns: list[Columns]) -> None:
        self._columns = columns
        self._counted = [np.zeros(one.rows, dtype=bool) for one in columns]
        self._lowest = [0] * len(columns)
        self._response = Histogram()
        self._delay = Histogram()
        self._last: tuple[int, int, int] | None = None

    def look(self) -> Snapshot:
        """The state now."""
        now = now_ns()
        issued = ended = ok = 0
        for worker, columns in enumerate(self._columns):
            header = columns.header
            cursor = header[HeaderSlot.CURSOR]
            issued += cursor
            ended += header[HeaderSlot.ENDED]
            ok += header[HeaderSlot.OK]
            self._count(worker, columns, cursor)
        start_ns = max(columns.header[HeaderSlot.START_NS] for columns in self._columns)
        since_ns, issued_before, ok_before = self._last or (start_ns, 0, 0)
        seconds = max((now - since_ns) / 1e9, 1e-9)
        self._last = (now, issued, ok)
        return Snapshot(
            elapsed_s=max(0.0, (now - start_ns) / 1e9) if start_ns else 0.0,
            planned=sum(columns.rows for columns in self._columns),
            issued=issued,
            ok=ok,
            failed=ended - ok,
            in_flight=max(0, issued - ended),
            offered_qps=(issued - issued_before) / seconds,
            completed_qps=(ok - ok_before) / seconds,
            p50_ns=self._response.percentile(50),
            p99_ns=self._response.percentile(99),
            delay_p99_ns=self._delay.percentile(99),
        )

    def _count(self, worker: int, columns: Columns, cursor: int) -> None:
        """Add the queries that ended since the last look to the histograms."""
        low = self._lowest[worker]
        window = slice(low, cursor)
        counted = self._counted[worker][window]
        outcome = columns.array("outcome")[window]
        fresh = (outcome != Outcome.NOT_ISSUED) & ~counted
        good = fresh & (outcome == Outcome.OK)
        scheduled_ns = columns.array("scheduled_ns")[window][good]
        self._response.record(columns.array("completed_ns")[window][good] - scheduled_ns)
        self._delay.record(columns.array("issued_ns")[window][good] - scheduled_ns)
        counted |= fresh
        unended = np.flatnonzero(~counted)
        self._lowest[worker] = low + (int(unended[0]) if len(unended) else len(counted))
        columns.release(low, self._lowest[worker])
