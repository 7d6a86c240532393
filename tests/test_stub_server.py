"""The stub over real sockets: KServe as tritonclient reads it, true stamps, and every fault as a raw client sees it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import stubs
import tritonclient.http as triton
from servebench_servers.stub import StubLauncher, StubOptions
from servebench_servers.stub_faults import Faults
from servebench_servers.stub_queue import Service, service_times_ns, simulate
from stubs import NOTHING, count, reset, stamps
from tritonclient.utils import InferenceServerException

from servebench.clock import now_ns
from servebench.errors import LaunchError
from servebench.launcher import RunningServer, find_launcher

start, shared, instant = stubs.start, stubs.shared, stubs.instant  # pytest finds its fixtures here


def infer_request(document: dict[str, Any] | None = None, *, raw: bytes = bytes(64), headers: str = "") -> bytes:
    """An inference request for one row of 16 zeros, binary both ways, unless told otherwise."""
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}
    document = {"inputs": [tensor], "parameters": {"binary_data_output": True}} | (document or {})
    head = json.dumps(document).encode()
    return (
        f"POST /v2/models/m/infer HTTP/1.1\r\nHost: stub\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + len(raw)}\r\n{headers}\r\n"
    ).encode() + head + raw  # fmt: skip


class RawClient:
    """A TCP connection that sends what it is told and reads replies with the standard library's parser."""

    def __init__(self, server: RunningServer) -> None:
        host, port = server.urls["http"].removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self.socket.makefile("rb")

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What HTTPResponse reads from: one stream for all replies, or read-ahead would lose pipelined ones."""
        return UnclosedReader(self._stream)  # type: ignore[return-value]

    def read(self) -> tuple[int, http.client.HTTPMessage, bytes]:
        response = http.client.HTTPResponse(self)  # type: ignore[arg-type]
        response.begin()
        return response.status, response.headers, response.read()

    def ask(self, request: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        self.socket.sendall(request)
        return self.read()

    def rest(self) -> bytes:
        """Everything until the server ends the connection."""
        return self._stream.read()

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


class UnclosedReader:
    """A stream whose close does nothing."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        pass


@pytest.fixture
def connect() -> Iterator[Callable[[RunningServer], RawClient]]:
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(contextlib.closing(RawClient(server)))


def triton_client(server: RunningServer) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(server.urls["http"].removeprefix("http://"))


# KServe, as its best-known client reads it.


def test_tritonclient_finds_the_model(instant):
    with triton_client(instant) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m", "1")
        assert not client.is_model_ready("other")
        metadata = client.get_model_metadata("m")
        assert metadata["inputs"] == [{"name": "INPUT", "datatype": "FP32", "shape": [-1, 16]}]
        assert metadata["outputs"] == [{"name": "OUTPUT", "datatype": "FP32", "shape": [-1, 16]}]
        assert client.get_model_config("m")["max_batch_size"] == 128
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert count(instant) == 0


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False, None], ids=["binary", "json", "default"])
@pytest.mark.parametrize("rows", [1, 3])
def test_tritonclient_reads_the_answer(instant, binary_input, binary_output, rows):
    tensor = triton.InferInput("INPUT", [rows, 16], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, 16), dtype=np.float32), binary_data=binary_input)
    outputs = None if binary_output is None else [triton.InferRequestedOutput("OUTPUT", binary_data=binary_output)]
    with triton_client(instant) as client:
        result = client.infer("m", [tensor], outputs=outputs, request_id="query 7", model_version="1")
    np.testing.assert_array_equal(result.as_numpy("OUTPUT"), [np.arange(16)] * rows)
    assert result.get_response()["id"] == "query 7"
    assert ("data" in result.get_output("OUTPUT")) == (binary_output is False)
    assert count(instant) == 1


