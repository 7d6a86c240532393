"""Calls to the stub over gRPC: by grpcio, and frame by frame on a connection that does nothing by itself."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from stubs import count

from servebench.launcher import RunningServer

grpc = pytest.importorskip("grpc", reason="grpcio is not installed")
hpack = pytest.importorskip("hpack", reason="hpack is not installed")
frames = pytest.importorskip("hyperframe.frame", reason="h2, of which hyperframe is a part, is not installed")
triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
from tritonclient.grpc import service_pb2  # noqa: E402

SERVICE = "/inference.GRPCInferenceService/"
Infer = Any  # grpc.UnaryUnaryMultiCallable


def infer_message(rows: int = 1, elements: int = 16, **changes: Any) -> service_pb2.ModelInferRequest:
    """An inference request for zeros, sent raw, by Triton's own messages."""
    tensor = {"name": "INPUT", "datatype": "FP32", "shape": [rows, elements]}
    fields = {"model_name": "m", "inputs": [tensor], "raw_input_contents": [bytes(4 * rows * elements)]}
    return service_pb2.ModelInferRequest(**fields | changes)


REQUEST = infer_message().SerializeToString()


@pytest.fixture
def channel() -> Iterator[Callable[[RunningServer], Any]]:
    """Opens grpcio channels, each with a connection of its own."""
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    options = [("grpc.use_local_subchannel_pool", 1), *unlimited]
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(grpc.insecure_channel(address(server), options=options))


@pytest.fixture
def infer_on(channel) -> Callable[[RunningServer], Infer]:
    """``ModelInfer`` of a new channel, bytes in and bytes out."""
    return lambda server: channel(server).unary_unary(f"{SERVICE}ModelInfer")


def address(server: RunningServer) -> str:
    return server.urls["grpc"].removeprefix("grpc://")


def await_count(server: RunningServer, wanted: int) -> None:
    while count(server) < wanted:
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
    """Opens raw connections, each with the client's settings."""
    with contextlib.ExitStack() as stack:
        yield lambda server, **settings: stack.enter_context(contextlib.closing(RawClient(server, **settings)))


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
