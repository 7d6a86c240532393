"""Helpers for tests that run servebench for real, against a stub on another core."""

import contextlib
import copy
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servebench_servers.stub import StubLauncher, StubOptions
from witness import Witness

from servebench.engine.run import run_profile
from servebench.judge import judge
from servebench.launcher import RunningServer
from servebench.profile import parse_profile
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import ERROR_OUTCOMES, Outcome
from servebench.record.progress import Snapshot
from servebench.record.rundata import RunData
from servebench.record.rundir import read_run
from servebench.report.rewrite import rewrite_reports

CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPUS, CLIENT_CPUS = [CPUS[0]], [CPUS[-1]]


class Quiet:
    """An observer that only listens; ``on_progress`` may act."""

    def __init__(self, on_progress: Callable[[Snapshot], None] | None = None) -> None:
        self.phases: list[str] = []
        self._on_progress = on_progress

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        self.phases.append(name)

    def progress(self, snapshot: Snapshot) -> None:
        if self._on_progress is not None and self.phases[-1] == "measuring":
            self._on_progress(snapshot)


def profile_data(url: str | None = None, *, constraints: list[str], load: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A profile's mapping for the stub model, without warm-up unless ``load`` says so."""
    protocol = "kserve-grpc" if url and url.startswith("grpc") else "kserve-http"
    return {
        "name": "test",
        "server": {"url": url} if url else {"launch": "stub"},
        "endpoint": {"model": "stub", "protocol": protocol},
        "load": {"warmup_s": 0, "drain_timeout_s": 3, **load},
        "client": {"cpus": CLIENT_CPUS, **sections.pop("client", {})},
        "constraints": constraints,
        **sections,
    }


def run(data: dict[str, Any], out: Path, observer: Quiet | None = None) -> tuple[dict[str, Any], RunData]:
    """Run a profile here; its judged document and its records."""
    # This process has the heap of a whole test session: collecting it would take a core from client or server.
    gc.collect()
    gc.disable()
    try:
        run_profile(parse_profile(data, source="test"), out, command=["test"], observer=observer or Quiet())
    finally:
        gc.enable()
    return rewrite_reports(out), read_run(out)


@contextlib.contextmanager
def stub(tmp_path: Path, **options: Any) -> Iterator[RunningServer]:
    """A running stub, pinned to its own core."""
    work = tmp_path / "stub"
    work.mkdir(exist_ok=True)
    server = StubLauncher().launch("stub", StubOptions.model_validate({"cpus": SERVER_CPUS, **options}), work)
    try:
        yield server
    finally:
        server.stop()


#: SIGHUP: a test run under nohup ignores it, and so would its children, on purpose (see `interrupting`).
_COMMAND = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from servebench.cli import main; main()"


def start_command(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """``servebench ARGUMENTS`` as a user would run it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(*arguments: str, cwd: Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run ``servebench ARGUMENTS`` to its end."""
    process = start_command(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


#: How often a run is made that should be VALID, on a machine whose pauses of some milliseconds are not its client's fault.
MAX_TRUST_TRIES = 2
_OF_A_BUSY_MACHINE = {"lateness", "loop_stall", "achieved_rate", "connection_opening", "cpu_wait", "cpu_steal"}


def trusted_run(*arguments: str, cwd: Path, timeout_s: float = 60) -> dict[str, Any]:
    """``servebench run ARGUMENTS --json --out DIR/run``: the document of a PASS with trust VALID.

    A shared machine that stands still for 30 ms makes 1 % of a short run late, and saying DEGRADED is then right: the
    run is made again. Where that does not help, the test is skipped if trust would be VALID but for what was late while a
    watcher on the client's CPU (see `witness`) saw it stand still. A client that is itself late has no such excuse.
    """
    for _ in range(MAX_TRUST_TRIES):
        shutil.rmtree(cwd / "run", ignore_errors=True)
        with Witness(CLIENT_CPUS) as witness:
            done = command("run", *arguments, "--out", "run", "--json", cwd=cwd, timeout_s=timeout_s)
        assert done.returncode in {0, 5}, done.stdout[-3000:] + done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        assert document["state"] == "complete"
        assert_books_balance(document, cwd / "run")
        assert document["output_check"]["wrong"] == 0
        reasons = document["trust"]["reasons"]
        if not reasons:
            assert (document["trust"]["verdict"], document["verdict"]) == ("VALID", "PASS")
            return document
        assert {reason["code"] for reason in reasons} <= _OF_A_BUSY_MACHINE, reasons
    own = judge(without_pauses(read_run(cwd / "run"), witness))
    assert (own["trust"]["verdict"], own["verdict"]) == ("VALID", "PASS"), (own["trust"]["reasons"], reasons)
    pytest.skip(
        f"the client's CPU stood still for {witness.paused_share():.1%} of the time, which alone made the run {reasons}"
    )


def without_pauses(data: RunData, witness: Witness) -> RunData:
    """``data`` as if what was late while the machine stood still, or until just after it, had been on time."""
    start_ns, facts = data.facts["start_ns"], copy.deepcopy(data.facts)
    sent = data.issued_ns >= 0
    excused = sent & witness.touched(start_ns + data.scheduled_ns, start_ns + data.issued_ns)
    facts["host_cpu"] |= {"steal_share": 0.0, "client_steal_share": 0.0}
    for worker in facts["workers"]:
        stalls = worker["stats"]["stalls"]
        begin_ns = np.array([start_ns + stall["at_ns"] for stall in stalls], dtype=np.int64)
        seen = witness.touched(begin_ns, begin_ns + [stall["duration_ns"] for stall in stalls]) if stalls else []
        worker["stats"]["stalls"] = [stall for stall, excuse in zip(stalls, seen, strict=True) if not excuse]
    return replace(data, facts=facts, issued_ns=np.where(excused, data.scheduled_ns, data.issued_ns))


def await_issued(directory: Path, queries: int, *, worker: int = 0, deadline_s: float = 30) -> None:
    """Wait until a run that goes on in another process has issued that many queries; fail after a deadline."""
    end = time.monotonic() + deadline_s
    path = directory / f"columns-{worker}.bin"
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if Columns.open(path).header[HeaderSlot.CURSOR] >= queries:
                return
        time.sleep(0.01)
    pytest.fail(f"{directory} issued fewer than {queries} queries in {deadline_s} s")


def facts(directory: Path) -> dict[str, Any]:
    """The facts as they stand on disk."""
    document: dict[str, Any] = json.loads((directory / "facts.json").read_text())
    return document


def assert_books_balance(document: dict[str, Any], directory: Path) -> None:
    """The reported counts, errors and workers' statistics against the records of the run, row by row."""
    counts, records = document["counts"], read_run(directory)
    tally = Counter({outcome: int((records.outcome == outcome).sum()) for outcome in Outcome})
    untouched = tally[Outcome.SHED] + tally[Outcome.NOT_ISSUED]
    expected = {
        "ok": tally[Outcome.OK],
        "timeout": tally[Outcome.TIMEOUT],
        "unfinished": tally[Outcome.UNFINISHED] + tally[Outcome.OUTSTANDING],
        "error": sum(tally[outcome] for outcome in ERROR_OUTCOMES),
    }
    assert {name: counts[name] for name in expected} == expected
    assert counts["planned"] == len(records.outcome) == tally.total() == document["schedule"]["planned"]
    assert counts["shed"] + counts["not_due"] == untouched
    assert counts["not_due"] == 0 or document["state"] != "complete"
    sent = records.issued_ns >= 0
    unconnected = ~sent & np.isin(records.outcome, [Outcome.CONNECT, Outcome.CLIENT])
    assert counts["issued"] == sent.sum() + unconnected.sum() == counts["planned"] - untouched
    told = Counter[str]()
    for error in document["errors"]:
        told[error["kind"]] += error["count"]
    failures = {outcome.kind: tally[outcome] for outcome in ERROR_OUTCOMES}
    failures |= {name: counts[name] for name in ("timeout", "shed", "unfinished")}
    assert told == {kind: count for kind, count in failures.items() if count}
    assert "books" not in {reason["code"] for reason in document["trust"]["reasons"]}, document["trust"]["reasons"]
    for worker in document["workers"]:
        if worker["stats"] is not None:
            outcome = records.outcome[records.worker == worker["worker"]]
            ok = int(np.isin(outcome, [Outcome.OK, Outcome.OUTPUT]).sum())
            assert worker["stats"]["counted"] == {"begun": len(outcome), "ended": len(outcome), "ok": ok}
    for name in ("response_time", "service_time", "issue_delay"):
        assert document[name]["count"] == counts["planned"] - counts["not_due"]
