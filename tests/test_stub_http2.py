"""The stub's HTTP/2: its limits, and every fault as grpcio and a raw client see it."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from typing import Any

import numpy as np
import pytest
import stub_calls
import stubs
from stub_calls import (
    REQUEST,
    Infer,
    address,
    await_count,
    call_frames,
    fields_of,
    frames,
    grpc,
    infer_message,
    of_stream,
    output_of,
    prefixed,
    service_pb2,
    triton,
)
from stubs import NOTHING, Start, count, stamps

from servebench.clock import now_ns

start, shared, instant = stubs.start, stubs.shared, stubs.instant  # pytest finds its fixtures here
channel, infer_on, connect = stub_calls.channel, stub_calls.infer_on, stub_calls.connect


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


# A backlog, as it waits after a freeze.

BACKLOG = 250  # calls, in less than the 64 KiB that a new connection's receive buffer takes
BACKLOG_FRAMES = [frame for number in range(BACKLOG) for frame in call_frames(2 * number + 1)]


def test_replies_leave_between_the_turns_of_a_backlog(start, connect):
    server = start(service={"kind": "constant", "mean_ms": 0.1})
    client = connect(server)
    client.send()
    client.until_pong()
    os.kill(server.describe()["pid"], signal.SIGSTOP)
    client.send(*BACKLOG_FRAMES)
    os.kill(server.describe()["pid"], signal.SIGCONT)
    ends: list[int] = []
    while len(ends) < BACKLOG:
        last = client.read_until(frames.HeadersFrame)[-1]
        ends += [last.stream_id] if "END_STREAM" in last.flags else []
    assert ends == [2 * number + 1 for number in range(BACKLOG)]
    seen = stamps(server)
    assert len(seen["arrival_ns"]) == BACKLOG and (np.diff(seen["departure_ns"]) > 0).all()
    # Read at once, all would have arrived before the first reply left; in turns of a few calls, few are still to leave.
    assert np.count_nonzero(seen["departure_ns"] < seen["arrival_ns"][-1]) > BACKLOG / 2


@pytest.mark.parametrize("elements", [16, 10_000], ids=["small-replies", "replies-that-nobody-takes"])
def test_a_client_that_leaves_in_its_backlog_harms_nobody(start, connect, infer_on, elements):
    server = start(service={"kind": "constant", "mean_ms": 0.1}, output_elements=elements)
    leaving = connect(server, INITIAL_WINDOW_SIZE=1 << 24)
    leaving.send(frames.WindowUpdateFrame(0, window_increment=1 << 30), *BACKLOG_FRAMES)
    await_count(server, BACKLOG // 5)
    leaving.close()
    np.testing.assert_array_equal(output_of(infer_on(server)(REQUEST)), [np.arange(elements)])
    arrived = 0
    while arrived != (arrived := count(server)):  # the rest of the backlog, a turn of it every millisecond
        time.sleep(0.1)
    assert server.log_path.read_text().count("\n") == 1  # no traceback


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
