"""The stub over gRPC: KServe as grpcio and tritonclient read it, true stamps, HTTP/2's limits, and every fault."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servebench_servers.stub import StubLauncher, StubOptions
from servebench_servers.stub_queue import Service, service_times_ns, simulate

from servebench.clock import now_ns
from servebench.errors import LaunchError
from servebench.launcher import RunningServer

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
hpack = pytest.importorskip("hpack", reason="hpack is not installed")
frames = pytest.importorskip("hyperframe.frame", reason="h2, of which hyperframe is a part, is not installed")
triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from tritonclient.grpc import service_pb2  # noqa: E402

SERVICE = "/inference.GRPCInferenceService/"
NOTHING = {"kind": "constant", "mean_ms": 0.0}
Start = Callable[..., RunningServer]
Infer = Any  # grpc.UnaryUnaryMultiCallable

# Fixtures and helpers.


def infer_message(rows: int = 1, elements: int = 16, **changes: Any) -> service_pb2.ModelInferRequest:
    """An inference request for zeros, sent raw, by Triton's own messages."""
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [rows, elements]}
    fields = {"model_name": "m", "inputs": [tensor], "raw_input_contents": [bytes(4 * rows * elements)]}
    return service_pb2.ModelInferRequest(**fields | changes)


REQUEST = infer_message().SerializeToString()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers = []

    def start_stub(**options: Any) -> RunningServer:
        servers.append(StubLauncher().launch("m", StubOptions(**options), tmp_path))
        return servers[-1]

    yield start_stub
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A stub that takes no time."""
    server = StubLauncher().launch("m", StubOptions(service=NOTHING), tmp_path_factory.mktemp("stub"))
    yield server
    server.stop()


@pytest.fixture
def instant(shared: RunningServer) -> RunningServer:
    with urllib.request.urlopen(urllib.request.Request(f"{shared.urls['http']}/stub/reset", method="POST")):
        pass
    return shared


@pytest.fixture
def channel() -> Iterator[Callable[[RunningServer], Any]]:
    """Opens grpcio channels, each with a connection of its own."""
    channels = []

    def open_channel(server: RunningServer) -> Any:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        options = [("grpc.use_local_subchannel_pool", 1), *unlimited]
        channels.append(grpc.insecure_channel(address(server), options=options))
        return channels[-1]

    yield open_channel
    for each in channels:
        each.close()


@pytest.fixture
def infer_on(channel) -> Callable[[RunningServer], Infer]:
    """``ModelInfer`` of a new channel, bytes in and bytes out."""
    return lambda server: channel(server).unary_unary(f"{SERVICE}ModelInfer")


def address(server: RunningServer) -> str:
    return server.urls["grpc"].removeprefix("grpc://")


def stamps(server: RunningServer) -> dict[str, np.ndarray]:
    with urllib.request.urlopen(f"{server.urls['http']}/stub/stamps") as response:
        return {name: np.array(column, dtype=np.int64) for name, column in json.load(response).items()}


def await_count(server: RunningServer, count: int) -> None:
    while len(stamps(server)["arrival_ns"]) < count:
        pass


def output_of(reply: bytes) -> np.ndarray:
    message = service_pb2.ModelInferResponse.FromString(reply)
    return np.frombuffer(message.raw_output_contents[0], dtype="<f4").reshape(message.outputs[0].shape)


class RawClient:
    """HTTP/2 frame by frame: sends what it is told, and does nothing by itself."""

    def __init__(self, server: RunningServer, **settings: int) -> None:
        host, port = address(server).split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        self._stream = self.socket.makefile("rb")
        named = {getattr(frames.SettingsFrame, name): value for name, value in settings.items()}
        self._opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame(0, settings=named).serialize()
        self._opening += frames.SettingsFrame(0, flags=["ACK"]).serialize()

    def send(self, *sent: Any) -> None:
        """Frames, or bytes, in one segment if they are few; what opens a connection goes before the first."""
        data = b"".join(each if isinstance(each, bytes) else each.serialize() for each in sent)
        self.socket.sendall(self._opening + data)
        self._opening = b""

    def read(self) -> Any:
        """The next frame; None at the end of the connection."""
        head = self._stream.read(9)
        if not head:
            return None
        frame, length = frames.Frame.parse_frame_header(memoryview(head))
        frame.parse_body(memoryview(self._stream.read(length)))
        return frame

    def read_until(self, *last: type) -> list[Any]:
        """Frames up to one of a type in ``last``, or to the end of the connection."""
        found = []
        while (frame := self.read()) is not None:
            found.append(frame)
            if isinstance(frame, last):
                break
        return found

    def until_pong(self) -> list[Any]:
        """All that the server sends before it answers a PING."""
        self.send(frames.PingFrame(0, opaque_data=b"12345678"))
        return self.read_until(frames.PingFrame)[:-1]

    def close(self) -> None:
        self._stream.close()
        self.socket.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    clients = []

    def open_connection(server: RunningServer, **settings: int) -> RawClient:
        clients.append(RawClient(server, **settings))
        return clients[-1]

    yield open_connection
    for client in clients:
        client.close()


def prefixed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def call_frames(stream: int, data: bytes | None = None, method: str = "ModelInfer") -> list[Any]:
    """The frames of a call with little data."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = [(":method", "POST"), (":scheme", "http"), (":path", f"{SERVICE}{method}"), (":authority", "stub")]
    block = encoder.encode([*fields, ("te", "trailers"), ("content-type", "application/grpc")])
    data = prefixed(REQUEST) if data is None else data
    return [
        frames.HeadersFrame(stream, block, flags=["END_HEADERS"]),
        frames.DataFrame(stream, data, flags=["END_STREAM"]),
    ]


