"""The stub over gRPC: KServe as grpcio and tritonclient read it, refusals, true stamps, and the launcher."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import stub_calls
import stubs
from servebench_servers.stub import StubLauncher, StubOptions
from servebench_servers.stub_queue import Service, service_times_ns, simulate
from stub_calls import (
    REQUEST,
    SERVICE,
    RawClient,
    address,
    await_count,
    call_frames,
    fields_of,
    frames,
    grpc,
    hpack,
    infer_message,
    of_stream,
    output_of,
    prefixed,
    service_pb2,
    triton,
)
from stubs import NOTHING, Start, stamps

from servebench.clock import now_ns
from servebench.errors import LaunchError

start, shared, instant = stubs.start, stubs.shared, stubs.instant  # pytest finds its fixtures here
channel, infer_on, connect = stub_calls.channel, stub_calls.infer_on, stub_calls.connect


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
