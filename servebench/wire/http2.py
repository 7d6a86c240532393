"""HTTP/2 client side for gRPC calls, as pure bytes: many streams on one connection, frames in, replies out.

Contract: no sockets, no clock (times are passed in). `Http2Client` owns the state of one
connection: what it wants sent is returned or gathered in ``outgoing``; what it learns is
returned as ended `Stream`s. A `ProtocolFault` is the end of the connection and of all its
streams.

Plan. A load generator sends one kind of request, so its HEADERS block is encoded once,
without HPACK's dynamic table, and a stream costs two frame headers. We announce a header
table of size 0: the peer's header blocks then have no state either, and what the ``hpack``
library made of one is remembered under its exact bytes. Receiving, every stream may send
2 GiB, and the connection's window is refilled in large steps, so flow control costs nothing.

Known limits: no server push (refused), no priorities (obsolete, skipped), no Huffman when sending.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hpack import Decoder, HPACKError

from servebench.wire.faults import ProtocolFault

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST = range(1, 7)
ERROR_NAMES = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
_CANCEL = 8

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_MAX_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_OUR_FRAME_SIZE = 1 << 20  #: fewer frame headers in large replies; the default is 16 KiB
_REFILL_BYTES = 1 << 28
_MAX_HEADER_BYTES = 64 * 1024
_MAX_REMEMBERED_BLOCKS = 256
_MAX_STREAM_ID = 2**31 - 1
_FRAME = struct.Struct(">BHBBL")  # length (24 bits in two parts), type, flags, stream

#: header block -> its fields; shared by a transport's connections.
HeaderMemo = dict[bytes, dict[bytes, bytes]]


@dataclass(slots=True, eq=False)
class Stream:
    """One call. ``fields`` gathers the reply's headers and trailers once it has ended."""

    row: int
    number: int = 0
    first_byte_ns: int = 0
    body_bytes: int = 0  #: of DATA received, gRPC's message prefixes included
    kept: list[bytes] | None = None  #: the DATA received, where it is to be kept
    prefix: bytes = b""  #: the first bytes of DATA, up to a message prefix's 5
    fields: dict[bytes, bytes] = field(default_factory=dict)
    unsent: memoryview | None = None
    window: int = 0  #: what the peer still takes on this stream, while some is unsent
    reset: str | None = None  #: why the peer ended it, where it did


def encode_headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """A header block that needs no state: literals without indexing, names and values as they are.

    `ValueError` for names in upper case and values with line breaks or NUL, which HTTP/2 forbids.
    """
    block = bytearray()
    for name, value in fields:
        if not name or name != name.lower() or any(char in name for char in " \r\n\0"):
            raise ValueError(f"{name!r} is not an HTTP/2 header name: lower case, no spaces")
        if any(char in "\r\n\0" or ord(char) > 0xFF for char in value):
            raise ValueError(f"header {name}: the value holds a line break or a character outside Latin-1")
        block.append(0)
        for text in (name, value):
            data = text.encode("latin-1")
            block += _integer(len(data), 7) + data
    return bytes(block)


