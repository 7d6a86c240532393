"""One run, from a profile to a closed run directory: launch, discover, warm up, measure, drain, check, keep.

The coordinator's side. It never touches a query: workers issue and record, this process
watches, and afterwards checks outputs and closes the books.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import uvloop

from servebench import __version__
from servebench.clock import now_ns
from servebench.control.base import Discovery
from servebench.engine.arrangement import Arrangement
from servebench.engine.asking import control_of_run
from servebench.engine.closing import check_outputs, merge_errors
from servebench.engine.cpus import kept_off, with_cpus_named
from servebench.engine.dialect import encode_library, launched_model, require_packages
from servebench.engine.fleet import Fleet, WorkerEnd
from servebench.engine.hosting import interrupting, launched, launcher_options
from servebench.engine.preparation import (
    Preparation,
    check_ca_file,
    create_columns,
    prepare,
    query_headers,
    raise_open_files_limit,
    replies_path,
    transport_settings,
    worker_settings,
)
from servebench.engine.probe import probe
from servebench.engine.redaction import Redaction
from servebench.engine.requests import share_requests
from servebench.errors import LaunchError, RunError, ServebenchError
from servebench.launcher import RunningServer
from servebench.profile import Profile
from servebench.record.columns import Columns
from servebench.record.environment import CpuTimes, collect_environment, throttled_periods
from servebench.record.progress import ProgressReader, Snapshot
from servebench.record.replies import read_replies
from servebench.record.rundir import ENVIRONMENT, FACTS, SERVER, RunDirectory

#: Time between the order to start and t=0: covers the order's way and the workers' first touch of the columns.
_LEAD_NS = 100_000_000
_LEAD_PER_ROW_NS = 10
_LOOK_INTERVAL_S = 0.25


class Observer(Protocol):
    """Hears how a run goes; called in the coordinator between its other duties."""

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        """A phase begins: what it is, and how long it is planned to take where that is known."""

    def progress(self, snapshot: Snapshot) -> None:
        """How the phase is going, a few times a second."""


def run_profile(profile: Profile, out: Path, *, command: list[str], observer: Observer) -> str:
    """Run ``profile`` into the new directory ``out``; returns the final state, ``complete`` or ``interrupted``.

    Must be called from the main thread: it launches servers and handles SIGINT and SIGTERM
    (the first drains and closes the books, the second stops at once). Raises `ProfileError`
    before anything is started, `LaunchError`, `TransportError` or `RunError` later; a
    directory in which nothing was measured and no server spoke is removed again, or emptied if it was there.
    """
    profile = with_cpus_named(profile)
    query_headers(profile)
    check_ca_file(profile.endpoint)
    require_packages(profile.endpoint)
    launcher, options = launcher_options(profile)
    directory = RunDirectory.create(out)
    run = _Run(profile, directory, command, observer)
    try:
        with interrupting(signal.SIGTERM), contextlib.ExitStack() as stack:
            if launcher is not None:
                observer.phase(f"starting {launcher.name}")
                run.server = stack.enter_context(launched(launcher, profile.endpoint.model, options, out / SERVER))
                stack.callback(observer.phase, f"stopping {launcher.name}")
            uvloop.run(run.execute())
    except (ServebenchError, KeyboardInterrupt) as error:
        if not run.started:
            directory.discard()
        if isinstance(error, KeyboardInterrupt) and run.state == "interrupted":
            return run.state
        raise
    finally:
        directory.unlock()
    return run.state


class _Run:
    """The asynchronous part of a run."""

    def __init__(self, profile: Profile, directory: RunDirectory, command: list[str], observer: Observer) -> None:
        self.server: RunningServer | None = None
        self.started = False  #: whether there are records to keep
        self.state = "running"
        self._profile = profile
        self._directory = directory
        self._observer = observer
        self._fleet = Fleet()
        self._interrupts = 0
        self._measuring = True  #: until the books are closed
        self._facts: dict[str, Any] = {
            "schema": "servebench.facts/1",
            "version": __version__,
            "command": command,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": "running",
            "stop_reason": None,
            "profile": profile.public_dict(),
        }

    async def execute(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        profile = self._profile
        url = str(profile.server.url) if self.server is None else self.server.urls.get(profile.endpoint.framing)
        if url is None:
            raise LaunchError(f"{profile.server.launch}: serves nothing over {profile.endpoint.framing} here; see its log")
        headers = query_headers(profile, self.server.tokens.get("inference") if self.server is not None else None)
        redacted = Redaction(self._secrets(headers))
        arrangement = Arrangement(profile, partial(control_of_run, profile, url, headers, self.server), self._observer)
        try:
            async with arrangement.in_place() as found:
                self._facts["server"] = self._describe_server(url, found, arrangement.actions)
                try:
                    await self._measured(found, url, headers, redacted)
                finally:
                    self._measuring = False
        except ServebenchError as error:
            error.args = (redacted(str(error)),)
            _redact_errors(arrangement.actions, redacted)
            self._fail(error)
            raise
        if arrangement.actions:
            _redact_errors(arrangement.actions, redacted)
            self._directory.finish(self._facts)  # once more: it was changed back after the books were closed

    def _secrets(self, headers: list[tuple[str, str]]) -> list[str]:
        """What the server is sent and must be read nowhere."""
        tokens = list(self.server.tokens.values()) if self.server is not None else []
        management = os.environ.get(self._profile.server.management_token_env or "", "")
        return [value for _, value in headers] + tokens + [management]

    async def _measured(self, found: Discovery, url: str, headers: list[tuple[str, str]], redacted: Redaction) -> None:
        profile, facts, directory = self._profile, self._facts, self._directory
        model = found.model if self.server is None else launched_model(found.model, self.server.describe())
        preparation = prepare(profile, model)
        if profile.endpoint.protocol.startswith("torchserve"):
            first = next(encode_library(preparation.protocol, preparation.library, url, headers))
            await probe(transport_settings(profile, preparation, url, headers), first)
        facts["schedule"] = _describe_schedule(preparation)
        directory.write_profile(profile.public_dict())
        directory.write_json(ENVIRONMENT, collect_environment())
        self._observer.phase("preparing payloads and records")
        rows = create_columns(profile, preparation, directory)
        raise_open_files_limit()
        requests_fd = share_requests(encode_library(preparation.protocol, preparation.library, url, headers))
        try:
            await self._fleet.start(worker_settings(profile, preparation, directory, url, headers, requests_fd))
            facts["workers"] = [
                {"worker": worker, "rows": count, "pid": pid, "state": "lost", "exit": None, "stats": None}
                for worker, (count, pid) in enumerate(zip(rows, self._fleet.pids, strict=True))
            ]
            directory.write_json(FACTS, facts)
            self.started = True
            with kept_off(profile.client.cpus):
                ends = await self._phases(rows)
        finally:
            os.close(requests_fd)
            await self._fleet.close()
        self._close_books(preparation, ends, redacted)

    async def _phases(self, rows: list[int]) -> list[WorkerEnd]:
        profile, facts = self._profile, self._facts
        if profile.load.warmup_s and not self._interrupts:
            self._observer.phase("warm-up", duration_s=profile.load.warmup_s)
            warm = await self._watched("warmup", self._fleet.warm_up(_LEAD_NS))
            facts["warmup"] = {"queries": sum(one["queries"] for one in warm), "ok": sum(one["ok"] for one in warm)}
        start_ns = now_ns() + _LEAD_NS + _LEAD_PER_ROW_NS * max(rows)
        facts["start_ns"] = start_ns
        facts["clocks"] = {"start": _clocks(), "end": None}
        self._directory.write_json(FACTS, facts)
        watched = {"steal_share": None, "client_steal_share": profile.client.cpus}
        before = {name: CpuTimes.now(cpus) for name, cpus in watched.items()}
        throttled = throttled_periods()
        self._observer.phase("measuring", duration_s=facts["schedule"]["last_offset_ns"] / 1e9)
        ends: list[WorkerEnd] = await self._watched("columns", self._fleet.measure(start_ns, rows))
        facts["clocks"]["end"] = _clocks()
        throttled_now = throttled_periods()
        facts["host_cpu"] = {
            **{name: times.stolen_share_until(CpuTimes.now(watched[name])) for name, times in before.items()},
            "throttled": None if throttled is None or throttled_now is None else throttled_now - throttled,
        }
        return ends

    async def _watched(self, phase: str, work: Any) -> Any:
        """Await a phase and report its progress meanwhile."""
        workers = range(self._profile.client.workers)
        reader = ProgressReader([Columns.open(self._directory.columns_path(worker, phase)) for worker in workers])
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_INTERVAL_S)
            self._observer.progress(reader.look())
        return task.result()

    def _interrupt(self) -> None:
        self._interrupts += 1
        if self._interrupts == 1 and not self._measuring:
            self._observer.phase("interrupted: leaving the server as it was found (again to stop at once)")
        elif self._interrupts == 1 and self._fleet.pids:
            self._observer.phase("interrupted: waiting for outstanding replies (again to stop at once)")
            self._stopping = asyncio.ensure_future(self._fleet.stop())
        elif self._measuring and self._fleet.pids:
            self._fleet.cut()
        else:
            raise KeyboardInterrupt

    def _fail(self, error: ServebenchError) -> None:
        """Say in the facts why the run ended early; what was measured stays."""
        if self.started and self.state == "running":
            self.state, self._facts["state"], self._facts["stop_reason"] = "failed", "failed", str(error)
            with contextlib.suppress(RunError):  # of a full disk; the first error is the one to tell
                self._directory.finish(self._facts)

    def _describe_server(self, url: str, found: Discovery, actions: list[dict[str, Any]]) -> dict[str, Any]:
        described: dict[str, Any] = {"url": url, "launch": self._profile.server.launch}
        if self.server is not None:
            described |= self.server.describe()
        return described | {
            "metadata": found.server,
            "model": asdict(found.model),
            "model_config": found.config,
            "control": actions,
        }

    def _close_books(self, preparation: Preparation, ends: list[WorkerEnd], redacted: Redaction) -> None:
        self._observer.phase("checking outputs and closing the books")
        profile, facts, directory = self._profile, self._facts, self._directory
        workers = profile.client.workers
        facts["workers"] = [
            facts["workers"][end.worker] | {"state": end.state, "exit": end.exit, "stats": end.stats} for end in ends
        ]
        facts["errors"] = merge_errors(ends, workers, redacted)
        if self.server is not None:
            facts["server"]["exit_code"] = self.server.exit_code()
        lost = [end for end in ends if end.state == "lost"]
        columns = [Columns.open(directory.columns_path(worker), writable=True) for worker in range(workers)]
        kept: dict[int, bytes] = {}
        for worker in range(workers):
            replies = read_replies(replies_path(directory, worker))
            kept |= {row * workers + worker: reply for row, reply in replies.items()}
        facts["output_check"] = check_outputs(preparation, kept, columns, facts["errors"], redacted) | {
            "wanted": len(preparation.keep_queries),
            "golden": profile.output_check.golden is not None or preparation.library.golden is not None,
        }
        if self._interrupts:
            self.state, facts["stop_reason"] = "interrupted", "interrupted by a signal"
        elif lost:
            self.state = "failed"
            facts["stop_reason"] = f"worker {lost[0].worker} died (exit {lost[0].exit})"
        else:
            self.state = "complete"
        facts["state"] = self.state
        directory.finish(facts)


def _redact_errors(actions: list[dict[str, Any]], redacted: Redaction) -> None:
    for action in actions:
        if "error" in action:
            action["error"] = redacted(action["error"])


def _describe_schedule(preparation: Preparation) -> dict[str, Any]:
    plan = preparation.plan
    return {
        "arrivals": plan.arrivals,
        "target_qps": plan.target_qps,
        "seed": plan.seed,
        "planned": plan.planned,
        "sha256": plan.sha256,
        "generated_duration_ns": plan.generated_duration_ns,
        "last_offset_ns": int(plan.offsets_ns[-1]),
        "samples": len(preparation.library),
    }


def _clocks() -> dict[str, int]:
    return {
        "monotonic_ns": now_ns(),
        "realtime_ns": time.time_ns(),
        "boottime_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    }