def of_stream(found: list[Any], stream: int) -> list[Any]:
    return [frame for frame in found if frame.stream_id == stream]


def fields_of(frame: Any) -> dict[str, str]:
    """A header block by itself."""
    return dict(hpack.Decoder().decode(frame.data))


# KServe, as its best-known client reads it.


def test_tritonclient_finds_the_model(instant):
    with triton.InferenceServerClient(address(instant)) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m", "1")
        assert not client.is_model_ready("other") and not client.is_model_ready("m", "2")
        metadata = client.get_model_metadata("m", as_json=True)
        assert metadata["inputs"] == [{"name": "INPUT", "datatype": "FP32", "shape": ["-1", "16"]}]
        assert metadata["outputs"] == [{"name": "OUTPUT", "datatype": "FP32", "shape": ["-1", "16"]}]
        assert client.get_model_config("m").config.max_batch_size == 128
        assert client.get_server_metadata().name == "stub"
        index = client.get_model_repository_index(as_json=True)
        assert index == {"models": [{"name": "m", "version": "1", "state": "READY"}]}
    assert stamps(instant)["arrival_ns"].size == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_tritonclient_reads_the_answer(instant, rows):
    tensor = triton.InferInput("INPUT", [rows, 16], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, 16), dtype=np.float32))
    with triton.InferenceServerClient(address(instant)) as client:
        named = client.infer("m", [tensor], request_id="query 7", model_version="1")
        unnamed = client.infer("m", [tensor], outputs=[triton.InferRequestedOutput("OUTPUT")])
    for result in (named, unnamed):
        np.testing.assert_array_equal(result.as_numpy("OUTPUT"), [np.arange(16)] * rows)
    assert (named.get_response().id, unnamed.get_response().id) == ("query 7", "")
    assert named.get_response().model_version == "1"


def test_numbers_may_come_in_the_tensor_itself(instant, infer_on):
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [1, 16], "contents": {"fp32_contents": [0.5] * 16}}
    reply = infer_on(instant)(infer_message(inputs=[tensor], raw_input_contents=[]).SerializeToString())
    np.testing.assert_array_equal(output_of(reply), [np.arange(16)])


def test_megabytes_both_ways(start, infer_on):
    infer = infer_on(start(service=NOTHING, input_elements=400_000, output_elements=500_000))
    reply = infer(infer_message(3, 400_000).SerializeToString())  # 4.8 MB there, 6 MB back
    np.testing.assert_array_equal(output_of(reply), [np.arange(500_000)] * 3)


# Refusals.


def changed_tensor(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "INPUT", "datatype": "FP32", "shape": [1, 16]} | changes]


