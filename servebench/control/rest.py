"""A REST API, asked now and then: whole answers, and a `TransportError` when there is none."""

from __future__ import annotations

import errno
import json
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp

from servebench.control.base import ANSWER_TIMEOUT_S, NOBODY_LISTENS
from servebench.errors import TransportError
from servebench.wire.kserve import error_text


class Answer(NamedTuple):
    """A status and a body."""

    status: int
    body: bytes

    @property
    def words(self) -> str:
        """The status and the server's own words, for an error: KServe's ``error``, TorchServe's ``message``, or the body."""
        document = self.document
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            return f"HTTP {self.status}: {error_text(document['message'].encode())}"
        return f"HTTP {self.status}: {error_text(self.body)}"

    @property
    def document(self) -> Any:
        """The body as JSON, None when it isn't."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


def _why(error: Exception, url: str) -> str:
    """Why there is no answer; where that tells of a wrong address, what to do about it, else in the library's words."""
    secure = url.startswith("https:")
    cause = getattr(error, "os_error", None)  # of the attempt to connect
    if getattr(cause, "errno", None) == errno.ECONNREFUSED:
        return NOBODY_LISTENS
    if secure and (isinstance(cause, ConnectionResetError) or getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER"):
        return "does not answer TLS; is it http://?"
    if isinstance(error, aiohttp.ClientResponseError):  # aiohttp's for a reply that it cannot read
        found = "does not answer HTTP"
    elif isinstance(error, aiohttp.ClientConnectionError) and not isinstance(error, aiohttp.ClientConnectorError):
        found = "ended the connection without an HTTP answer"
    else:
        return " ".join(str(cause or error).split()) or type(error).__name__
    scheme, tls = ("grpcs", "") if secure else ("grpc", ", or behind TLS (https://)")
    return f"{found}; is this the port of gRPC ({scheme}://, with the endpoint.protocol that ends in -grpc){tls}?"


class Rest:
    """One server's REST API below ``url``. Make it in the event loop that uses it."""

    def __init__(self, url: str, *, headers: Mapping[str, str], ssl_context: ssl.SSLContext) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(headers=dict(headers), connector=aiohttp.TCPConnector(ssl=ssl_context))

    async def ask(self, method: str, path: str, *, body: object | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer:
        """One exchange; ``path`` may end with a query, ``body`` is sent as JSON. `TransportError` when there is no answer."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                return Answer(response.status, await response.read())
        except TimeoutError:
            raise TransportError(f"{self.url}: cannot be reached: no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, ValueError) as error:  # ValueError: an address that is none
            raise TransportError(f"{self.url}: cannot be reached: {_why(error, self.url)}") from None

    async def close(self) -> None:
        """Close its connections."""
        await self._session.close()
