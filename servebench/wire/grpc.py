"""gRPC over HTTP/2: a call's constant headers, its length-prefixed message, and what a reply means."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import unquote

from servebench.wire.faults import ProtocolFault
from servebench.wire.http2 import Stream, encode_headers

STATUS_NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
_PREFIX = struct.Struct(">BL")
_MAX_TIMEOUT_MS = 99_999_999  # the header's number has at most 8 digits


class End(NamedTuple):
    """How a call ended. ``status`` is gRPC's code, or HTTP's where there is none."""

    kind: Literal["ok", "status", "reset", "protocol"]
    status: int
    detail: str


def call_headers(
    authority: str, path: str, *, tls: bool, timeout_ns: int | None, metadata: Iterable[tuple[str, str]] = ()
) -> bytes:
    """The header block of every call to one method. `ValueError` for metadata that HTTP/2 does not allow."""
    fields = [
        (":method", "POST"),
        (":scheme", "https" if tls else "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "identity"),
        ("user-agent", "servebench"),
    ]
    if timeout_ns is not None:
        fields.append(("grpc-timeout", f"{min(max(timeout_ns // 1_000_000, 1), _MAX_TIMEOUT_MS)}m"))
    fields += [(name.lower(), value) for name, value in metadata]
    return encode_headers(fields)


def frame_message(message: bytes) -> bytes:
    """A message behind its prefix: not compressed, four bytes of length."""
    return _PREFIX.pack(0, len(message)) + message


def unframe_message(body: bytes) -> bytes:
    """The one message of a unary reply's body. `ProtocolFault` for none, several, a compressed or a cut one."""
    if len(body) < 5:
        raise ProtocolFault(f"reply of {len(body)} bytes, too short for a message")
    compressed, length = _PREFIX.unpack_from(body)
    if compressed:
        raise ProtocolFault("the message is compressed, although identity was asked for")
    if len(body) != 5 + length:
        raise ProtocolFault(f"the message says {length} bytes, the reply has {len(body) - 5}")
    return body[5:]


def read_end(stream: Stream) -> End:
    """What the end of a unary call means."""
    fields = stream.fields
    status = fields.get(b"grpc-status")
    if stream.reset is not None and status is None:
        return End("reset", 0, stream.reset)
    if status == b"0":
        prefix = stream.prefix
        if len(prefix) == 5 and not prefix[0] and _PREFIX.unpack(prefix)[1] == stream.body_bytes - 5:
            return End("ok", 0, "")
        try:
            unframe_message(prefix + bytes(max(0, min(stream.body_bytes, 1 << 20) - len(prefix))))
        except ProtocolFault as fault:
            return End("protocol", 0, str(fault))
        return End("protocol", 0, "more than one message")
    if status is None:
        http_status = fields.get(b":status", b"")
        if http_status not in (b"200", b"") and http_status.isdigit():
            return End("status", int(http_status), f"HTTP {http_status.decode()} without a grpc-status")
        return End("protocol", 0, "the reply ended without a grpc-status")
    if not status.isdigit():
        return End("protocol", 0, f"grpc-status {status[:20]!r} is no number")
    code = int(status)
    name = STATUS_NAMES[code] if code < len(STATUS_NAMES) else f"code {code}"
    message = unquote(fields.get(b"grpc-message", b"").decode("latin-1"))
    return End("status", min(code, 65_535), f"{name}: {message}" if message else name)