@pytest.mark.parametrize(
    ("method", "message", "code", "details"),
    [
        pytest.param("ModelStatistics", b"", "UNIMPLEMENTED", f"there is no method {SERVICE}ModelStatistics", id="method"),
        pytest.param("ModelInfer", infer_message(model_name="x"), "NOT_FOUND", "unknown model: 'x'", id="model"),
        pytest.param("ModelInfer", infer_message(model_version="2"), "NOT_FOUND", "has no version 2", id="version"),
        pytest.param("ModelMetadata", b"\x0a\x01x", "NOT_FOUND", "unknown model: 'x'", id="metadata"),
        pytest.param("ModelConfig", b"\x0a\x01x", "NOT_FOUND", "unknown model: 'x'", id="config"),
        pytest.param("ModelInfer", b"\xff\xff", "INVALID_ARGUMENT", "no ModelInferRequest", id="not-protobuf"),
        pytest.param("ModelReady", b"\xff\xff", "INVALID_ARGUMENT", "no ModelReadyRequest", id="ready-not-protobuf"),
        pytest.param("ModelInfer", infer_message(inputs=[]), "INVALID_ARGUMENT", "expected 1 input", id="no-input"),
        pytest.param("ModelInfer", infer_message(inputs=changed_tensor(name="X")), "INVALID_ARGUMENT", "'X'", id="name"),
        pytest.param(
            "ModelInfer", infer_message(inputs=changed_tensor(datatype="FP16")), "INVALID_ARGUMENT", "is FP32", id="datatype"
        ),
        pytest.param(
            "ModelInfer", infer_message(inputs=changed_tensor(shape=[1, 8])), "INVALID_ARGUMENT", "got [1, 8]", id="shape"
        ),
        pytest.param("ModelInfer", infer_message(129), "INVALID_ARGUMENT", "got [129, 16]", id="rows"),
        pytest.param(
            "ModelInfer", infer_message(raw_input_contents=[bytes(60)]), "INVALID_ARGUMENT", "got 60 bytes", id="bytes"
        ),
        pytest.param("ModelInfer", infer_message(raw_input_contents=[]), "INVALID_ARGUMENT", "got 0 numbers", id="no-data"),
        pytest.param(
            "ModelInfer",
            infer_message(inputs=changed_tensor(contents={"fp32_contents": [0.0] * 16})),
            "INVALID_ARGUMENT",
            "contents besides them",
            id="twice",
        ),
    ],
)
def test_refusals_say_why_and_keep_the_connection(instant, channel, method, message, code, details):
    opened = channel(instant)
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        opened.unary_unary(f"{SERVICE}{method}")(data, timeout=10)
    assert (caught.value.code().name, details in caught.value.details()) == (code, True), caught.value.details()
    assert opened.unary_unary(f"{SERVICE}ModelInfer")(REQUEST)
    assert stamps(instant)["arrival_ns"].size == 1


def test_the_status_message_is_percent_encoded(instant, connect):
    """As "gRPC over HTTP2" has it: what is not printable ASCII, and "%" itself; nothing else."""
    client = connect(instant)
    client.send(*call_frames(1, prefixed(infer_message(model_name="ö 100%\n<'~").SerializeToString())))
    message = fields_of(client.read_until(frames.HeadersFrame)[-1])["grpc-message"]
    assert message == "Request for unknown model: '%C3%B6 100%25%0A<'~' is not found"


