"""One worker process: one event loop, one transport, its share of the schedule.

The coordinator talks to it in JSON lines over stdin and stdout:

    settings ->            (first line, `WorkerSettings`)
                <- ready   requests mapped, connections open
    warmup   ->            at start_ns
                <- warm    its replies are in, or given up on
    measure  ->            at start_ns
                <- done    books closed, statistics
    stop     ->            at any time: shed what is left, drain, close the books

When stdin ends the coordinator is gone, and the worker leaves at once; killed, it takes the worker with it. Measurements never
travel here; they are in the columns (see `servebench.record.columns`), and stay there.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from servebench.clock import now_ns
from servebench.engine.issuer import DeadlineSweep, Issuer
from servebench.engine.requests import open_requests
from servebench.engine.stalls import StallMonitor, cpu_wait_ns
from servebench.errors import ServebenchError, TransportError
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import INTERRUPTED, Outcome
from servebench.record.recorder import Recorder
from servebench.record.replies import write_replies
from servebench.transport.factory import TransportSettings, make_transport

_ROWS_AT_ONCE = 1 << 18
RELEASED_ROWS = 1 << 14
_RELEASE_PERIOD_S = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """All a worker needs to know; travels as JSON."""

    transport: TransportSettings
    requests_fd: int
    columns: str
    warmup_columns: str
    replies: str  #: where to leave the raw replies of ``keep_rows``
    keep_rows: list[int]
    pacing: str
    warm_connections: int
    max_outstanding: int | None
    drain_timeout_ns: int
    cpus: list[int] | None


class Worker:
    """The phases of one worker: prepare, warm up, measure."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._requests = open_requests(settings.requests_fd)
        self._warmup = Columns.open(Path(settings.warmup_columns), writable=True)
        self._columns = Columns.open(Path(settings.columns), writable=True)
        self._transport = make_transport(settings.transport, Recorder(self._warmup))
        self._issuer: Issuer | None = None
        self._stopped_ns: int | None = None  #: when it was told to stop

    async def prepare(self) -> dict[str, Any]:
        """Open connections and still the garbage collector: nothing is collected from here on."""
        await self._transport.open(self._settings.warm_connections)
        gc.collect()
        gc.freeze()
        gc.disable()
        return {"event": "ready"}

    async def warm_up(self, start_ns: int) -> dict[str, Any]:
        """Untimed traffic, in columns of its own."""
        recorder = Recorder(self._warmup)
        await self._phase(recorder, start_ns)
        ok = self._warmup.header[HeaderSlot.OK]
        return {"event": "warm", "queries": self._warmup.rows, "ok": ok, "errors": _error_rows(recorder)}

    async def measure(self, start_ns: int) -> dict[str, Any]:
        """The judged queries."""
        recorder = Recorder(self._columns, keep=self._settings.keep_rows)
        collections = _collections()
        waited_ns = cpu_wait_ns()
        before, wall_ns = resource.getrusage(resource.RUSAGE_SELF), now_ns()
        stalls = StallMonitor()
        await self._phase(recorder, start_ns)
        stalls.stop()
        after, wall_ns = resource.getrusage(resource.RUSAGE_SELF), now_ns() - wall_ns
        waited_now_ns = cpu_wait_ns()
        self._columns.header[HeaderSlot.FINAL] = 1
        _leave_replies(Path(self._settings.replies), recorder.replies)
        stats = {
            "wall_s": wall_ns / 1e9,
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "cpu_wait_s": None if waited_ns is None or waited_now_ns is None else (waited_now_ns - waited_ns) / 1e9,
            "voluntary_switches": after.ru_nvcsw - before.ru_nvcsw,
            "involuntary_switches": after.ru_nivcsw - before.ru_nivcsw,
            "max_rss_bytes": after.ru_maxrss * 1024,
            "gc_collections": _collections() - collections,
            "pacing": self._settings.pacing,
            "counted": {
                "begun": self._columns.header[HeaderSlot.CURSOR],
                "ended": self._columns.header[HeaderSlot.ENDED],
                "ok": self._columns.header[HeaderSlot.OK],
            },
            "stopped_ns": None if self._stopped_ns is None else self._stopped_ns - start_ns,
            "stall_count": stalls.count,
            "stalls": [{"at_ns": at - start_ns, "duration_ns": duration} for at, duration in stalls.longest()],
            **asdict(self._transport.stats),
        }
        return {"event": "done", "stats": stats, "errors": _error_rows(recorder)}

    def stop(self) -> None:
        """Issue nothing more; what is out is still awaited."""
        self._stopped_ns = self._stopped_ns or now_ns()
        if self._issuer is not None:
            self._issuer.stop(INTERRUPTED)

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    async def _phase(self, recorder: Recorder, start_ns: int) -> None:
        """Issue one column file's rows from ``start_ns``, then wait for what is out, within the drain's time."""
        settings, columns, transport = self._settings, recorder.columns, self._transport
        scheduled_ns = columns.array("scheduled_ns")
        for start in range(0, columns.rows, _ROWS_AT_ONCE):
            scheduled_ns[start : start + _ROWS_AT_ONCE] += start_ns
            columns.release(start, start + _ROWS_AT_ONCE)
        columns.header[HeaderSlot.START_NS] = start_ns
        transport.sink = recorder
        loop = asyncio.get_running_loop()
        finished, drained = loop.create_future(), loop.create_future()
        issuer = Issuer(
            transport,
            recorder,
            self._requests,
            pacing=settings.pacing,
            max_outstanding=settings.max_outstanding,
            on_finished=lambda: finished.set_result(None),
        )
        sweep = DeadlineSweep(transport, recorder, issuer, timeout_ns=settings.transport.timeout_ns)
        trail = Trail(recorder, issuer)
        self._issuer = issuer
        issuer.start()
        if self._stopped_ns is not None:
            self.stop()
        last_due_ns = int(scheduled_ns[-1]) if columns.rows else start_ns
        end_ns = last_due_ns + settings.drain_timeout_ns
        if not await _done_by(finished, end_ns):
            issuer.stop("the client could not issue it before the run's end")
        recorder.on_drained(lambda: drained.set_result(None))
        await _done_by(drained, min(end_ns, now_ns() + settings.drain_timeout_ns))
        sweep.stop()
        trail.stop()
        for row in transport.abandon_waiting():
            recorder.unsent(row, "no connection came free")
        if recorder.outstanding:
            for row in np.flatnonzero(columns.array("outcome") == Outcome.NOT_ISSUED).tolist():
                transport.cancel(row, recorder.connection_of(row), Outcome.UNFINISHED, "still outstanding when the drain ended")


