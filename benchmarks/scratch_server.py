"""A server that a benchmark starts for itself: a process on CPUs of its own and a scratch directory, both gone at the end."""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psutil
from servebench_servers.process import ServerProcess

_READY_DEADLINE_S = 15.0
_CHECKOUT = Path(__file__).parents[1]  # a server may be a module of the benchmarks, which are not installed


class ScratchServer(abc.ABC):
    """A running server on the given CPUs; use it as a context manager, from the main thread.

    Raises `LaunchError` with the server's own words when it does not start.
    """

    name: ClassVar[str]
    url: str  #: where it listens; known from `is_ready` on at the latest

    def __init__(self, cpus: Sequence[int]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix=f"{self.name}-")
        directory = Path(self._scratch.name)
        try:
            argv = self.prepare(directory)
            self._process = ServerProcess(self.name, argv, directory / "log", cwd=_CHECKOUT, cpus=cpus)
            self._process.wait_ready(self.is_ready, _READY_DEADLINE_S)
        except BaseException:
            self._scratch.cleanup()
            raise

    @abc.abstractmethod
    def prepare(self, directory: Path) -> list[str]:
        """Write what the server reads into its scratch directory; returns its command."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Whether it can be asked now."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stop()
        self._scratch.cleanup()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def log_tail(self) -> str:
        """The last lines that it wrote."""
        return self._process.log_tail()

    def cpu_s(self) -> float:
        """CPU time that it has used so far, in seconds."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)