def test_compression_is_refused(instant, infer_on):
    with pytest.raises(grpc.RpcError) as caught:
        infer_on(instant)(REQUEST, compression=grpc.Compression.Gzip, timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("data", [b"", b"\0\0\0", prefixed(REQUEST)[:-1], prefixed(REQUEST) + b"\0"])
def test_a_broken_prefix_is_an_invalid_argument(instant, connect, data):
    client = connect(instant)
    client.send(*call_frames(1, data))
    (trailers,) = of_stream(client.read_until(frames.HeadersFrame), 1)
    assert fields_of(trailers)["grpc-status"] == "3"


def test_an_error_is_trailers_only(instant, connect):
    client = connect(instant)
    client.send(*call_frames(1, method="Other"))
    (trailers,) = of_stream(client.read_until(frames.HeadersFrame), 1)
    assert "END_STREAM" in trailers.flags
    fields = fields_of(trailers)
    assert (fields[":status"], fields["content-type"], fields["grpc-status"]) == ("200", "application/grpc", "12")


def test_a_full_queue_is_unavailable(start, infer_on):
    server = start(service={"kind": "constant", "mean_ms": 300}, queue_limit=1)
    infer = infer_on(server)
    accepted = []
    for number in (1, 2):
        accepted.append(infer.future(REQUEST))
        await_count(server, number)
    with pytest.raises(grpc.RpcError) as caught:
        infer(REQUEST)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the queue is full: 1 queries are waiting"
    assert all(output_of(call.result()).shape == (1, 16) for call in accepted)
    assert stamps(server)["batch_size"].tolist() == [1, 1, 0]


# The queue, as its stamps tell it.


def test_departures_are_the_queues_to_20_microseconds(start, connect):
    # The best median of a few: how late a busy machine lets the stub run is not the stub's.
    assert any(median_lateness_us(start, connect) <= 20 for _ in range(3))


def median_lateness_us(start: Start, connect: Callable[..., RawClient]) -> float:
    """How late a new stub's 300 replies depart; every stamp is held against the queue's arithmetic.

    The client only writes while the queue is at work: it must not take the stub's CPU.
    """
    service = Service(kind="exponential", mean_ms=1.5, seed=42)
    server = start(service=service)
    client = connect(server)
    calls = [b"".join(frame.serialize() for frame in call_frames(2 * index + 1)) for index in range(300)]
    sent_ns = []
    for call, gap_s in zip(calls, np.random.default_rng(3).exponential(0.004, 300).tolist(), strict=True):
        time.sleep(gap_s)
        sent_ns.append(now_ns())
        client.send(call)
    ends = 0
    while ends < 300:
        last = client.read_until(frames.HeadersFrame)[-1]
        if "END_STREAM" in last.flags:
            assert fields_of(last) == {"grpc-status": "0"}
            ends += 1
    seen = stamps(server)
    assert (seen["arrival_ns"] >= sent_ns).all()
    np.testing.assert_array_equal(seen["service_ns"], service_times_ns(service, 300))

    departure_ns = 0  # Lindley's recursion, written out
    for index in range(300):
        departure_ns = max(int(seen["arrival_ns"][index]), departure_ns) + int(seen["service_ns"][index])
        assert seen["due_ns"][index] == departure_ns
    late_us = (seen["departure_ns"] - seen["due_ns"]) / 1e3
    assert late_us.min() >= 0
    return float(np.median(late_us))


def test_the_reply_is_on_the_wire_when_its_stamp_says_so(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 1.0})
    client = connect(server)
    times_ns = []
    for stream in range(1, 400, 2):
        request = b"".join(frame.serialize() for frame in call_frames(stream))
        sent_ns = now_ns()
        client.send(request)
        client.read_until(frames.DataFrame)
        times_ns.append((sent_ns, now_ns()))
        client.read_until(frames.HeadersFrame)
    sent_ns, received_ns = np.array(times_ns).T
    seen = stamps(server)
    assert (seen["arrival_ns"] >= sent_ns).all() and (received_ns >= seen["departure_ns"]).all()
    # What is not service is two trips over loopback and both sides' parsing; a reply held back shows here.
    assert np.median(received_ns - sent_ns - 1_000_000) < 1_500_000


def test_fifty_calls_at_once(start, infer_on):
    service = Service(kind="batch", batch_base_ms=4, batch_per_query_ms=0.5, max_batch=8)
    server = start(service=service)
    infer = infer_on(server)
    calls = [infer.future(infer_message(id=str(number)).SerializeToString()) for number in range(50)]
    for number, call in enumerate(calls):
        assert service_pb2.ModelInferResponse.FromString(call.result()).id == str(number)
    seen = stamps(server)
    assert len(seen["arrival_ns"]) == 50 and (seen["departure_ns"] >= seen["due_ns"]).all()
    model = simulate(seen["arrival_ns"], service)
    np.testing.assert_array_equal(seen["due_ns"], model.departure_ns)
    np.testing.assert_array_equal(seen["batch_size"], model.batch_size)


def test_calls_that_end_in_one_chunk_arrived_together(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 2})
    client = connect(server)
    client.send(*call_frames(1), *call_frames(3), *call_frames(5)[:1])
    found = client.until_pong()  # in which the first replies may be, on a busy machine
    client.send(*call_frames(5)[1:])
    while sum(isinstance(frame, frames.HeadersFrame) for frame in found) < 6:  # headers and trailers
        found += client.read_until(frames.HeadersFrame)
    first, second, third = stamps(server)["arrival_ns"].tolist()
    assert first == second < third


def test_http_and_grpc_wait_in_one_queue(start, infer_on):
    server = start(service={"kind": "constant", "mean_ms": 60})
    call = infer_on(server).future(REQUEST)
    await_count(server, 1)
    over_http = http.client.HTTPConnection(server.urls["http"].removeprefix("http://"))
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [1, 16], "data": [0] * 16}
    over_http.request("POST", "/v2/models/m/infer", json.dumps({"inputs": [tensor]}))
    assert over_http.getresponse().status == 200
    assert call.done()
    over_http.close()
    assert np.diff(stamps(server)["due_ns"]).tolist() == [60_000_000]


