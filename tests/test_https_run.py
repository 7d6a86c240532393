"""A whole run over TLS against an independent server (aiohttp), with a token, JSON tensors and a private authority."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from aiohttp import web
from e2e import assert_books_balance, profile_data, run

from servebench.errors import TransportError

TOKEN = "t0ken-that-must-not-leak"


class Doubler:
    """A KServe v2 server that doubles X; it wants a bearer token, and is told nothing of batching."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._authorise])
        app.router.add_get("/v2/models/doubler", self._metadata)
        app.router.add_get("/v2", self._server)
        app.router.add_post("/v2/models/doubler/infer", self._infer)
        return app

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}" or request.headers.get("X-Team") != "blue":
            return web.json_response({"error": "who are you?"}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _server(self, request: web.Request) -> web.Response:
        return web.json_response({"name": "test", "version": "1", "extensions": []})

    async def _metadata(self, request: web.Request) -> web.Response:
        tensor = {"datatype": "FP32", "shape": [-1, 3]}
        return web.json_response({"name": "doubler", "inputs": [{"name": "X", **tensor}], "outputs": [{"name": "Y", **tensor}]})

    async def _infer(self, request: web.Request) -> web.Response:
        query = await request.json()
        (tensor,) = query["inputs"]
        self.seen.append(tensor["name"])
        doubled = (2 * np.array(tensor["data"])).ravel().tolist()
        output = {"name": "Y", "datatype": "FP32", "shape": tensor["shape"], "data": doubled}
        return web.json_response({"model_name": "doubler", "outputs": [output]})


@pytest.fixture
def doubler(tmp_path: Path) -> Iterator[tuple[str, Path, Doubler]]:
    """(https URL, authority's certificate, the server) of a server in a thread of its own."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    server = Doubler()
    started = threading.Event()
    loop = asyncio.new_event_loop()
    ports: list[int] = []

    async def serve() -> None:
        runner = web.AppRunner(server.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        ports.append(runner.addresses[0][1])
        stop.clear()
        started.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(10)
    yield f"https://127.0.0.1:{ports[0]}", ca_file, server
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def settings(url: str, ca_file: Path, tmp_path: Path) -> dict[str, Any]:
    inputs = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "inputs.npz", X=inputs)
    np.savez(tmp_path / "outputs.npz", Y=2 * inputs)
    return profile_data(
        url,
        constraints=["p90 <= 1s"],
        load={"target_qps": 100, "min_duration_s": 1},
        endpoint={
            "model": "doubler",
            "tensor_format": "json",
            "ca_file": str(ca_file),
            "bearer_token_env": "DOUBLER_TOKEN",
            "headers": {"X-Team": "blue"},
        },
        samples={"source": "npz", "path": str(tmp_path / "inputs.npz")},
        output_check={"golden": str(tmp_path / "outputs.npz")},
    )


def test_a_run_over_tls_with_a_token(
    tmp_path: Path, doubler: tuple[str, Path, Doubler], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, ca_file, server = doubler
    monkeypatch.setenv("DOUBLER_TOKEN", TOKEN)
    document, data = run(settings(url, ca_file, tmp_path), tmp_path / "run")
    assert document["counts"]["ok"] == document["counts"]["planned"] == len(server.seen) == len(data.outcome)
    assert document["output_check"]["checked"] == document["counts"]["ok"]
    assert document["output_check"]["wrong"] == 0
    assert_books_balance(document, tmp_path / "run")
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"bearer_token_env": None}, r"HTTP 401: who are you\?", id="no token"),
        pytest.param({"ca_file": None}, "certificate verify failed", id="unknown authority"),
        pytest.param({"model": "tripler"}, "'tripler' is not on the server", id="another model"),
    ],
)
def test_what_the_server_or_tls_refuses_is_said_before_any_load(
    tmp_path: Path,
    doubler: tuple[str, Path, Doubler],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    url, ca_file, server = doubler
    monkeypatch.setenv("DOUBLER_TOKEN", TOKEN)
    data = settings(url, ca_file, tmp_path)
    data["endpoint"] |= change
    with pytest.raises(TransportError, match=message):
        run(data, tmp_path / "run")
    assert server.seen == []
    assert not (tmp_path / "run").exists()
