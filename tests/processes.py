"""Processes that tests start: whose children they are, when they are gone, and the wait until something has happened."""

import time
from collections.abc import Callable

import psutil

from servebench.launcher import RunningServer


def children() -> list[psutil.Process]:
    """All descendants of this process."""
    return psutil.Process().children(recursive=True)


def family(server: RunningServer) -> list[psutil.Process]:
    """A server's first process and all descendants of it."""
    leader = psutil.Process(server.describe()["pid"])
    return [leader, *leader.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for an event that must come; the limit only bounds a failing test."""
    give_up = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up, "the event did not come"
        time.sleep(0.005)
