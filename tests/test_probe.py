"""The query before a run: which answers stop it, and that nothing is left behind by a server that does not read on."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import uvloop

from servebench.engine.probe import probe
from servebench.errors import TransportError
from servebench.transport.factory import TransportSettings
from servebench.wire.http1 import encode_request


@contextlib.contextmanager
def server_that_says(answer: bytes) -> Iterator[str]:
    """Takes the head of one request, answers, and neither reads on nor closes until the test is over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                connection.sendall(answer)
                over.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def ask(url: str, client: str = "wire", body: bytes = b"", timeout_s: float = 5) -> None:
    settings = TransportSettings(client, url, "/x", [], None, 1, 5_000_000_000, None, True)  # type: ignore[arg-type]
    uvloop.run(probe(settings, encode_request("POST", "/x", "host", [], body), timeout_s=timeout_s))


def http(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    "status", ["200 OK", "429 Too Many Requests", "503 Service Unavailable", "507 Insufficient Storage", "500 Oops"]
)
def test_what_may_pass_does_not_stop_a_run(status: str) -> None:
    with server_that_says(http(status)) as url:
        ask(url)


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "415 Unsupported Media Type"])
def test_what_no_later_query_betters_stops_a_run_in_the_servers_words(status: str) -> None:
    with (
        server_that_says(http(status, b'{"error": "it wants a tensor"}')) as url,
        pytest.raises(
            TransportError, match=rf"^endpoint: the server at {url} refuses the first sample: HTTP {status[:3]}: it wants"
        ),
    ):
        ask(url)


def test_a_refusal_before_all_is_sent_leaves_nothing_open() -> None:
    """More than the socket's buffers hold: warnings and errors of a write that can never end would fail this test."""
    with (
        server_that_says(http("413 Request Entity Too Large")) as url,
        pytest.raises(TransportError, match="refuses the first sample: HTTP 413"),
    ):
        ask(url, body=bytes(50_000_000))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(b"garbage\r\n\r\n", "does not answer the first sample: ", id="garbage"),
        pytest.param(b"", "nothing within 0.1 s", id="silence"),
    ],
)
def test_no_answer_stops_a_run(answer: bytes, said: str) -> None:
    with server_that_says(answer) as url, pytest.raises(TransportError, match=said):
        ask(url, timeout_s=0.1 if not answer else 5)


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="refused"):
            ask(f"http://127.0.0.1:{unused.getsockname()[1]}")
