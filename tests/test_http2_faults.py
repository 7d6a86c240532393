"""What a peer should not send over HTTP/2: odd but legal frames, illegal ones, other protocols, and rubbish."""

import pytest
from http2_frames import (
    BLOCK,
    C_6_1,
    HEADERS_BLOCK,
    MAX_WINDOW,
    MESSAGE,
    TRAILERS_BLOCK,
    Split,
    at_random,
    block,
    byte_by_byte,
    feed,
    frames,
    opened,
    raw,
    reply_frames,
    settings_frame,
    take,
    whole,
    window_update,
)
from hyperframe import frame as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
from servebench.wire.http2 import Http2Client, Stream

LEGAL_ODDITIES = [
    pytest.param(raw(0xFA, flags=0xFF, payload=b"abc"), id="unknown type on stream 0"),
    pytest.param(raw(0x10, stream=5), id="unknown type on an open stream"),
    pytest.param(raw(0x63, flags=5, stream=99, payload=b"ab"), id="unknown type on an idle stream"),
    pytest.param(hf.PriorityFrame(5, depends_on=3, stream_weight=7).serialize(), id="PRIORITY"),
    pytest.param(hf.PriorityFrame(77, depends_on=0, stream_weight=7).serialize(), id="PRIORITY of an idle stream"),
    pytest.param(hf.AltSvcFrame(0, origin=b"a", field=b"b").serialize(), id="ALTSVC"),
    pytest.param(settings_frame({0x4242: 7, 8: 1}), id="unknown settings"),
    pytest.param(settings_frame({2: 0}), id="push is off"),
    pytest.param(raw(4, flags=1), id="another SETTINGS ACK"),
    pytest.param(hf.PingFrame(0, flags=["ACK"], opaque_data=b"12345678").serialize(), id="PING ACK nobody waits for"),
    pytest.param(window_update(5, 5), id="window of a stream that sent all"),
    pytest.param(window_update(1, 5), id="window of a stream that ended"),
    pytest.param(raw(0, stream=1, payload=b"abc"), id="DATA on a stream that ended"),
    pytest.param(raw(1, flags=5, stream=1, payload=TRAILERS_BLOCK), id="HEADERS on a stream that ended"),
    pytest.param(hf.RstStreamFrame(1, error_code=0).serialize(), id="RST_STREAM on a stream that ended"),
    pytest.param(raw(0, flags=8, stream=3, payload=b"\x05" + bytes(5)), id="DATA of nothing but padding"),
    pytest.param(raw(0, flags=0x28, stream=3, payload=b"\0"), id="a flag that DATA does not have"),
    pytest.param(raw(0, stream=3), id="empty DATA"),
    pytest.param(raw(0, stream=0x80000003), id="reserved bit in the number of DATA"),
    pytest.param(raw(8, stream=0x80000005, payload=b"\0\0\0\1"), id="reserved bit in another number"),
    pytest.param(raw(6, flags=1, stream=0x80000000, payload=bytes(8)), id="reserved bit in the number of the connection"),
    pytest.param(raw(8, payload=b"\x80\0\0\1"), id="reserved bit in a window's increment"),
]


@pytest.mark.parametrize("split", [whole, byte_by_byte])
@pytest.mark.parametrize("odd", LEGAL_ODDITIES)
def test_what_is_odd_but_legal_changes_nothing(odd: bytes, split: Split) -> None:
    client = opened(3)
    cut = len(reply_frames(3)) - len(raw(1, payload=TRAILERS_BLOCK))  # between two frames
    stream = reply_frames(1) + reply_frames(3)[:cut] + odd + reply_frames(3)[cut:] + odd + reply_frames(5)
    ended = feed(client, *split(stream))
    assert [(one.row, read_end(one).kind, one.body_bytes) for one in ended] == [(row, "ok", 8) for row in range(3)]
    assert all(isinstance(one, hf.SettingsFrame) for one in frames(take(client))), "only settings are acknowledged"


HEADERS_OPEN = raw(1, stream=3, payload=HEADERS_BLOCK)  # a block that a CONTINUATION must end

