"""What the reference clients share: every query is a task that calls a client library as an application would.

They exist beside the wire transports for two reasons: to measure what an ordinary application
feels, library included, and as an independent opinion on our own wire code. So the library does
as it pleases: it owns the connections, the waiting for them and the parsing. What that means for
the contract (`servebench.transport.base.Transport`):

- ``issued`` is the moment at which the task calls the library. Waiting for a connection comes
  after it, so it is part of the service time, and a query whose connection was refused was issued.
- Only a query whose task has not begun can be given back by `abandon_waiting`. One that waits
  inside the library is like one that waits for its reply: `cancel` ends it.
- `cancel` records the end at once. The library hears of it in the loop's next turns and closes
  the connection or resets the stream, so a late reply has nobody to go to.
"""

from __future__ import annotations

import abc
import asyncio
import functools

from servebench.clock import now_ns
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, TransportStats


class Query:
    """One query on its way through a library."""

    __slots__ = ("begun", "connected", "first_byte_ns", "queued_ns", "reused", "row", "task")

    def __init__(self, row: int) -> None:
        self.row = row
        self.begun = False
        self.first_byte_ns = 0
        self.queued_ns = 0  #: since when it waits for a place under the cap on connections; 0: it never had to
        self.connected = False  #: whether it was given a connection, as far as the library tells
        self.reused = False  #: and whether that one had carried another before
        self.task: asyncio.Task[None]


class ReferenceTransport(abc.ABC):
    """Tasks, rows and their ends; subclasses call the library in `carry`.

    ``sink`` may be replaced between phases. Row numbers begin anew with a phase: what the task of
    a cancelled query still does can never touch the next query of the same number.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.stats = TransportStats()
        self._out: dict[int, Query] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @abc.abstractmethod
    async def carry(self, query: Query, request: bytes | memoryview) -> None:
        """Carry one query through the library; the first step tells the sink that it is ``issued``."""

    @abc.abstractmethod
    async def close_library(self) -> None:
        """Close what the library holds; no task is left by then."""

    def issue(self, row: int, request: bytes | memoryview) -> None:
        query = self._out[row] = Query(row)
        query.task = asyncio.get_running_loop().create_task(self.carry(query, request))
        self._tasks.add(query.task)
        query.task.add_done_callback(functools.partial(self._task_ended, query))

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        query = self._out.pop(row, None)
        if query is not None:
            query.task.cancel()
            self.sink.failed(row, query.first_byte_ns, now_ns(), outcome, detail)

    def abandon_waiting(self) -> list[int]:
        waiting = [query for query in self._out.values() if not query.begun]
        for query in waiting:
            del self._out[query.row]
            query.task.cancel()
        return [query.row for query in waiting]

    async def close(self) -> None:
        for query in list(self._out.values()):
            self.cancel(query.row, 0, Outcome.RESET, "the transport was closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.close_library()

    # --- for subclasses -----------------------------------------------------------------

    def begin(self, query: Query, connection: int) -> bool:
        """Stamp the query as issued, right before the library is called; whether its reply is to be kept."""
        query.begun = True
        return self.sink.issued(query.row, now_ns(), connection)

    def claim(self, query: Query) -> bool:
        """Whether the query's end is still to be told; true once."""
        if self._out.get(query.row) is not query:
            return False
        del self._out[query.row]
        return True

    def fail(self, query: Query, at_ns: int, outcome: Outcome, detail: str) -> None:
        """The query ended without a whole valid reply, unless it had ended before."""
        if self.claim(query):
            self.sink.failed(query.row, query.first_byte_ns, at_ns, outcome, detail)

    def count_connect_failure(self, reason: str) -> None:
        """A connection could not be opened."""
        self.stats.connect_failures[reason] = self.stats.connect_failures.get(reason, 0) + 1

    def set_open(self, connections: int) -> None:
        """So many connections are open now."""
        stats = self.stats
        stats.connections_open = connections
        stats.connections_peak = max(stats.connections_peak, connections)

    def _task_ended(self, query: Query, task: asyncio.Task[None]) -> None:
        del query.task  # a cancelled task keeps its error, whose frames hold the query: collection is off while measuring
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a fault of our own: the loop's exception handler must hear of it
