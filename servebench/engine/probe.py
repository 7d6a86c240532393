"""One query before the run, sent as the run will send its own.

TorchServe describes no tensors, so whether it takes our samples only shows when it is asked.
The transport, the TLS settings and the token are those of the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from servebench.engine.closing import server_words
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink
from servebench.transport.factory import TransportSettings, make_transport

#: Answers that no later query would better; 429 (too many requests) and a server's own trouble may pass.
_PERMANENT_HTTP = frozenset(range(400, 500)) - {429}
#: INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, UNIMPLEMENTED, UNAUTHENTICATED
_PERMANENT_GRPC = frozenset({3, 5, 7, 12, 16})


class _Refusal(NamedTuple):
    status: int
    text: str


class _Answer:
    """The sink of one query: None when it was served."""

    def __init__(self) -> None:
        self.end: asyncio.Future[_Refusal | str | None] = asyncio.get_running_loop().create_future()

    def issued(self, row: int, at_ns: int, connection: int) -> bool:
        return False

    def completed(self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int) -> None:
        self._ends(None)

    def refused(
        self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int, detail: str, tail: bytes = b""
    ) -> None:
        self._ends(_Refusal(status, f"{detail}: {server_words(tail)}" if tail else detail))

    def failed(self, row: int, first_byte_ns: int, at_ns: int, outcome: Outcome, detail: str) -> None:
        self._ends(detail)

    def reply(self, row: int, chunks: Sequence[bytes]) -> None:
        """Never asked for."""

    def _ends(self, end: _Refusal | str | None) -> None:
        if not self.end.done():  # it is when the time was up
            self.end.set_result(end)


async def probe(settings: TransportSettings, request: bytes, *, timeout_s: float = 30.0) -> None:
    """Send ``request`` once. `TransportError` when there is no answer, or one that no later query would better."""
    answer = _Answer()
    transport = make_transport(settings, answer)
    try:
        await transport.open(1)
        transport.issue(0, request)
        end = await asyncio.wait_for(answer.end, timeout_s)
    except TimeoutError:
        end = f"nothing within {timeout_s:g} s"
    finally:
        await transport.close()
    if isinstance(end, str):
        raise TransportError(f"endpoint: the server at {settings.url} does not answer the first sample: {end}")
    permanent = _PERMANENT_HTTP if settings.url.startswith("http") else _PERMANENT_GRPC
    if end is not None and end.status in permanent:
        raise TransportError(f"endpoint: the server at {settings.url} refuses the first sample: {end.text}")


if TYPE_CHECKING:
    _sink: type[Sink] = _Answer
