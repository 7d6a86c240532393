"""How a query ended: a closed set, one byte in its record."""

from __future__ import annotations

from enum import IntEnum


class Outcome(IntEnum):
    """Values are stored on disk; never renumber.

    ``NOT_ISSUED`` and ``OUTSTANDING`` only appear while a run is going on, or when its
    process was killed.
    """

    NOT_ISSUED = 0
    OUTSTANDING = 1  #: issued, no end seen yet
    OK = 2
    TIMEOUT = 3  #: no complete reply within the deadline
    CONNECT = 4  #: no connection could be opened
    STALE = 5  #: the server closed an idle connection, in good order, just as it was reused
    RESET = 6  #: the connection broke, or ended before the reply was complete
    PROTOCOL = 7  #: the reply was not valid HTTP, or too large
    STATUS = 8  #: the server answered with an error status
    OUTPUT = 9  #: the reply was well-formed but its tensors were wrong
    SHED = 10  #: due, but not sent: a cap, or the end of the run
    UNFINISHED = 11  #: issued, still outstanding when the drain ended
    CLIENT = 12  #: our own host ran out of something (file descriptors, ports)

    @property
    def kind(self) -> str:
        """Name in reports, lower case."""
        return self.name.lower()


#: The detail of a query that is SHED because its run was interrupted; most such were not even due yet.
INTERRUPTED = "the run was interrupted"

#: Ended with an error that the server (or the way to it, or our own host) caused.
ERROR_OUTCOMES = frozenset(
    {
        Outcome.CONNECT,
        Outcome.STALE,
        Outcome.RESET,
        Outcome.PROTOCOL,
        Outcome.STATUS,
        Outcome.OUTPUT,
        Outcome.CLIENT,
    }
)