def test_a_call_that_is_given_up_is_served_nevertheless(start, infer_on):
    server = start(service={"kind": "constant", "mean_ms": 20})
    infer = infer_on(server)
    calls = [infer.future(REQUEST) for _ in range(3)]
    await_count(server, 3)
    calls[1].cancel()
    assert calls[0].result() == calls[2].result()
    while not stamps(server)["departure_ns"].all():  # grpcio may have sent them in any order
        pass
    np.testing.assert_array_equal(np.diff(stamps(server)["due_ns"]), [20_000_000] * 2)


def test_a_call_given_up_in_the_chunk_that_completes_it_never_arrived(start, connect):
    server = start(service=NOTHING)
    client = connect(server)
    client.send(*call_frames(1), frames.RstStreamFrame(1, error_code=8), *call_frames(3))
    client.read_until(frames.DataFrame)
    assert stamps(server)["arrival_ns"].size == 1
    assert server.log_path.read_text().count("\n") == 1


@pytest.mark.parametrize("table_bytes", [0, 4096])
def test_other_calls_are_answered_while_a_reply_waits(start, connect, table_bytes):
    """Header blocks leave in another order than they were made in: the client's header table must not mind."""
    client = connect(start(service={"kind": "constant", "mean_ms": 100}), HEADER_TABLE_SIZE=table_bytes)
    client.send(*call_frames(1))
    client.until_pong()  # the call waits for its 100 ms
    client.send(*call_frames(3, method="Other"))
    found = client.read_until(frames.DataFrame) + client.read_until(frames.HeadersFrame)
    decoder = hpack.Decoder()
    decoder.max_allowed_table_size = table_bytes
    blocks = [(frame.stream_id, dict(decoder.decode(frame.data))) for frame in found if isinstance(frame, frames.HeadersFrame)]
    assert [stream for stream, _ in blocks] == [3, 1, 1]
    assert [fields.get("grpc-status") for _, fields in blocks] == ["12", None, "0"]


# HTTP/2's limits.


def test_grpcio_survives_goaway(start, infer_on):
    server = start(service={"kind": "constant", "mean_ms": 1}, goaway_after=7)
    infer = infer_on(server)
    for _ in range(21):
        infer(REQUEST)
    for call in [infer.future(REQUEST) for _ in range(10)]:  # it sends those that GOAWAY leaves out again, but just once
        call.result()
    assert stamps(server)["arrival_ns"].size == 31


def test_goaway_finishes_what_was_accepted_and_closes(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 20}, goaway_after=3)
    client = connect(server)
    client.send(*(frame for stream in (1, 3, 5, 7) for frame in call_frames(stream)))
    found = client.read_until()
    (goaway,) = [frame for frame in found if isinstance(frame, frames.GoAwayFrame)]
    assert (goaway.last_stream_id, goaway.error_code) == (5, 0)
    (refused,) = of_stream(found, 7)
    assert isinstance(refused, frames.RstStreamFrame) and refused.error_code == 7  # REFUSED_STREAM
    for stream in (1, 3, 5):
        assert fields_of(of_stream(found, stream)[-1]) == {"grpc-status": "0"}
        assert found.index(goaway) < found.index(of_stream(found, stream)[0])
    assert stamps(server)["arrival_ns"].size == 3


def test_grpcio_keeps_to_the_most_streams(start, infer_on):
    server = start(service={"kind": "constant", "mean_ms": 5}, max_concurrent_streams=2)
    infer = infer_on(server)
    for call in [infer.future(REQUEST) for _ in range(10)]:
        call.result()
    seen = stamps(server)
    assert len(seen["arrival_ns"]) == 10
    assert (seen["arrival_ns"][2:] >= seen["departure_ns"][:-2]).all()  # a third one never was in the server


def test_the_announced_settings(start, connect):
    announced = connect(start(max_concurrent_streams=9, initial_window_size=70_000))
    announced.send()
    settings, window = announced.read(), announced.read()
    assert settings.settings[frames.SettingsFrame.MAX_CONCURRENT_STREAMS] == 9
    assert settings.settings[frames.SettingsFrame.INITIAL_WINDOW_SIZE] == 70_000
    assert (window.stream_id, window.window_increment) == (0, 70_000 - 65_535)