ILLEGAL = [
    pytest.param(raw(0, stream=0, payload=b"abc"), "stream 0", id="DATA on stream 0"),
    pytest.param(raw(0, stream=4, payload=b"abc"), "stream 4", id="DATA on an even stream"),
    pytest.param(raw(0, stream=7, payload=b"abc"), "stream 7", id="DATA on an idle stream"),
    pytest.param(raw(0, stream=3, payload=b"abc"), "DATA before", id="DATA before the headers"),
    pytest.param(raw(0, flags=8, stream=3), "padded frame without", id="padded DATA without a length"),
    pytest.param(raw(0, flags=8, stream=3, payload=b"\x03abc"[:3]), "padding", id="padding longer than DATA"),
    pytest.param(raw(0, flags=8, stream=1, payload=b"\xff"), "padding", id="padding longer than late DATA"),
    pytest.param(raw(1, flags=5, stream=0, payload=HEADERS_BLOCK), "stream 0", id="HEADERS on stream 0"),
    pytest.param(raw(1, flags=5, stream=2, payload=HEADERS_BLOCK), "stream 2", id="HEADERS on an even stream"),
    pytest.param(raw(1, flags=5, stream=7, payload=HEADERS_BLOCK), "stream 7", id="HEADERS on an idle stream"),
    pytest.param(raw(1, flags=0x0D, stream=3), "padded frame without", id="padded HEADERS without a length"),
    pytest.param(raw(1, flags=0x0D, stream=3, payload=b"\x02\x88"), "padding", id="padding longer than HEADERS"),
    pytest.param(raw(1, flags=0x25, stream=3, payload=b"\0\0\0\0"), "priority", id="HEADERS shorter than their priority"),
    pytest.param(raw(1, flags=0x2D, stream=3, payload=b"\x01\0\0\0\0\x10"), "priority", id="padding reaches into the priority"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\x80"), "cannot be decoded", id="header index 0"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\xbe"), "cannot be decoded", id="header index 62"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\x88\x40\x05ab"), "cannot be decoded", id="truncated header"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\x3f\xe1\x1f\x88"), "cannot be decoded", id="header table of 4096"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\x88\x20"), "cannot be decoded", id="table size after a header"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\x88\0\x01a\x81\x00"), "cannot be decoded", id="bad Huffman padding"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\xff" + b"\xff" * 20), "cannot be decoded", id="endless integer"),
    pytest.param(raw(1, flags=5, stream=3, payload=TRAILERS_BLOCK), "without a final :status", id="no :status"),
    pytest.param(raw(1, flags=5, stream=3, payload=block((":status", "100"))), "without a final", id="1xx that ends"),
    pytest.param(raw(1, flags=4, stream=3, payload=HEADERS_BLOCK) * 2, "trailers that do not end", id="headers twice"),
    pytest.param(raw(1, flags=5, stream=3, payload=bytes(65_537)), "header block over", id="headers of 64 KiB"),
    pytest.param(raw(1, flags=5, stream=3, payload=b"\0\x01a\x00" * 2000), "cannot be decoded", id="64 KiB once decoded"),
    pytest.param(raw(3, stream=3, payload=b"\0\0\0"), "RST_STREAM of 3", id="short RST_STREAM"),
    pytest.param(raw(3, stream=3, payload=bytes(5)), "RST_STREAM of 5", id="long RST_STREAM"),
    pytest.param(raw(3, stream=0, payload=bytes(4)), "stream 0", id="RST_STREAM on stream 0"),
    pytest.param(raw(3, stream=9, payload=bytes(4)), "stream 9", id="RST_STREAM on an idle stream"),
    pytest.param(raw(4, payload=bytes(5)), "SETTINGS of 5", id="SETTINGS of 5 bytes"),
    pytest.param(raw(4, stream=1), "SETTINGS on stream 1", id="SETTINGS on a stream"),
    pytest.param(raw(4, flags=1, payload=bytes(6)), "SETTINGS ACK of 6", id="SETTINGS ACK with settings"),
    pytest.param(settings_frame({4: 2**31}), "INITIAL_WINDOW_SIZE", id="initial window of 2^31"),
    pytest.param(settings_frame({5: 16_383}), "MAX_FRAME_SIZE", id="frame size of 16,383"),
    pytest.param(settings_frame({5: 2**24}), "MAX_FRAME_SIZE", id="frame size of 2^24"),
    pytest.param(settings_frame({2: 1}), "ENABLE_PUSH", id="a server that wants push"),
    pytest.param(raw(5, flags=4, stream=3, payload=b"\0\0\0\x02" + HEADERS_BLOCK), "PUSH_PROMISE", id="PUSH_PROMISE"),
    pytest.param(raw(6, payload=bytes(7)), "PING of 7", id="short PING"),
    pytest.param(raw(6, stream=3, payload=bytes(8)), "PING on stream 3", id="PING on a stream"),
    pytest.param(raw(7, payload=bytes(7)), "GOAWAY of 7", id="short GOAWAY"),
    pytest.param(raw(7, stream=3, payload=bytes(8)), "GOAWAY on stream 3", id="GOAWAY on a stream"),
    pytest.param(raw(8, payload=bytes(3)), "WINDOW_UPDATE of 3", id="short WINDOW_UPDATE"),
    pytest.param(raw(8, payload=bytes(4)), "by 0", id="window of the connection by 0"),
    pytest.param(raw(8, stream=3, payload=b"\x80\0\0\0"), "by 0", id="window of a stream by 0"),
    pytest.param(raw(8, stream=9, payload=b"\0\0\0\1"), "stream 9", id="window of an idle stream"),
    pytest.param(window_update(0, MAX_WINDOW) * 2, "over 2", id="window of the connection over 2^31-1"),
    pytest.param(window_update(5, MAX_WINDOW), "stream 5 over 2", id="window of a stream over 2^31-1"),
    pytest.param(window_update(5, MAX_WINDOW - 1) + settings_frame({4: 65_600}), "stream 5 over 2", id="settings widen it so"),
    pytest.param(raw(9, flags=4, stream=3, payload=HEADERS_BLOCK), "without a header block", id="CONTINUATION of nothing"),
    pytest.param(HEADERS_OPEN + raw(9, flags=4, stream=1), "without a header block", id="CONTINUATION of another stream"),
    pytest.param(HEADERS_OPEN + raw(0, stream=3), "interrupted", id="DATA inside a header block"),
    pytest.param(HEADERS_OPEN + HEADERS_OPEN, "interrupted", id="HEADERS inside a header block"),
    pytest.param(HEADERS_OPEN + raw(6, payload=bytes(8)), "interrupted", id="PING inside a header block"),
    pytest.param(HEADERS_OPEN + raw(0x63), "interrupted", id="unknown frame inside a header block"),
    pytest.param(HEADERS_OPEN + raw(9, stream=3) * 100, "header block over", id="CONTINUATION flood of nothing"),
    pytest.param(HEADERS_OPEN + raw(9, stream=3, payload=bytes(9000)) * 8, "header block over", id="CONTINUATION flood"),
    pytest.param(raw(0, stream=3, payload=bytes((1 << 20) + 1)), "frame of 1048577 bytes", id="a frame a byte too long"),
    pytest.param(raw(0x77, payload=bytes((1 << 20) + 1)), "frame of 1048577 bytes", id="an unknown frame too long"),
]


