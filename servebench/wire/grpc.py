"""gRPC over HTTP/2: a call's constant headers, its length-prefixed message, and what a reply means.

After gRPC's "PROTOCOL-HTTP2" document. Unary calls only, without compression.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes

from servebench.wire.faults import ProtocolFault
from servebench.wire.http2 import Stream
from servebench.wire.http2_headers import encode_headers

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
_STATUS = re.compile(rb"0|[1-9][0-9]{0,3}")  # decimal without leading zeros; the record holds 16 bits

_METADATA_NAME = re.compile(r"[0-9a-z_.-]+")
_METADATA_VALUE = re.compile(r"[ -~]*")
#: Set by us, or without a meaning in HTTP/2, which takes a request that has them for malformed (RFC 9113, 8.2.2).
_RESERVED_NAMES = frozenset(
    {
        "te",
        "content-type",
        "user-agent",
        "host",
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
        "content-length",
    }
)


class End(NamedTuple):
    """How a call ended. ``status`` is gRPC's code, or HTTP's where there is none."""

    kind: Literal["ok", "status", "reset", "protocol"]
    status: int
    detail: str


_OK = End("ok", 0, "")


def call_headers(
    authority: str, path: str, *, tls: bool, timeout_ns: int | None, metadata: Iterable[tuple[str, str]] = ()
) -> bytes:
    """The header block of every call to one method. `ValueError` for metadata that gRPC or HTTP/2 does not allow.

    The value of a name in ``-bin`` is given as it travels: its bytes in base64, padded or not, several
    with commas between. The time allowed is told in whole ms, rounded up: a server never gives up before we do.
    """
    fields = [
        (":method", "POST"),
        (":scheme", "https" if tls else "http"),
        (":path", path),
        (":authority", authority),
    ]
    if timeout_ns is not None:
        fields.append(("grpc-timeout", f"{min(max(-(-timeout_ns // 1_000_000), 1), _MAX_TIMEOUT_MS)}m"))
    fields += [
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-accept-encoding", "identity"),
        ("user-agent", "servebench"),
    ]
    for name, value in metadata:
        lower = name.lower()
        _check_metadata(lower, value)
        fields.append((lower, value))
    return encode_headers(fields)


def _check_metadata(name: str, value: str) -> None:
    if not _METADATA_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of gRPC metadata: letters, digits, '_', '-', '.'")
    if name in _RESERVED_NAMES or name.startswith("grpc-"):
        raise ValueError(f"{name} is not metadata: gRPC sets it itself")
    if not _METADATA_VALUE.fullmatch(value):
        raise ValueError(f"metadata {name}: the value holds something other than printable ASCII")
    if name.endswith("-bin"):
        for part in value.split(","):
            try:
                base64.b64decode(part + "=" * (-len(part) % 4), validate=True)
            except ValueError:
                raise ValueError(f"metadata {name}: the value of a name in -bin is its bytes in base64") from None


def frame_message(message: bytes) -> bytes:
    """A message behind its prefix: not compressed, four bytes of length."""
    return _PREFIX.pack(0, len(message)) + message


def unframe_message(body: bytes) -> bytes:
    """The one message of a unary reply's body. `ProtocolFault` for none, several, a compressed or a cut one."""
    if not _holds_one_message(body[:5], len(body)):
        raise ProtocolFault(_message_problem(body[:5], len(body)))
    return body[5:]


def _holds_one_message(prefix: bytes, body_bytes: int) -> bool:
    # As one number, the prefix is the message's length only if the byte before it, "compressed", is 0.
    return int.from_bytes(prefix, "big") == body_bytes - 5


def _message_problem(prefix: bytes, body_bytes: int) -> str:
    if body_bytes < 5:
        return f"reply of {body_bytes} bytes, too short for a message"
    compressed, length = _PREFIX.unpack(prefix)
    if compressed:
        return "the message is compressed, although identity was asked for"
    more = ": more than one message" if length < body_bytes - 5 else ""
    return f"the message says {length} bytes, the reply has {body_bytes - 5}{more}"


def read_end(stream: Stream) -> End:
    """What the end of a unary call means."""
    trailers = stream.trailers
    status = None if trailers is None else trailers.get(b"grpc-status")
    if status == b"0" and _holds_one_message(stream.prefix, stream.body_bytes):
        return _OK
    if stream.reset is not None:
        return End("reset", 0, stream.reset)
    if trailers is None or status is None:
        return _without_status(stream)
    if not _STATUS.fullmatch(status):
        return End("protocol", 0, f"grpc-status {status[:20]!r} is no status")
    code = int(status)
    if code == 0:
        return End("protocol", 0, _message_problem(stream.prefix, stream.body_bytes))
    name = STATUS_NAMES[code] if code < len(STATUS_NAMES) else f"code {code}"
    message = unquote_to_bytes(trailers.get(b"grpc-message", b"")).decode("utf-8", "replace")
    return End("status", code, f"{name}: {message}" if message else name)


def _without_status(stream: Stream) -> End:
    """A proxy's reply, most of the time."""
    headers = stream.headers or {}
    http_status = headers.get(b":status", b"")
    if http_status != b"200" and _STATUS.fullmatch(http_status):
        return End("status", int(http_status), f"HTTP {http_status.decode()} without a grpc-status")
    kind = headers.get(b"content-type", b"none")[:100].decode("latin-1")
    return End("protocol", 0, f"the reply ended without a grpc-status (content-type {kind})")
