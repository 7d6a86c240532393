"""The HTTP/1.1 reader and request encoder, as pure bytes."""

import http.client
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servebench.wire.http1 import (
    MAX_HEADER_BYTES,
    HeaderMemo,
    Progress,
    ProtocolFault,
    ResponseReader,
    encode_request,
    parse_reply,
)

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nServer: x\r\n\r\nhello"

# (whole reply, status, body bytes, how it ends)
REPLIES = [
    pytest.param(PLAIN, 200, 5, Progress.COMPLETE, id="content length"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, 0, Progress.COMPLETE, id="empty body"),
    pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, 0, Progress.COMPLETE, id="204 has no body"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;ext=1\r\nlo\r\n0\r\nTrailer: t\r\n\r\n",
        200,
        5,
        Progress.COMPLETE,
        id="chunked with extension and trailer",
    ),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, 200, 5, Progress.COMPLETE, id="100 before the reply"),
    pytest.param(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + PLAIN, 200, 5, Progress.COMPLETE, id="103 with headers"),
    pytest.param(
        b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno",
        503,
        2,
        Progress.COMPLETE_CLOSE,
        id="says close",
    ),
    pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, 2, Progress.COMPLETE_CLOSE, id="HTTP/1.0"),
    pytest.param(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        200,
        2,
        Progress.COMPLETE,
        id="1.0 kept alive",
    ),
]

GARBAGE = [
    pytest.param(b"\x16\x03\x01 TLS, not HTTP\r\n\r\n", "not valid HTTP", id="not HTTP"),
    pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", "not valid HTTP", id="status is no number"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not valid HTTP", id="negative length"),
    pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "not valid HTTP", id="two lengths"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "not valid HTTP",
        id="length and chunks",
    ),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not valid HTTP", id="chunk size is no number"
    ),
    pytest.param(PLAIN + PLAIN, "more bytes than one reply", id="two replies to one query"),
    pytest.param(PLAIN + b"x", "not valid HTTP|more bytes", id="a byte too many"),
    pytest.param(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", "switched protocols", id="101"),
    pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"a" * (MAX_HEADER_BYTES + 1), "header block over", id="endless header"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: " + b"a" * MAX_HEADER_BYTES + b"\r\n\r\n",
        "header block over",
        id="large header at once",
    ),
]


def deliver(reader: ResponseReader, pieces: list[bytes]) -> Progress:
    """Feed pieces; all but the last must leave the reply unfinished."""
    for piece in pieces[:-1]:
        assert reader.feed(piece) is Progress.PARTIAL
    return reader.feed(pieces[-1])


@pytest.mark.parametrize(("reply", "status", "body_bytes", "end"), REPLIES)
def test_reply_is_understood_however_it_is_split(reply: bytes, status: int, body_bytes: int, end: Progress) -> None:
    ways = [[reply], [reply[i : i + 1] for i in range(len(reply))]]
    ways += [[reply[:cut], reply[cut:]] for cut in range(1, len(reply))]
    for pieces in ways:
        reader = ResponseReader({})
        assert deliver(reader, pieces) is end, pieces
        assert (reader.status, reader.body_bytes) == (status, body_bytes)


@pytest.mark.parametrize(
    ("reply", "status", "body_bytes", "end"), [row for row in REPLIES if row.values[3] is Progress.COMPLETE]
)
def test_a_connection_reads_one_reply_after_another(reply: bytes, status: int, body_bytes: int, end: Progress) -> None:
    memo: HeaderMemo = {}
    reader = ResponseReader(memo)
    for pieces in ([reply], [reply], [reply[:9], reply[9:]], [reply], [PLAIN], [reply]):
        assert deliver(reader, pieces) is end
        assert reader.status == (200 if pieces == [PLAIN] else status)
        assert reader.body_bytes == (5 if pieces == [PLAIN] else body_bytes)


def test_remembered_header_blocks_do_not_hide_a_different_body() -> None:
    memo: HeaderMemo = {}
    reader = ResponseReader(memo)
    reader.feed(PLAIN)
    assert memo, "a plain reply is remembered"
    assert reader.feed(PLAIN[:-2]) is Progress.PARTIAL, "the same block with a body still incomplete"
    assert reader.feed(PLAIN[-2:]) is Progress.COMPLETE
    with pytest.raises(ProtocolFault):
        reader.feed(PLAIN + b"x")


