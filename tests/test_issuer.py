"""The open loop on a fake transport: everything in order and never early, late ones in bursts, caps, stops, timeouts."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from servebench.clock import now_ns
from servebench.engine.issuer import DeadlineSweep, Issuer
from servebench.record.columns import Columns, HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.recorder import Recorder
from servebench.transport.fake import FakeEnd, FakeTransport, answer_at_once

MS = 1_000_000
HOUR_NS = 3_600_000 * MS
LATE_NS = -1_000 * MS
HANGS = FakeEnd(Outcome.OUTSTANDING)
REQUESTS = [b"zero", b"one", b"two"]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """On the loop that workers use; what hangs fails."""
    return uvloop.run(asyncio.wait_for(work, 20))


class Bench:
    """An issuer, its columns, and a fake transport. ``due_ns`` are relative to now."""

    def __init__(
        self,
        tmp_path: Path,
        due_ns: Iterable[int],
        script: Callable[[int], FakeEnd] = answer_at_once,
        *,
        pacing: str = "precise",
        max_outstanding: int | None = None,
        max_connections: int | None = None,
        clock: Callable[[], int] = now_ns,
    ) -> None:
        due = np.array(list(due_ns), dtype=np.int64)
        self.columns = Columns.create(tmp_path / "columns-0.bin", rows=len(due), worker=0, workers=1)
        self.columns.array("scheduled_ns")[:] = now_ns() + due
        self.columns.array("sample")[:] = np.arange(len(due)) % len(REQUESTS)
        self.recorder = Recorder(self.columns)
        self.transport = FakeTransport(self.recorder, script, max_connections=max_connections, clock=clock)
        self.finished = asyncio.Event()
        self.issuer = Issuer(
            self.transport,
            self.recorder,
            REQUESTS,
            pacing=pacing,
            max_outstanding=max_outstanding,
            on_finished=self._finish,
        )

    def _finish(self) -> None:
        assert not self.finished.is_set(), "finished twice"
        self.finished.set()

    async def drained(self) -> None:
        """The last row was issued or shed, and all that was issued has ended."""
        await self.finished.wait()
        drained = asyncio.Event()
        self.recorder.on_drained(drained.set)
        await drained.wait()

    @property
    def outcomes(self) -> list[Outcome]:
        return [Outcome(value) for value in self.columns.view("outcome")]

    @property
    def issued_rows(self) -> list[int]:
        return [row for row, _ in self.transport.requests]

    def assert_books_balance(self) -> None:
        """Every planned query was issued or shed, and has ended; the header says so."""
        header, outcomes = self.columns.header, self.outcomes
        assert header[HeaderSlot.CURSOR] == header[HeaderSlot.ENDED] == len(outcomes)
        assert header[HeaderSlot.OK] == outcomes.count(Outcome.OK)
        assert np.count_nonzero(self.columns.array("issued_ns")) + outcomes.count(Outcome.SHED) == len(outcomes)
        assert Outcome.NOT_ISSUED not in outcomes
        assert self.recorder.outstanding == 0


# --- issuing ------------------------------------------------------------------------------


@pytest.mark.parametrize("pacing", ["precise", "eco"])
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(answer_at_once, id="answered at once"),
        pytest.param(lambda row: FakeEnd(delay_s=0.003 * (row % 3)), id="answered later, in another order"),
        pytest.param(lambda row: FakeEnd(Outcome.CONNECT) if row % 2 else FakeEnd(Outcome.STATUS, 0, 503), id="all fail"),
    ],
)
def test_every_row_is_issued_in_order_and_never_early(tmp_path: Path, pacing: str, script: Callable[[int], FakeEnd]) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [row * MS * 7 // 5 for row in range(40)], script, pacing=pacing)
        bench.issuer.start()
        await bench.drained()
        return bench

    bench = run(work())
    assert bench.transport.requests == [(row, REQUESTS[row % 3]) for row in range(40)]
    late_ns = bench.columns.array("issued_ns") - bench.columns.array("scheduled_ns")
    assert late_ns.min() >= 0
    assert np.median(late_ns) < 2 * MS
    bench.assert_books_balance()


def test_an_open_loop_does_not_wait_for_replies(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [row * MS // 2 for row in range(50)], lambda row: HANGS)
        bench.issuer.start()
        await bench.finished.wait()
        return bench

    bench = run(work())
    assert bench.issued_rows == list(range(50))
    assert bench.recorder.outstanding == 50
    assert bench.columns.header[HeaderSlot.CURSOR] == 50


def test_queries_due_at_one_moment_are_issued_together_and_in_order(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [5 * MS] * 10 + [30 * MS] * 10)
        bench.issuer.start()
        await bench.drained()
        return bench

    bench = run(work())
    assert bench.issued_rows == list(range(20))
    issued_ns = bench.columns.array("issued_ns")
    assert issued_ns[10] - issued_ns[9] > 15 * MS
    bench.assert_books_balance()


@pytest.mark.parametrize("runner", [pytest.param(uvloop.run, id="uvloop"), pytest.param(asyncio.run, id="asyncio")])
def test_what_is_late_goes_out_in_bursts_that_let_others_run(tmp_path: Path, runner: Callable[[Any], Any]) -> None:
    async def work() -> tuple[Bench, list[int]]:
        bench = Bench(tmp_path, [LATE_NS] * 1_000)
        loop = asyncio.get_running_loop()
        seen = [0]

        def look() -> None:
            seen.append(len(bench.transport.requests))
            if not bench.finished.is_set():
                loop.call_soon(look)

        loop.call_soon(look)
        bench.issuer.start()
        await bench.drained()
        return bench, seen

    bench, seen = runner(work())
    assert bench.issued_rows == list(range(1_000))
    bursts = np.diff(seen)
    assert bursts.max() == 64
    assert np.count_nonzero(bursts) == -(-1_000 // 64)
    bench.assert_books_balance()


def test_no_rows_finish_at_once(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [])
        bench.issuer.start()
        assert bench.finished.is_set()
        bench.issuer.stop("too late")
        return bench

    bench = run(work())
    assert bench.transport.requests == []
    bench.assert_books_balance()


# --- caps and stops -----------------------------------------------------------------------


def test_what_is_due_beyond_the_cap_is_shed(tmp_path: Path) -> None:
    """Ten at one moment, four may be out; they end, and four of the next ten go."""

    async def work() -> Bench:
        bench = Bench(
            tmp_path, [LATE_NS] * 10 + [50 * MS] * 10, lambda row: FakeEnd(delay_s=0.01), max_outstanding=4, pacing="eco"
        )
        bench.issuer.start()
        await bench.drained()
        return bench

    bench = run(work())
    assert bench.issued_rows == [0, 1, 2, 3, 10, 11, 12, 13]
    assert bench.outcomes == ([Outcome.OK] * 4 + [Outcome.SHED] * 6) * 2
    (error,) = bench.recorder.errors
    assert (error.outcome, error.detail, error.count) == (Outcome.SHED, "client.max_outstanding was reached", 12)
    bench.assert_books_balance()


def test_a_cap_that_is_not_reached_sheds_nothing(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [LATE_NS] * 200, max_outstanding=1)
        bench.issuer.start()
        await bench.drained()
        return bench

    bench = run(work())
    assert bench.outcomes == [Outcome.OK] * 200, "each had ended before the next was due"


def test_stop_sheds_the_rest_and_awaits_what_is_out(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [LATE_NS] * 6 + [HOUR_NS] * 4, lambda row: FakeEnd(delay_s=0.02))
        bench.issuer.start()
        while len(bench.issued_rows) < 6:
            await asyncio.sleep(0)
        bench.issuer.stop("the run was interrupted")
        assert bench.finished.is_set()
        assert bench.recorder.outstanding == 6
        bench.issuer.stop("once more")
        await bench.drained()
        return bench

    bench = run(work())
    assert bench.outcomes == [Outcome.OK] * 6 + [Outcome.SHED] * 4
    (error,) = bench.recorder.errors
    assert (error.detail, error.count, error.example_row) == ("the run was interrupted", 4, 6)
    bench.assert_books_balance()


def test_stop_between_two_bursts(tmp_path: Path) -> None:
    async def work() -> Bench:
        bench = Bench(tmp_path, [LATE_NS] * 200)
        bench.issuer.start()
        while not bench.transport.requests:
            await asyncio.sleep(0)
        bench.issuer.stop("enough")
        for _ in range(5):
            await asyncio.sleep(0)
        return bench

    bench = run(work())
    assert bench.issued_rows == list(range(64))
    assert bench.outcomes == [Outcome.OK] * 64 + [Outcome.SHED] * 136
    bench.assert_books_balance()


# --- deadlines ----------------------------------------------------------------------------


class Hands:
    """A clock that a test sets by hand."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def sweep_bench(
    tmp_path: Path, hands: Hands, due_ns: list[int], script: Callable[[int], FakeEnd], **options: Any
) -> tuple[Bench, DeadlineSweep]:
    """Row r is issued at 1000 + 10 r, by a clock that the script moves; the timeout is 500. Sweeps happen when asked for."""

    def at_its_time(row: int) -> FakeEnd:
        hands.ns = max(hands.ns, 1_000 + 10 * row)
        return script(row)

    bench = Bench(tmp_path, due_ns, at_its_time, clock=hands, **options)
    sweep = DeadlineSweep(bench.transport, bench.recorder, bench.issuer, timeout_ns=500)
    sweep.stop()
    return bench, sweep