def test_shape_options(start):
    server = start(service=NOTHING, input_elements=3, output_elements=1000)
    tensor = triton.InferInput("INPUT", [2, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((2, 3), dtype=np.float32))
    with triton_client(server) as client:
        assert client.infer("m", [tensor]).as_numpy("OUTPUT").shape == (2, 1000)
        assert client.get_model_metadata("m")["inputs"][0]["shape"] == [-1, 3]


def test_plain_json_is_the_default(instant, connect):
    data = {"inputs": [{"name": "INPUT", "datatype": "FP32", "shape": [1, 16], "data": [[0.5] * 16]}]}
    body = json.dumps(data).encode()
    request = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    status, headers, reply = connect(instant).ask(request)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(reply)["outputs"] == [
        {"name": "OUTPUT", "datatype": "FP32", "shape": [1, 16], "data": [float(value) for value in range(16)]}
    ]


def test_unknown_model_is_not_found(instant):
    tensor = triton.InferInput("INPUT", [1, 16], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 16), dtype=np.float32))
    with triton_client(instant) as client, pytest.raises(InferenceServerException, match="unknown model: 'other'") as caught:
        client.infer("other", [tensor])
    assert caught.value.status() == "404"
    assert count(instant) == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/", 404, id="nothing-there"),
        pytest.param("GET", "/v2/models/m/versions/2", 404, id="unknown-version"),
        pytest.param("GET", "/v2/models/m/infer", 405, id="wrong-method"),
        pytest.param("GET", "/v2/models/%6d/ready", 200, id="quoted-name"),
    ],
)
def test_paths(instant, connect, method, path, status):
    found, _, body = connect(instant).ask(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert found == status
    assert status == 200 or set(json.loads(body)) == {"error"}


def tensor_with(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [1, 16], "parameters": {"binary_data_size": 64}}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize(
    ("request_bytes", "message"),
    [
        pytest.param(infer_request({"inputs": []}), "expected 1 input", id="no-input"),
        pytest.param(infer_request(tensor_with(name="X")), "unexpected inference input 'X'", id="other-input"),
        pytest.param(infer_request(tensor_with(datatype="FP16")), "INPUT is FP32, got 'FP16'", id="datatype"),
        pytest.param(infer_request(tensor_with(shape=[1, 8])), r"got [1, 8]", id="shape"),
        pytest.param(infer_request(tensor_with(shape=[16])), r"got [16]", id="no-batch-axis"),
        pytest.param(infer_request(tensor_with(shape=[129, 16])), r"got [129, 16]", id="too-many-rows"),
        pytest.param(infer_request(raw=bytes(60)), "60 bytes follow", id="short-tensor"),
        pytest.param(infer_request(tensor_with(parameters={"binary_data_size": 60}), raw=bytes(60)), "got 60 bytes", id="size"),
        pytest.param(infer_request(tensor_with(data=[1.0]), raw=b""), "got 1 numbers, expected 16", id="short-data"),
        pytest.param(infer_request(tensor_with(data=["a"] * 16), raw=b""), "must be numbers", id="words"),
        pytest.param(infer_request(tensor_with(data=[0] * 16)), "64 bytes follow", id="data-and-bytes"),
        pytest.param(infer_request({"outputs": [{"name": "X"}]}), "it has only OUTPUT", id="other-output"),
        pytest.param(infer_request({"parameters": 3}), "parameters must be an object", id="parameters"),
        pytest.param(infer_request().replace(b"{", b"[", 1), "failed to parse", id="not-json"),
        pytest.param(infer_request().replace(b"Inference-Header", b"X-Header"), "failed to parse", id="no-json-length"),
        pytest.param(infer_request().replace(b"-Length: ", b"-Length: x", 1), "failed to parse", id="bad-json-length"),
    ],
)
def test_bad_requests_are_refused_in_words_and_keep_the_connection(instant, connect, request_bytes, message):
    client = connect(instant)
    status, _, body = client.ask(request_bytes)
    assert status == 400
    assert message in json.loads(body)["error"]
    assert client.ask(infer_request())[0] == 200
    assert count(instant) == 1


# HTTP/1.1.


def test_a_request_in_single_bytes_arrives_with_its_last_one(instant, connect):
    client = connect(instant)
    request = infer_request()
    for index in range(len(request) - 1):
        client.socket.sendall(request[index : index + 1])
    assert count(instant) == 0
    before_last_ns = now_ns()
    status, _, _ = client.ask(request[-1:])
    assert status == 200
    assert stamps(instant)["arrival_ns"][0] >= before_last_ns


def test_pipelined_requests_are_answered_in_order(start, connect):
    client = connect(start(service={"kind": "constant", "mean_ms": 20}))
    health = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    client.socket.sendall(infer_request({"id": "a"}) + health + infer_request({"id": "b"}))
    first, second, third = client.read(), client.read(), client.read()
    ids = [json.loads(body[: int(headers["Inference-Header-Content-Length"])])["id"] for _, headers, body in (first, third)]
    assert ids == ["a", "b"]
    assert (second[0], second[2]) == (200, b"")


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(infer_request(headers="Connection: close\r\n"), id="connection-close"),
        pytest.param(infer_request().replace(b"HTTP/1.1", b"HTTP/1.0"), id="http-1.0"),
    ],
)
def test_the_connection_ends_when_the_client_asks_for_it(instant, connect, request_bytes):
    client = connect(instant)
    assert client.ask(request_bytes)[0] == 200
    assert client.rest() == b""


