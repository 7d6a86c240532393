"""The contract between servebench and the servers it can start.

A launcher is found by name through the entry-point group ``servebench.servers``; the object
behind the entry point implements `Launcher`. It sees nothing of servebench but this module,
`servebench.errors`, `servebench.clock` and `servebench.protos`, so that servers can live in other distributions.

Life cycle: `Launcher.launch` blocks until the server answers readiness or raises
`LaunchError` (with the log's last lines); `RunningServer.stop` ends the whole process group
and leaves nothing behind. Both are called from one thread.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel

from servebench.errors import ProfileError

ENTRY_POINT_GROUP = "servebench.servers"


class RunningServer(Protocol):
    """A started, ready server."""

    @property
    def urls(self) -> dict[str, str]:
        """Base URLs by name: ``http`` and ``grpc`` (``grpc://host:port``) answer queries, where the server has them.

        ``management`` is TorchServe's management API, and says that queries are TorchServe's, else they
        are KServe's; ``metrics`` is the whole address of the page of Prometheus metrics.
        """

    @property
    def tokens(self) -> dict[str, str]:
        """Bearer tokens that the server made for itself, by use (``inference``, ``management``); mostly empty. Never logged."""

    @property
    def log_path(self) -> Path:
        """The server's combined stdout and stderr."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for the report: name, version, command, model, config, pid.

        Where the server itself does not describe the model's tensors (TorchServe), ``inputs`` and ``outputs`` do: a
        list of objects with ``name``, ``datatype`` (KServe's) and ``shape``; if every input's begins with -1, that is
        the axis of rows, which a query has one of.
        """

    def config_files(self) -> list[Path]:
        """Rendered configuration to keep with the run (e.g. ``config.pbtxt``)."""

    def exit_code(self) -> int | None:
        """None while the server runs, else its exit code (negative: a signal)."""

    def stop(self) -> None:
        """End the server and every process it started; idempotent; never raises for a dead server."""


class Launcher(Protocol):
    """Starts one kind of server."""

    name: ClassVar[str]
    #: Pydantic model (frozen, ``extra="forbid"``) of what ``server.options`` may hold.
    Options: type[BaseModel]

    def launch(self, model: str, options: Any, work_dir: Path) -> RunningServer:
        """Start the server hosting ``model``, with scratch files under ``work_dir``, and wait until it is ready.

        ``options`` is an instance of ``Options``. Binds 127.0.0.1 and free ports unless told
        otherwise. Raises `LaunchError` with the remedy in its text.
        """


def launcher_names() -> list[str]:
    """Names of the launchers installed in this environment, sorted."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)})


def find_launcher(name: str) -> Launcher:
    """The launcher called ``name``; `ProfileError` names the installed ones when there is none."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            launcher: Launcher = point.load()()
            return launcher
    raise ProfileError(f"server.launch: no launcher called {name!r}; installed: {', '.join(launcher_names()) or 'none'}")
