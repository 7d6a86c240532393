"""Worker processes and their fleet: what goes wrong is said in one line, and nothing hangs or stays behind."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from servebench.clock import now_ns
from servebench.engine.fleet import Fleet
from servebench.engine.requests import open_requests, share_requests
from servebench.engine.worker import WorkerSettings
from servebench.errors import RunError, TransportError
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.replies import read_replies
from servebench.transport.factory import TransportSettings

MS = 1_000_000
HOUR_NS = 3_600_000 * MS
REQUEST = b"POST /query HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\n"
REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """On the loop that runs use; what hangs fails."""
    return uvloop.run(asyncio.wait_for(work, 30))


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers every query at once: its URL, and the bodies it got."""
    bodies: list[bytes] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                bodies.append(await reader.readexactly(1))
                writer.write(REPLY)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", bodies
    finally:
        server.close()


@contextlib.contextmanager
def settings_for(tmp_path: Path, url: str, due_ns: list[int], *, samples: int = 2, worker: int = 0) -> Any:
    """Settings of one worker, its columns made: queries are due at these offsets, in the warm-up and in the measured phase."""
    paths = {}
    for phase in ("columns", "warmup"):
        paths[phase] = tmp_path / f"{phase}-{worker}.bin"
        columns = Columns.create(paths[phase], rows=len(due_ns), worker=worker, workers=1)
        columns.array("scheduled_ns")[:] = due_ns
        columns.array("sample")[:] = np.arange(len(due_ns)) % samples
    requests_fd = share_requests([REQUEST + b"a", REQUEST + b"b"])
    try:
        yield WorkerSettings(
            transport=TransportSettings(
                client="wire",
                url=url,
                target="",
                metadata=[],
                max_connections=None,
                channels=1,
                timeout_ns=5_000 * MS,
                ca_file=None,
                verify_tls=True,
            ),
            requests_fd=requests_fd,
            columns=str(paths["columns"]),
            warmup_columns=str(paths["warmup"]),
            replies=str(tmp_path / f"replies-{worker}"),
            keep_rows=[1],
            pacing="eco",
            warm_connections=1,
            max_outstanding=None,
            drain_timeout_ns=5_000 * MS,
            cpus=None,
        )
    finally:
        os.close(requests_fd)


@contextlib.asynccontextmanager
async def started(*settings: WorkerSettings) -> AsyncIterator[Fleet]:
    """A fleet that is ready, and closed afterwards: then no worker is left."""
    fleet = Fleet()
    try:
        await fleet.start(list(settings))
        yield fleet
    finally:
        await fleet.close()
        for pid in fleet.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def in_soon(fleet: Fleet, rows: list[int]) -> Any:
    return await fleet.measure(now_ns() + 20 * MS, rows)


# --- a run as it should be ----------------------------------------------------------------


def test_the_phases_of_two_workers(tmp_path: Path) -> None:
    async def work() -> None:
        async with answering() as (url, bodies):
            with (
                settings_for(tmp_path, url, [0, MS, 2 * MS]) as first,
                settings_for(tmp_path, url, [MS, 2 * MS], worker=1) as second,
            ):
                async with started(first, second) as fleet:
                    assert len(set(fleet.pids)) == 2
                    warm = await fleet.warm_up(20 * MS)
                    assert [(one["queries"], one["ok"], one["errors"]) for one in warm] == [(3, 3, []), (2, 2, [])]
                    ends = await in_soon(fleet, [3, 2])
                    assert [(end.worker, end.rows, end.state, end.exit, end.errors) for end in ends] == [
                        (0, 3, "done", None, []),
                        (1, 2, "done", None, []),
                    ]
                    assert all(end.stats and end.stats["pacing"] == "eco" for end in ends)
            assert sorted(bodies) == [b"a"] * 6 + [b"b"] * 4, "warm-up and measured, samples 0 1 0 and 0 1"
        for settings in (first, second):
            columns = Columns.open(Path(settings.columns))
            assert set(columns.array("outcome").tolist()) == {Outcome.OK}
            assert (columns.header[HeaderSlot.OK], columns.header[HeaderSlot.FINAL]) == (columns.rows, 1)
            assert (columns.array("issued_ns") >= columns.array("scheduled_ns")).all()
            assert read_replies(Path(settings.replies)) == {1: REPLY}
            assert Columns.open(Path(settings.warmup_columns)).header[HeaderSlot.FINAL] == 0

    run(work())


def test_stop_ends_a_phase_after_its_drain(tmp_path: Path) -> None:
    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0, HOUR_NS, 2 * HOUR_NS]) as settings:
                async with started(settings) as fleet:
                    phase = asyncio.ensure_future(in_soon(fleet, [3]))
                    columns = Columns.open(Path(settings.columns))
                    while not columns.header[HeaderSlot.OK]:
                        await asyncio.sleep(0.005)
                    await fleet.stop()
                    (end,) = await phase
        assert end.state == "done"
        assert [(error["kind"], error["count"]) for error in end.errors] == [("shed", 2)]
        assert columns.array("outcome").tolist() == [Outcome.OK, Outcome.SHED, Outcome.SHED]

    run(work())


# --- workers that cannot start ------------------------------------------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def work() -> None:
        with settings_for(tmp_path, f"http://127.0.0.1:{port}", [0]) as settings:
            async with started(settings):
                pass

    with pytest.raises(TransportError) as caught:
        run(work())
    assert str(caught.value) == f"127.0.0.1:{port}: cannot connect: Connection refused"