def test_what_is_not_http_gets_400_and_the_connection_ends(instant, connect):
    client = connect(instant)
    assert client.ask(b"\x16\x03\x01\x02\x00 hello\r\n\r\n")[0] == 400
    assert client.rest() == b""


def test_a_client_that_leaves_is_served_nevertheless(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 5})
    leaver = connect(server)
    leaver.socket.sendall(infer_request())
    while count(server) == 0:
        pass
    leaver.close()
    assert connect(server).ask(infer_request())[0] == 200
    assert (stamps(server)["departure_ns"] > 0).all()


# The queue, as its stamps tell it.


def send_open_loop(client: RawClient, gaps_ns: np.ndarray) -> np.ndarray:
    """Send one request after each gap, whatever comes back; gives the times of sending, then reads all replies."""
    request = infer_request()
    sent_ns = np.zeros(len(gaps_ns), dtype=np.int64)
    due_ns = now_ns() + np.cumsum(gaps_ns)
    for index, moment_ns in enumerate(due_ns.tolist()):
        time.sleep(max(0, moment_ns - now_ns()) / 1e9)
        sent_ns[index] = now_ns()
        client.socket.sendall(request)
    for _ in gaps_ns:
        assert client.read()[0] == 200
    return sent_ns


def test_departures_are_the_queues_to_20_microseconds(start, connect):
    service = Service(kind="exponential", mean_ms=1.5, seed=42)
    server = start(service=service)
    gaps_ns = np.rint(np.random.default_rng(3).exponential(2.5e6, 500)).astype(np.int64)
    sent_ns = send_open_loop(connect(server), gaps_ns)
    seen = stamps(server)
    np.testing.assert_array_equal(seen["service_ns"], service_times_ns(service, 500))
    assert (seen["arrival_ns"] >= sent_ns).all()

    departure_ns = 0  # Lindley's recursion, written out
    for index in range(500):
        departure_ns = max(int(seen["arrival_ns"][index]), departure_ns) + int(seen["service_ns"][index])
        assert seen["due_ns"][index] == departure_ns
    late_us = (seen["departure_ns"] - seen["due_ns"]) / 1e3
    assert late_us.min() >= 0
    assert np.median(late_us) <= 20


def test_the_reply_is_on_the_wire_when_its_stamp_says_so(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 1.0})
    client = connect(server)
    times_ns = []
    for _ in range(200):
        sent_ns = now_ns()
        client.ask(infer_request())
        times_ns.append((sent_ns, now_ns()))
    sent_ns, received_ns = np.array(times_ns).T
    seen = stamps(server)
    assert (seen["arrival_ns"] >= sent_ns).all() and (received_ns >= seen["departure_ns"]).all()
    # What is not service is two trips over loopback and this client's parsing; a reply held back shows here.
    assert np.median(received_ns - sent_ns - 1_000_000) < 1_000_000


