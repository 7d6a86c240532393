"""A server that is kept up: looked at once a second through its control plane, until a signal or its own end.

A look never raises: a server that does not answer is not ready, and why is what the status says.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servebench.clock import now_ns
from servebench.control.base import Activity, ControlPlane
from servebench.engine.asking import control_of_server
from servebench.errors import LaunchError, TransportError
from servebench.launcher import RunningServer

#: Signals that end serving; a SIGHUP (the terminal is closed) that is ignored stays so.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_LOOK_INTERVAL_S = 1.0
_LOOK_TIMEOUT_S = 5.0
_LOG_TAIL_BYTES = 64 * 1024
_LOG_TAIL_LINES = 20
#: An error as Triton (glog), TorchServe (log4j) and Python say it, without the head of the line.
_ERROR_LINE = re.compile(
    r"^(?:[EF]\d{4} \S+\s+\d+ \S+\] \"?(?P<glog>.*?)\"?"
    r"|\S+ \[(?:ERROR|FATAL)\s*\] \S+ \S+ - (?P<log4j>.*)"
    r"|(?:.* MODEL_LOG - )?(?P<python>[A-Za-z_][\w.]*(?:Error|Exception)\b.*))$"
)


@dataclass(frozen=True, slots=True)
class ServingStatus:
    """One look at a server. Rates and means are since the look before; None is not known."""

    uptime_s: float  #: since it was ready
    ready: bool
    requests: int | None
    requests_qps: float | None
    failed: int | None
    pending: int | None
    queue_ns: float | None  #: mean wait of a request
    batch_size: float | None  #: mean rows of a batch
    workers: tuple[str, ...] | None
    error: str | None  #: the last one, from the log or from a look that failed
    error_age_s: float | None


class Watch:
    """Looks at one model of a running server."""

    def __init__(self, control: ControlPlane, model: str, log_path: Path) -> None:
        self._control = control
        self._model = model
        self._log = LogErrors(log_path)
        self._started_ns = now_ns()
        self._last: tuple[int, Activity] | None = None
        self._error: tuple[int, str] | None = None

    async def look(self) -> ServingStatus:
        """The state now."""
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                activity = await self._control.activity(self._model)
        except (TransportError, TimeoutError) as error:
            activity = Activity(ready=False)
            self._error = now_ns(), str(error) or f"no answer within {_LOOK_TIMEOUT_S:g} s"
        now = now_ns()
        if (logged := self._log.newest()) is not None:
            self._error = now, logged
        status = self._status(now, activity)
        self._last = now, activity
        return status

    def _status(self, now: int, activity: Activity) -> ServingStatus:
        before_ns, before = self._last or (now, Activity(ready=False))
        requests = _growth(activity.requests, before.requests)
        seconds = (now - before_ns) / 1e9
        return ServingStatus(
            uptime_s=(now - self._started_ns) / 1e9,
            ready=activity.ready,
            requests=activity.requests,
            requests_qps=requests / seconds if requests is not None and seconds > 0 else None,
            failed=activity.failed,
            pending=activity.pending,
            queue_ns=_ratio(_growth(activity.queue_ns, before.queue_ns), _growth(activity.queued, before.queued)),
            batch_size=_ratio(_growth(activity.inferences, before.inferences), _growth(activity.executions, before.executions)),
            workers=activity.workers,
            error=self._error[1] if self._error else None,
            error_age_s=(now - self._error[0]) / 1e9 if self._error else None,
        )


class LogErrors:
    """The errors that are added to a log file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size

    def newest(self) -> str | None:
        """The last error since the call before; None when there was none."""
        with self._path.open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(self._offset, size - _LOG_TAIL_BYTES))  # a log that floods is not read whole
            new = log.read()
        whole, _, rest = new.rpartition(b"\n")
        self._offset = size - len(rest)  # the end of a line that is being written comes with the next look
        found = [line for line in map(_ERROR_LINE.match, whole.decode("utf-8", "replace").splitlines()) if line]
        return next((text.strip() for text in reversed(found[-1].groups()) if text), None) if found else None


async def watch(server: RunningServer, model: str, tell: Callable[[ServingStatus], None]) -> None:
    """Look at a server once a second and ``tell`` each status; returns on one of `END_SIGNALS`.

    `LaunchError` when the server ends by itself.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, ended.set)
    async with control_of_server(server) as control:
        looking = asyncio.ensure_future(_look_on(Watch(control, model, server.log_path), server, tell))
        ending = asyncio.ensure_future(ended.wait())
        await asyncio.wait([looking, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not looking.done():
            looking.cancel()
            await asyncio.wait([looking])
            return
        looking.result()


async def _look_on(watched: Watch, server: RunningServer, tell: Callable[[ServingStatus], None]) -> None:
    while (code := server.exit_code()) is None:
        tell(await watched.look())
        await asyncio.sleep(_LOOK_INTERVAL_S)
    lines = server.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    raise LaunchError(f"the server ended by itself (exit {code})", log_tail="\n".join(lines[-_LOG_TAIL_LINES:]))


def _growth(now: int | None, before: int | None) -> int | None:
    """How much a counter grew; one that fell began anew (Triton's do when a model is loaded again)."""
    if now is None or before is None:
        return None
    return now - before if now >= before else now


def _ratio(share: int | None, of: int | None) -> float | None:
    return share / of if share is not None and of else None
