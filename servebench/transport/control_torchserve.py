"""The control plane of TorchServe: which models its management API knows, and one query to see that they answer."""

from __future__ import annotations

import io
import ssl
from typing import Any

import aiohttp

from servebench.errors import TransportError
from servebench.transport.control import Discovery
from servebench.wire.kserve import error_text
from servebench.wire.tensors import ModelMetadata

_TIMEOUT = aiohttp.ClientTimeout(total=30)


async def discover_torchserve(management_url: str | None, model: str, version: str | None, *, token: str | None) -> Discovery:
    """What the management API says of a model; nothing where there is none to ask (a server that runs elsewhere).

    TorchServe describes no tensors, so the metadata has neither inputs nor outputs.
    """
    metadata = ModelMetadata(model, (version,) if version else (), "torchserve", (), (), max_batch_size=0)
    if management_url is None:
        return Discovery({"name": "torchserve"}, metadata, None)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    path = f"/models/{model}" + (f"/{version}" if version else "")
    try:
        async with aiohttp.ClientSession(management_url, headers=headers, timeout=_TIMEOUT) as session:
            async with session.get(path) as response:
                status, body = response.status, await response.read()
            if status != 200:
                known = await _model_names(session)
                raise TransportError(
                    f"endpoint.model: {model!r} is not on the server at {management_url} (HTTP {status}: {error_text(body)})"
                    f"{f'; it has: {known}' if known else ''}"
                )
            async with session.get(path) as response:
                described: Any = await response.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise TransportError(f"{management_url}: cannot be reached: {error}") from None
    return Discovery({"name": "torchserve"}, metadata, described[0] if isinstance(described, list) and described else None)


async def probe(url: str, target: str, body: bytes, headers: dict[str, str], tls: ssl.SSLContext) -> None:
    """Send one query. `TransportError` for an answer that no later query would better: 4xx but not too many requests."""
    connector = aiohttp.TCPConnector(ssl=tls)
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, connector=connector) as session,
            session.post(url.rstrip("/") + target, data=io.BytesIO(body), headers=headers) as response,
        ):
            status, reply = response.status, await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise TransportError(f"{url}: cannot be reached: {error}") from None
    if 400 <= status < 500 and status != 429:
        raise TransportError(f"endpoint: the server at {url} refuses the first sample: HTTP {status}: {error_text(reply)}")


async def _model_names(session: aiohttp.ClientSession) -> str:
    async with session.get("/models") as response:
        if response.status != 200:
            return ""
        listed: Any = await response.json(content_type=None)
    return ", ".join(sorted(str(one["modelName"]) for one in listed.get("models", [])))
