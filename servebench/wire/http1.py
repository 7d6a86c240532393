"""HTTP/1.1 client side as pure bytes: encode a request once, read replies from any split.

Contract: no sockets, no clock. `ResponseReader.feed` takes what the socket gave and says
where the current reply stands. Framing (chunked bodies, lengths, read-until-close, 1xx) is
llhttp's, through `httptools`; anything it refuses, and anything that could make two replies
out of one, is a `ProtocolFault` and the connection must be thrown away.

One shortcut, because the reader runs once per query while measuring: servers send the same
header block again and again, so what llhttp found for a block (status, body length) is
remembered under the block's exact bytes, and a reply that arrives whole behind a remembered
block is not parsed a second time. Only blocks whose body is framed by Content-Length and
whose connection stays open are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import httptools

from servebench.wire.faults import ProtocolFault

#: nginx, Apache and h11 cap header blocks between 8 and 64 KiB.
MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 1 << 30
_MAX_REMEMBERED_BLOCKS = 256
_BLANK_LINE = b"\r\n\r\n"
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")

#: Written from what is known here; a second one would tear the request apart.
_OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding"})

#: header block without its blank line -> (status, body bytes); shared by a transport's readers.
HeaderMemo = dict[bytes, tuple[int, int]]


class Progress(IntEnum):
    """Where the current reply stands after some bytes."""

    PARTIAL = 0
    COMPLETE = 1  #: the connection can carry another query
    COMPLETE_CLOSE = 2  #: complete, and the connection must not be reused


# Looking an enum's member up costs more than the comparison it is for.
_PARTIAL, _COMPLETE, _COMPLETE_CLOSE = Progress.PARTIAL, Progress.COMPLETE, Progress.COMPLETE_CLOSE


def encode_request(method: str, target: str, host: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    """One whole request, ready for a single write.

    ``headers`` follow Host and Content-Length. `ValueError` for characters that would break
    the framing: CR, LF or NUL in a value, a name that is no token, a space in the target.
    """
    if any(ord(char) <= 0x20 or ord(char) >= 0x7F for char in target):
        raise ValueError(f"request target {target!r} holds a character that must be percent-encoded")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    for name, value in headers:
        if not name or not _TOKEN.issuperset(name):
            raise ValueError(f"{name!r} is not a header name")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"header {name} is set by the client itself")
        if any(char in "\r\n\0" or ord(char) > 0xFF for char in value):
            raise ValueError(f"header {name}: the value holds a line break or a character outside Latin-1")
        lines.append(f"{name}: {value}")
    return "\r\n".join(lines).encode("latin-1") + _BLANK_LINE + body


class ResponseReader:
    """Reads the replies of one connection, one at a time; bodies are counted, not kept.

    After `feed` or `eof` returns COMPLETE or COMPLETE_CLOSE, ``status`` and ``body_bytes``
    describe the reply until the next `feed`.
    """

    __slots__ = (
        "_complete",
        "_extra",
        "_framed",
        "_header_bytes",
        "_headers_done",
        "_interim",
        "_keep_alive",
        "_max_body_bytes",
        "_memo",
        "_parser",
        "_partial",
        "body_bytes",
        "status",
    )

    def __init__(self, memo: HeaderMemo, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self._memo = memo
        self._max_body_bytes = max_body_bytes
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self._partial = False
        self._begin()

    def _begin(self) -> None:
        self.body_bytes = 0
        self._header_bytes = 0
        self._headers_done = False
        self._framed = False
        self._interim = False
        self._complete = False
        self._keep_alive = False
        self._extra = False

    def feed(self, data: bytes) -> Progress:
        """Take the reply's next bytes. `ProtocolFault` when they are not HTTP, too large, or more than one reply."""
        if not self._partial:
            end = data.find(_BLANK_LINE)
            known = self._memo.get(data[:end]) if end >= 0 else None
            if known is not None and known[1] == len(data) - end - 4:
                self.status, self.body_bytes = known
                return _COMPLETE
            if end > MAX_HEADER_BYTES:
                raise ProtocolFault(f"header block over {MAX_HEADER_BYTES} bytes")
            self._begin()
            progress = self._parse(data)
            # Whatever follows the blank line must be body and nothing else: then length alone recognises it.
            if progress is _COMPLETE and not self._interim and len(data) - end - 4 == self.body_bytes:
                if len(self._memo) >= _MAX_REMEMBERED_BLOCKS:
                    del self._memo[next(iter(self._memo))]  # a Date header makes a new block every second
                self._memo[data[:end]] = (self.status, self.body_bytes)
        else:
            progress = self._parse(data)
        self._partial = progress is _PARTIAL
        return progress

    def eof(self) -> Progress:
        """The peer closed its side: COMPLETE_CLOSE for a reply that ends so, `ProtocolFault` for one cut short."""
        if self._partial and self._headers_done and not self._framed:
            self._partial = False
            return _COMPLETE_CLOSE
        raise ProtocolFault(f"connection closed inside the reply, after {self.body_bytes} body bytes")

    def close(self) -> None:
        """Let go of the parser, which refers back to its reader: collection is off while measuring."""
        del self._parser

    def _parse(self, data: bytes) -> Progress:
        if not self._headers_done:
            self._header_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise ProtocolFault("the server switched protocols (101)") from None
        except httptools.HttpParserError as error:
            raise ProtocolFault(f"not valid HTTP: {error}") from None
        if self._extra:
            raise ProtocolFault("more bytes than one reply")
        if not self._headers_done and self._header_bytes > MAX_HEADER_BYTES:
            raise ProtocolFault(f"header block over {MAX_HEADER_BYTES} bytes")
        if self.body_bytes > self._max_body_bytes:
            raise ProtocolFault(f"body over {self._max_body_bytes} bytes")
        if not self._complete:
            return _PARTIAL
        return _COMPLETE if self._keep_alive else _COMPLETE_CLOSE

    # --- llhttp's callbacks -------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._extra = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._interim = True
            return
        self.status = status
        self._headers_done = True

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._headers_done:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()


class _Collector:
    def __init__(self) -> None:
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        if self.status < 200:
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        self.body += body


def parse_reply(data: bytes) -> tuple[int, dict[str, str], bytes]:
    """A whole recorded reply as (status, headers with lower-case names, body); for use off the timed path."""
    collector = _Collector()
    try:
        collector.parser.feed_data(data)
    except httptools.HttpParserError as error:
        raise ProtocolFault(f"not valid HTTP: {error}") from None
    return collector.status, dict(collector.headers), bytes(collector.body)
