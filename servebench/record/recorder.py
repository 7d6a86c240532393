"""Stores what happens to queries straight into the mapped columns: the hot path's only sink.

Plain integer stores; nothing here formats, logs or allocates on success. Failures are rare
enough to keep a count and an example per kind and detail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import Outcome

_MAX_DISTINCT_ERRORS = 200
_MAX_DETAIL_CHARACTERS = 300
# Plain integers: an enum member costs a method call each time it is stored or indexes.
_OK, _STATUS, _SHED, _NOT_ISSUED = int(Outcome.OK), int(Outcome.STATUS), int(Outcome.SHED), int(Outcome.NOT_ISSUED)
_ENDED_SLOT, _OK_SLOT = int(HeaderSlot.ENDED), int(HeaderSlot.OK)


@dataclass(slots=True)
class ErrorCount:
    """Queries that ended alike, and one of them."""

    outcome: Outcome
    detail: str
    count: int
    example_row: int
    example_reply: bytes = b""


class Recorder:
    """The `servebench.transport.base.Sink` of one worker and phase.

    The raw replies of the rows in ``keep`` are gathered in ``replies``. ``outstanding``
    counts queries handed to the transport (`started`) whose end is not known.
    """

    def __init__(self, columns: Columns, *, keep: Iterable[int] = ()) -> None:
        self.columns = columns
        self.replies: dict[int, bytes] = {}
        self.outstanding = 0
        self._errors: dict[tuple[Outcome, str], ErrorCount] = {}
        self._on_drained: Callable[[], None] | None = None
        self._header = columns.header
        self._issued_ns = columns.view("issued_ns")
        self._first_byte_ns = columns.view("first_byte_ns")
        self._completed_ns = columns.view("completed_ns")
        self._outcome = columns.view("outcome")
        self._status = columns.view("status")
        self._response_bytes = columns.view("response_bytes")
        self._connection = columns.view("connection")
        self._keep = bytearray(columns.rows)
        for row in keep:
            self._keep[row] = 1

    @property
    def errors(self) -> list[ErrorCount]:
        """What went wrong, most frequent first."""
        return sorted(self._errors.values(), key=lambda error: -error.count)

    # --- the sink -----------------------------------------------------------------------

    def issued(self, row: int, at_ns: int, connection: int) -> bool:
        self._issued_ns[row] = at_ns
        self._connection[row] = connection
        return self._keep[row] != 0

    def completed(self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int) -> None:
        self._completed_ns[row] = at_ns
        self._first_byte_ns[row] = first_byte_ns
        self._status[row] = status
        self._response_bytes[row] = response_bytes
        self._outcome[row] = _OK
        self._header[_OK_SLOT] += 1
        self._end()

    def refused(
        self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int, detail: str, tail: bytes = b""
    ) -> None:
        self._status[row] = status
        self._response_bytes[row] = response_bytes
        error = self._store_failure(row, first_byte_ns, at_ns, Outcome.STATUS, detail)
        if error.count == 1:
            error.example_reply = tail
        self._end()

    def failed(self, row: int, first_byte_ns: int, at_ns: int, outcome: Outcome, detail: str) -> None:
        self._store_failure(row, first_byte_ns, at_ns, outcome, detail)
        self._end()

    def reply(self, row: int, chunks: Sequence[bytes]) -> None:
        self.replies[row] = b"".join(chunks)

    # --- the engine's side --------------------------------------------------------------

    def shed(self, row: int, detail: str) -> None:
        """A query that was due is not sent."""
        self._outcome[row] = _SHED
        self._header[_ENDED_SLOT] += 1
        self._count(row, Outcome.SHED, detail)

    def shed_from(self, first_row: int, detail: str) -> None:
        """None of the rows from ``first_row`` on is sent."""
        count = self.columns.rows - first_row
        if count > 0:
            self.columns.array("outcome")[first_row:] = _SHED
            self._header[_ENDED_SLOT] += count
            self._count(first_row, Outcome.SHED, detail, count)

    def unsent(self, row: int, detail: str) -> None:
        """A query that was handed to the transport never left it."""
        self.outstanding -= 1
        self.shed(row, detail)

    def first_outstanding(self, start: int, stop: int) -> int:
        """The first of the rows from ``start`` to ``stop`` whose end is not known; ``stop`` when there is none."""
        index = self._outcome[start:stop].tobytes().find(_NOT_ISSUED)
        return stop if index < 0 else start + index

    def issue_time_ns(self, row: int) -> int:
        """When the query was issued; 0 when it was not."""
        return int(self._issued_ns[row])

    def connection_of(self, row: int) -> int:
        """Number of the connection that carries the query."""
        return int(self._connection[row])

    def on_drained(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when nothing is outstanding: now, if that is so already."""
        if self.outstanding:
            self._on_drained = callback
        else:
            callback()

    def _end(self) -> None:
        self._header[_ENDED_SLOT] += 1
        self.outstanding -= 1
        if self.outstanding == 0 and self._on_drained is not None:
            callback, self._on_drained = self._on_drained, None
            callback()

    def _store_failure(self, row: int, first_byte_ns: int, at_ns: int, outcome: Outcome, detail: str) -> ErrorCount:
        self._completed_ns[row] = at_ns
        self._first_byte_ns[row] = first_byte_ns
        self._outcome[row] = outcome
        return self._count(row, outcome, detail)

    def _count(self, row: int, outcome: Outcome, detail: str, count: int = 1) -> ErrorCount:
        key = (outcome, detail[:_MAX_DETAIL_CHARACTERS])
        error = self._errors.get(key)
        if error is None:
            if len(self._errors) >= _MAX_DISTINCT_ERRORS:
                key = (outcome, "other details")
            error = self._errors.setdefault(key, ErrorCount(outcome, key[1], 0, row))
        error.count += count
        return error
