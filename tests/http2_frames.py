"""HTTP/2 frames made by hand, and our client fed with them in pieces of any size.

hyperframe and hpack, below the h2 library, make the frames that h2 would not send.
"""

import random
import struct
from collections.abc import Callable, Iterable, Iterator

import hpack
from hyperframe import frame as hf

from servebench.wire.http2 import Http2Client, Stream
from servebench.wire.http2_headers import encode_headers

BLOCK = encode_headers([(":method", "POST"), (":scheme", "http"), (":path", "/s/m"), (":authority", "a"), ("te", "trailers")])
MAX_WINDOW = 2**31 - 1

Split = Callable[[bytes], Iterable[bytes]]


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def at_random(seed: int, largest: int) -> Split:
    draw = random.Random(seed)

    def split(data: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(data):
            size = draw.randint(1, largest)
            yield data[position : position + size]
            position += size

    return split


def raw(kind: int, *, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream) + payload


def block(*fields: tuple[str, str]) -> bytes:
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return encoder.encode(fields)


def settings_frame(values: dict[int, int]) -> bytes:
    return hf.SettingsFrame(0, settings=values).serialize()


def window_update(stream: int, increment: int) -> bytes:
    return hf.WindowUpdateFrame(stream, window_increment=increment).serialize()


MESSAGE = b"\0\0\0\0\3abc"
HEADERS_BLOCK, TRAILERS_BLOCK = block((":status", "200")), block(("grpc-status", "0"))
#: A reply's header block as published, Huffman coded: RFC 7541, appendix C.6.1.
C_6_1 = bytes.fromhex(
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
)


def reply_frames(stream: int) -> bytes:
    return (
        raw(1, flags=4, stream=stream, payload=HEADERS_BLOCK)
        + raw(0, stream=stream, payload=MESSAGE)
        + raw(1, flags=5, stream=stream, payload=TRAILERS_BLOCK)
    )


def feed(client: Http2Client, *pieces: bytes, at_ns: int = 7) -> list[Stream]:
    ended: list[Stream] = []
    for piece in pieces:
        client.feed(piece, at_ns, ended)
    return ended


def start(client: Http2Client, values: dict[int, int] | None = None) -> None:
    feed(client, settings_frame(values or {}), raw(4, flags=1))
    client.outgoing.clear()


def opened(calls: int, values: dict[int, int] | None = None) -> Http2Client:
    """A client with rows 0, 1, ... on streams 1, 3, ..."""
    client = Http2Client(BLOCK, {})
    start(client, values)
    for row in range(calls):
        client.request(row, MESSAGE, keep=False)
    return client


def take(client: Http2Client) -> bytes:
    out = bytes(client.outgoing)
    client.outgoing.clear()
    return out


def frames(data: bytes) -> list[hf.Frame]:
    found = []
    while data:
        one, length = hf.Frame.parse_frame_header(memoryview(data[:9]))
        one.parse_body(memoryview(data[9 : 9 + length]))
        one.body = data[9 : 9 + length]  # type: ignore[attr-defined]
        found.append(one)
        data = data[9 + length :]
    return found


def sent_bytes(data: bytes) -> int:
    return sum(len(one.data) for one in frames(data) if isinstance(one, hf.DataFrame))
