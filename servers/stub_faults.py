"""What may go wrong with a stub reply, and which queries it happens to; no I/O.

A fault changes what is sent, never the queue: a faulty query is served as long, and departs at
the same time, as a healthy one. Each fault has a random stream of its own, so changing one
probability moves no other fault, and none moves the service times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .stub_queue import Milliseconds, Seed

Probability = Annotated[float, Field(ge=0, le=1)]

_CHUNK = 4096


class Fault(Enum):
    """Faults, in order of precedence: when several hit one query, the first one counts."""

    STATUS = "status"
    RESET = "reset"
    TRUNCATED = "truncated"
    SLOW_BODY = "slow_body"
    HANG = "hang"
    WRONG_OUTPUT = "wrong_output"
    GARBAGE = "garbage"
    CLOSE_IDLE = "close_idle"


#: Makes a reply ready to be sent, spoilt by a fault if there is one, and returns what sends it.
Prepare = Callable[[Fault | None], Callable[[], None]]


class Faults(BaseModel):
    """Probabilities (0-1) that the reply to an inference query is spoilt."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    status: Probability = 0.0
    """An error reply with `status_code`. gRPC: status 14, UNAVAILABLE."""
    status_code: Annotated[int, Field(ge=400, le=599)] = 503
    """HTTP status of `status` faults."""
    reset: Probability = 0.0
    """No reply: the connection is reset (TCP RST). gRPC: the call alone is reset, with INTERNAL_ERROR."""
    truncated: Probability = 0.0
    """The connection is closed after half of the announced body. gRPC: half of the message, then status 0."""
    slow_body: Probability = 0.0
    """The second half of the body follows `slow_body_delay_ms` after the first. gRPC: of the message."""
    slow_body_delay_ms: Milliseconds = 100.0
    """Pause of `slow_body` faults."""
    hang: Probability = 0.0
    """No reply, ever; the connection stays open. gRPC: so does the call."""
    wrong_output: Probability = 0.0
    """Status 200, but the output tensor carries no data. gRPC: status 0, likewise."""
    garbage: Probability = 0.0
    """Bytes that are not HTTP; the connection stays open. gRPC: bytes that are no HTTP/2 frame."""
    close_idle: Probability = 0.0
    """A good reply, then the connection is closed without having said `Connection: close`. gRPC: or GOAWAY."""
    seed: Seed = 0
    """Seed of the fault streams (numpy's PCG64)."""


class FaultStream:
    """The fault, if any, of one query after the other."""

    def __init__(self, faults: Faults) -> None:
        self._chances: list[tuple[Fault, float, np.random.Generator]] = []
        for key, fault in enumerate(Fault):
            probability = getattr(faults, fault.value)
            if probability > 0:
                rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((faults.seed, key))))
                self._chances.append((fault, probability, rng))
        self._drawn: deque[Fault | None] = deque()

    def next(self) -> Fault | None:
        """The fault of the next arrival."""
        if not self._chances:
            return None
        if not self._drawn:
            self._drawn.extend(self._draw(_CHUNK))
        return self._drawn.popleft()

    def _draw(self, count: int) -> list[Fault | None]:
        drawn: list[Fault | None] = [None] * count
        for fault, probability, rng in self._chances:
            for number in np.flatnonzero(rng.random(count) < probability).tolist():
                drawn[number] = drawn[number] or fault
        return drawn