def test_the_eco_timer_needs_no_spinning_to_be_within_a_millisecond(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 3.0}, precise=False)
    client = connect(server)
    for _ in range(50):
        client.ask(infer_request())
    seen = stamps(server)
    late_ns = seen["departure_ns"] - seen["due_ns"]
    assert late_ns.min() >= 0 and np.median(late_ns) < 1_000_000


def test_batches_form_while_the_server_is_busy(start, connect):
    service = Service(kind="batch", batch_base_ms=4, batch_per_query_ms=1, max_batch=3)
    server = start(service=service)
    client = connect(server)
    client.socket.sendall(infer_request() * 5)  # one segment, so one arrival time: 1 starts, 3 go together, 1 is left
    assert [client.read()[0] for _ in range(5)] == [200] * 5
    seen = stamps(server)
    assert seen["batch_size"].tolist() == [1, 3, 3, 3, 1]
    assert seen["service_ns"].tolist() == [5_000_000, 7_000_000, 7_000_000, 7_000_000, 5_000_000]
    np.testing.assert_array_equal(seen["due_ns"], simulate(seen["arrival_ns"], service).departure_ns)


def test_a_full_queue_refuses_with_503(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 20}, queue_limit=1)
    client = connect(server)
    client.socket.sendall(infer_request() * 3)
    replies = [client.read() for _ in range(3)]
    assert [status for status, _, _ in replies] == [200, 200, 503]
    assert "queue is full" in json.loads(replies[2][2])["error"]
    assert stamps(server)["batch_size"].tolist() == [1, 1, 0]


def test_reset_restarts_the_streams_and_forgets_the_stamps(start, connect):
    server = start(service={"kind": "exponential", "mean_ms": 0.1, "seed": 8}, faults={"status": 0.5, "seed": 1})
    client = connect(server)
    first = [client.ask(infer_request())[0] for _ in range(20)]
    services_ns = stamps(server)["service_ns"].tolist()
    assert set(first) == {200, 503}
    reset(server)
    assert count(server) == 0
    assert [client.ask(infer_request())[0] for _ in range(20)] == first
    assert stamps(server)["service_ns"].tolist() == services_ns


def test_reset_waits_for_an_empty_queue(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 300})
    client = connect(server)
    client.socket.sendall(infer_request())
    while count(server) == 0:
        pass
    with pytest.raises(urllib.error.HTTPError) as caught:
        reset(server)
    with caught.value as refusal:
        assert refusal.code == 409 and "1 queries are still in the queue" in json.load(refusal)["error"]
    assert client.read()[0] == 200
    reset(server)


def test_stamps_as_a_numpy_file_are_the_same(instant, connect):
    client = connect(instant)
    for _ in range(3):
        client.ask(infer_request())
    with urllib.request.urlopen(f"{instant.urls['http']}/stub/stamps?format=npy") as response:
        table = np.load(io.BytesIO(response.read()))
    for name, column in stamps(instant).items():
        np.testing.assert_array_equal(table[name], column)


# Faults, each certain, as a raw client sees them.


def test_fault_status(start, connect):
    status, _, body = connect(start(service=NOTHING, faults={"status": 1, "status_code": 500})).ask(infer_request())
    assert status == 500 and set(json.loads(body)) == {"error"}


def test_fault_reset(start, connect):
    client = connect(start(service=NOTHING, faults={"reset": 1}))
    client.socket.sendall(infer_request())
    with pytest.raises(ConnectionResetError):  # an orderly end would read as b""
        client.socket.recv(1)


def test_fault_truncated(start, connect):
    client = connect(start(service=NOTHING, faults={"truncated": 1}))
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.ask(infer_request())
    assert len(caught.value.partial) > 0
    assert caught.value.expected == pytest.approx(len(caught.value.partial), abs=1)  # half is there, half is missing


