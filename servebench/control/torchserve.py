"""The control plane of TorchServe: its management REST API.

Names and parameters are those of TorchServe 0.12's ``docs/management_api.md``. A model's version is
part of the path; without one, TorchServe means the default version.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from servebench.control.base import CHANGE_TIMEOUT_S, Activity, ControlPlane, Discovery, RefusedError, absent
from servebench.control.metrics import metric_sum
from servebench.control.rest import Answer, Rest
from servebench.errors import TransportError
from servebench.wire.tensors import ModelMetadata

_READY_TIMEOUT_S, _READY_POLL_S = 30.0, 0.1
_READY = "READY"
_ALL_MODELS = "/models?limit=1000"  # pages of 100 otherwise
_TOKEN_REMEDY = "; give its management token (server.management_token_env)"
_MODEL_API_REMEDY = "; start TorchServe with enable_model_api=true (model_api: true of our launcher)"


def undescribed(model: str, version: str | None = None) -> Discovery:
    """What is known of a model of TorchServe that nobody can be asked about. TorchServe never describes tensors."""
    metadata = ModelMetadata(model, (version,) if version else (), "torchserve", (), (), max_batch_size=0)
    return Discovery({"name": "torchserve"}, metadata, None)


class TorchServeControl:
    """Asks the management API at ``url``. ``metrics_url``, where there is one, is the page of Prometheus metrics."""

    def __init__(
        self, url: str, *, token: str | None = None, ssl_context: ssl.SSLContext, metrics_url: str | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._rest = Rest(url, headers=headers, ssl_context=ssl_context)
        self._metrics = Rest(metrics_url, headers={}, ssl_context=ssl_context) if metrics_url is not None else None

    async def ready(self) -> bool:
        """Whether the API answers. (``GET /ping`` says "Healthy" before any model is loaded.)"""
        return (await self._rest.ask("GET", _ALL_MODELS)).status == 200

    async def model_ready(self, model: str, version: str | None = None) -> bool:
        """Whether the model has workers, and all of them are READY."""
        try:
            return _all_ready(_workers(await self.describe(model, version)))
        except RefusedError:
            return False

    async def describe(self, model: str, version: str | None = None) -> dict[str, Any]:
        """``GET /models/M``: workers, batching, queue. `RefusedError` when it is not there (it names those that are)."""
        answer = await self._rest.ask("GET", _path(model, version))
        if answer.status == 404:
            raise absent(model, self._rest.url, answer.words, await self._model_names())
        self._check(answer, f"describe {model!r}")
        match answer.document:
            case [{"modelName": str()} as described]:
                return dict(described)
        raise TransportError(f"{self._rest.url}: this is not TorchServe's management API ({answer.words})")

    async def discover(self, model: str, version: str | None = None) -> Discovery:
        """The model's description as ``config``; `RefusedError` unless all its workers are READY."""
        described = await self.describe(model, version)
        workers = _workers(described)
        if not _all_ready(workers):
            states = ", ".join(workers) or "it has none"
            raise RefusedError(f"endpoint.model: not all workers of {model!r} at {self._rest.url} are READY: {states}")
        about = undescribed(model, version)
        return Discovery(about.server, about.model, described)

    async def activity(self, model: str, version: str | None = None) -> Activity:
        """Queue and workers out of the model's description, and the number of requests out of the metrics."""
        try:
            described = await self.describe(model, version)
        except RefusedError:
            return Activity(ready=False)
        workers = _workers(described)
        queue = described.get("jobQueueStatus") or {}
        return Activity(
            _all_ready(workers),
            requests=await self._requests(model),
            pending=queue.get("pendingRequests"),
            workers=tuple(workers),
        )

    async def scale(self, model: str, min_workers: int, max_workers: int, version: str | None = None) -> None:
        """Change the number of workers and return when they are there. TorchServe runs ``min_workers`` of them."""
        query = urlencode({"min_worker": min_workers, "max_worker": max_workers, "synchronous": "true"})
        answer = await self._rest.ask("PUT", f"{_path(model, version)}?{query}", timeout_s=CHANGE_TIMEOUT_S)
        self._check(answer, f"scale {model!r} to {min_workers} workers")
        # TorchServe 0.12 may answer before the last of them has its model. One that never has it is told of by `discover`.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READY_TIMEOUT_S):
                while not _all_ready(_workers(await self.describe(model, version))):  # noqa: ASYNC110  (another process's event)
                    await asyncio.sleep(_READY_POLL_S)

    async def register(self, archive: str, *, workers: int = 1) -> None:
        """Register an archive of the model store (or a URL that TorchServe allows), and return when its workers are ready."""
        query = urlencode({"url": archive, "initial_workers": workers, "synchronous": "true"})
        answer = await self._rest.ask("POST", f"/models?{query}", timeout_s=CHANGE_TIMEOUT_S)
        self._check(answer, f"register {archive!r}")

    async def unregister(self, model: str, version: str | None = None) -> None:
        """Unregister a model; what waits for it is answered first."""
        answer = await self._rest.ask("DELETE", _path(model, version), timeout_s=CHANGE_TIMEOUT_S)
        self._check(answer, f"unregister {model!r}")

    async def close(self) -> None:
        """End all connections."""
        await self._rest.close()
        if self._metrics is not None:
            await self._metrics.close()

    def _check(self, answer: Answer, what: str) -> None:
        """`RefusedError` for any status but success, with the remedy where the status names the cause."""
        if answer.status == 200:
            return
        remedy = ""
        if answer.status == 405:
            remedy = _MODEL_API_REMEDY
        elif answer.status in (401, 403) or (answer.status == 400 and "Token" in answer.words):
            remedy = _TOKEN_REMEDY
        raise RefusedError(f"{self._rest.url}: cannot {what} ({answer.words}){remedy}")

    async def _model_names(self) -> list[str]:
        document = (await self._rest.ask("GET", _ALL_MODELS)).document
        listed = document.get("models", []) if isinstance(document, dict) else []
        return [str(one.get("modelName")) for one in listed if isinstance(one, dict)]

    async def _requests(self, model: str) -> int | None:
        if self._metrics is None:
            return None
        page = (await self._metrics.ask("GET", "")).body.decode("utf-8", "replace")
        # A counter appears with its first increment.
        return metric_sum(page, "ts_inference_requests_total", model_name=model) or 0


def _path(model: str, version: str | None) -> str:
    return "/models/" + "/".join(quote(part, safe="") for part in (model, version) if part)


def _workers(described: dict[str, Any]) -> list[str]:
    return [str(worker.get("status")) for worker in described.get("workers") or []]


def _all_ready(workers: Sequence[str]) -> bool:
    return bool(workers) and all(status == _READY for status in workers)


if TYPE_CHECKING:
    _control: type[ControlPlane] = TorchServeControl
