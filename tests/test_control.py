"""The control plane against scripted servers: what it makes of their words, and of their silence."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import pytest
from aiohttp import web
from e2e import profile_data

from servebench.control.base import Activity, Discovery, RefusedError
from servebench.control.kserve import KServeControl
from servebench.control.kserve_grpc import TRITON, KServeGrpcControl
from servebench.control.metrics import metric_sum
from servebench.control.torchserve import TorchServeControl
from servebench.errors import ProfileError, TransportError
from servebench.profile import parse_profile

T = TypeVar("T")
TLS = ssl.create_default_context()
#: ``"METHOD /path?query"`` -> statuses and bodies, the last one again and again
Answers = dict[str, list[tuple[int, object]]]

METADATA = {"name": "m", "platform": "python", "versions": ["1"], "inputs": [], "outputs": []}
READY = [(200, "")]


def ask(answers: Answers, question: Callable[[str], Awaitable[T]]) -> tuple[T, list[tuple[str, str | None]]]:
    """What ``question`` makes of a server that answers so, and what the server was asked: request and Authorization."""

    async def main() -> tuple[T, list[tuple[str, str | None]]]:
        asked: list[tuple[str, str | None]] = []
        left = {request: list(script) for request, script in answers.items()}

        async def handle(request: web.Request) -> web.Response:
            asked.append((f"{request.method} {request.raw_path}", request.headers.get("Authorization")))
            script = left.get(asked[-1][0], [(404, {"error": "nothing there"})])
            status, body = script.pop(0) if len(script) > 1 else script[0]
            return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

        runner = web.ServerRunner(web.Server(handle))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await question(f"http://127.0.0.1:{runner.addresses[0][1]}"), asked
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def kserve(answers: Answers, question: Callable[[KServeControl], Awaitable[T]], *, metrics: bool = False) -> T:
    async def main(url: str) -> T:
        control = KServeControl(
            url + "/", headers={"Authorization": "Bearer t"}, ssl_context=TLS, metrics_url=f"{url}/metrics" if metrics else None
        )
        try:
            return await question(control)
        finally:
            await control.close()

    found, asked = ask(answers, main)
    assert all(token == ("Bearer t" if " /v2" in request else None) for request, token in asked)
    return found


def torchserve(answers: Answers, question: Callable[[TorchServeControl], Awaitable[T]], *, metrics: bool = False) -> T:
    async def main(url: str) -> T:
        control = TorchServeControl(url, token="t", ssl_context=TLS, metrics_url=f"{url}/metrics" if metrics else None)
        try:
            return await question(control)
        finally:
            await control.close()

    found, asked = ask(answers, main)
    assert all(token == ("Bearer t" if " /models" in request else None) for request, token in asked)
    return found


def refusal(call: Callable[[], object], kind: type[TransportError] = RefusedError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- KServe over HTTP ----------------------------------------------------------------------


def test_a_model_that_is_not_there() -> None:
    answers: Answers = {
        "GET /v2/models/m": [(404, {"error": "Request for unknown model: 'm' is not found"})],
        "POST /v2/repository/index": [(200, [{"name": "b"}, {"name": "a", "version": "1"}, {"name": "a", "version": "2"}])],
    }
    text = refusal(lambda: kserve(answers, lambda control: control.discover("m")))
    assert text.startswith("endpoint.model: 'm' is not on the server at http://127.0.0.1:")
    assert text.endswith("(HTTP 404: Request for unknown model: 'm' is not found); it has: a, b")
    about: Answers = {"GET /v2": [(200, {"name": "s", "version": "1", "extensions": []})]}
    assert refusal(lambda: kserve(about, lambda control: control.discover("m"))).endswith("(HTTP 404: nothing there)")
    about["GET /v2"] = [(401, "")]  # whoever asks for a token may well speak KServe
    assert "'m' is not on the server" in refusal(lambda: kserve(about, lambda control: control.discover("m")))


@pytest.mark.parametrize("status", [404, 405])
def test_a_server_that_knows_nothing_of_kserve(status: int) -> None:
    """GET /v2 is the protocol's own server metadata. TorchServe says 404 to all of it, for models that it has."""
    answers: Answers = {"GET /v2": [(status, {"code": status, "message": "Requested resource is not found"})]}
    text = refusal(lambda: kserve(answers, lambda control: control.discover("m")))
    assert text.startswith("endpoint.protocol: http://127.0.0.1:")
    assert text.endswith(
        f" does not seem to speak KServe v2 (GET /v2: HTTP {status}: Requested resource is not found); "
        "a TorchServe needs torchserve-http"
    )