class Trail:
    """Gives back the memory under the queries that have ended, so that a long run's records need not all fit into it.

    It costs the loop some tens of microseconds, after every `RELEASED_ROWS` queries or more.
    """

    def __init__(self, recorder: Recorder, issuer: Issuer) -> None:
        self._recorder = recorder
        self._issuer = issuer
        self._released = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(_RELEASE_PERIOD_S, self._beat)

    def stop(self) -> None:
        """Look no more."""
        self._handle.cancel()

    def release(self) -> None:
        """Give back what lies before the oldest query that has not ended, if that is enough to be worth it."""
        ended = self._recorder.first_outstanding(self._released, self._issuer.cursor)
        if ended - self._released >= RELEASED_ROWS:
            self._recorder.columns.release(self._released, ended)
            self._released = ended

    def _beat(self) -> None:
        self.release()
        self._handle = self._loop.call_later(_RELEASE_PERIOD_S, self._beat)


async def _done_by(future: asyncio.Future[None], end_ns: int) -> bool:
    done, _ = await asyncio.wait([future], timeout=max(0.0, (end_ns - now_ns()) / 1e9))
    return bool(done)


def _collections() -> int:
    return sum(int(generation["collections"]) for generation in gc.get_stats())


def _error_rows(recorder: Recorder) -> list[dict[str, Any]]:
    return [
        {
            "kind": error.outcome.kind,
            "detail": error.detail,
            "count": error.count,
            "example_row": error.example_row,
            "example_reply": error.example_reply[:4096].decode("latin-1"),
        }
        for error in recorder.errors
    ]


def _leave_replies(path: Path, replies: dict[int, bytes]) -> None:
    """What a full disk costs is the output check, and trust says that nothing was checked."""
    try:
        write_replies(path, replies)
    except OSError as error:
        sys.stderr.write(f"servebench: warning: replies cannot be kept for the output check: {error.strerror or error}\n")
        path.unlink(missing_ok=True)


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def _serve() -> int:
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    first = await commands.readline()
    if not first:
        return 1
    loop.set_exception_handler(_give_up)
    told = json.loads(first)
    settings = WorkerSettings(**{**told, "transport": TransportSettings(**told["transport"])})
    if settings.cpus:
        os.sched_setaffinity(0, settings.cpus)
    worker = Worker(settings)
    _tell(await worker.prepare())
    phase: asyncio.Task[None] | None = None
    while line := await commands.readline():
        command = json.loads(line)
        if command["do"] == "stop":
            worker.stop()
        elif command["do"] == "leave":
            await worker.close()
            return 0
        else:
            run_phase = worker.warm_up if command["do"] == "warmup" else worker.measure
            phase = asyncio.create_task(_report(run_phase(command["start_ns"])))
    if phase is not None:
        phase.cancel()
    return 1


async def _report(phase: Coroutine[Any, Any, dict[str, Any]]) -> None:
    try:
        _tell(await phase)
    except Exception as error:
        _give_up(asyncio.get_running_loop(), {"exception": error})


def _give_up(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A fault of our own, perhaps in a callback: the run is void, and the coordinator must hear of it rather than wait."""
    error = context.get("exception")
    if error is not None:
        traceback.print_exception(error)
    _tell({"event": "error", "message": f"worker fault: {error!r}" if error else str(context.get("message"))})
    os._exit(1)


def _die_with_the_coordinator() -> None:
    """A launched server dies with it too: queries that saw that would be recorded as the server's errors."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")


def main() -> int:
    """Entry point of ``python -m servebench.engine.worker``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what an interrupt means
    _die_with_the_coordinator()
    try:
        return uvloop.run(_serve())
    except (ServebenchError, OSError) as error:
        _tell({"event": "error", "message": str(error), "transport": isinstance(error, TransportError)})
        return 1


if __name__ == "__main__":
    sys.exit(main())