def test_more_streams_than_announced_end_the_connection(start, connect):
    client = connect(start(service={"kind": "constant", "mean_ms": 50}, max_concurrent_streams=1))
    client.send(*call_frames(1), *call_frames(3))
    assert isinstance(client.read_until()[-1], frames.GoAwayFrame)


def test_a_large_request_through_a_small_window(start, infer_on):
    infer = infer_on(start(service=NOTHING, input_elements=50_000, initial_window_size=3000))
    np.testing.assert_array_equal(output_of(infer(infer_message(1, 50_000).SerializeToString())), [np.arange(16)])


@pytest.mark.parametrize("mean_ms", [0, 5], ids=["at-once", "prepared"])
def test_a_large_reply_keeps_to_the_clients_window(start, connect, mean_ms):
    server = start(service={"kind": "constant", "mean_ms": mean_ms}, output_elements=1000)
    client = connect(server, INITIAL_WINDOW_SIZE=100)
    client.send(*call_frames(1))
    found = client.read_until(frames.DataFrame)
    found += client.until_pong()
    assert sum(len(frame.data) for frame in found if isinstance(frame, frames.DataFrame)) == 100
    client.send(frames.WindowUpdateFrame(1, window_increment=150))
    found += client.until_pong()
    assert sum(len(frame.data) for frame in found if isinstance(frame, frames.DataFrame)) == 250
    client.send(frames.SettingsFrame(0, settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: 10_000}))
    found += client.read_until(frames.HeadersFrame)
    data = b"".join(frame.data for frame in found if isinstance(frame, frames.DataFrame))
    assert int.from_bytes(data[:5], "big") == len(data) - 5
    np.testing.assert_array_equal(output_of(data[5:]), [np.arange(1000)])
    assert fields_of(found[-1]) == {"grpc-status": "0"}


def test_the_connections_window_is_shared(start, connect):
    """Two replies of 40 kB go through a connection's window of 65,535 bytes, which no setting changes."""
    client = connect(start(service=NOTHING, output_elements=10_000), INITIAL_WINDOW_SIZE=1 << 20)
    client.send(*call_frames(1), *call_frames(3))
    found = client.read_until(frames.DataFrame) + client.until_pong()
    assert sum(len(frame.data) for frame in found if isinstance(frame, frames.DataFrame)) == 65_535
    client.send(frames.WindowUpdateFrame(0, window_increment=1 << 20))
    found += client.until_pong()
    for stream in (1, 3):
        data = b"".join(frame.data for frame in of_stream(found, stream) if isinstance(frame, frames.DataFrame))
        np.testing.assert_array_equal(output_of(data[5:]), [np.arange(10_000)])
        assert fields_of(of_stream(found, stream)[-1]) == {"grpc-status": "0"}


def test_what_is_not_http2_ends_the_connection(instant, connect):
    rng = random.Random(1)
    rubbish = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", *(rng.randbytes(64) for _ in range(30))]
    for data in rubbish:
        client = connect(instant)
        client.send()  # the preface; what follows is no frame, or no sensible one
        client.socket.sendall(data + bytes(9))
        client.socket.shutdown(socket.SHUT_WR)
        client.read_until()
    client = connect(instant)
    client.socket.sendall(rubbish[0])
    client.read_until()
    assert instant.log_path.read_text().count("\n") == 1  # no traceback


# Faults, each certain, as raw clients see them.


@pytest.fixture
def faulty(start) -> Start:
    return lambda **faults: start(service=NOTHING, faults=faults)


def failure(infer: Infer, timeout_s: float = 10) -> Any:
    """How grpcio says that a call failed."""
    with pytest.raises(grpc.RpcError) as caught:
        infer(REQUEST, timeout=timeout_s)
    return caught.value


def test_fault_status(faulty, infer_on):
    error = failure(infer_on(faulty(status=1)))
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "an injected fault")


def test_fault_reset(faulty, infer_on, connect):
    server = faulty(reset=1)
    error = failure(infer_on(server))
    assert error.code() == grpc.StatusCode.INTERNAL and "RST_STREAM" in error.details()
    client = connect(server)
    client.send(*call_frames(1))
    (reset,) = of_stream(client.read_until(frames.RstStreamFrame), 1)
    assert reset.error_code == 2  # INTERNAL_ERROR
    client.send(*call_frames(3, prefixed(b""), "ServerLive"))
    assert fields_of(client.read_until(frames.HeadersFrame)[-1])[":status"] == "200"  # the connection goes on