def test_a_port_that_is_none(tmp_path: Path) -> None:
    async def work() -> None:
        with settings_for(tmp_path, "http://127.0.0.1:99999", [0]) as settings:
            async with started(settings):
                pass

    with pytest.raises(TransportError) as caught:
        run(work())
    assert str(caught.value) == "http://127.0.0.1:99999: Port out of range 0-65535"


def test_the_workers_that_could_start_leave_too(tmp_path: Path) -> None:
    """The check is in `started`."""

    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0]) as good, settings_for(tmp_path, url, [0], worker=1) as bad:
                async with started(good, replace(bad, columns=str(tmp_path / "nowhere.bin"))):
                    pass

    with pytest.raises(RunError, match=r"No such file or directory: '.*/nowhere\.bin'"):
        run(work())


def test_a_worker_that_dies_before_it_is_ready_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zeros").write_bytes(bytes(8192))

    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0]) as settings:
                async with started(replace(settings, columns=str(tmp_path / "zeros"))):
                    pass

    with pytest.raises(RunError, match=r"^worker 0 died at its start \(exit 1\)$"):
        run(work())
    assert "zeros: not a column file" in capfd.readouterr().err


# --- workers that fail later --------------------------------------------------------------


@pytest.mark.parametrize("phase", ["warmup", "columns"])
def test_a_fault_in_a_workers_loop_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str) -> None:
    """The second query's sample does not exist: an IndexError inside a timer's callback."""

    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0, MS]) as settings:
                Columns.open(tmp_path / f"{phase}-0.bin", writable=True).array("sample")[1] = 99
                async with started(settings) as fleet:
                    await (fleet.warm_up(20 * MS) if phase == "warmup" else in_soon(fleet, [2]))

    with pytest.raises(RunError, match=r"^worker fault: IndexError\("):
        run(work())
    assert "IndexError" in capfd.readouterr().err, "the traceback, for whoever mends it"


def test_a_worker_that_is_killed_is_lost_and_the_other_goes_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with answering() as (url, _):
            with (
                settings_for(tmp_path, url, [0, HOUR_NS]) as doomed,
                settings_for(tmp_path, url, [0, 300 * MS], worker=1) as other,
            ):
                async with started(doomed, other) as fleet:
                    phase = asyncio.ensure_future(in_soon(fleet, [2, 2]))
                    columns = Columns.open(Path(doomed.columns))
                    while not columns.header[HeaderSlot.OK]:
                        await asyncio.sleep(0.005)
                    os.kill(fleet.pids[0], signal.SIGKILL)
                    ends = await phase
        assert [(end.state, end.exit) for end in ends] == [("lost", -signal.SIGKILL), ("done", None)]
        assert columns.array("outcome").tolist() == [Outcome.OK, Outcome.NOT_ISSUED]

    run(work())


def test_cut_ends_all_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [HOUR_NS]) as settings:
                async with started(settings) as fleet:
                    phase = asyncio.ensure_future(in_soon(fleet, [1]))
                    await asyncio.sleep(0)
                    fleet.cut()
                    (end,) = await phase
                    assert (end.state, end.stats) == ("cut", None)

    run(work())


@pytest.mark.parametrize("phase", [None, "warmup", "measure"])
def test_a_worker_leaves_when_its_coordinator_is_gone(tmp_path: Path, phase: str | None) -> None:
    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0, HOUR_NS]) as settings:
                worker = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "servebench.engine.worker",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    pass_fds=[settings.requests_fd],
                )
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
                assert json.loads(await worker.stdout.readline()) == {"event": "ready"}
                if phase is not None:
                    worker.stdin.write(json.dumps({"do": phase, "start_ns": now_ns()}).encode() + b"\n")
                    columns = Columns.open(Path(settings.warmup_columns if phase == "warmup" else settings.columns))
                    while not columns.header[HeaderSlot.OK]:
                        await asyncio.sleep(0.005)
                worker.stdin.close()
                assert await asyncio.wait_for(worker.wait(), 10) == 1
                assert await worker.stdout.read() == b"", "nobody is there to be told"

    run(work())


def test_an_interrupt_at_the_terminal_is_for_the_coordinator(tmp_path: Path) -> None:
    async def work() -> None:
        async with answering() as (url, _):
            with settings_for(tmp_path, url, [0, 100 * MS]) as settings:
                async with started(settings) as fleet:
                    assert os.getpgid(fleet.pids[0]) != os.getpgid(0)
                    os.kill(fleet.pids[0], signal.SIGINT)
                    (end,) = await in_soon(fleet, [2])
        assert end.state == "done"

    run(work())


# --- the shared requests ------------------------------------------------------------------


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param([], id="none"),
        pytest.param([b""], id="one, empty"),
        pytest.param([b"", b"x", b"", b"yy", b""], id="empty ones between"),
        pytest.param([b"12345678"], id="no padding"),
        pytest.param([bytes([i % 256]) * (i % 13) for i in range(1_000)], id="many"),
        pytest.param([b"a" * 20_000_003, b"b" * 5], id="large"),
    ],
)
def test_requests_come_back_from_shared_memory(requests: list[bytes]) -> None:
    descriptor = share_requests(iter(requests))
    assert os.get_inheritable(descriptor)
    opened = open_requests(descriptor)
    os.close(descriptor)
    assert [bytes(view) for view in opened] == requests
    for view in opened[:1]:
        with pytest.raises(TypeError, match="read-only"):
            view[:] = bytes(len(view))


def test_requests_have_no_name_on_any_disk() -> None:
    descriptor = share_requests([b"Authorization: Bearer hush"])
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/memfd:")
    os.close(descriptor)