def test_fault_slow_body(start, connect):
    server = start(service=NOTHING, faults={"slow_body": 1, "slow_body_delay_ms": 80})
    client = connect(server)
    sent_ns = now_ns()
    client.socket.sendall(infer_request())
    client.socket.recv(1, socket.MSG_PEEK)
    first_byte_ns = now_ns()
    status, _, body = client.read()
    completed_ns = now_ns()
    assert status == 200 and body.endswith(np.arange(16, dtype="<f4").tobytes())
    assert completed_ns - sent_ns >= 79_000_000  # the loop's own timers count whole milliseconds
    assert completed_ns - first_byte_ns > first_byte_ns - sent_ns


def test_fault_hang(start, connect):
    server = start(service=NOTHING, faults={"hang": 1})
    client = connect(server)
    client.socket.sendall(infer_request())
    while not stamps(server)["departure_ns"].any():  # from here on the reply is overdue
        pass
    client.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        client.socket.recv(1)


@pytest.mark.parametrize("binary", [True, False])
def test_fault_wrong_output(start, connect, binary):
    server = start(service=NOTHING, faults={"wrong_output": 1})
    request = infer_request({"outputs": [{"name": "OUTPUT", "parameters": {"binary_data": binary}}]})
    status, headers, body = connect(server).ask(request)
    assert status == 200
    output = json.loads(body[: int(headers.get("Inference-Header-Content-Length", len(body)))])["outputs"][0]
    assert output["shape"] == [1, 16]
    assert (output["parameters"] == {"binary_data_size": 0}) if binary else (output["data"] == [])


def test_fault_garbage(start, connect):
    client = connect(start(service=NOTHING, faults={"garbage": 1}))
    with pytest.raises(http.client.BadStatusLine):
        client.ask(infer_request())


def test_fault_close_idle(start, connect):
    client = connect(start(service=NOTHING, faults={"close_idle": 1}))
    status, headers, _ = client.ask(infer_request())
    assert (status, headers["Connection"]) == (200, None)
    assert client.rest() == b""


def test_faults_spare_everything_but_inference(start, connect):
    client = connect(start(service=NOTHING, faults={"reset": 1}))
    assert client.ask(b"GET /v2/models/m HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


# The launcher.


def test_the_launcher_is_installed_under_its_name(tmp_path):
    launcher = find_launcher("stub")
    assert isinstance(launcher, StubLauncher)
    server = launcher.launch("any name", launcher.Options(), tmp_path)
    try:
        with triton_client(server) as client:
            assert client.is_model_ready("any name")
        facts = server.describe()
        assert json.loads(json.dumps(facts)) == facts
        assert facts["service"] == "constant, mean 2 ms; one server, first come first served, no limit"
        assert StubOptions(**facts["config"]) == StubOptions()
        assert psutil.Process(facts["pid"]).cmdline() == facts["command"]
        assert server.exit_code() is None
        assert server.log_path.read_text() == f"listening on {server.urls['http']}\n"
    finally:
        server.stop()


@pytest.mark.parametrize("model", [StubOptions, Service, Faults])
def test_every_option_is_documented(model):
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_stop_leaves_nothing(start, connect):
    server = start(service=NOTHING, faults={"hang": 1})
    client = connect(server)
    client.socket.sendall(infer_request())
    pid = server.describe()["pid"]
    server.stop()
    server.stop()
    assert server.exit_code() == 0
    assert not psutil.pid_exists(pid)
    with pytest.raises(ConnectionRefusedError):
        RawClient(server)


def test_a_taken_port_is_named_with_the_remedy(start, tmp_path):
    port = int(start().urls["http"].rpartition(":")[2])
    with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another port, or 0") as caught:
        StubLauncher().launch("m", StubOptions(port=port), tmp_path)
    assert "cannot listen" in caught.value.log_tail


def test_cpus_pin_the_stub(start):
    cpu = max(os.sched_getaffinity(0))
    assert psutil.Process(start(cpus=[cpu]).describe()["pid"]).cpu_affinity() == [cpu]
