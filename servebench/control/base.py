"""The control plane's contract: what a server says of itself and of a model, whatever protocol it is asked over.

Nothing here is on the timed path, so the implementations are plain aiohttp and grpcio. One
object asks one server, from one event loop, one question at a time; `ControlPlane.close` ends its
connections. Changing what a server hosts is not part of the contract, because servers differ in it:
Triton loads and unloads models of its repository, TorchServe registers archives and scales workers.

Errors are `TransportError`s of one line, with the server's own words in it; a server that
answers, but refuses, makes a `RefusedError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from servebench.errors import TransportError
from servebench.wire.tensors import ModelMetadata

#: How long a question may take, and how long a change: large models take minutes to load.
ANSWER_TIMEOUT_S = 15.0
CHANGE_TIMEOUT_S = 900.0

#: What is said of an address that refuses connections.
NOBODY_LISTENS = "connection refused; is the server running there?"

_UNLOAD_POLL_S = 0.05
#: States of Triton's repository index in which a model has instances, or is about to.
_PRESENT = frozenset({"READY", "LOADING", "UNLOADING"})


class RefusedError(TransportError):
    """The server answers, and refuses."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a server says of itself and of one model."""

    server: dict[str, Any]
    model: ModelMetadata
    config: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What a model does now, and has done since it was loaded. None: the server does not say."""

    ready: bool
    requests: int | None = None  #: requests that were answered, well or badly
    failed: int | None = None  #: those answered badly
    inferences: int | None = None  #: rows that were computed
    executions: int | None = None  #: batches in which they were
    queued: int | None = None  #: requests that waited for an instance ...
    queue_ns: int | None = None  #: ... and for how long, in sum
    pending: int | None = None  #: requests that wait now
    workers: tuple[str, ...] | None = None  #: the state of each worker


class ControlPlane(Protocol):
    """A server that can be asked."""

    async def ready(self) -> bool:
        """Whether the server says that it is ready. A Triton with strict readiness is not while a model is missing."""

    async def model_ready(self, model: str, version: str | None = None) -> bool:
        """Whether the model can be asked now. `TransportError` when nobody answers."""

    async def discover(self, model: str, version: str | None = None) -> Discovery:
        """The server, and a model that is ready; `TransportError` when nobody answers, or it is not there."""

    async def activity(self, model: str, version: str | None = None) -> Activity:
        """How busy the model is; `TransportError` when nobody answers."""

    async def close(self) -> None:
        """End all connections."""


class ModelRepository(Protocol):
    """What Triton offers with ``--model-control-mode=explicit``.

    A model that is loaded can be loaded again, to take up what changed in the repository. When that
    fails, the old one stays, and the server goes on saying READY: only the answer to ``load``
    tells, and afterwards only the configuration shows what is there.
    """

    async def load(self, model: str) -> None:
        """Load a model, or load it anew, and return when it is ready; `RefusedError` says why it is not."""

    async def unload(self, model: str) -> None:
        """Unload a model and return when its instances are gone. One that is not loaded is left alone."""


def absent(model: str, url: str, why: str, known: Iterable[str]) -> RefusedError:
    """The error for a model that the server does not have, or not ready; it names those that are there."""
    names = ", ".join(sorted(set(known)))
    return RefusedError(
        f"endpoint.model: {model!r} is not on the server at {url} ({why}){f'; it has: {names}' if names else ''}"
    )


def not_kserve(url: str, why: str, instead: str) -> RefusedError:
    """The error for a server that knows nothing of KServe v2, not even of itself; ``instead`` is TorchServe's protocol."""
    return RefusedError(f"endpoint.protocol: {url} does not seem to speak KServe v2 ({why}); a TorchServe needs {instead}")


def load_refused(model: str, url: str, why: str) -> RefusedError:
    """The error for a model that could not be loaded; Triton's reason is often in its log alone."""
    remedy = ""
    if "not allowed" in why:
        remedy = "; start Triton with --model-control-mode=explicit"
    elif "failed to poll" in why:
        remedy = "; the server's log says what is wrong with it"
    return RefusedError(f"{url}: cannot load {model!r} ({why}){remedy}")


async def until_unloaded(states: Callable[[], Awaitable[set[str]]], model: str, url: str) -> None:
    """Wait until none of a model's ``states`` is one of presence: Triton answers before its instances have ended."""
    try:
        async with asyncio.timeout(CHANGE_TIMEOUT_S):
            while await states() & _PRESENT:  # noqa: ASYNC110  (the event is another process's)
                await asyncio.sleep(_UNLOAD_POLL_S)
    except TimeoutError:
        raise TransportError(f"{url}: {model!r} is still unloading after {CHANGE_TIMEOUT_S:g} s") from None
