"""HTTP/2's frames (RFC 9113, 4 and 6): their kinds and flags, how one is written, and what is wrong with one."""

from __future__ import annotations

import struct

from servebench.wire.faults import ProtocolFault

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
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

FRAME = struct.Struct(">BHBBL")  # length (24 bits in two parts), type, flags, stream


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def frame_bounds(flags: int, data: bytes, start: int, stop: int) -> tuple[int, int]:
    """Where the content of a DATA or HEADERS frame lies within its payload, padding and priority left out."""
    padding = 0
    if flags & PADDED:
        if start == stop:
            raise ProtocolFault("a padded frame without the length of its padding")
        padding = data[start]
        start += 1
    if flags & PRIORITY_FLAG:
        start += 5
    if start + padding > stop:
        raise ProtocolFault("padding or priority longer than its frame")
    return start, stop - padding


def check_size(name: str, payload: bytes, size: int) -> None:
    """`ProtocolFault` for a frame whose payload has another size than its kind has."""
    if len(payload) != size:
        raise ProtocolFault(f"{name} of {len(payload)} bytes, not {size}")


def check_stream_0(name: str, number: int) -> None:
    """`ProtocolFault` for a frame on a stream whose kind is the connection's."""
    if number:
        raise ProtocolFault(f"{name} on stream {number}")


def error_name(code: bytes) -> str:
    """The name of a four-byte error code."""
    number = int.from_bytes(code, "big")
    return ERROR_NAMES[number] if number < len(ERROR_NAMES) else f"error {number}"
