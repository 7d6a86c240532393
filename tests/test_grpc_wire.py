"""gRPC's headers, messages and ends, as pure bytes; the rules are those of gRPC's PROTOCOL-HTTP2 document."""

import base64
import re
import struct
from urllib.parse import quote

import grpc
import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import call_headers, frame_message, read_end, unframe_message
from servebench.wire.http2 import Fields, Stream

S = 1_000_000_000


def decoded(block: bytes) -> list[tuple[str, str]]:
    return [(name.decode(), value.decode("latin-1")) for name, value in hpack.Decoder().decode(block, raw=True)]


def test_the_headers_of_a_call() -> None:
    block = call_headers(
        "10.0.0.1:8001", "/inference.GRPCInferenceService/ModelInfer", tls=False, timeout_ns=2 * S, metadata=[("X-Key", "a b")]
    )
    assert decoded(block) == [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/inference.GRPCInferenceService/ModelInfer"),
        (":authority", "10.0.0.1:8001"),
        ("grpc-timeout", "2000m"),  # "immediately after the reserved headers"
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "identity"),
        ("user-agent", "servebench"),
        ("x-key", "a b"),
    ]
    plain = dict(decoded(call_headers("a", "/s/m", tls=True, timeout_ns=None)))
    assert plain[":scheme"] == "https"
    assert "grpc-timeout" not in plain


@pytest.mark.parametrize(
    ("timeout_ns", "value"),
    [
        pytest.param(1, "1m", id="never 0"),
        pytest.param(1_000_000, "1m", id="1 ms"),
        pytest.param(1_000_001, "2m", id="rounded up: the server is not to give up first"),
        pytest.param(60 * S, "60000m", id="a minute"),
        pytest.param(10**18, "99999999m", id="at most 8 digits"),
    ],
)
def test_the_time_allowed(timeout_ns: int, value: str) -> None:
    assert dict(decoded(call_headers("a", "/s/m", tls=False, timeout_ns=timeout_ns)))["grpc-timeout"] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("authorization", "Bearer abc.def==", id="a token"),
        pytest.param("triton-grpc-protocol-key", "", id="empty"),
        pytest.param("a_b-c.9", " ~".strip(), id="every kind of character"),
        pytest.param("trace-bin", "jher831yy13JHy3h", id="binary"),
        pytest.param("trace-bin", base64.b64encode(b"\x00\xff").decode(), id="binary, padded"),
        pytest.param("trace-bin", "AP8,AP8=,", id="several binaries, padded or not, one empty"),
    ],
)
def test_metadata_travels_as_it_is(name: str, value: str) -> None:
    assert decoded(call_headers("a", "/s/m", tls=False, timeout_ns=None, metadata=[(name, value)]))[-1] == (name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("", "x", "'' is not a name", id="no name"),
        pytest.param(":path", "x", "':path' is not a name", id="pseudo-header"),
        pytest.param("a b", "x", "'a b' is not a name", id="space in the name"),
        pytest.param("é", "x", "'é' is not a name", id="name beyond ASCII"),
        pytest.param("grpc-timeout", "1S", "gRPC sets it itself", id="one of gRPC's own"),
        pytest.param("GRPC-anything", "1S", "gRPC sets it itself", id="reserved for gRPC"),
        pytest.param("Content-Type", "x", "gRPC sets it itself", id="content type"),
        pytest.param("Host", "x", "gRPC sets it itself", id="host"),
        pytest.param("connection", "close", "gRPC sets it itself", id="of the connection"),
        pytest.param("x", "é", "printable ASCII", id="value beyond ASCII"),
        pytest.param("x", "a\r\nb: c", "printable ASCII", id="line break in the value"),
        pytest.param("x", "a\t", "printable ASCII", id="tab in the value"),
        pytest.param("x", "a ", "begins or ends with a space", id="space at the end"),
        pytest.param("x-bin", "not base64!", "in base64", id="binary that is not base64"),
        pytest.param("x-bin", "A", "in base64", id="binary of 6 bits"),
    ],
)
def test_metadata_that_would_not_arrive_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_headers("a", "/s/m", tls=False, timeout_ns=None, metadata=[(name, value)])


# --- messages ---------------------------------------------------------------------------------


@given(st.binary(max_size=2000))
def test_a_message_survives_its_frame(message: bytes) -> None:
    framed = frame_message(message)
    assert struct.unpack(">?L", framed[:5]) == (False, len(message))
    assert unframe_message(framed) == message


BODIES = [
    pytest.param(b"", "too short", id="nothing"),
    pytest.param(b"\0\0\0\0", "reply of 4 bytes, too short", id="half a prefix"),
    pytest.param(b"\0\0\0\0\2a", "says 2 bytes, the reply has 1$", id="cut"),
    pytest.param(b"\0\0\0\0\0a", "says 0 bytes, the reply has 1: more than one", id="longer than it says"),
    pytest.param(frame_message(b"abc") * 2, "says 3 bytes, the reply has 11: more than one", id="two messages"),
    pytest.param(b"\1\0\0\0\1a", "is compressed", id="compressed"),
    pytest.param(b"\xff\0\0\0\1a", "is compressed", id="a flag that does not exist"),
    pytest.param(b"\0\xff\xff\xff\xff", "says 4294967295 bytes", id="4 GiB announced"),
]


