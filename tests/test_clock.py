"""The deadline timer on both event loops: never early, soon after, re-armed at any moment, with sockets served meanwhile."""

import asyncio
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from servebench.clock import DeadlineTimer, now_ns

MS = 1_000_000
Run = Callable[[Awaitable[Any]], Any]

on_both_loops = pytest.mark.parametrize("run", [pytest.param(asyncio.run, id="asyncio"), pytest.param(uvloop.run, id="uvloop")])
in_both_modes = pytest.mark.parametrize("spin_ns", [pytest.param(0, id="eco"), pytest.param(250_000, id="precise")])


class Alarm:
    """A timer, when it called back, and a way to wait for that."""

    def __init__(self, *, spin_ns: int = 0) -> None:
        self.fired_ns: list[int] = []
        self._rang = asyncio.Event()
        self.timer = DeadlineTimer(asyncio.get_running_loop(), self._ring, spin_ns=spin_ns)

    def _ring(self) -> None:
        self.fired_ns.append(now_ns())
        self._rang.set()

    async def ring(self) -> int:
        """When it rings next; a test that never sees it fails after ten seconds."""
        async with asyncio.timeout(10):
            await self._rang.wait()
        self._rang.clear()
        return self.fired_ns[-1]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def pass_time(until_ns: int) -> None:
    """Let the loop run until a moment, by a kernel timer that was armed after those under test."""
    alarm = Alarm()
    alarm.timer.arm(until_ns)
    await alarm.ring()
    alarm.timer.close()


@on_both_loops
@in_both_modes
def test_each_deadline_is_met_soon_and_never_early(run: Run, spin_ns: int) -> None:
    """Forty deadlines, each armed by the callback of the one before."""

    async def lateness_ns() -> list[int]:
        loop = asyncio.get_running_loop()
        deadline_ns = now_ns() + MS
        late: list[int] = []
        done: asyncio.Future[None] = loop.create_future()

        def fire() -> None:
            nonlocal deadline_ns
            fired_ns = now_ns()
            late.append(fired_ns - deadline_ns)
            if len(late) < 40:
                deadline_ns = fired_ns + 1_370_000  # after a pause of this process the others are not late for it
                timer.arm(deadline_ns)
            else:
                done.set_result(None)

        timer = DeadlineTimer(loop, fire, spin_ns=spin_ns)
        timer.arm(deadline_ns)
        async with asyncio.timeout(10):
            await done
        timer.close()
        return late

    late_ns = run(lateness_ns())
    assert len(late_ns) == 40
    assert min(late_ns) >= 0
    # The event loops' own timers are 1 ms coarse. The quartile forgives a busy machine, which delays some deadlines by more.
    assert statistics.quantiles(late_ns, n=4)[0] < MS / 4


@on_both_loops
def test_a_past_deadline_fires_on_the_next_turn_of_the_loop(run: Run) -> None:
    async def check() -> None:
        alarm = Alarm(spin_ns=250_000)
        alarm.timer.arm(now_ns() - 1_000 * MS)
        assert alarm.fired_ns == [], "never from inside arm()"
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(alarm.fired_ns) == 1
        alarm.timer.close()

    run(check())


@on_both_loops
@pytest.mark.parametrize(
    ("spin_ms", "first_ms", "second_ms"),
    [
        pytest.param(0, 10_000, 5, id="earlier"),
        pytest.param(0, 3, 30, id="later"),
        pytest.param(0, 20, -5, id="into the past"),
        pytest.param(60, 50, 20, id="earlier while it spins"),
        pytest.param(20, 15, 80, id="later while it spins, beyond the spin"),
        pytest.param(60, 10, 40, id="later while it spins, within the spin"),
    ],
)
def test_arming_again_replaces_the_deadline(run: Run, spin_ms: int, first_ms: int, second_ms: int) -> None:
    async def check() -> None:
        alarm = Alarm(spin_ns=spin_ms * MS)
        begun_ns = now_ns()
        alarm.timer.arm(begun_ns + first_ms * MS)
        await asyncio.sleep(0)
        alarm.timer.arm(begun_ns + second_ms * MS)
        assert await alarm.ring() >= begun_ns + second_ms * MS
        assert alarm.fired_ns[0] < begun_ns + 5_000 * MS
        await pass_time(max(now_ns(), begun_ns + min(first_ms, 60) * MS) + 5 * MS)
        assert len(alarm.fired_ns) == 1
        alarm.timer.close()

    run(check())


@on_both_loops
@pytest.mark.parametrize("spin_ms", [pytest.param(0, id="waiting"), pytest.param(60, id="spinning")])
@pytest.mark.parametrize("end", ["disarm", "close"])
def test_no_callback_after_disarm_or_close(run: Run, spin_ms: int, end: str) -> None:
    async def check() -> None:
        alarm = Alarm(spin_ns=spin_ms * MS)
        deadline_ns = now_ns() + 10 * MS
        alarm.timer.arm(deadline_ns)
        await asyncio.sleep(0)
        getattr(alarm.timer, end)()
        await pass_time(deadline_ns + 10 * MS)
        assert alarm.fired_ns == []
        if end == "disarm":
            alarm.timer.arm(now_ns() + MS)
            await alarm.ring()
        alarm.timer.close()
        alarm.timer.close()

    run(check())


@on_both_loops
def test_the_callback_may_close_the_timer(run: Run) -> None:
    async def check() -> int:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def fire() -> None:
            timer.close()
            done.set_result(None)

        timer = DeadlineTimer(loop, fire)
        timer.arm(now_ns() + MS)
        async with asyncio.timeout(10):
            await done
        return open_files()

    before = open_files()
    open_in_loop = run(check())
    assert run(check()) == open_in_loop, "the kernel timer was released"
    assert open_files() == before


@on_both_loops
def test_sockets_are_served_while_it_spins(run: Run) -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        echoes = 0

        def pong() -> None:
            far.send(far.recv(1))

        def ping() -> None:
            nonlocal echoes
            near.recv(1)
            echoes += 1
            near.send(b"x")

        loop.add_reader(near, ping)
        loop.add_reader(far, pong)
        near.send(b"x")
        alarm = Alarm(spin_ns=100 * MS)
        alarm.timer.arm(now_ns() + 50 * MS)
        await alarm.ring()
        loop.remove_reader(near)
        loop.remove_reader(far)
        near.close()
        far.close()
        alarm.timer.close()
        assert echoes > 50

    run(check())


@on_both_loops
def test_eco_leaves_the_processor_alone_and_precise_does_not(run: Run) -> None:
    async def cpu_s(spin_ns: int) -> float:
        alarm = Alarm(spin_ns=spin_ns)
        alarm.timer.arm(now_ns() + 60 * MS)
        before = time.process_time()
        await alarm.ring()
        spent = time.process_time() - before
        alarm.timer.close()
        return spent

    assert run(cpu_s(0)) < 0.01
    assert run(cpu_s(50 * MS)) > 0.01


@on_both_loops
def test_a_deadline_that_moves_away_ends_the_spin(run: Run) -> None:
    async def cpu_s() -> float:
        alarm = Alarm(spin_ns=20 * MS)
        begun_ns, before = now_ns(), time.process_time()
        alarm.timer.arm(begun_ns + 15 * MS)
        alarm.timer.arm(begun_ns + 250 * MS)
        await alarm.ring()
        alarm.timer.close()
        return time.process_time() - before

    assert run(cpu_s()) < 0.06