@pytest.mark.parametrize(("data", "message"), ILLEGAL)
def test_what_is_illegal_is_a_protocol_fault_and_what_came_before_it_counts(data: bytes, message: str) -> None:
    for pieces in (
        [reply_frames(1) + data],
        at_random(len(data), 400)(reply_frames(1) + data),
        [reply_frames(1), *(byte_by_byte(data) if len(data) < 10_000 else [data])],
    ):
        client = opened(2)
        client.request(2, bytes(70_000), keep=False)  # waits for its window
        ended: list[Stream] = []
        with pytest.raises(ProtocolFault, match=message):
            for piece in pieces:
                client.feed(piece, 7, ended)
        assert [(stream.row, read_end(stream).kind) for stream in ended] == [(0, "ok")]
        assert [stream.row for stream in client.drop_all()] == [1, 2]


def test_frames_up_to_what_we_allow() -> None:
    client = opened(2)
    large = raw(0, stream=1, payload=bytes(1 << 20))
    feed(client, raw(1, flags=4, stream=1, payload=HEADERS_BLOCK), large[: 1 << 19], large[1 << 19 :])
    feed(client, raw(1, flags=4, stream=3, payload=HEADERS_BLOCK), large[:8] + b"\x03" + large[9:])
    assert [stream.body_bytes for stream in client.drop_all()] == [1 << 20, 1 << 20]


NO_HTTP2 = [
    pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "not HTTP/2: .*HTTP/1.1 400", id="HTTP/1.1"),
    pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP/2: .*SSH-2.0", id="SSH"),
    pytest.param(b"\x15\x03\x01\x00\x02\x02\x28\x00\x00", "not HTTP/2", id="a TLS alert"),
    pytest.param(raw(4, flags=1), "does not begin with SETTINGS", id="SETTINGS ACK first"),
    pytest.param(raw(6, payload=bytes(8)), "does not begin with SETTINGS", id="PING first"),
    pytest.param(window_update(0, 5), "does not begin with SETTINGS", id="WINDOW_UPDATE first"),
    pytest.param(raw(0x99), "does not begin with SETTINGS", id="unknown frame first"),
    pytest.param(reply_frames(1), "never opened", id="a reply first"),
]