def _integer(value: int, bits: int) -> bytes:
    """HPACK's variable-length integer (RFC 7541, 5.1), the bits above it 0."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([value])
    out = bytearray([limit])
    value -= limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return _FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


class Http2Client:
    """One connection, from the client's side.

    Life: send `preface`; feed what comes; once ``ready`` (our settings are acknowledged) and
    while ``capacity`` is over 0, `request` opens streams. ``goaway`` says why no more may be
    opened. Whatever `feed` leaves in ``outgoing`` must be sent (and cleared) soon.
    """

    def __init__(self, header_block: bytes, memo: HeaderMemo) -> None:
        self._headers_tail = header_block
        self._memo = memo
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags, header block awaiting CONTINUATION
        self._streams: dict[int, Stream] = {}
        self._rows: dict[int, Stream] = {}
        self._next_number = 1
        self._last_allowed = _MAX_STREAM_ID
        self._peer_window = _DEFAULT_WINDOW  # initial window of new streams
        self._peer_frame_size = 16_384
        self._peer_max_streams = _MAX_STREAM_ID
        self._send_window = _DEFAULT_WINDOW
        self._received = 0
        self._blocked: dict[int, Stream] = {}  # streams with unsent bytes, oldest first
        self._heard_settings = False
        self.ready = False
        self.goaway: str | None = None
        self.outgoing = bytearray()
        self.peer_settings: dict[int, int] = {}

    @property
    def active(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def capacity(self) -> int:
        """How many more streams may be opened now."""
        if not self.ready or self.goaway is not None:
            return 0
        return min(self._peer_max_streams - len(self._streams), (_MAX_STREAM_ID - self._next_number) // 2 + 1)

    def preface(self) -> bytes:
        """What a connection begins with: our settings, and a large receive window."""
        settings = {
            _HEADER_TABLE_SIZE: 0,
            _ENABLE_PUSH: 0,
            _INITIAL_WINDOW_SIZE: _MAX_WINDOW,
            _MAX_FRAME_SIZE: _OUR_FRAME_SIZE,
            _MAX_HEADER_LIST: _MAX_HEADER_BYTES,
        }
        payload = b"".join(struct.pack(">HL", key, value) for key, value in settings.items())
        window = struct.pack(">L", _MAX_WINDOW - _DEFAULT_WINDOW)
        return _PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, window)

    def request(self, row: int, body: bytes | memoryview, *, keep: bool) -> bytes:
        """Open a stream with ``body``; returns its bytes as far as flow control lets them go, `feed` sends the rest."""
        number = self._next_number
        self._next_number = number + 2
        stream = Stream(row, number)
        if keep:
            stream.kept = []
        self._streams[number] = stream
        self._rows[row] = stream
        tail, size = self._headers_tail, len(body)
        head = _FRAME.pack(len(tail) >> 16, len(tail) & 0xFFFF, HEADERS, END_HEADERS, number) + tail
        if size <= self._peer_frame_size and size <= self._send_window and size <= self._peer_window and not self._blocked:
            self._send_window -= size
            return b"".join((head, _FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM, number), body))
        stream.unsent = memoryview(body)
        stream.window = self._peer_window
        self._blocked[number] = stream
        out = bytearray(head)
        self._send_blocked(out)
        return bytes(out)

    def cancel(self, row: int) -> Stream | None:
        """Give a call up; queues RST_STREAM in ``outgoing``. None when it has ended."""
        stream = self._rows.get(row)
        if stream is not None:
            self._forget(stream)
            self.outgoing += frame(RST_STREAM, 0, stream.number, struct.pack(">L", _CANCEL))
        return stream

    def drop_all(self) -> list[Stream]:
        """The connection is over: every stream that had not ended, oldest first."""
        streams = list(self._streams.values())
        self._streams.clear()
        self._rows.clear()
        self._blocked.clear()
        return streams

    def feed(self, data: bytes, at_ns: int) -> list[Stream]:
        """Take what was received at ``at_ns``; returns the streams that have ended. `ProtocolFault` ends the connection."""
        if self._rest:
            data = self._rest + data
        ended: list[Stream] = []
        streams = self._streams
        position, end = 0, len(data)
        while end - position >= 9:
            high, low, kind, flags, number = _FRAME.unpack_from(data, position)
            start = position + 9
            stop = start + (high << 16) + low
            if stop > end:
                if stop - start > _OUR_FRAME_SIZE:
                    raise ProtocolFault(f"frame of {stop - start} bytes, over the {_OUR_FRAME_SIZE} allowed")
                break
            position = stop
            if self._block is not None and kind != CONTINUATION:
                raise ProtocolFault("a header block is interrupted by another frame")
            if kind == DATA and not flags & PADDED:
                stream = streams.get(number)
                self._received += stop - start
                if stream is None:
                    self._check_known(number)
                    continue
                self._take_data(stream, data, start, stop, at_ns)
                if flags & END_STREAM:
                    ended.append(self._end(stream))
            elif kind == HEADERS and flags & (END_HEADERS | PADDED | PRIORITY_FLAG) == END_HEADERS:
                self._take_headers(number, flags, data[start:stop], at_ns, ended)
            else:
                self._take_rare(kind, flags, number & _MAX_STREAM_ID, data[start:stop], at_ns, ended)
        self._rest = data[position:] if position else data
        if self._received >= _REFILL_BYTES:
            self.outgoing += frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._received))
            self._received = 0
        return ended

    # --- receiving ----------------------------------------------------------------------

    def _take_data(self, stream: Stream, data: bytes, start: int, stop: int, at_ns: int) -> None:
        if not stream.first_byte_ns:
            stream.first_byte_ns = at_ns
        if len(stream.prefix) < 5:
            stream.prefix += data[start : min(stop, start + 5 - len(stream.prefix))]
        stream.body_bytes += stop - start
        if stream.kept is not None:
            stream.kept.append(data[start:stop])

    def _take_headers(self, number: int, flags: int, block: bytes, at_ns: int, ended: list[Stream]) -> None:
        fields = self._memo.get(block)
        if fields is None:
            fields = self._decode(block)
        stream = self._streams.get(number)
        if stream is None:
            self._check_known(number)
            return
        if not stream.first_byte_ns:
            stream.first_byte_ns = at_ns
        # Most calls see two blocks that were seen before: the dictionaries are shared, and only merged, never changed.
        stream.fields = {**stream.fields, **fields} if stream.fields else fields
        if flags & END_STREAM:
            ended.append(self._end(stream))

    def _take_rare(self, kind: int, flags: int, number: int, payload: bytes, at_ns: int, ended: list[Stream]) -> None:
        if kind in (DATA, HEADERS):
            size = len(payload)
            if flags & PADDED:
                if not size or payload[0] >= size:
                    raise ProtocolFault("padding longer than its frame")
                payload = payload[1 : size - payload[0]]
            if kind == DATA:
                self._received += size
                stream = self._streams.get(number)
                if stream is None:
                    self._check_known(number)
                    return
                self._take_data(stream, payload, 0, len(payload), at_ns)
                if flags & END_STREAM:
                    ended.append(self._end(stream))
                return
            if flags & PRIORITY_FLAG:
                payload = payload[5:]
            if flags & END_HEADERS:
                self._take_headers(number, flags, payload, at_ns, ended)
            else:
                self._block = (number, flags, bytearray(payload))
        elif kind == CONTINUATION:
            self._take_continuation(flags, number, payload, at_ns, ended)
        elif kind == SETTINGS:
            self._take_settings(flags, number, payload)
        elif kind == PING:
            if len(payload) != 8 or number:
                raise ProtocolFault("malformed PING")
            if not flags & ACK:
                self.outgoing += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE:
            self._take_window_update(number, payload)
        elif kind == RST_STREAM:
            if len(payload) != 4:
                raise ProtocolFault("malformed RST_STREAM")
            self._check_known(number)
            stream = self._streams.get(number)
            if stream is not None:
                stream.reset = f"RST_STREAM {_error_name(payload)}"
                ended.append(self._forget(stream))
        elif kind == GOAWAY:
            self._take_goaway(payload, ended)
        elif kind == PUSH_PROMISE:
            raise ProtocolFault("PUSH_PROMISE although push is off")
        # PRIORITY and frames of unknown types are ignored, as RFC 9113 5.5 asks.

    def _take_continuation(self, flags: int, number: int, payload: bytes, at_ns: int, ended: list[Stream]) -> None:
        if self._block is None or self._block[0] != number:
            raise ProtocolFault("CONTINUATION without a header block to continue")
        _, first_flags, block = self._block
        block += payload
        if len(block) > _MAX_HEADER_BYTES:
            raise ProtocolFault(f"header block over {_MAX_HEADER_BYTES} bytes")
        if flags & END_HEADERS:
            self._block = None
            self._take_headers(number, first_flags, bytes(block), at_ns, ended)

    def _take_settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % 6 or (flags & ACK and payload):
            raise ProtocolFault("malformed SETTINGS")
        if flags & ACK:
            self.ready = self._heard_settings
            return
        for key, value in struct.iter_unpack(">HL", payload):
            self.peer_settings[key] = value
            if key == _MAX_CONCURRENT_STREAMS:
                self._peer_max_streams = value
            elif key == _INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise ProtocolFault("SETTINGS_INITIAL_WINDOW_SIZE over 2^31-1")
                for stream in self._blocked.values():
                    stream.window += value - self._peer_window
                self._peer_window = value
            elif key == _MAX_FRAME_SIZE:
                if not 16_384 <= value < 1 << 24:
                    raise ProtocolFault("SETTINGS_MAX_FRAME_SIZE out of range")
                self._peer_frame_size = value
        self._heard_settings = True
        self.outgoing += frame(SETTINGS, ACK, 0)
        self._send_blocked(self.outgoing)

    def _take_window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ProtocolFault("malformed WINDOW_UPDATE")
        increment = int.from_bytes(payload, "big") & _MAX_WINDOW
        if increment == 0:
            raise ProtocolFault("WINDOW_UPDATE by 0")
        if number == 0:
            self._send_window += increment
            if self._send_window > _MAX_WINDOW:
                raise ProtocolFault("flow-control window over 2^31-1")
        elif number in self._blocked:
            self._blocked[number].window += increment
        else:
            self._check_known(number)
        if self._blocked:
            self._send_blocked(self.outgoing)

    def _take_goaway(self, payload: bytes, ended: list[Stream]) -> None:
        if len(payload) < 8:
            raise ProtocolFault("malformed GOAWAY")
        self._last_allowed = int.from_bytes(payload[:4], "big") & _MAX_STREAM_ID
        said = payload[8:200].decode("utf-8", "replace").strip()
        self.goaway = f"GOAWAY {_error_name(payload[4:8])}{f': {said}' if said else ''}"
        for stream in [one for number, one in self._streams.items() if number > self._last_allowed]:
            stream.reset = self.goaway
            ended.append(self._forget(stream))

    def _decode(self, block: bytes) -> dict[bytes, bytes]:
        # A decoder of its own for each block: with a table of size 0 there is no state to share.
        decoder = Decoder(max_header_list_size=_MAX_HEADER_BYTES)
        decoder.header_table_size = 0
        decoder.max_allowed_table_size = 0
        try:
            decoded: list[Any] = list(decoder.decode(block, raw=True))
        except (HPACKError, IndexError, UnicodeDecodeError) as error:
            raise ProtocolFault(f"header block cannot be decoded: {error}") from None
        fields = {bytes(name): bytes(value) for name, value in decoded}
        if len(self._memo) >= _MAX_REMEMBERED_BLOCKS:
            del self._memo[next(iter(self._memo))]
        self._memo[block] = fields
        return fields

    def _check_known(self, number: int) -> None:
        """Frames may still come for streams that we gave up, but not for ones that we never opened."""
        if number == 0 or number % 2 == 0 or number >= self._next_number:
            raise ProtocolFault(f"a frame for stream {number}, which was never opened")

    def _end(self, stream: Stream) -> Stream:
        """The peer's side of a stream is over; what we had not sent of ours is not wanted any more."""
        if stream.number in self._blocked:
            self.outgoing += frame(RST_STREAM, 0, stream.number, struct.pack(">L", _CANCEL))
        return self._forget(stream)

    def _forget(self, stream: Stream) -> Stream:
        del self._streams[stream.number]
        del self._rows[stream.row]
        self._blocked.pop(stream.number, None)
        return stream

    # --- sending ------------------------------------------------------------------------

    def _send_blocked(self, out: bytearray) -> None:
        """Send what the windows allow of the streams that wait for them, oldest first."""
        for number, stream in list(self._blocked.items()):
            unsent = stream.unsent
            assert unsent is not None
            while unsent.nbytes:
                size = min(unsent.nbytes, stream.window, self._send_window, self._peer_frame_size)
                if size <= 0:
                    break
                last = size == unsent.nbytes
                out += _FRAME.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM if last else 0, number)
                out += unsent[:size]
                unsent = unsent[size:]
                stream.window -= size
                self._send_window -= size
            stream.unsent = unsent
            if not unsent.nbytes:
                del self._blocked[number]
            elif self._send_window <= 0:
                break


def _error_name(code: bytes) -> str:
    number = int.from_bytes(code, "big")
    return ERROR_NAMES[number] if number < len(ERROR_NAMES) else f"error {number}"
