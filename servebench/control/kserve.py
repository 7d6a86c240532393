"""The control plane of a KServe v2 server over HTTP, with Triton's extensions: statistics and the model repository."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from servebench.control.base import (
    CHANGE_TIMEOUT_S,
    Activity,
    ControlPlane,
    Discovery,
    ModelRepository,
    RefusedError,
    absent,
    load_refused,
    not_kserve,
    until_unloaded,
)
from servebench.control.metrics import metric_sum
from servebench.control.rest import Rest
from servebench.errors import TransportError
from servebench.wire.kserve import model_path, parse_metadata

_NO_SUCH_PATH = (404, 405)


class KServeControl:
    """Asks over HTTP. ``metrics_url``, where the server has one, is Triton's page of Prometheus metrics."""

    def __init__(
        self, url: str, *, headers: Mapping[str, str], ssl_context: ssl.SSLContext, metrics_url: str | None = None
    ) -> None:
        self._rest = Rest(url, headers=headers, ssl_context=ssl_context)
        self._metrics = Rest(metrics_url, headers={}, ssl_context=ssl_context) if metrics_url is not None else None

    async def ready(self) -> bool:
        """``GET /v2/health/ready``."""
        return (await self._rest.ask("GET", "/v2/health/ready")).status == 200

    async def model_ready(self, model: str, version: str | None = None) -> bool:
        """``GET /v2/models/M/ready``."""
        return (await self._rest.ask("GET", f"{_path(model, version)}/ready")).status == 200

    async def discover(self, model: str, version: str | None = None) -> Discovery:
        """The metadata of server and model, and the model's configuration where there is one."""
        path = _path(model, version)
        metadata = await self._rest.ask("GET", path)
        if metadata.status != 200:
            known = [str(entry.get("name")) for entry in await self._index()]
            if not known and (answer := await self._rest.ask("GET", "/v2")).status in _NO_SUCH_PATH:
                raise not_kserve(self._rest.url, f"GET /v2: {answer.words}", "torchserve-http")
            raise absent(model, self._rest.url, metadata.words, known)
        config = await self._rest.ask("GET", f"{path}/config")
        server = await self._rest.ask("GET", "/v2")
        has_config = config.status == 200
        try:
            described = parse_metadata(metadata.body, config.body if has_config else None)
        except ValueError as error:
            raise TransportError(f"{self._rest.url}{path}: {error}") from None
        about = server.document if server.status == 200 and isinstance(server.document, dict) else {}
        return Discovery(about, described, config.document if has_config and isinstance(config.document, dict) else None)

    async def activity(self, model: str, version: str | None = None) -> Activity:
        """Triton's statistics of the model, and how many requests wait, out of its metrics."""
        ready = await self.model_ready(model, version)
        answer = await self._rest.ask("GET", f"{_path(model, version)}/stats")
        activity = _statistics(answer.document) if answer.status == 200 else Activity(ready)
        return replace(activity, ready=ready, pending=await self._pending(model))

    async def load(self, model: str) -> None:
        """``POST /v2/repository/models/M/load``, and whether the model is ready afterwards."""
        answer = await self._rest.ask("POST", f"{_repository_path(model)}/load", body={}, timeout_s=CHANGE_TIMEOUT_S)
        if answer.status != 200:
            raise load_refused(model, self._rest.url, answer.words)
        if not await self.model_ready(model):
            raise RefusedError(f"{self._rest.url}: says that it loaded {model!r}, but the model is not ready")

    async def unload(self, model: str) -> None:
        """``POST /v2/repository/models/M/unload``, and the end of its instances."""
        answer = await self._rest.ask("POST", f"{_repository_path(model)}/unload", body={}, timeout_s=CHANGE_TIMEOUT_S)
        if answer.status != 200:
            raise RefusedError(f"{self._rest.url}: cannot unload {model!r} ({answer.words})")

        async def states() -> set[str]:
            return {str(entry.get("state")) for entry in await self._index() if entry.get("name") == model}

        await until_unloaded(states, model, self._rest.url)

    async def close(self) -> None:
        """End all connections."""
        await self._rest.close()
        if self._metrics is not None:
            await self._metrics.close()

    async def _index(self) -> list[dict[str, Any]]:
        """Triton's repository index; empty for servers that have none."""
        answer = await self._rest.ask("POST", "/v2/repository/index", body={})
        entries = answer.document if answer.status == 200 else None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    async def _pending(self, model: str) -> int | None:
        if self._metrics is None:
            return None
        page = await self._metrics.ask("GET", "")
        return metric_sum(page.body.decode("utf-8", "replace"), "nv_inference_pending_request_count", model=model)


def _path(model: str, version: str | None) -> str:
    try:
        return model_path(model, version)
    except ValueError as error:
        raise TransportError(f"endpoint.model: {error}") from None


def _repository_path(model: str) -> str:
    return f"/v2/repository/models/{quote(model, safe='')}"


def _statistics(document: Any) -> Activity:
    """The counts of all versions, out of the body of ``GET /v2/models/M/stats``; none when it is not one."""
    try:
        versions = document["model_stats"]
        parts = [one["inference_stats"] for one in versions]
        failed = sum(part["fail"]["count"] for part in parts)
        return Activity(
            ready=True,
            requests=failed + sum(part["success"]["count"] for part in parts),
            failed=failed,
            inferences=sum(one["inference_count"] for one in versions),
            executions=sum(one["execution_count"] for one in versions),
            queued=sum(part["queue"]["count"] for part in parts),
            queue_ns=sum(part["queue"]["ns"] for part in parts),
        )
    except (LookupError, TypeError):
        return Activity(ready=True)


if TYPE_CHECKING:
    _control: type[ControlPlane] = KServeControl
    _repository: type[ModelRepository] = KServeControl
