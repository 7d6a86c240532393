"""Servers that run: what the bundled ones have in common beyond their process.

`RunningProcess` answers what a `servebench.launcher.RunningServer` is asked from the process and what its launcher knew.
`HostingProcess` hosts one of our models, and so has to be waited for: until the model is ready *and* has the
configuration that was asked for, because servers keep quiet about what they change.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servebench.errors import LaunchError

from .container_engine import ContainerError
from .host import memory_kills
from .process import ServerProcess
from .remedies import explain


class RunningProcess(abc.ABC):
    """A server that is one process, and all that it starts."""

    def __init__(self, process: ServerProcess, *, facts: Mapping[str, Any], config_files: Sequence[Path] = ()) -> None:
        self._process = process
        self._facts = dict(facts)
        self._config_files = list(config_files)

    @property
    @abc.abstractmethod
    def urls(self) -> dict[str, str]:
        """Base URLs by name."""

    @property
    def tokens(self) -> dict[str, str]:
        """None: it asks for no token."""
        return {}

    @property
    def log_path(self) -> Path:
        """The combined output of the server and what it started."""
        return self._process.log_path

    def describe(self) -> dict[str, Any]:
        """Facts for the report: what the launcher knew, and was found out since; command and process id."""
        return {**self._facts, "command": list(self._process.argv), "pid": self._process.pid}

    def config_files(self) -> list[Path]:
        """The rendered configuration."""
        return list(self._config_files)

    def exit_code(self) -> int | None:
        """None while the server runs, else its exit code (negative: a signal)."""
        return self._process.exit_code()

    @abc.abstractmethod
    def stop(self) -> None:
        """End the server and what it started, remove what it left; idempotent."""


class HostingProcess(RunningProcess):
    """A server that hosts one of our models; its launcher makes it and calls `wait_ready`."""

    def wait_ready(self, deadline_s: float) -> None:
        """Return when the model is ready with the settings asked for; `LaunchError` otherwise, and all is stopped."""
        started_s = time.monotonic()
        try:
            self._wait_until_it_says_so(deadline_s)
            self._check_config()
            self._facts["ready_after_s"] = round(time.monotonic() - started_s, 3)
        except BaseException:
            self.stop()
            raise

    @abc.abstractmethod
    def _is_ready(self) -> bool:
        """Whether it says that the model is ready. `LaunchError` when it never will be."""

    @abc.abstractmethod
    def _check_config(self) -> None:
        """Ask what the model was made of and add it to the facts; `LaunchError` when it is not what was asked for."""

    @abc.abstractmethod
    def _failure_cause(self, happened: str) -> str:
        """One line of the log that says why it did not start, "" if there is none. ``happened`` is what became of it."""

    def _wait_until_it_says_so(self, deadline_s: float) -> None:
        kills_before = memory_kills()
        try:
            self._process.wait_ready(self._is_ready, deadline_s)
        except ContainerError:
            raise
        except LaunchError as error:
            # The process quotes the log's last line; a server's last error says more.
            happened = str(error).partition(": ")[0]
            cause = self._failure_cause(happened)
            told = LaunchError(f"{happened}: {cause}" if cause else str(error), log_tail=error.log_tail)
            raise explain(told, killed_for_memory=memory_kills() > kills_before) from None

    def _refusal(self, message: str) -> LaunchError:
        """The error, with the log's end."""
        return LaunchError(message, log_tail=self._process.log_tail())

    def _log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")