def timeouts(bench: Bench) -> list[int]:
    return [row for row, outcome in enumerate(bench.outcomes) if outcome is Outcome.TIMEOUT]


def test_queries_expire_in_order_each_at_its_own_time(tmp_path: Path) -> None:
    async def work() -> None:
        hands = Hands()
        bench, sweep = sweep_bench(tmp_path, hands, [LATE_NS] * 6, lambda row: FakeEnd() if row in (0, 3) else HANGS)
        bench.issuer.start()
        await bench.finished.wait()
        for now, expired in [
            (1_509, []),  # row 1 was issued at 1010
            (1_510, [1]),
            (1_511, [1]),
            (1_539, [1, 2]),  # row 3 has its reply
            (1_549, [1, 2, 4]),
            (9_999, [1, 2, 4, 5]),
            (99_999, [1, 2, 4, 5]),
        ]:
            hands.ns = now
            sweep.expire(now)
            assert timeouts(bench) == expired, now
        assert bench.columns.array("completed_ns")[[1, 2, 4, 5]].tolist() == [1_510, 1_539, 1_549, 9_999]
        assert bench.columns.array("first_byte_ns")[[1, 2, 4, 5]].tolist() == [0] * 4
        (error,) = bench.recorder.errors
        assert (error.detail, error.count) == ("no complete reply in time", 4)
        bench.assert_books_balance()

    run(work())