@pytest.mark.parametrize(("body", "message"), BODIES)
def test_a_body_that_is_not_one_message(body: bytes, message: str) -> None:
    with pytest.raises(ProtocolFault, match=message):
        unframe_message(body)
    end = read_end(ended({b"grpc-status": b"0"}, body))
    assert (end.kind, end.status) == ("protocol", 0)
    assert re.search(message, end.detail)


# --- ends ---------------------------------------------------------------------------------------


def ended(trailers: Fields | None, body: bytes = frame_message(b"ok"), headers: Fields | None = None) -> Stream:
    stream = Stream(0, 1)
    stream.headers = {b":status": b"200"} if headers is None else headers
    stream.trailers = trailers
    stream.body_bytes = len(body)
    stream.prefix = body[:5]
    return stream


def status(code: bytes, message: bytes = b"") -> Fields:
    return {b"grpc-status": code, b"grpc-message": message}


PROXY = {b":status": b"502", b"content-type": b"text/html"}

ENDS = [
    pytest.param(ended(status(b"0")), "ok", 0, "", id="ok"),
    pytest.param(ended({b"grpc-status": b"0"}, frame_message(b"")), "ok", 0, "", id="ok, empty message"),
    pytest.param(ended(status(b"14", b"queue full")), "status", 14, "UNAVAILABLE: queue full", id="status"),
    pytest.param(ended(status(b"5"), b""), "status", 5, "NOT_FOUND", id="status without a message"),
    pytest.param(
        ended(status(b"16", b"%C3%A9%E2%82%AC %25"), b""), "status", 16, "UNAUTHENTICATED: é€ %", id="encoded message"
    ),
    pytest.param(ended(status(b"3", "é".encode()), b""), "status", 3, "INVALID_ARGUMENT: é", id="UTF-8 that is not encoded"),
    pytest.param(
        ended(status(b"3", b"100%, %zz, %C3"), b""), "status", 3, "INVALID_ARGUMENT: 100%, %zz, \ufffd", id="badly encoded"
    ),
    pytest.param(ended(status(b"99", b"x"), b""), "status", 99, "code 99: x", id="unknown status"),
    pytest.param(
        ended({b"grpc-status": b"4"}, b"", PROXY), "status", 4, "DEADLINE_EXCEEDED", id="grpc-status goes before :status"
    ),
    pytest.param(ended({b"grpc-status": b"00"}), "protocol", 0, "grpc-status b'00' is no status", id="leading zero"),
    pytest.param(ended({b"grpc-status": b""}), "protocol", 0, "grpc-status b'' is no status", id="empty status"),
    pytest.param(ended({b"grpc-status": b"-1"}), "protocol", 0, "grpc-status b'-1' is no status", id="negative status"),
    pytest.param(
        ended({b"grpc-status": b"9" * 5000}), "protocol", 0, f"grpc-status b'{'9' * 20}' is no status", id="endless status"
    ),
    pytest.param(
        ended({b"x": b"y"}), "protocol", 0, "the reply ended without a grpc-status (content-type none)", id="no grpc-status"
    ),
    pytest.param(
        ended(None, b"<html>", {b":status": b"200", b"content-type": b"text/html"}),
        "protocol",
        0,
        "the reply ended without a grpc-status (content-type text/html)",
        id="a web page",
    ),
    pytest.param(ended(None, b"<html>", PROXY), "status", 502, "HTTP 502 without a grpc-status", id="a proxy's 502"),
    pytest.param(ended(PROXY, b"", PROXY), "status", 502, "HTTP 502 without a grpc-status", id="a proxy's 502 without a body"),
    pytest.param(
        ended(None, b"", {b":status": b"9" * 5000}),
        "protocol",
        0,
        "the reply ended without a grpc-status (content-type none)",
        id="endless :status",
    ),
]


@pytest.mark.parametrize(("stream", "kind", "code", "detail"), ENDS)
def test_what_an_end_means(stream: Stream, kind: str, code: int, detail: str) -> None:
    assert read_end(stream) == (kind, code, detail)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_statuses_have_their_names(code: grpc.StatusCode) -> None:
    number = code.value[0]
    assert read_end(ended({b"grpc-status": b"%d" % number})) == ("status", number, code.name)


def test_a_reset_stream_is_a_reset_whatever_came_before() -> None:
    stream = ended(None, headers={b":status": b"200", b"grpc-status": b"0"})
    stream.reset = "RST_STREAM INTERNAL_ERROR"
    assert read_end(stream) == ("reset", 0, "RST_STREAM INTERNAL_ERROR")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_survives_percent_encoding(text: str) -> None:
    message = quote(text, safe="").encode()
    assert read_end(ended(status(b"2", message))).detail == f"UNKNOWN: {text}"


@given(st.binary(min_size=1))
def test_any_message_is_shown_somehow(message: bytes) -> None:
    assert read_end(ended(status(b"2", message))).detail.startswith("UNKNOWN: ")