def test_a_server_without_tritons_extensions_is_described_and_says_nothing_of_its_work() -> None:
    answers: Answers = {"GET /v2/models/m/versions/1": [(200, METADATA)], "GET /v2/models/m/versions/1/ready": READY}
    found = kserve(answers, lambda control: control.discover("m", "1"))
    assert (found.model.name, found.server, found.config) == ("m", {}, None)
    assert kserve(answers, lambda control: control.activity("m", "1")) == Activity(ready=True)


@pytest.mark.parametrize("body", ["", "{", "[1]", '{"model_stats": [{"name": "m"}]}', '{"model_stats": 3}', '{"x": 1}'])
def test_statistics_that_are_none_are_not_made_up(body: str) -> None:
    answers: Answers = {"GET /v2/models/m/ready": READY, "GET /v2/models/m/stats": [(200, body)]}
    assert kserve(answers, lambda control: control.activity("m")) == Activity(ready=True)


def test_statistics_are_those_of_all_versions_and_pending_is_in_the_metrics() -> None:
    def version(number: int, success: int, fail: int, queue: tuple[int, int]) -> dict[str, Any]:
        counts = {"success": {"count": success, "ns": 9}, "fail": {"count": fail, "ns": 9}}
        counts["queue"] = {"count": queue[0], "ns": queue[1]}
        return {"version": str(number), "inference_count": 8 * success, "execution_count": success, "inference_stats": counts}

    answers: Answers = {
        "GET /v2/models/m/ready": [(400, {"error": "not ready"})],
        "GET /v2/models/m/stats": [(200, {"model_stats": [version(1, 5, 1, (6, 700)), version(2, 20, 0, (20, 1_000))]})],
        "GET /metrics": [
            (200, 'nv_inference_pending_request_count{model="m",version="1"} 2\n'
                  'nv_inference_pending_request_count{model="m",version="2"} 3\n'
                  'nv_inference_pending_request_count{model="other",version="1"} 70\n')
        ],
    }  # fmt: skip
    assert kserve(answers, lambda control: control.activity("m"), metrics=True) == Activity(
        ready=False, requests=26, failed=1, inferences=200, executions=25, queued=26, queue_ns=1_700, pending=5
    )


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        pytest.param(
            503,
            "explicit model load / unload is not allowed if polling is enabled",
            "(HTTP 503: explicit model load / unload is not allowed if polling is enabled); "
            "start Triton with --model-control-mode=explicit",
            id="another control mode",
        ),
        pytest.param(
            500,
            "failed to load 'm', failed to poll from model repository",
            "(HTTP 500: failed to load 'm', failed to poll from model repository); the server's log says what is wrong with it",
            id="a broken configuration",
        ),
        pytest.param(
            400,
            "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: RuntimeError: no\nluck;\n",
            "(HTTP 400: load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: RuntimeError: no luck;)",
            id="broken code",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded(status: int, error: str, words: str) -> None:
    answers: Answers = {"POST /v2/repository/models/m/load": [(status, {"error": error})]}
    text = refusal(lambda: kserve(answers, lambda control: control.load("m")))
    assert text.partition(": cannot load 'm' ")[2] == words


def test_a_load_that_leaves_the_model_not_ready() -> None:
    answers: Answers = {"POST /v2/repository/models/a%2Fb/load": [(200, "")], "GET /v2/models/a%2Fb/ready": [(400, "")]}
    assert "says that it loaded 'a/b', but" in refusal(lambda: kserve(answers, lambda control: control.load("a/b")))


def test_unloading_ends_when_the_instances_have() -> None:
    """Triton answers at once, and tells in its index when it is done."""
    states = ["UNLOADING", "UNLOADING", "UNAVAILABLE"]
    looks = [(200, [{"name": "m", "state": one}, {"name": "n", "state": "READY"}]) for one in states]
    answers: Answers = {
        "POST /v2/repository/models/m/unload": [(200, "")],
        "POST /v2/repository/index": [*looks, (200, [{"name": "fourth"}])],
    }

    async def unload_and_look(control: KServeControl) -> str:
        await control.unload("m")
        with pytest.raises(RefusedError) as caught:
            await control.discover("m")
        return str(caught.value)

    assert kserve(answers, unload_and_look).endswith("; it has: fourth")  # the first three answers were needed
    refused: Answers = {"POST /v2/repository/models/m/unload": [(503, {"error": "not allowed"})]}
    assert "cannot unload 'm' (HTTP 503: not allowed)" in refusal(lambda: kserve(refused, lambda c: c.unload("m")))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def test_nobody_there() -> None:
    async def main(make: Callable[[], Any]) -> None:
        control = make()
        try:
            await control.activity("m")
        finally:
            await control.close()

    port = closed_port()
    url = f"http://127.0.0.1:{port}"
    for make in (
        lambda: KServeControl(url, headers={}, ssl_context=TLS),
        lambda: TorchServeControl(url, ssl_context=TLS),
        lambda: KServeGrpcControl(f"grpc://127.0.0.1:{port}", metadata=[], ca_file=None),
    ):
        assert refusal(
            lambda make=make: asyncio.run(main(make)), TransportError  # type: ignore[misc]
        ).endswith(f"127.0.0.1:{port}: cannot be reached: connection refused; is the server running there?")  # fmt: skip


async def settings_of_http2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """What a gRPC server says first (RFC 9113, 3.4): an empty SETTINGS frame."""
    writer.write(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))


