"""The errors servebench raises, by whose fault they are; the command maps each to an exit code.

A single query's fault (a timeout, a 503, a reset) is *not* an exception: it is an
`Outcome` value in the query's record. Exceptions are for what stops a run.
"""

from __future__ import annotations


class ServebenchError(Exception):
    """Root of every error servebench raises on purpose. Its text is one line for people."""


class ProfileError(ServebenchError):
    """Bad input: a profile, a ``--set``, a path. Nothing has been started or overwritten (exit 2)."""


class LaunchError(ServebenchError):
    """A server could not be started or did not become ready; carries its last log lines (exit 1)."""

    def __init__(self, message: str, *, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class TransportError(ServebenchError):
    """The server cannot be reached at all, or refuses to describe the model (exit 1)."""


class RunError(ServebenchError):
    """Our own fault: a worker that cannot start, a run directory that cannot be written (exit 1)."""