def test_a_query_that_waits_for_a_connection_has_not_begun_its_time(tmp_path: Path) -> None:
    async def work() -> None:
        hands = Hands()
        bench, sweep = sweep_bench(tmp_path, hands, [LATE_NS] * 3, lambda row: HANGS, max_connections=1)
        bench.issuer.start()
        await bench.finished.wait()
        assert [bench.recorder.issue_time_ns(row) for row in range(3)] == [1_000, 0, 0]
        hands.ns = 1_500
        sweep.expire(1_500)
        assert timeouts(bench) == [0]
        sweep.expire(1_500)
        while not bench.recorder.issue_time_ns(1):  # the connection came free
            await asyncio.sleep(0)
        sweep.expire(1_999)
        assert timeouts(bench) == [0], "its time began at 1500"
        hands.ns = 2_000
        sweep.expire(2_000)
        assert timeouts(bench) == [0, 1]
        assert bench.transport.abandon_waiting() == [2]
        bench.recorder.unsent(2, "no connection came free")
        sweep.expire(10_000)
        assert bench.outcomes == [Outcome.TIMEOUT, Outcome.TIMEOUT, Outcome.SHED]
        bench.assert_books_balance()

    run(work())


def test_rows_that_are_not_due_yet_are_left_alone_and_shed_ones_hide_nobody(tmp_path: Path) -> None:
    async def work() -> None:
        hands = Hands()
        bench, sweep = sweep_bench(tmp_path, hands, [LATE_NS] * 3 + [50 * MS], lambda row: HANGS, max_outstanding=1)
        bench.issuer.start()
        while bench.issuer.cursor < 3:
            await asyncio.sleep(0)
        hands.ns = 5_000
        sweep.expire(5_000)
        assert bench.outcomes == [Outcome.TIMEOUT, Outcome.SHED, Outcome.SHED, Outcome.NOT_ISSUED]
        await bench.finished.wait()
        sweep.expire(5_499)
        assert timeouts(bench) == [0]
        hands.ns = 5_500
        sweep.expire(5_500)
        assert timeouts(bench) == [0, 3]
        bench.assert_books_balance()

    run(work())


