"""The contract between the engine and whatever carries queries to a server.

Ordering and ownership: `Transport.issue` is called on the event loop, in due order, and
never blocks or awaits. Every issued query ends exactly once, in any order, through the
`Sink`, from the same loop. The transport owns sockets and connections; the engine owns rows,
deadlines and records. Request bytes stay unchanged and valid until the transport is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from servebench.record.outcome import Outcome


class Sink(Protocol):
    """Receives what happens to queries. Nothing here may await, log or format on success."""

    def issued(self, row: int, at_ns: int, connection: int) -> bool:
        """The query's bytes are being handed to the socket of connection number ``connection``.

        Returns whether the raw reply is to be kept for a check after the run (see `reply`).
        """

    def completed(self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int) -> None:
        """The whole reply is here, and its ``status`` is a success."""

    def refused(
        self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int, detail: str, tail: bytes = b""
    ) -> None:
        """The whole reply is here, and says that the server could not serve the query.

        Replies alike have the same ``detail``; ``tail`` is what was received last, for an
        example of the server's words where the detail has none.
        """

    def failed(self, row: int, first_byte_ns: int, at_ns: int, outcome: Outcome, detail: str) -> None:
        """The query ended without a whole valid reply. ``first_byte_ns`` is 0 when none came."""

    def reply(self, row: int, chunks: Sequence[bytes]) -> None:
        """The raw bytes of a reply that `issued` asked for, right after its `completed`."""


@dataclass(slots=True)
class TransportStats:
    """What a transport did, for the trust verdict."""

    connections_opened: int = 0
    connections_open: int = 0
    connections_peak: int = 0
    #: queries that were due while no connection was free, and waited for one to open
    connection_waits: int = 0
    #: of those, the ones that waited because ``max_connections`` was reached, and (once nobody waits) for how long in all
    cap_waits: int = 0
    cap_wait_ns: int = 0
    #: and those that waited because the server's limit of concurrent streams was reached on every channel
    stream_waits: int = 0
    stream_wait_ns: int = 0
    #: error text of connection attempts that failed, with counts
    connect_failures: dict[str, int] = field(default_factory=dict)


class Transport(Protocol):
    """Carries encoded queries to one server. ``sink`` may be replaced between phases, while no query is outstanding."""

    sink: Sink
    stats: TransportStats

    async def open(self, connections: int) -> None:
        """Open that many connections ahead. `TransportError` when not even one can be opened."""

    def issue(self, row: int, request: bytes | memoryview) -> None:
        """Send one query now, or as soon as a connection is there; its end comes through the sink."""

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        """End a query that is on ``connection`` without waiting longer (deadline, end of drain)."""

    def abandon_waiting(self) -> list[int]:
        """Rows that were never sent because no connection came free; they are forgotten."""

    async def close(self) -> None:
        """Close every connection."""
