"""Fires what is due: the open loop.

The issuer walks its rows in due order and hands each to the transport at its scheduled time,
whatever has or has not come back. When it is late it fires everything that is due, in
bursts short enough that replies are still stamped in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from servebench.clock import DeadlineTimer, now_ns
from servebench.record.columns import HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.recorder import Recorder
from servebench.transport.base import Transport

#: How long before a due time the loop is woken to spin in ``precise`` pacing.
PRECISE_SPIN_NS = 250_000
#: Queries fired before sockets are served again, when late.
_MAX_BURST = 64
_CURSOR_SLOT = int(HeaderSlot.CURSOR)


class Issuer:
    """Issues the rows of ``recorder.columns`` whose ``scheduled_ns`` are absolute.

    ``requests[sample]`` is the encoded request of a sample. ``max_outstanding`` sheds what
    is due beyond it. ``on_finished`` is called once, after the last row was issued or shed.
    """

    def __init__(
        self,
        transport: Transport,
        recorder: Recorder,
        requests: Sequence[bytes | memoryview],
        *,
        pacing: str,
        max_outstanding: int | None,
        on_finished: Callable[[], None],
    ) -> None:
        columns = recorder.columns
        self.cursor = 0
        self._transport = transport
        self._recorder = recorder
        self._requests = requests
        self._rows = columns.rows
        self._header = columns.header
        self._scheduled_ns = columns.view("scheduled_ns")
        self._sample = columns.view("sample")
        self._max_outstanding = max_outstanding
        self._on_finished = on_finished
        self._finished = False
        spin_ns = PRECISE_SPIN_NS if pacing == "precise" else 0
        self._timer = DeadlineTimer(asyncio.get_running_loop(), self._fire, spin_ns=spin_ns)

    def start(self) -> None:
        """Wait for the first due time and go."""
        if self._rows:
            self._timer.arm(self._scheduled_ns[0])
        else:
            self._finish()

    def stop(self, detail: str) -> None:
        """Issue nothing more; what was left is shed with ``detail`` as the reason."""
        if not self._finished:
            self._recorder.shed_from(self.cursor, detail)
            self.cursor = self._rows
            self._finish()

    def _fire(self) -> None:
        cursor = self.cursor
        last = min(self._rows, cursor + _MAX_BURST)
        scheduled_ns, recorder = self._scheduled_ns, self._recorder
        cap = self._max_outstanding
        while cursor < last and scheduled_ns[cursor] <= now_ns():
            if cap is not None and recorder.outstanding >= cap:
                recorder.shed(cursor, "client.max_outstanding was reached")
            else:
                recorder.outstanding += 1
                self._transport.issue(cursor, self._requests[self._sample[cursor]])
            cursor += 1
        self.cursor = cursor
        self._header[_CURSOR_SLOT] = cursor
        if cursor < self._rows:
            self._timer.arm(scheduled_ns[cursor])
        else:
            self._finish()

    def _finish(self) -> None:
        self._finished = True
        self._header[_CURSOR_SLOT] = self.cursor
        self._timer.close()
        self._on_finished()


class DeadlineSweep:
    """Ends queries that have been out for longer than ``timeout_ns``.

    Queries are issued in row order and all have the same time allowed, so the oldest one
    still out is always the next to expire: a sweep looks at each row once. It runs every
    fiftieth of the timeout, between 1 and 50 ms: that is how late a timeout is noticed.
    """

    def __init__(self, transport: Transport, recorder: Recorder, issuer: Issuer, *, timeout_ns: int) -> None:
        self._transport = transport
        self._recorder = recorder
        self._issuer = issuer
        self._timeout_ns = timeout_ns
        self._oldest = 0
        self._loop = asyncio.get_running_loop()
        self._period_s = min(max(timeout_ns / 50, 1e6), 50e6) / 1e9
        self._handle = self._loop.call_later(self._period_s, self._sweep)

    def stop(self) -> None:
        """No more timeouts."""
        self._handle.cancel()

    def _sweep(self) -> None:
        self.expire(now_ns())
        self._handle = self._loop.call_later(self._period_s, self._sweep)

    def expire(self, now: int) -> None:
        """End every query whose time is over at ``now`` (monotonic ns)."""
        recorder = self._recorder
        cursor = self._issuer.cursor
        row = recorder.first_outstanding(self._oldest, cursor)
        while row < cursor:
            issued_ns = recorder.issue_time_ns(row)
            if issued_ns == 0 or now - issued_ns < self._timeout_ns:
                break
            self._transport.cancel(row, recorder.connection_of(row), Outcome.TIMEOUT, "no complete reply in time")
            row = recorder.first_outstanding(row + 1, cursor)
        self._oldest = row