def test_the_sweep_runs_by_itself_until_it_is_stopped(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path, [0] * 3, lambda row: HANGS)
        sweep = DeadlineSweep(bench.transport, bench.recorder, bench.issuer, timeout_ns=20 * MS)
        bench.issuer.start()
        await bench.drained()
        sweep.stop()
        assert bench.outcomes == [Outcome.TIMEOUT] * 3
        out_ns = bench.columns.array("completed_ns") - bench.columns.array("issued_ns")
        assert out_ns.min() >= 20 * MS
        bench.assert_books_balance()

    run(work())


# --- the fake itself ----------------------------------------------------------------------


def test_the_fake_caps_its_connections_and_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        bench = Bench(tmp_path, [LATE_NS] * 500, lambda row: FakeEnd(delay_s=0), max_connections=2)
        await bench.transport.open(8)
        assert repr(bench.transport) == "<FakeTransport out=0 idle=2 waiting=0>"
        bench.issuer.start()
        await bench.drained()
        stats = bench.transport.stats
        assert (stats.connections_opened, stats.connections_peak) == (2, 2)
        assert 300 < stats.connection_waits == stats.cap_waits < 500
        assert set(bench.columns.array("connection").tolist()) == {0, 1}
        assert (np.diff(bench.columns.array("issued_ns")) >= 0).all(), "first come, first served"
        bench.assert_books_balance()

    run(work())


def test_the_fake_gives_each_end_its_sink_call(tmp_path: Path) -> None:
    ends = [
        FakeEnd(reply=b"fine"),
        FakeEnd(Outcome.STATUS, status=503, reply=b"no", detail="HTTP 503"),
        FakeEnd(Outcome.RESET, detail="gone"),
        HANGS,
        FakeEnd(delay_s=3_600),
    ]

    async def work() -> None:
        bench = Bench(tmp_path, [LATE_NS] * 5, ends.__getitem__)
        bench.recorder = bench.transport.sink = Recorder(bench.columns, keep=[0, 1])
        bench.recorder.outstanding = 5
        for row in range(5):
            bench.transport.issue(row, b"x")
        assert bench.outcomes[:3] == [Outcome.OK, Outcome.STATUS, Outcome.RESET]
        assert bench.columns.view("status").tolist() == [200, 503, 0, 0, 0]
        assert bench.columns.view("response_bytes").tolist() == [4, 2, 0, 0, 0]
        assert bench.recorder.replies == {0: b"fine"}
        connection = bench.recorder.connection_of(3)
        bench.transport.cancel(3, connection + 1, Outcome.TIMEOUT, "not on that connection")
        bench.transport.cancel(3, connection, Outcome.UNFINISHED, "enough")
        bench.transport.cancel(3, connection, Outcome.UNFINISHED, "twice")
        await bench.transport.close()
        assert bench.outcomes[3:] == [Outcome.UNFINISHED, Outcome.RESET]
        assert [error.detail for error in bench.recorder.errors] == ["HTTP 503", "gone", "enough", "the transport was closed"]
        assert bench.recorder.outstanding == bench.transport.stats.connections_open == 0
        bench.issuer.stop("unused")

    run(work())