@pytest.mark.parametrize(("data", "message"), NO_HTTP2)
def test_a_peer_that_speaks_something_else(data: bytes, message: str) -> None:
    client = Http2Client(BLOCK, {})
    with pytest.raises(ProtocolFault, match=message):
        feed(client, data)


# --- rubbish ------------------------------------------------------------------------------------

#: One of everything, for rows 0 to 4 on streams 1 to 9, of which the last waits for its windows.
EVERYTHING = b"".join(
    [
        reply_frames(1),
        hf.PingFrame(0, opaque_data=b"12345678").serialize(),
        raw(1, stream=3, payload=HEADERS_BLOCK[:1]) + raw(9, stream=3) + raw(9, flags=4, stream=3, payload=HEADERS_BLOCK[1:]),
        raw(0, flags=8, stream=3, payload=b"\x03" + MESSAGE + bytes(3)),
        window_update(0, 256) + window_update(9, 256),
        raw(
            1,
            flags=0x2D,
            stream=3,
            payload=b"\x02\0\0\0\0\x01" + block(("grpc-status", "5"), ("grpc-message", "%C3%A9")) + b"\0\0",
        ),
        settings_frame({4: 60_000, 5: 20_000, 3: 7}),
        raw(1, flags=4, stream=5, payload=C_6_1),
        hf.RstStreamFrame(7, error_code=7).serialize(),
        hf.GoAwayFrame(0, last_stream_id=MAX_WINDOW, additional_data=b"bye").serialize(),
        raw(0xB, flags=1, stream=5, payload=b"ab"),
        raw(0, flags=1, stream=5, payload=b"<html>"),
    ]
)


def survive(data: bytes, split: Split) -> list[tuple[int, str]]:
    """Feed what may be rubbish. Every call must end once, and every end must have a meaning."""
    client = opened(4)
    client.request(4, bytes(100_000), keep=True)
    ended: list[Stream] = []
    try:
        for piece in split(data):
            client.feed(piece, 7, ended)
    except ProtocolFault:
        pass
    for one in frames(take(client)):  # whatever we say meanwhile is well-formed
        assert isinstance(one, hf.DataFrame | hf.PingFrame | hf.SettingsFrame | hf.RstStreamFrame)
    ends = [(stream.row, read_end(stream).kind) for stream in ended]
    assert sorted([*(row for row, _ in ends), *(stream.row for stream in client.drop_all())]) == [0, 1, 2, 3, 4]
    return ends


def test_the_stream_that_is_to_be_corrupted_is_sound() -> None:
    assert (
        survive(EVERYTHING, whole)
        == survive(EVERYTHING, byte_by_byte)
        == [(0, "ok"), (1, "status"), (3, "reset"), (2, "status")]
    )


@st.composite
def corrupted(draw: st.DrawFn) -> bytes:
    data = bytearray(EVERYTHING)
    for _ in range(draw(st.integers(1, 6))):
        position = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["change", "flip", "insert", "delete", "repeat", "cut"]))
        if kind == "change":
            data[position] = draw(st.integers(0, 255))
        elif kind == "flip":
            data[position] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[position:position] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "delete" and len(data) > 40:
            del data[position : position + draw(st.integers(1, 20))]
        elif kind == "repeat":
            data += data[position : position + draw(st.integers(1, 60))]
        elif position > 40:
            del data[position:]
    return bytes(data)


@given(corrupted(), st.sampled_from([1, 7, 10_000]))
@settings(max_examples=400, deadline=None)
def test_a_corrupted_stream_is_read_or_refused_and_nothing_else(data: bytes, largest: int) -> None:
    survive(data, at_random(len(data), largest))


@given(st.binary(max_size=80), st.sampled_from([1, 10_000]))
@settings(max_examples=200, deadline=None)
def test_any_header_block_is_read_or_refused(fields: bytes, largest: int) -> None:
    survive(raw(1, flags=5, stream=1, payload=HEADERS_BLOCK + fields), at_random(0, largest))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 255), st.integers(0, 10), st.binary(max_size=20)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_frames_are_read_or_refused(parts: list[tuple[int, int, int, bytes]]) -> None:
    survive(b"".join(raw(kind, flags=flags, stream=stream, payload=data) for kind, flags, stream, data in parts), whole)