async def refusal_of_http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """It hears something, and hangs up."""
    await reader.read(1)


async def end_of_a_call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A gRPC server that dies of a call: it says SETTINGS, hears HEADERS (frame type 1), and hangs up."""
    await settings_of_http2(reader, writer)
    await reader.readexactly(24)  # the client's preface
    kind = None
    while kind != 1:
        head = await reader.readexactly(9)
        kind = head[3]
        await reader.readexactly(int.from_bytes(head[:3]))


@pytest.mark.parametrize(
    ("scheme", "answer", "words"),
    [
        pytest.param(
            "http",
            settings_of_http2,
            "does not answer HTTP; is this the port of gRPC (grpc://, with the endpoint.protocol that ends in -grpc), "
            "or behind TLS (https://)?",
            id="HTTP to gRPC's port",
        ),
        pytest.param("http", silence, "ended the connection without an HTTP answer; is this the port of gRPC", id="hangs up"),
        pytest.param("https", refusal_of_http1, "does not answer TLS; is it http://?", id="TLS to a plain server"),
        pytest.param("https", silence, "does not answer TLS; is it http://?", id="TLS to a plain server that hangs up"),
        pytest.param(
            "grpc",
            refusal_of_http1,
            "does not speak gRPC; is this the port of HTTP (http://, with the endpoint.protocol that ends in -http), "
            "or behind TLS (grpcs://)?",
            id="gRPC to HTTP's port",
        ),
        pytest.param(
            "grpc", silence, "ended the connection before it spoke gRPC; is this the port of HTTP", id="as Triton's HTTP port"
        ),
        pytest.param("grpc", end_of_a_call, "Stream removed", id="a gRPC server that dies gets no advice"),
        pytest.param("grpcs", refusal_of_http1, "does not answer TLS; is it grpc://?", id="gRPC with TLS to a plain server"),
    ],
)
def test_a_server_that_speaks_something_else(
    scheme: str, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], words: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
            await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            control = (
                KServeGrpcControl(url, metadata=[], ca_file=None)
                if scheme.startswith("grpc")
                else KServeControl(url, headers={}, ssl_context=TLS)
            )
            try:
                await control.discover("m")
            finally:
                await control.close()

    text = refusal(lambda: asyncio.run(main()), TransportError)
    assert f": cannot be reached: {words}" in text
    assert ("?" in text) is ("?" in words or "is this" in words)


def test_a_certificate_that_nobody_trusts_is_named() -> None:
    """Neither "refused" nor "no TLS": the library's words say best what is wrong."""
    trustme = pytest.importorskip("trustme", reason="trustme is not installed")

    async def main() -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
        async with await asyncio.start_server(silence, "127.0.0.1", 0, ssl=tls) as server:
            control = KServeControl(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", headers={}, ssl_context=TLS)
            try:
                await control.ready()
            finally:
                await control.close()

    text = refusal(lambda: asyncio.run(main()), TransportError)
    assert "cannot be reached: " in text and "certificate verify failed" in text and "?" not in text


# ---- KServe over gRPC ----------------------------------------------------------------------


def grpc_control(code: grpc.StatusCode, words: str, question: Callable[[KServeGrpcControl], Awaitable[T]]) -> T:
    """What ``question`` makes of a gRPC server that answers every call with an error."""

    class Refuses(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            async def refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
                await context.abort(code, words)
                return b""

            return grpc.unary_unary_rpc_method_handler(refuse)

    async def main() -> T:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([Refuses()])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        control = KServeGrpcControl(f"grpc://127.0.0.1:{port}", metadata=[("X-Key", "k")], ca_file=None)
        try:
            return await question(control)
        finally:
            await control.close()
            await server.stop(None)

    return asyncio.run(main())


def test_a_refusal_over_grpc_is_not_taken_for_silence() -> None:
    """UNAVAILABLE is what grpcio says of a server that is not there, and Triton of what it does not allow."""
    words = "explicit model load / unload is not allowed if polling is enabled"
    text = refusal(lambda: grpc_control(grpc.StatusCode.UNAVAILABLE, words, lambda control: control.load("m")))
    assert text.endswith(f"cannot load 'm' (UNAVAILABLE: {words}); start Triton with --model-control-mode=explicit")
    unknown = (grpc.StatusCode.NOT_FOUND, "Request for unknown model:\n 'm' is not found")
    text = refusal(lambda: grpc_control(*unknown, lambda control: control.discover("m")))
    assert text.endswith("(NOT_FOUND: Request for unknown model: 'm' is not found)")
    assert "cannot unload 'm' (NOT_FOUND: " in refusal(lambda: grpc_control(*unknown, lambda control: control.unload("m")))
    assert grpc_control(*unknown, lambda control: control.activity("m")) == Activity(ready=False)
    text = refusal(lambda: grpc_control(grpc.StatusCode.UNIMPLEMENTED, "no method", lambda control: control.discover("m")))
    assert text.endswith(" does not seem to speak KServe v2 (UNIMPLEMENTED: no method); a TorchServe needs torchserve-grpc")


@pytest.mark.parametrize(
    "name",
    [
        "RepositoryModelLoadRequest",
        "RepositoryModelUnloadRequest",
        "ModelStatisticsRequest",
        "ModelStatisticsResponse",
        "ModelStatistics",
        "InferStatistics",
        "StatisticDuration",
    ],
)
def test_field_numbers_and_types_are_tritons(name: str) -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed")
    ours, theirs = getattr(TRITON, name).DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR
    assert ours.fields
    for field in ours.fields:
        published = theirs.fields_by_name[field.name]
        assert (field.number, field.type) == (published.number, published.type), field.name


# ---- TorchServe ----------------------------------------------------------------------------

# TorchServe 0.12's own words.
NOT_ALLOWED = {
    "code": 405,
    "type": "MethodNotAllowedException",
    "message": "Requested method is not allowed, please refer to API document.",
}
WRONG_TOKEN = {
    "code": 400,
    "type": "InvalidKeyException",
    "message": "Token Authorization failed. Token either incorrect, expired, or not provided correctly",
}
NO_WORKER = {"code": 500, "type": "InternalServerException", "message": "Failed to start workers for model m version: 1.0"}


def described(*states: str, pending: int = 0) -> list[dict[str, Any]]:
    workers = [{"id": f"900{number}", "status": state} for number, state in enumerate(states)]
    return [{"modelName": "m", "workers": workers, "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": pending}}]


def test_scaling_ends_when_all_workers_are_ready() -> None:
    """TorchServe calls a worker that still loads UNLOADING."""
    answers: Answers = {
        "PUT /models/m?min_worker=2&max_worker=2&synchronous=true": [(200, {"status": "Workers scaled to 2 for model: m"})],
        "GET /models/m": [(200, described("READY", "UNLOADING")), (200, described("READY", "READY"))],
    }

    async def scale(control: TorchServeControl) -> Discovery:
        await control.scale("m", 2, 2)
        return await control.discover("m")

    assert torchserve(answers, scale).config == described("READY", "READY")[0]


@pytest.mark.parametrize(
    ("answers", "question", "words"),
    [
        pytest.param(
            {"POST /models?url=m.mar&initial_workers=2&synchronous=true": [(405, NOT_ALLOWED)]},
            lambda control: control.register("m.mar", workers=2),
            "cannot register 'm.mar' (HTTP 405: Requested method is not allowed, please refer to API document.); "
            "start TorchServe with enable_model_api=true (model_api: true of our launcher)",
            id="register without the model API",
        ),
        pytest.param(
            {"DELETE /models/m/2.0": [(405, NOT_ALLOWED)]},
            lambda control: control.unregister("m", "2.0"),
            "start TorchServe with enable_model_api=true",
            id="unregister without the model API",
        ),
        pytest.param(
            {"GET /models/m": [(400, WRONG_TOKEN)]},
            lambda control: control.discover("m"),
            "cannot describe 'm' (HTTP 400: Token Authorization failed. Token either incorrect, expired, or not provided "
            "correctly); give its management token (server.management_token_env)",
            id="a wrong token",
        ),
        pytest.param(
            {"PUT /models/m/1.0?min_worker=3&max_worker=4&synchronous=true": [(500, NO_WORKER)]},
            lambda control: control.scale("m", 3, 4, "1.0"),
            "cannot scale 'm' to 3 workers (HTTP 500: Failed to start workers for model m version: 1.0)",
            id="workers that do not start",
        ),
        pytest.param(
            {
                "GET /models/m": [(404, {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: m"})],
                "GET /models?limit=1000": [(200, {"models": [{"modelName": "b"}, {"modelName": "a"}]})],
            },
            lambda control: control.discover("m"),
            "(HTTP 404: Model not found: m); it has: a, b",
            id="no such model",
        ),
        pytest.param(
            {"GET /models/m": [(200, described("READY", "UNLOADING"))]},
            lambda control: control.discover("m"),
            "are READY: READY, UNLOADING",
            id="a worker that is not ready",
        ),
        pytest.param(
            {"GET /models/m": [(200, described())]},
            lambda control: control.discover("m"),
            "are READY: it has none",
            id="no workers",
        ),
    ],
)
def test_what_torchserve_refuses(
    answers: Answers, question: Callable[[TorchServeControl], Awaitable[object]], words: str
) -> None:
    assert words in refusal(lambda: torchserve(answers, question))


@pytest.mark.parametrize("body", ["", "{}", "[]", "[{}]", "not JSON"])
def test_a_server_that_is_no_torchserve(body: str) -> None:
    answers: Answers = {"GET /models/m": [(200, body)]}
    text = refusal(lambda: torchserve(answers, lambda control: control.discover("m")), TransportError)
    assert "this is not TorchServe's management API (HTTP 200: " in text


def test_what_torchserve_tells_of_its_work() -> None:
    page = 'ts_inference_requests_total{model_name="m",model_version="1.0",hostname="h",} 41.0\n'
    answers: Answers = {
        "GET /models/m": [(200, described("READY", "READY", pending=7))],
        "GET /metrics": [(200, page + page.replace('"1.0"', '"2.0"').replace("41", "1") + page.replace('"m"', '"n"'))],
    }
    assert torchserve(answers, lambda control: control.activity("m"), metrics=True) == Activity(
        ready=True, requests=42, pending=7, workers=("READY", "READY")
    )
    del answers["GET /metrics"]  # nothing was counted yet
    assert torchserve(answers, lambda control: control.activity("m"), metrics=True).requests == 0
    assert torchserve(answers, lambda control: control.activity("m")).requests is None
    half: Answers = {"GET /models/m": [(200, described("READY", "UNLOADING"))]}
    assert torchserve(half, lambda control: control.activity("m")) == Activity(
        ready=False, pending=0, workers=("READY", "UNLOADING")
    )
    assert torchserve({}, lambda control: control.activity("m")) == Activity(ready=False)


# ---- the profile's keys -------------------------------------------------------------------


TRITON_AT, TORCHSERVE_AT = {"url": "http://127.0.0.1:8000"}, {"url": "http://127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("protocol", "server", "words"),
    [
        pytest.param("kserve-http", {"launch": "triton", "load_model": True}, "load_model: a launched", id="load, launched"),
        pytest.param(
            "torchserve-http",
            {"launch": "torchserve", "management_url": "http://127.0.0.1:8081"},
            "management_url: a launched",
            id="management, launched",
        ),
        pytest.param(
            "torchserve-http",
            {"launch": "torchserve", "workers": 2},
            "workers: for a server at url; a launched",
            id="workers, launched",
        ),
        pytest.param(
            "torchserve-http", TORCHSERVE_AT | {"load_model": True}, "server.load_model: is Triton's", id="load, TorchServe"
        ),
        pytest.param("torchserve-http", TORCHSERVE_AT | {"workers": 2}, "workers: needs management_url", id="workers alone"),
        pytest.param(
            "torchserve-http", TORCHSERVE_AT | {"management_token_env": "X"}, "management_token_env: needs", id="token alone"
        ),
        pytest.param(
            "kserve-http",
            TRITON_AT | {"management_url": "http://127.0.0.1:8081"},
            "server.management_url: is TorchServe's",
            id="Triton",
        ),
        pytest.param(
            "torchserve-http",
            TORCHSERVE_AT | {"management_url": "grpc://127.0.0.1:7071"},
            "management_url: 'grpc://127.0.0.1:7071' is not an http:// or https:// address",
            id="the management API over gRPC",
        ),
        pytest.param(
            "torchserve-http",
            TORCHSERVE_AT | {"management_url": "http://me:secret@127.0.0.1:8081"},
            "management_url: holds a user or password; use management_token_env",
            id="a password in the address",
        ),
        pytest.param(
            "torchserve-http",
            TORCHSERVE_AT | {"management_url": "http://127.0.0.1:8081", "workers": 0},
            "server.workers: input should be greater than or equal to 1",
            id="no worker",
        ),
    ],
)
def test_keys_that_do_not_fit(protocol: str, server: dict[str, Any], words: str) -> None:
    data = profile_data("http://127.0.0.1:1", constraints=["p99 <= 1s"], load={"target_qps": 1})
    data["server"], data["endpoint"]["protocol"] = server, protocol
    with pytest.raises(ProfileError) as caught:
        parse_profile(data, source="p.yaml")
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_keys_that_fit() -> None:
    data = profile_data("http://127.0.0.1:1", constraints=["p99 <= 1s"], load={"target_qps": 1})
    data["server"] |= {"management_url": "https://127.0.0.1:8081", "management_token_env": "X", "workers": 4}
    data["endpoint"]["protocol"] = "torchserve-grpc"
    data["server"]["url"] = "grpc://127.0.0.1:7070"
    assert parse_profile(data, source="p.yaml").server.workers == 4
    for url, protocol in (("http://127.0.0.1:1", "kserve-http"), ("grpc://127.0.0.1:1", "kserve-grpc")):
        data["server"], data["endpoint"]["protocol"] = {"url": url, "load_model": True}, protocol
        assert parse_profile(data, source="p.yaml").server.load_model


# ---- metrics -------------------------------------------------------------------------------


# The format's own example (prometheus.io, "Exposition formats"), and an escaped label.
PAGE = """\
# HELP http_requests_total The total number of HTTP requests.
# TYPE http_requests_total counter
http_requests_total{method="post",code="200"} 1027 1395066363000
http_requests_total{method="post",code="400"}    3 1395066363000
# Escaping in label values:
msdos_file_access_time_seconds{path="C:\\\\DIR\\\\FILE.TXT",error="Cannot find file:\\n\\"FILE.TXT\\""} 1.458255915e9
metric_without_timestamp_and_labels 12.47
"""


@pytest.mark.parametrize(
    ("name", "labels", "total"),
    [
        pytest.param("http_requests_total", {}, 1030, id="all samples"),
        pytest.param("http_requests_total", {"code": "400"}, 3, id="one of them"),
        pytest.param("http_requests_total", {"code": "500"}, None, id="none of them"),
        pytest.param("http_requests", {}, None, id="the beginning of a name"),
        pytest.param("metric_without_timestamp_and_labels", {}, 12, id="no labels"),
        pytest.param(
            "msdos_file_access_time_seconds", {"error": 'Cannot find file:\\n\\"FILE.TXT\\"'}, 1458255915, id="escapes"
        ),
    ],
)
def test_metrics(name: str, labels: dict[str, str], total: int | None) -> None:
    assert metric_sum(PAGE, name, **labels) == total