def test_fault_truncated(faulty, infer_on, connect):
    server = faulty(truncated=1)
    assert infer_on(server)(REQUEST) is None  # which is how grpcio says that status 0 came without a whole message
    client = connect(server)
    client.send(*call_frames(1))
    _, data, trailers = of_stream(client.read_until(frames.DataFrame) + client.read_until(frames.HeadersFrame), 1)
    announced = int.from_bytes(data.data[1:5], "big")
    assert 0 < len(data.data) - 5 < announced
    assert fields_of(trailers) == {"grpc-status": "0"}


def test_fault_slow_body(faulty, infer_on, connect):
    server = faulty(slow_body=1, slow_body_delay_ms=80)
    np.testing.assert_array_equal(output_of(infer_on(server)(REQUEST)), [np.arange(16)])
    client = connect(server)
    client.send(*call_frames(1))
    first = client.read_until(frames.DataFrame)[-1]
    first_ns = now_ns()
    second = client.read_until(frames.DataFrame)[-1]
    assert now_ns() - first_ns > 60_000_000  # 80 ms, counted in whole milliseconds, less what this process lost meanwhile
    assert abs(len(first.data) - len(second.data)) <= 1
    np.testing.assert_array_equal(output_of((first.data + second.data)[5:]), [np.arange(16)])
    assert fields_of(client.read()) == {"grpc-status": "0"}


def test_fault_hang(faulty, infer_on, connect):
    server = faulty(hang=1)
    assert failure(infer_on(server), timeout_s=0.3).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    client = connect(server)
    client.send(*call_frames(1))
    await_count(server, 2)
    assert (stamps(server)["departure_ns"] > 0).all()
    assert of_stream(client.until_pong(), 1) == []


def test_fault_wrong_output(faulty, infer_on):
    reply = service_pb2.ModelInferResponse.FromString(infer_on(faulty(wrong_output=1))(REQUEST))
    assert (list(reply.outputs[0].shape), list(reply.raw_output_contents)) == ([1, 16], [b""])


def test_fault_garbage(faulty, infer_on):
    error = failure(infer_on(faulty(garbage=1)))
    assert error.code() != grpc.StatusCode.DEADLINE_EXCEEDED  # it was noticed, and the connection given up


def test_fault_close_idle(faulty, infer_on, connect):
    server = faulty(close_idle=1)
    assert output_of(infer_on(server)(REQUEST)).shape == (1, 16)
    client = connect(server)
    client.send(*call_frames(1))
    found = client.read_until()  # to the end of the connection
    assert not any(isinstance(frame, frames.GoAwayFrame) for frame in found)
    assert fields_of(found[-1]) == {"grpc-status": "0"}


def test_faults_spare_everything_but_inference(faulty):
    with triton.InferenceServerClient(address(faulty(reset=1))) as client:
        assert client.is_server_live()


# The launcher.


def test_the_address_is_told(instant):
    assert instant.describe()["grpc"] == instant.urls["grpc"]
    assert instant.urls["grpc"].startswith("grpc://127.0.0.1:")


@pytest.mark.parametrize("missing", ["h2", "google.protobuf"])
def test_without_its_packages_there_is_http_alone(start, tmp_path, monkeypatch, missing):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = start()
    assert list(server.urls) == ["http"]
    said = server.describe()["grpc"]
    assert said.startswith("not served: ") and missing in said and "pip install 'servebench[grpc]'" in said
    with urllib.request.urlopen(f"{server.urls['http']}/v2/health/ready") as response:
        assert response.status == 200


def test_grpc_can_be_turned_off(start):
    server = start(grpc_port=None)
    assert list(server.urls) == ["http"]
    assert server.describe()["grpc"] == "not served: grpc_port is null"
    assert StubOptions(**server.describe()["config"]) == StubOptions(grpc_port=None)


def test_a_taken_grpc_port_is_named_with_the_remedy(instant, tmp_path):
    port = int(instant.urls["grpc"].rpartition(":")[2])
    with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another port, or 0"):
        StubLauncher().launch("m", StubOptions(grpc_port=port), tmp_path)


def test_http_alone_needs_no_grpc_packages():
    code = "import sys, servebench_servers.stub_server; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {"h2", "hpack", "google.protobuf", "grpc"} & set(modules)
