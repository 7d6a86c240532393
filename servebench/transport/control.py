"""The control plane of a KServe v2 server over HTTP: is it there, which models, what do they take.

Not timed, so it is plain aiohttp.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from servebench.errors import TransportError
from servebench.wire.kserve import error_text, model_path, parse_metadata
from servebench.wire.tensors import ModelMetadata

_TIMEOUT = aiohttp.ClientTimeout(total=15)


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a server says of itself and of one model."""

    server: dict[str, Any]
    model: ModelMetadata
    config: dict[str, Any] | None


async def discover(
    url: str, model: str, version: str | None, *, headers: Mapping[str, str], ssl_context: ssl.SSLContext
) -> Discovery:
    """Ask the server for its metadata, the model's, and the model's configuration where it has one.

    `TransportError` when nobody answers, or the model is not there (it names those that are).
    """
    path = model_path(model, version)
    connector = aiohttp.TCPConnector(ssl=ssl_context)
    async with aiohttp.ClientSession(url, headers=dict(headers), timeout=_TIMEOUT, connector=connector) as session:
        try:
            status, metadata = await _get(session, path)
            if status != 200:
                known = await _model_names(session)
                listing = f"; it has: {', '.join(known)}" if known else ""
                raise TransportError(
                    f"endpoint.model: {model!r} is not on the server at {url} (HTTP {status}: {error_text(metadata)}){listing}"
                )
            config_status, config = await _get(session, f"{path}/config")
            server_status, server = await _get(session, "/v2")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransportError(f"{url}: cannot be reached: {_cause(error)}") from None
    has_config = config_status == 200
    try:
        described = parse_metadata(metadata, config if has_config else None)
    except ValueError as error:
        raise TransportError(f"{url}{path}: {error}") from None
    return Discovery(
        _json_object(server) if server_status == 200 else {}, described, _json_object(config) if has_config else None
    )


async def _get(session: aiohttp.ClientSession, path: str) -> tuple[int, bytes]:
    async with session.get(path) as response:
        return response.status, await response.read()


async def _model_names(session: aiohttp.ClientSession) -> list[str]:
    """Triton's repository index; empty for servers that have none."""
    async with session.post("/v2/repository/index", json={}) as response:
        if response.status != 200:
            return []
        try:
            return sorted({str(entry["name"]) for entry in await response.json(content_type=None)})
        except (ValueError, TypeError, KeyError):
            return []


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer within 15 s"
    return str(error) or type(error).__name__
