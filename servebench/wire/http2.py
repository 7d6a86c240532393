"""HTTP/2 client side for gRPC calls, as pure bytes: many streams on one connection, frames in, replies out.

Contract: no sockets, no clock (times are passed in). `Http2Client` owns the state of one
connection: what it wants sent is returned or gathered in ``outgoing``; what it learns is
returned as ended `Stream`s. A `ProtocolFault` is the end of the connection and of all its
streams; the peer's errors in one stream are no exception (RFC 9113, 5.4.1 allows it).

Plan. A load generator sends one kind of request, so its HEADERS block is encoded once,
without HPACK's dynamic table, and a stream costs two frame headers. We announce a header
table of size 0: the peer's header blocks then have no state either, and what the ``hpack``
library made of one is remembered under its exact bytes. Receiving, every stream may send
2 GiB, and the connection's window is refilled in large steps, so flow control costs nothing.
Bytes of an unfinished frame are put together once, when the last of them is here.

Known limits: no server push (refused), no priorities (obsolete, skipped), no Huffman when
sending. Replies are not checked for what does no harm here: upper-case names, pseudo-headers
in trailers, frames after the end of a stream, a peer that overdraws our windows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from servebench.wire.faults import ProtocolFault
from servebench.wire.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    check_size,
    check_stream_0,
    error_name,
    frame,
    frame_bounds,
)
from servebench.wire.http2_headers import MAX_HEADER_BYTES, Fields, decode_headers

_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST = range(1, 7)
_NO_ERROR, _CANCEL = 0, 8

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_MAX_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_DEFAULT_FRAME_SIZE = 16_384
_OUR_FRAME_SIZE = 1 << 20  #: fewer frame headers in large replies; the default is 16 KiB
_LARGE_FRAME = _OUR_FRAME_SIZE >> 16
_HEADERS_FLAGS = END_HEADERS | PADDED | PRIORITY_FLAG
_MAX_FRAGMENTS = 64  #: of one header block; empty CONTINUATIONs would otherwise never end
_MAX_REMEMBERED_BLOCKS = 256
_STREAM_BITS = 2**31 - 1  #: the bit above a stream's number is reserved, and ignored (RFC 9113, 4.1)

#: A connection's receive window, and how much of it is used up before it is refilled.
RECEIVE_WINDOW = _MAX_WINDOW
REFILL_BYTES = 1 << 28
#: The highest number a stream can have; a connection that has used it is of no more use.
LAST_STREAM = 2**31 - 1

#: header block -> its fields; shared by a transport's connections.
HeaderMemo = dict[bytes, Fields]


@dataclass(slots=True, eq=False)
class Stream:
    """One call. ``headers`` and ``trailers`` are shared with other calls: read them only."""

    row: int
    number: int
    kept: list[bytes] | None = None  #: the DATA received, where it is to be kept
    first_byte_ns: int = 0
    body_bytes: int = 0  #: of DATA received, gRPC's message prefixes included
    prefix: bytes = b""  #: the first bytes of DATA, up to a message prefix's 5
    headers: Fields | None = None  #: of the final reply, not of a 1xx before it
    trailers: Fields | None = None  #: the header block that ended the stream; the headers themselves, if they did
    unsent: memoryview | None = None
    window: int = 0  #: what the peer still takes on this stream, while some is unsent
    reset: str | None = None  #: why the peer ended it, where it did


class Http2Client:
    """One connection, from the client's side.

    Life: send `preface`; feed what comes; once ``ready`` (our settings are acknowledged) and
    while ``streams`` are fewer than ``max_streams``, `request` opens more. ``goaway`` says why
    no more may be opened. Whatever `feed` leaves in ``outgoing`` must be sent (and cleared) soon.
    """

    def __init__(self, header_block: bytes, memo: HeaderMemo) -> None:
        size = len(header_block)
        self._request = struct.Struct(f">5sL{size}sBHBBL")  # a HEADERS frame, and the header of a DATA frame
        self._headers_start = FRAME.pack(size >> 16, size & 0xFFFF, HEADERS, END_HEADERS, 0)[:5]
        self._header_block = header_block
        self._memo = memo
        self._parts: list[bytes] = []  # received, but not a whole frame yet
        self._missing = 0  # bytes until the frame, or its header, is whole
        self._block: tuple[int, int, list[bytes]] | None = None  # stream, flags, fragments awaiting CONTINUATION
        self._rows: dict[int, Stream] = {}
        self._next_number = 1
        self._peer_window = _DEFAULT_WINDOW  # initial window of new streams
        self._peer_frame_size = _DEFAULT_FRAME_SIZE
        self._peer_max_streams = LAST_STREAM
        self._one_frame = _DEFAULT_FRAME_SIZE  # a body up to this size fits in one frame and in a new stream's window
        self._send_window = _DEFAULT_WINDOW
        self._received = 0
        self._blocked: dict[int, Stream] = {}  # streams with unsent bytes, oldest first
        self._heard_settings = False
        self.streams: dict[int, Stream] = {}  #: those that have not ended, oldest first; for reading only
        self.max_streams = 0  #: how many there may be; 0 while, and as soon as, none may be opened
        self.ready = False
        self.goaway: str | None = None
        self.outgoing = bytearray()
        self.peer_settings: dict[int, int] = {}

    @property
    def used(self) -> bool:
        """Whether a stream was ever opened."""
        return self._next_number > 1

    def preface(self) -> bytes:
        """What a connection begins with: our settings, and a large receive window."""
        settings = {
            _HEADER_TABLE_SIZE: 0,
            _ENABLE_PUSH: 0,
            _INITIAL_WINDOW_SIZE: _MAX_WINDOW,
            _MAX_FRAME_SIZE: _OUR_FRAME_SIZE,
            _MAX_HEADER_LIST: MAX_HEADER_BYTES,
        }
        payload = b"".join(struct.pack(">HL", key, value) for key, value in settings.items())
        window = struct.pack(">L", RECEIVE_WINDOW - _DEFAULT_WINDOW)
        return _PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, window)

    def request(self, row: int, body: bytes | memoryview, *, keep: bool) -> bytes:
        """Open a stream with ``body``; returns its bytes as far as flow control lets them go, `feed` sends the rest."""
        number = self._next_number
        self._next_number = number + 2
        if number >= LAST_STREAM:
            self._open_no_more("the connection's stream numbers are used up")
        stream = Stream(row, number, [] if keep else None)
        self.streams[number] = stream
        self._rows[row] = stream
        size = len(body)
        if size <= self._one_frame and size <= self._send_window:
            self._send_window -= size
            start = self._request.pack(
                self._headers_start, number, self._header_block, size >> 16, size & 0xFFFF, DATA, END_STREAM, number
            )
            return start + body
        stream.unsent = memoryview(body)
        stream.window = self._peer_window
        self._blocked[number] = stream
        parts: list[bytes | memoryview] = [frame(HEADERS, END_HEADERS, number, self._header_block)]
        self._send(stream, parts)
        return b"".join(parts)

    def cancel(self, row: int) -> Stream | None:
        """Give a call up; queues RST_STREAM in ``outgoing``. None when it has ended."""
        stream = self._rows.get(row)
        if stream is not None:
            self._forget(stream)
            self.outgoing += frame(RST_STREAM, 0, stream.number, struct.pack(">L", _CANCEL))
        return stream

    def drop_all(self) -> list[Stream]:
        """The connection is over: every stream that had not ended, oldest first."""
        streams = list(self.streams.values())
        self.streams.clear()
        self._rows.clear()
        self._blocked.clear()
        return streams

    def feed(self, data: bytes, at_ns: int, ended: list[Stream]) -> None:
        """Take what was received at ``at_ns``, and append the streams that it ended to ``ended``.

        `ProtocolFault` ends the connection, but not what was appended before it.
        """
        parts = self._parts
        if parts:
            parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(parts)
            parts.clear()
        streams = self.streams
        position, end = 0, len(data)
        while True:
            start = stop = position + 9
            if start > end:
                break
            high, low, kind, flags, number = FRAME.unpack_from(data, position)
            stop += (high << 16) + low
            if stop > end or high >= _LARGE_FRAME:
                if stop - start > _OUR_FRAME_SIZE:
                    self._refuse_size(data, stop - start)
                if stop > end:
                    break
            position = stop
            if self._block is not None and kind != CONTINUATION:
                raise ProtocolFault("a header block is interrupted by another frame")
            if kind == DATA:
                self._received += stop - start  # padding included, and whoever still wants it
                if flags & PADDED:
                    start, stop = frame_bounds(PADDED, data, start, stop)
                stream = streams.get(number) or self._find(number)
                if stream is None:
                    continue
                before = stream.body_bytes
                if before < 5:
                    if stream.headers is None:
                        raise ProtocolFault("DATA before the reply's headers")
                    stream.prefix += data[start : min(stop, start + 5 - before)]
                stream.body_bytes = before + stop - start
                if stream.kept is not None:
                    stream.kept.append(data[start:stop])
                if flags & END_STREAM:
                    ended.append(self._end(stream))
            elif kind == HEADERS and flags & _HEADERS_FLAGS == END_HEADERS:
                self._take_headers(number, flags, data[start:stop], at_ns, ended)
            else:
                self._take_rare(kind, flags, number & _STREAM_BITS, data[start:stop], at_ns, ended)
        if position < end:
            parts.append(data[position:])
            self._missing = stop - end
        if self._received >= REFILL_BYTES:
            self.outgoing += frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._received))
            self._received = 0
        if self._blocked:
            self._send_blocked()

    # --- receiving ----------------------------------------------------------------------

    def _take_headers(self, number: int, flags: int, block: bytes, at_ns: int, ended: list[Stream]) -> None:
        # Most calls see two blocks that were seen before: the dictionaries are shared, and never changed.
        fields = self._memo.get(block)
        if fields is None:
            fields = self._decode(block)
        stream = self.streams.get(number) or self._find(number)
        if stream is None:
            return
        if stream.headers is None:
            if stream.first_byte_ns == 0:
                stream.first_byte_ns = at_ns
            if fields.get(b":status") == b"200" or _is_final(fields, flags):
                stream.headers = fields
        elif not flags & END_STREAM:
            raise ProtocolFault("trailers that do not end their stream")
        if flags & END_STREAM:
            stream.trailers = fields
            ended.append(self._end(stream))

    def _take_rare(self, kind: int, flags: int, number: int, payload: bytes, at_ns: int, ended: list[Stream]) -> None:
        if kind == SETTINGS:
            self._take_settings(flags, number, payload)
        elif not self._heard_settings:
            raise ProtocolFault("the connection does not begin with SETTINGS")
        elif kind == HEADERS:
            start, stop = frame_bounds(flags, payload, 0, len(payload))
            if flags & END_HEADERS:
                self._take_headers(number, flags, payload[start:stop], at_ns, ended)
            else:
                self._block = (number, flags, [payload[start:stop]])
        elif kind == CONTINUATION:
            self._take_continuation(flags, number, payload, at_ns, ended)
        elif kind == PING:
            check_size("PING", payload, 8)
            check_stream_0("PING", number)
            if not flags & ACK:
                self.outgoing += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            self._take_window_update(number, payload)
        elif kind == RST_STREAM:
            check_size("RST_STREAM", payload, 4)
            stream = self._find(number)
            if stream is not None:
                stream.reset = f"RST_STREAM {error_name(payload)}"
                self._forget(stream)
                ended.append(stream)
        elif kind == GOAWAY:
            self._take_goaway(number, payload, ended)
        elif kind == PUSH_PROMISE:
            raise ProtocolFault("PUSH_PROMISE although push is off")
        # PRIORITY means nothing any more; frames of unknown types are ignored, as RFC 9113, 5.5 asks.

    def _take_continuation(self, flags: int, number: int, payload: bytes, at_ns: int, ended: list[Stream]) -> None:
        if self._block is None or self._block[0] != number:
            raise ProtocolFault("CONTINUATION without a header block to continue")
        _, first_flags, fragments = self._block
        fragments.append(payload)
        if len(fragments) > _MAX_FRAGMENTS or sum(map(len, fragments)) > MAX_HEADER_BYTES:
            raise ProtocolFault(f"header block over {MAX_HEADER_BYTES} bytes or {_MAX_FRAGMENTS} frames")
        if flags & END_HEADERS:
            self._block = None
            self._take_headers(number, first_flags, b"".join(fragments), at_ns, ended)

    def _take_settings(self, flags: int, number: int, payload: bytes) -> None:
        check_stream_0("SETTINGS", number)
        if flags & ACK:
            check_size("SETTINGS ACK", payload, 0)
            if not self._heard_settings:
                raise ProtocolFault("the connection does not begin with SETTINGS")
            self.ready = True
            self._limit_streams()
            return
        if len(payload) % 6:
            raise ProtocolFault(f"SETTINGS of {len(payload)} bytes")
        for key, value in struct.iter_unpack(">HL", payload):
            self.peer_settings[key] = value
            if key == _MAX_CONCURRENT_STREAMS:
                self._peer_max_streams = value
                self._limit_streams()
            elif key == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise ProtocolFault("SETTINGS_INITIAL_WINDOW_SIZE over 2^31-1")
                for stream in self._blocked.values():
                    _widen(stream, value - self._peer_window)
                self._peer_window = value
            elif key == _MAX_FRAME_SIZE:
                if not _DEFAULT_FRAME_SIZE <= value < 1 << 24:
                    raise ProtocolFault("SETTINGS_MAX_FRAME_SIZE out of range")
                self._peer_frame_size = value
            elif key == _ENABLE_PUSH and value:
                raise ProtocolFault("SETTINGS_ENABLE_PUSH from a server")
        self._one_frame = min(self._peer_frame_size, self._peer_window)
        self._heard_settings = True
        self.outgoing += frame(SETTINGS, ACK, 0)

    def _take_window_update(self, number: int, payload: bytes) -> None:
        check_size("WINDOW_UPDATE", payload, 4)
        increment = int.from_bytes(payload, "big") & _MAX_WINDOW
        if increment == 0:
            raise ProtocolFault("WINDOW_UPDATE by 0")
        if number == 0:
            self._send_window += increment
            if self._send_window > _MAX_WINDOW:
                raise ProtocolFault("flow-control window over 2^31-1")
        else:
            stream = self._find(number)
            if stream is not None and stream.unsent is not None:
                _widen(stream, increment)

    def _take_goaway(self, number: int, payload: bytes, ended: list[Stream]) -> None:
        check_stream_0("GOAWAY", number)
        if len(payload) < 8:
            raise ProtocolFault(f"GOAWAY of {len(payload)} bytes")
        last_allowed = int.from_bytes(payload[:4], "big") & _STREAM_BITS
        said = payload[8:200].decode("utf-8", "replace").strip()
        goaway = f"GOAWAY {error_name(payload[4:8])}{f': {said}' if said else ''}"
        self._open_no_more(goaway)
        for stream in [one for one in self.streams.values() if one.number > last_allowed]:
            stream.reset = goaway
            self._forget(stream)
            ended.append(stream)

    def _decode(self, block: bytes) -> Fields:
        fields = decode_headers(block)
        if len(self._memo) >= _MAX_REMEMBERED_BLOCKS:
            del self._memo[next(iter(self._memo))]
        self._memo[block] = fields
        return fields

    def _find(self, number: int) -> Stream | None:
        """The stream of a frame; None where it is one that has ended for us: late frames may still come for it."""
        number &= _STREAM_BITS
        if number % 2 == 0 or number >= self._next_number:
            raise ProtocolFault(f"a frame for stream {number}, which was never opened")
        return self.streams.get(number)

    def _refuse_size(self, data: bytes, size: int) -> None:
        if not self._heard_settings:
            raise ProtocolFault(f"not HTTP/2: the connection begins with {data[:24]!r}")
        raise ProtocolFault(f"frame of {size} bytes, over the {_OUR_FRAME_SIZE} allowed")

    def _end(self, stream: Stream) -> Stream:
        """The peer's side of a stream is over; what we had not sent of ours is not wanted any more."""
        if stream.unsent is not None:
            self.outgoing += frame(RST_STREAM, 0, stream.number, struct.pack(">L", _NO_ERROR))
        self._forget(stream)
        return stream

    def _forget(self, stream: Stream) -> None:
        del self.streams[stream.number]
        del self._rows[stream.row]
        if stream.unsent is not None:
            del self._blocked[stream.number]

    def _open_no_more(self, reason: str) -> None:
        self.goaway = reason
        self.max_streams = 0

    def _limit_streams(self) -> None:
        self.max_streams = self._peer_max_streams if self.ready and self.goaway is None else 0

    # --- sending ------------------------------------------------------------------------

    def _send_blocked(self) -> None:
        """Send what the windows allow of the streams that wait for them, oldest first."""
        parts: list[bytes | memoryview] = []
        for stream in list(self._blocked.values()):
            if self._send_window <= 0:
                break
            if stream.window > 0:
                self._send(stream, parts)
        self.outgoing += b"".join(parts)

    def _send(self, stream: Stream, parts: list[bytes | memoryview]) -> None:
        unsent = stream.unsent
        assert unsent is not None, "the stream is not blocked"
        position, length = 0, len(unsent)
        frame_size, allowed = self._peer_frame_size, min(length, stream.window, self._send_window)
        while position < allowed:
            size = min(allowed - position, frame_size)
            stop = position + size
            parts.append(FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM if stop == length else 0, stream.number))
            parts.append(unsent[position:stop])
            position = stop
        stream.window -= position
        self._send_window -= position
        if position == length:
            stream.unsent = None
            del self._blocked[stream.number]
        else:
            stream.unsent = unsent[position:]


def _is_final(fields: Fields, flags: int) -> bool:
    """Whether a reply's headers are not those of a 1xx before it."""
    status = fields.get(b":status")
    if status is None or (status.startswith(b"1") and flags & END_STREAM):
        raise ProtocolFault("a reply without a final :status")
    return not status.startswith(b"1")


def _widen(stream: Stream, by: int) -> None:
    stream.window += by
    if stream.window > _MAX_WINDOW:
        raise ProtocolFault(f"flow-control window of stream {stream.number} over 2^31-1")
