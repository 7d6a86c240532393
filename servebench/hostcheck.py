"""What ``servebench doctor`` finds out about a host: values that core and launchers both speak.

A launcher that can say whether this host fits it implements `ChecksHost`; the doctor asks every
installed one that does. A check is a judgement of facts that were collected before, so that
each failing state can be tested without a host that fails.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from servebench.errors import LaunchError


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"  #: works, but something will be slower, less exact, or fail under load
    FAIL = "fail"  #: there, and does not work
    ABSENT = "absent"  #: not there; only what needs it cannot be used


@dataclass(frozen=True, slots=True)
class HostCheck:
    """One thing looked at: what was found, what that means, and what to do about it (None where nothing has to be done)."""

    name: str
    state: State
    found: str
    meaning: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class CheckGroup:
    """Checks that belong together. ``way`` is the way to launch that needs all of them, e.g. ``triton by wheel``, or None."""

    title: str
    checks: tuple[HostCheck, ...]
    way: str | None = None

    @property
    def obstacle(self) -> HostCheck | None:
        """The first check that is failed or absent, None where there is none."""
        return next((check for check in self.checks if check.state in (State.FAIL, State.ABSENT)), None)


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """What a command said: its exit code (None: it said nothing in time) and all its output."""

    returncode: int | None
    output: str


def ask_tool(command: Sequence[str], timeout_s: float) -> ToolAnswer | None:
    """Run a command to its end; None where there is none that can be run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except (FileNotFoundError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        return ToolAnswer(None, "")
    return ToolAnswer(done.returncode, done.stdout)


@runtime_checkable
class ChecksHost(Protocol):
    """A launcher that can tell whether it would work on this host."""

    def check_host(self) -> Sequence[CheckGroup]:
        """A group for each way to launch, within a second or two; starts no server. Groups of one title are shown once."""


def from_launch_error(name: str, error: LaunchError, meaning: str, *, state: State = State.FAIL) -> HostCheck:
    """A failed check out of the error that a launch would end with; its text is ``cause; remedy``."""
    found, _, fix = str(error).partition("; ")
    return HostCheck(name, state, found, meaning, fix or None)


def attempt(name: str, check: Callable[[], object], *, found: str, meaning: str, otherwise: str) -> HostCheck:
    """A check out of one that a launch makes, which raises `LaunchError` when it fails.

    ``found`` and ``meaning`` are what to say if it does not; ``otherwise`` is what the failure means.
    """
    try:
        check()
    except LaunchError as error:
        return from_launch_error(name, error, otherwise)
    return HostCheck(name, State.OK, found, meaning)
