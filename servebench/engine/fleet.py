"""The worker processes of one run: start them, walk them through the phases, notice when one dies.

The fleet only coordinates. It holds no queries and no latencies: those are in the workers'
mapped columns, which it reads for progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from servebench.clock import now_ns
from servebench.engine.worker import WorkerSettings
from servebench.errors import RunError, TransportError

_READY_TIMEOUT_S = 60.0
_LEAVE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class WorkerEnd:
    """How one worker ended, for the run's facts."""

    worker: int
    rows: int
    state: Literal["done", "lost", "cut"]
    exit: int | None
    stats: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)


class _Member:
    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.process = process
        self.lost = False

    async def send(self, command: dict[str, Any]) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        if stdin.is_closing():
            return
        with contextlib.suppress(ConnectionError):
            stdin.write(json.dumps(command).encode() + b"\n")
            await stdin.drain()

    async def hear(self, event: str) -> dict[str, Any] | None:
        """The next message, which should be ``event``; None when the worker has died. `RunError` for a fault of its own."""
        stdout = self.process.stdout
        assert stdout is not None
        line = await stdout.readline()
        if not line:
            self.lost = True
            await self.process.wait()
            return None
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "error":
            raise TransportError(message["message"]) if message.get("transport") else RunError(message["message"])
        assert message["event"] == event, f"worker {self.number} said {message['event']!r} instead of {event!r}"
        return message


class Fleet:
    """All workers of a run."""

    def __init__(self) -> None:
        self._members: list[_Member] = []
        self._cut = False

    @property
    def pids(self) -> list[int]:
        """Process ids, in worker order."""
        return [member.process.pid for member in self._members]

    async def start(self, settings: list[WorkerSettings]) -> None:
        """Start one process per settings and wait until all are ready.

        `TransportError` when the server cannot be reached, `RunError` when a worker cannot start.
        """
        for number, one in enumerate(settings):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "servebench.engine.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=[one.requests_fd],
                start_new_session=True,  # a terminal's Ctrl-C is for the coordinator alone
                limit=1 << 26,
            )
            member = _Member(number, process)
            self._members.append(member)
            await member.send(asdict(one))
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                answers = await asyncio.gather(*(member.hear("ready") for member in self._members))
        except TimeoutError:
            raise RunError(f"a worker was not ready within {_READY_TIMEOUT_S:g} s") from None
        for member, answer in zip(self._members, answers, strict=True):
            if answer is None:
                raise RunError(f"worker {member.number} died at its start (exit {member.process.returncode})")

    async def warm_up(self, lead_ns: int) -> list[dict[str, Any]]:
        """Run the warm-up on all workers, starting ``lead_ns`` from now; what each said of it."""
        answers = await self._phase("warmup", "warm", now_ns() + lead_ns)
        return [answer for answer in answers if answer is not None]

    async def measure(self, start_ns: int, rows: list[int]) -> list[WorkerEnd]:
        """Run the measured phase; returns when every worker has closed its books or died."""
        answers = await self._phase("measure", "done", start_ns)
        ends = []
        for member, count, answer in zip(self._members, rows, answers, strict=True):
            if answer is None:
                state: Literal["lost", "cut"] = "cut" if self._cut else "lost"
                ends.append(WorkerEnd(member.number, count, state, member.process.returncode))
            else:
                ends.append(WorkerEnd(member.number, count, "done", None, answer["stats"], answer["errors"]))
        return ends

    async def stop(self) -> None:
        """Issue nothing more; the phase that runs ends after its drain."""
        await asyncio.gather(*(member.send({"do": "stop"}) for member in self._members))

    def cut(self) -> None:
        """End every worker at once; what they had measured stays in the columns."""
        self._cut = True
        for member in self._members:
            with contextlib.suppress(ProcessLookupError):
                member.process.kill()

    async def close(self) -> None:
        """Let every worker leave; kill the one that won't."""
        await asyncio.gather(*(member.send({"do": "leave"}) for member in self._members))
        for member in self._members:
            if member.process.stdin is not None and not member.process.stdin.is_closing():
                member.process.stdin.close()
            try:
                await asyncio.wait_for(member.process.wait(), _LEAVE_TIMEOUT_S)
            except TimeoutError:
                member.process.kill()
                await member.process.wait()

    async def _phase(self, command: str, event: str, start_ns: int) -> list[dict[str, Any] | None]:
        async def one(member: _Member) -> dict[str, Any] | None:
            if member.lost:
                return None
            await member.send({"do": command, "start_ns": start_ns})
            return await member.hear(event)

        return list(await asyncio.gather(*(one(member) for member in self._members)))