@pytest.mark.parametrize("body_bytes", range(121))
def test_a_remembered_reply_is_not_whole_before_its_last_byte(body_bytes: int) -> None:
    """Around the length of its own header block as well, where a cut inside the blank line could pass for a body."""
    memo: HeaderMemo = {}
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % body_bytes + b"x" * body_bytes
    for cut in range(1, len(reply)):
        reader = ResponseReader(memo)
        assert reader.feed(reply) is Progress.COMPLETE
        assert memo, "from here on the block is remembered"
        assert reader.feed(reply[:cut]) is Progress.PARTIAL, cut
        assert reader.feed(reply[cut:]) is Progress.COMPLETE
        assert (reader.status, reader.body_bytes) == (200, body_bytes)


def test_what_closes_or_is_chunked_is_not_remembered() -> None:
    memo: HeaderMemo = {}
    for row in REPLIES:
        reply, _, _, end = row.values
        if end is Progress.COMPLETE_CLOSE or b"chunked" in reply or reply.startswith(b"HTTP/1.1 10"):
            ResponseReader(memo).feed(reply)
    assert memo == {}


def test_memory_of_header_blocks_is_bounded() -> None:
    memo: HeaderMemo = {}
    reader = ResponseReader(memo)
    for second in range(1000):
        reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDate: %d\r\n\r\n" % second)
    assert len(memo) == 256


@pytest.mark.parametrize(("data", "message"), GARBAGE)
def test_garbage_is_a_protocol_fault(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolFault, match=message):
        ResponseReader({}).feed(data)
    reader = ResponseReader({})
    with pytest.raises(ProtocolFault, match="not valid HTTP|" + message):
        for i in range(len(data)):
            if reader.feed(data[i : i + 1]) is not Progress.PARTIAL and i + 1 < len(data):
                raise ProtocolFault("more bytes than one reply")


def test_body_over_the_limit_is_a_protocol_fault() -> None:
    reader = ResponseReader({}, max_body_bytes=4)
    with pytest.raises(ProtocolFault, match="body over 4 bytes"):
        reader.feed(PLAIN)


def test_a_body_that_ends_with_the_connection() -> None:
    reader = ResponseReader({})
    assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\nab") is Progress.PARTIAL
    assert reader.feed(b"cd") is Progress.PARTIAL
    assert reader.eof() is Progress.COMPLETE_CLOSE
    assert reader.body_bytes == 4


@pytest.mark.parametrize("cut", [1, 20, len(PLAIN) - 1])
def test_a_connection_that_ends_inside_the_reply(cut: int) -> None:
    reader = ResponseReader({})
    reader.feed(PLAIN[:cut])
    with pytest.raises(ProtocolFault, match="closed inside the reply"):
        reader.eof()


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, len(PLAIN)))
def test_rubbish_is_read_or_refused_and_nothing_else(pieces: list[bytes], kept: int) -> None:
    reader = ResponseReader({})
    try:
        for piece in [PLAIN[:kept], *pieces]:
            if piece:
                reader.feed(piece)
        reader.eof()
    except ProtocolFault:
        pass


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = "\n".join([self.path, self.headers["Host"], self.headers["X-One"], body.decode()]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


def test_the_standard_library_understands_our_request_and_we_its_reply() -> None:
    request = encode_request("POST", "/v2/models/m%20x/infer", "127.0.0.1:1", [("X-One", "é 1")], b"payload")
    with HTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.connect()
        connection.sock.sendall(request)
        connection.sock.settimeout(5)
        connection.sock.shutdown(1)
        received = io.BytesIO()
        while chunk := connection.sock.recv(10):
            received.write(chunk)
        connection.close()
        thread.join()
    status, headers, body = parse_reply(received.getvalue())
    assert status == 200
    assert headers["content-length"] == str(len(body))
    assert body.decode() == "/v2/models/m%20x/infer\n127.0.0.1:1\né 1\npayload"


@pytest.mark.parametrize(
    ("target", "headers", "message"),
    [
        pytest.param("/a b", [], "percent-encoded", id="space in the target"),
        pytest.param("/a\r\nX: y", [], "percent-encoded", id="line break in the target"),
        pytest.param("/", [("X", "a\r\nY: b")], "line break", id="header injection"),
        pytest.param("/", [("X Y", "a")], "not a header name", id="space in a name"),
        pytest.param("/", [("", "a")], "not a header name", id="no name"),
        pytest.param("/", [("X", "\u20ac")], "Latin-1", id="outside Latin-1"),
    ],
)
def test_requests_that_would_break_the_framing_are_refused(target: str, headers: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_request("POST", target, "h", headers, b"")
