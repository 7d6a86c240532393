"""HTTP/2's header blocks: published ones, what we encode ourselves, and frames of every layout."""

import hpack
import pytest
from http2_frames import BLOCK, C_6_1, Split, block, byte_by_byte, feed, opened, raw, start, whole
from hypothesis import example, given
from hypothesis import strategies as st

from servebench.wire import http2
from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
from servebench.wire.http2 import Http2Client
from servebench.wire.http2_headers import encode_headers


def test_memory_of_header_blocks_is_bounded_and_shared() -> None:
    memo: http2.HeaderMemo = {}
    client = Http2Client(BLOCK, memo)
    start(client)
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    for row in range(600):
        client.request(row, b"", keep=False)
        block = encoder.encode([(":status", "200"), ("grpc-status", "0"), ("x", str(row))])
        (stream,) = feed(client, raw(1, flags=5, stream=2 * row + 1, payload=block))
        assert stream.trailers is not None
        assert stream.trailers[b"x"] == b"%d" % row
    assert len(memo) == 256


# Published header blocks: RFC 7541, appendix C.5 (plain) and C.6 (Huffman).
FIRST_REPLY = {
    b":status": b"302",
    b"cache-control": b"private",
    b"date": b"Mon, 21 Oct 2013 20:13:21 GMT",
    b"location": b"https://www.example.com",
}
C_5_1 = bytes.fromhex(
    "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
    "6e1768747470733a2f2f7777772e6578616d706c652e636f6d"
)
C_5_2 = bytes.fromhex("4803333037c1c0bf")  # needs what C.5.1 put into the table
C_6_2 = bytes.fromhex("4883640effc1c0bf")


@pytest.mark.parametrize("block", [pytest.param(C_5_1, id="plain"), pytest.param(C_6_1, id="Huffman")])
def test_published_header_blocks(block: bytes) -> None:
    client = opened(1)
    (stream,) = feed(client, raw(1, flags=5, stream=1, payload=block))
    assert stream.headers == stream.trailers == FIRST_REPLY


@pytest.mark.parametrize(("first", "second"), [(C_5_1, C_5_2), (C_6_1, C_6_2)])
def test_a_peer_that_uses_a_header_table_we_do_not_have_breaks_the_protocol(first: bytes, second: bytes) -> None:
    client = opened(2)
    feed(client, raw(1, flags=5, stream=1, payload=first))
    with pytest.raises(ProtocolFault, match="cannot be decoded"):
        feed(client, raw(1, flags=5, stream=3, payload=second))


_NAMES = st.from_regex(r"\A:?[!#$%&'*+\-.^_`|~0-9a-z]{1,40}\Z")
_VALUES = st.text(st.characters(max_codepoint=0xFF, exclude_characters="\0\r\n"), max_size=400).map(
    lambda text: text.strip(" \t")
)


@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=12))
@example([("x", "v" * length) for length in (0, 126, 127, 128, 254, 255, 256, 2000)])  # where lengths take another byte
def test_encoded_headers_decode_to_themselves(fields: list[tuple[str, str]]) -> None:
    decoded = hpack.Decoder().decode(encode_headers(fields), raw=True)
    assert [(bytes(name), bytes(value)) for name, value in decoded] == [
        (name.encode(), value.encode("latin-1")) for name, value in fields
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        pytest.param("Upper", "", "not an HTTP/2 header name", id="upper case"),
        pytest.param("", "", "not an HTTP/2 header name", id="no name"),
        pytest.param("a b", "", "not an HTTP/2 header name", id="space in the name"),
        pytest.param("a:b", "", "not an HTTP/2 header name", id="colon inside the name"),
        pytest.param("é", "", "not an HTTP/2 header name", id="name beyond ASCII"),
        pytest.param("x\n", "", "not an HTTP/2 header name", id="line break in the name"),
        pytest.param("x", "a\r\nb", "line break", id="line break in the value"),
        pytest.param("x", "a\0", "line break", id="NUL in the value"),
        pytest.param("x", "\u20ac", "outside Latin-1", id="outside Latin-1"),
        pytest.param("x", " a", "begins or ends with a space", id="space before"),
        pytest.param("x", "a\t", "begins or ends with a space", id="tab behind"),
        pytest.param("x", "a" * 16_384, "more than the 16384 of a frame", id="longer than a frame"),
    ],
)
def test_headers_that_http2_forbids_are_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_headers([(name, value)])


LAYOUTS = [
    pytest.param(raw(1, flags=5, stream=1, payload=b"%s"), id="plain"),
    pytest.param(raw(1, flags=0x0D, stream=1, payload=b"\x03%s\0\0\0"), id="padded"),
    pytest.param(raw(1, flags=0x0D, stream=1, payload=b"\x00%s"), id="padded by nothing"),
    pytest.param(raw(1, flags=0x25, stream=1, payload=b"\x80\0\0\x01\x10%s"), id="priority"),
    pytest.param(raw(1, flags=0x2D, stream=1, payload=b"\x02\0\0\0\x03\x10%s\0\0"), id="padded, priority"),
]


@pytest.mark.parametrize("split", [whole, byte_by_byte])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_frames_of_every_layout(layout: bytes, split: Split) -> None:
    fields = block((":status", "200"), ("grpc-status", "7"))
    head, payload = layout[:9], layout[9:].replace(b"%s", fields)
    client = opened(1)
    (stream,) = feed(client, *split(len(payload).to_bytes(3, "big") + head[3:] + payload))
    assert stream.headers == {b":status": b"200", b"grpc-status": b"7"}


@pytest.mark.parametrize("split", [whole, byte_by_byte])
@pytest.mark.parametrize("pieces", [1, 2, 5, 60])
def test_header_blocks_in_pieces(pieces: int, split: Split) -> None:
    fields = block((":status", "200"), ("grpc-status", "7"), ("grpc-message", "x" * 300))
    size = -(-len(fields) // pieces)
    parts = [fields[i : i + size] for i in range(0, len(fields), size)]
    data = raw(1, flags=1 if len(parts) > 1 else 5, stream=1, payload=parts[0])
    for number, part in enumerate(parts[1:], 2):
        data += raw(9, flags=4 if number == len(parts) else 0, stream=1, payload=part)
    (stream,) = feed(opened(1), *split(data))
    assert read_end(stream) == ("status", 7, f"PERMISSION_DENIED: {'x' * 300}")
