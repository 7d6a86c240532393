"""What a run changes on a server that already runs, and changes back however it ends: a model loaded, workers scaled.

Every change is noted, with the time it took, for the run's facts. Changing back is never an
error of the run's own: what was measured stays, and the note says what went wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol

from servebench.clock import now_ns
from servebench.control.base import Discovery, ModelRepository, RefusedError
from servebench.control.torchserve import TorchServeControl, undescribed
from servebench.errors import ServebenchError, TransportError
from servebench.profile import Profile

if TYPE_CHECKING:
    from servebench.engine.asking import AnyControl

Connect = Callable[[], AbstractAsyncContextManager["AnyControl | None"]]


class PhaseObserver(Protocol):
    """Hears what goes on."""

    def phase(self, name: str) -> None:
        """A phase begins."""


class Arrangement:
    """The changes of one run. ``connect`` opens the server's control plane; ``actions`` are the notes, JSON-able."""

    def __init__(self, profile: Profile, connect: Connect, observer: PhaseObserver) -> None:
        self.actions: list[dict[str, Any]] = []
        self._model, self._version = profile.endpoint.model, profile.endpoint.version
        self._load, self._workers = profile.server.load_model, profile.server.workers
        self._connect = connect
        self._observer = observer
        self._back: Callable[[AnyControl], Awaitable[None]] | None = None

    @contextlib.asynccontextmanager
    async def in_place(self) -> AsyncIterator[Discovery]:
        """Make the changes, describe server and model, and change back at the end.

        `TransportError` when there is nobody, or the server refuses. An error that ends the run also tells what
        could not be changed back.
        """
        try:
            async with self._connect() as control:
                found = await self._arrange(control)
            yield found
        except ServebenchError as error:
            if problem := await self._change_back():
                error.args = (f"{error}; {problem}",)
            raise
        except BaseException:
            await self._change_back()
            raise
        await self._change_back()

    async def _arrange(self, control: AnyControl | None) -> Discovery:
        self._observer.phase("asking the server about the model")
        if control is None:
            return undescribed(self._model, self._version)
        if isinstance(control, TorchServeControl):
            if self._workers is not None:
                await self._scale(control, self._workers)
        elif self._load and not await control.model_ready(self._model, self._version):
            await self._load_model(control)
        return await control.discover(self._model, self._version)

    async def _load_model(self, control: ModelRepository) -> None:
        async def back(control: AnyControl) -> None:
            assert not isinstance(control, TorchServeControl)
            await self._noted({"action": "unload"}, control.unload(self._model))

        self._back = back  # from now on: an interrupt while it loads does not keep the server from loading it
        try:
            await self._noted({"action": "load"}, control.load(self._model))
        except RefusedError:
            self._back = None
            raise

    async def _scale(self, control: TorchServeControl, workers: int) -> None:
        described = await control.describe(self._model, self._version)
        before = (described.get("minWorkers"), described.get("maxWorkers"))
        if before == (workers, workers):
            return
        least, most = (int(count or 0) for count in before)

        async def back(control: AnyControl) -> None:
            assert isinstance(control, TorchServeControl)
            note = {"action": "scale", "min_workers": least, "max_workers": most}
            await self._noted(note, control.scale(self._model, least, most, self._version))

        self._back = back
        note = {"action": "scale", "min_workers": workers, "max_workers": workers}
        await self._noted(note, control.scale(self._model, workers, workers, self._version))

    async def _noted(self, action: dict[str, Any], change: Awaitable[None]) -> None:
        note = {**action, "model": self._model}
        self._observer.phase(f"{action['action']} {self._model}")
        self.actions.append(note)
        started_ns = now_ns()
        try:
            await change
        except TransportError as error:
            note["error"] = str(error)
            raise
        finally:
            note["seconds"] = round((now_ns() - started_ns) / 1e9, 3)

    async def _change_back(self) -> str | None:
        """Undo what was done; what could not be, in words."""
        back, self._back = self._back, None
        if back is None:
            return None
        try:
            async with self._connect() as control:
                assert control is not None
                await back(control)
        except TransportError as error:
            problem = f"and the server could not be left as it was found: {error}"
            self._observer.phase(problem)
            return problem
        return None
