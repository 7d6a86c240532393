"""The HTTP/2 client as pure bytes: against the h2 library, against frames made by hand, and against rubbish.

h2 is an implementation of its own, and a strict one: whatever of ours it does not take ends the test.
hyperframe and hpack, below it, make the frames that h2 would not send.
"""

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import hpack
import pytest
from h2.settings import SettingCodes, Settings
from hyperframe import frame as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from servebench.wire import http2
from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
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


@dataclass
class Pair:
    """Our client and an h2 server, joined by memory. h2's exceptions are the tests' failures."""

    settings: dict[int, int] = field(default_factory=dict)
    split: Split = whole
    consume: bool = True  #: whether the server opens its windows again for what it received
    ended: list[Stream] = field(default_factory=list)
    events: list[h2.events.Event] = field(default_factory=list)
    bodies: dict[int, bytes] = field(default_factory=dict)  #: of requests, as far as they have come
    complete: list[int] = field(default_factory=list)  #: numbers of the requests that have ended

    def __post_init__(self) -> None:
        self.client = Http2Client(BLOCK, {})
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.server = h2.connection.H2Connection(config)
        if self.settings:
            self.server.local_settings = Settings(client=False, initial_values=self.settings)
            self.server.max_inbound_frame_size = self.server.local_settings.max_frame_size
        self.server.initiate_connection()
        self.to_server(self.client.preface())
        self.pump()
        assert self.client.ready

    def to_server(self, data: bytes) -> None:
        for event in self.server.receive_data(data):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
                if self.consume:
                    self.server.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.complete.append(event.stream_id)

    def pump(self) -> None:
        """Carry bytes both ways until neither side has more to say."""
        while data := self.server.data_to_send():
            for piece in self.split(data):
                self.client.feed(piece, 7, self.ended)
            out = bytes(self.client.outgoing)
            self.client.outgoing.clear()
            self.to_server(out)

    def call(self, row: int, body: bytes, *, keep: bool = True) -> None:
        self.to_server(self.client.request(row, body, keep=keep))

    def reply(self, number: int, body: bytes, *, piece_bytes: int = 1 << 20, pad: int | None = None) -> None:
        self.server.send_headers(number, [(":status", "200"), ("content-type", "application/grpc")])
        largest = min(piece_bytes, self.server.max_outbound_frame_size - (pad or 0) - 1)
        for position in range(0, len(body), largest):
            self.server.send_data(number, body[position : position + largest], pad_length=pad)
        self.server.send_headers(number, [("grpc-status", "0")], end_stream=True)
        self.pump()

    def heard(self, kind: type[h2.events.Event]) -> list[h2.events.Event]:
        return [event for event in self.events if isinstance(event, kind)]


# --- frames by hand -----------------------------------------------------------------------------


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


# --- against h2 -----------------------------------------------------------------------------

SIZES = [0, 1, 4, 5, 6, 16_383, 16_384, 16_385, 65_535, 65_536, 200_000]
SPLITS = [
    pytest.param(whole, id="whole"),
    pytest.param(at_random(1, 60_000), id="large pieces"),
    pytest.param(at_random(2, 40), id="small pieces"),
]


@pytest.mark.parametrize("split", SPLITS)
def test_requests_and_replies_of_every_size_arrive_whole(split: Split) -> None:
    pair = Pair(split=split)
    for row, size in enumerate(SIZES):
        body = random.Random(size).randbytes(size)
        pair.call(row, body)
        pair.pump()
        number = 2 * row + 1
        assert pair.complete == [number]
        assert pair.bodies.get(number, b"") == body
        pair.reply(number, body[::-1], pad=size % 3 or None)
        (stream,) = pair.ended
        assert (stream.row, stream.body_bytes, stream.prefix) == (row, size, body[::-1][:5])
        assert stream.kept is not None
        assert b"".join(stream.kept) == body[::-1]
        assert stream.headers == {b":status": b"200", b"content-type": b"application/grpc"}
        assert stream.trailers == {b"grpc-status": b"0"}
        assert stream.first_byte_ns == 7
        pair.ended.clear()
        pair.complete.clear()
    assert not pair.client.streams


def test_three_megabytes_each_way() -> None:
    pair = Pair(split=at_random(3, 100_000))
    body = random.Random(0).randbytes(3_000_000)
    pair.call(0, memoryview(body))
    pair.pump()
    assert pair.bodies[1] == body
    pair.reply(1, body[::-1])
    assert b"".join(pair.ended[0].kept or ()) == body[::-1]


def test_one_frame_byte_by_byte() -> None:
    pair = Pair({SettingCodes.MAX_CONCURRENT_STREAMS: 9}, split=byte_by_byte)
    pair.call(0, b"12345")
    pair.reply(1, bytes(range(256)) * 80)
    assert b"".join(pair.ended[0].kept or ()) == bytes(range(256)) * 80
    assert pair.client.peer_settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 9


def test_replies_are_not_kept_unless_asked_for() -> None:
    pair = Pair()
    pair.call(0, b"12345", keep=False)
    pair.reply(1, bytes(100))
    assert (pair.ended[0].kept, pair.ended[0].body_bytes) == (None, 100)


@given(st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_interleaving_of_calls_and_cancellations(draw: random.Random) -> None:
    """Whatever the order, every call ends once: with its own reply, or with its cancellation."""
    windows = {
        SettingCodes.INITIAL_WINDOW_SIZE: draw.choice([1, 1000, 65_535, 1 << 20]),
        SettingCodes.MAX_FRAME_SIZE: draw.choice([16_384, 20_000]),
    }
    pair = Pair(windows, split=at_random(draw.randrange(1 << 30), draw.choice([3, 100, 100_000])))
    bodies: dict[int, bytes] = {}
    cancelled: set[int] = set()
    for row in range(draw.randint(1, 8)):
        bodies[row] = draw.randbytes(
            draw.choice([0, 5, 1500, 40_000] if windows[SettingCodes.INITIAL_WINDOW_SIZE] > 1 else [40])
        )
        pair.call(row, bodies[row])
        if draw.random() < 0.5:
            pair.pump()
        if draw.random() < 0.3:
            victim = draw.randrange(row + 1)
            if pair.client.cancel(victim) is not None:
                cancelled.add(victim)
                pair.to_server(bytes(pair.client.outgoing))
                pair.client.outgoing.clear()
    pair.pump()
    for number in draw.sample(pair.complete, len(pair.complete)):
        row = number // 2
        assert pair.bodies.get(number, b"") == bodies[row]
        if row not in cancelled:
            pair.reply(number, bodies[row] + b"%d" % row)
    assert {stream.row for stream in pair.ended} == bodies.keys() - cancelled
    assert len(pair.ended) == len(bodies) - len(cancelled)
    for stream in pair.ended:
        assert b"".join(stream.kept or ()) == bodies[stream.row] + b"%d" % stream.row
    assert pair.client.drop_all() == []


def test_ping_is_answered_with_its_own_bytes() -> None:
    pair = Pair()
    pair.server.ping(b"\x00\x01abc\xff\xfe\x09")
    pair.pump()
    (event,) = pair.heard(h2.events.PingAckReceived)
    assert isinstance(event, h2.events.PingAckReceived)
    assert event.ping_data == b"\x00\x01abc\xff\xfe\x09"


# --- settings and header tables ---------------------------------------------------------------


def test_our_settings() -> None:
    pair = Pair()
    theirs = pair.server.remote_settings
    assert theirs.header_table_size == 0
    assert theirs.enable_push == 0
    assert theirs.initial_window_size == MAX_WINDOW
    assert theirs.max_frame_size == 1 << 20
    assert theirs.max_header_list_size == 64 * 1024
    assert pair.server.outbound_flow_control_window == MAX_WINDOW


def test_no_call_before_our_settings_are_acknowledged() -> None:
    client = Http2Client(BLOCK, {})
    client.preface()
    assert (client.ready, client.max_streams) == (False, 0)
    feed(client, settings_frame({}))
    assert (client.ready, client.max_streams) == (False, 0)
    assert bytes(client.outgoing) == raw(4, flags=1), "theirs are"
    feed(client, raw(4, flags=1))
    assert (client.ready, client.max_streams) == (True, MAX_WINDOW), "streams are unlimited where the peer sets no limit"


@pytest.mark.parametrize("size", [0, 100, 4096, 1 << 20])
def test_our_header_blocks_fit_any_header_table(size: int) -> None:
    """RFC 9113, 4.3.1: after a smaller table was acknowledged, a block must begin with a size update."""
    pair = Pair({SettingCodes.HEADER_TABLE_SIZE: size})
    pair.call(0, b"")
    pair.server.update_settings({SettingCodes.HEADER_TABLE_SIZE: size // 2})
    pair.pump()
    pair.call(1, b"")
    assert pair.complete == [1, 3]
    requests = pair.heard(h2.events.RequestReceived)
    assert len(requests) == 2
    for event in requests:
        assert isinstance(event, h2.events.RequestReceived)
        assert event.headers is not None
        assert dict(event.headers)[":path"] == "/s/m"


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
C_6_1 = bytes.fromhex(
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
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


# --- flow control ----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 1000, 1024, 16_385])
def test_a_small_stream_window_is_respected_and_served(window: int) -> None:
    pair = Pair({SettingCodes.INITIAL_WINDOW_SIZE: window}, consume=False)
    body = bytes(range(256)) * 12
    pair.call(0, body)
    pair.call(1, body[::-1])
    received = 0
    while not pair.complete:
        total = sum(len(data) for data in pair.bodies.values())
        assert total == received + 2 * min(window, len(body) - received // 2), "as much as the windows take, and no more"
        received = total
        for number in (1, 3):
            pair.server.increment_flow_control_window(window, number)
        pair.pump()
    assert pair.bodies == {1: body, 3: body[::-1]}
    assert pair.complete == [1, 3]


def test_streams_that_compete_for_the_connections_window_are_served_oldest_first() -> None:
    pair = Pair({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}, consume=False)
    body = bytes(50_000)
    for row in range(4):
        pair.call(row, body)
    assert pair.bodies == {1: body, 3: bytes(15_535)}, "65,535 bytes in all (RFC 9113, 6.9.2)"
    pair.call(4, b"")
    assert pair.complete == [1, 9], "an empty body needs no window"
    pair.server.increment_flow_control_window(70_000)
    pair.pump()
    assert {number: len(data) for number, data in pair.bodies.items()} == {1: 50_000, 3: 50_000, 5: 35_535, 9: 0}
    pair.client.cancel(2)
    pair.server.increment_flow_control_window(50_000)
    pair.pump()
    assert pair.bodies[7] == body
    assert len(pair.bodies[5]) == 35_535, "a cancelled call sends no more"
    assert pair.complete == [1, 9, 3, 7]


def test_a_blocked_stream_does_not_hold_up_others() -> None:
    pair = Pair({SettingCodes.INITIAL_WINDOW_SIZE: 100}, consume=False)
    pair.call(0, bytes(101))
    pair.call(1, bytes(100))
    assert pair.complete == [3]
    pair.server.increment_flow_control_window(1, 1)
    pair.pump()
    assert pair.complete == [3, 1]


def test_the_peers_frame_size_is_respected() -> None:
    pair = Pair({SettingCodes.MAX_FRAME_SIZE: 20_000, SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    out = pair.client.request(0, bytes(50_000), keep=False)
    assert [len(one.body) for one in frames(out)][1:] == [20_000, 20_000, 10_000]
    pair.to_server(out)
    pair.pump()
    pair.server.update_settings({SettingCodes.MAX_FRAME_SIZE: 16_384})
    pair.pump()
    assert max(len(one.body) for one in frames(pair.client.request(1, bytes(50_000), keep=False))) == 16_384


def test_a_window_reduced_below_zero() -> None:
    """The example of RFC 9113, 6.9.2: 60 KB sent, then the initial window becomes 16 KB: the window is -44 KB."""
    kib = 1024
    client = opened(0, {SettingCodes.INITIAL_WINDOW_SIZE: 60 * kib})
    assert sent_bytes(client.request(0, bytes(100 * kib), keep=False)) == 60 * kib
    feed(client, settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 16 * kib}), window_update(0, 1 << 20))
    assert sent_bytes(take(client)) == 0
    feed(client, window_update(1, 44 * kib))
    assert sent_bytes(take(client)) == 0, "the window is 0 now"
    feed(client, window_update(1, 1))
    assert sent_bytes(take(client)) == 1
    assert sent_bytes(client.request(1, bytes(100 * kib), keep=False)) == 16 * kib, "a new stream has the new window"
    feed(client, settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 20 * kib}))
    assert sent_bytes(take(client)) == 2 * 4 * kib, "and it grows for all"


def test_what_windows_can_hold() -> None:
    client = opened(0)
    client.request(0, bytes(70_000), keep=False)
    feed(client, window_update(0, MAX_WINDOW), window_update(1, MAX_WINDOW))  # both were used up: exactly full
    with pytest.raises(ProtocolFault, match=r"window over 2\^31-1"):
        feed(client, window_update(0, 70_000))


@pytest.mark.parametrize("received", [b"", bytes(5), bytes(9_999), bytes(25_000)])
def test_the_receive_window_is_refilled_with_what_was_received(received: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "RECEIVE_WINDOW", 100_000)
    monkeypatch.setattr(http2, "REFILL_BYTES", 30_000)
    pair = Pair()
    assert pair.server.outbound_flow_control_window == 100_000
    for row in range(20):
        pair.call(row, b"")
        if row % 3 == 1:  # given up, but what still comes of it takes its part of the window
            pair.client.cancel(row)
        pair.reply(2 * row + 1, received, pad=10 if row % 2 else None)
        assert 70_000 < pair.server.outbound_flow_control_window <= 100_000
    refills = [event for event in pair.heard(h2.events.WindowUpdated) if isinstance(event, h2.events.WindowUpdated)]
    refilled = sum(event.delta or 0 for event in refills if event.stream_id == 0) - (100_000 - 65_535)
    used = 100_000 - pair.server.outbound_flow_control_window
    assert used + refilled == 20 * len(received) + (10 * 11 if received else 0), "the length of padding counts, too"


def test_a_cancelled_call_is_told_to_the_peer() -> None:
    pair = Pair()
    pair.call(0, b"12345")
    stream = pair.client.cancel(0)
    assert stream is not None
    assert (stream.row, pair.client.cancel(0)) == (0, None)
    pair.to_server(take(pair.client))
    (event,) = pair.heard(h2.events.StreamReset)
    assert isinstance(event, h2.events.StreamReset)
    assert (event.stream_id, event.error_code) == (1, 8)  # CANCEL


def test_late_frames_of_a_cancelled_call_are_ignored() -> None:
    pair = Pair()
    pair.call(0, b"12345")
    pair.client.cancel(0)
    pair.reply(1, bytes(1000))  # the server does not know yet
    assert pair.ended == []
    pair.call(1, b"12345")
    pair.reply(3, b"later")
    assert [(stream.row, b"".join(stream.kept or ())) for stream in pair.ended] == [(1, b"later")]


def test_an_early_reply_gives_up_the_rest_of_the_request() -> None:
    pair = Pair(consume=False)
    pair.call(0, bytes(100_000))
    pair.server.send_headers(1, [(":status", "200"), ("grpc-status", "8")], end_stream=True)
    pair.pump()
    (stream,) = pair.ended
    assert read_end(stream).detail == "RESOURCE_EXHAUSTED"
    (event,) = pair.heard(h2.events.StreamReset)
    assert isinstance(event, h2.events.StreamReset)
    assert event.error_code == 0, "gRPC over HTTP2, Early Server Closure: NO_ERROR"
    pair.server.increment_flow_control_window(100_000)
    pair.pump()
    assert len(pair.bodies[1]) == 65_535


# --- life of streams and connections ------------------------------------------------------------


def test_the_peers_limit_of_streams() -> None:
    pair = Pair({SettingCodes.MAX_CONCURRENT_STREAMS: 2})
    client = pair.client
    pair.call(0, b"")
    pair.call(1, b"")
    assert (len(client.streams), client.max_streams) == (2, 2)
    for limit in (1, 0, 5):
        pair.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: limit})
        pair.pump()
        assert (len(client.streams), client.max_streams) == (2, limit)
    pair.reply(1, b"12345")
    assert len(client.streams) == 1


def test_a_goaway_ends_what_the_peer_will_not_do() -> None:
    client = opened(4)
    goaway = hf.GoAwayFrame(0, last_stream_id=MAX_WINDOW, error_code=0, additional_data=b"max_age")
    assert feed(client, goaway.serialize()) == [], "a graceful end begins with the highest number of all"
    assert (client.goaway, client.max_streams) == ("GOAWAY NO_ERROR: max_age", 0)
    feed(client, settings_frame({SettingCodes.MAX_CONCURRENT_STREAMS: 100}))
    assert client.max_streams == 0, "and no setting takes it back"
    goaway = hf.GoAwayFrame(0, last_stream_id=3, error_code=11, additional_data=b"too_many_pings")
    ended = feed(client, goaway.serialize())
    assert [(stream.row, stream.reset) for stream in ended] == [
        (2, "GOAWAY ENHANCE_YOUR_CALM: too_many_pings"),
        (3, "GOAWAY ENHANCE_YOUR_CALM: too_many_pings"),
    ]
    assert [read_end(stream)[0] for stream in ended] == ["reset", "reset"]
    assert [stream.row for stream in feed(client, reply_frames(1), reply_frames(3), reply_frames(5))] == [0, 1]


def test_the_last_stream_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "LAST_STREAM", 5)
    client = opened(2)
    assert (client.goaway, client.max_streams) == (None, 5)
    client.request(2, b"", keep=False)
    assert (client.goaway, client.max_streams) == ("the connection's stream numbers are used up", 0)
    assert [stream.row for stream in feed(client, reply_frames(5), reply_frames(1))] == [2, 0]


@pytest.mark.parametrize(
    ("code", "name"), [(0, "NO_ERROR"), (7, "REFUSED_STREAM"), (8, "CANCEL"), (13, "HTTP_1_1_REQUIRED"), (99, "error 99")]
)
def test_a_reset_stream(code: int, name: str) -> None:
    client = opened(2)
    (stream,) = feed(client, hf.RstStreamFrame(3, error_code=code).serialize())
    assert (stream.row, stream.reset, read_end(stream)) == (1, f"RST_STREAM {name}", ("reset", 0, f"RST_STREAM {name}"))
    assert feed(client, hf.RstStreamFrame(3, error_code=code).serialize()) == [], "once is enough"


def test_a_reset_after_the_complete_reply_changes_nothing() -> None:
    client = opened(1)
    (stream,) = feed(client, reply_frames(1), hf.RstStreamFrame(1, error_code=0).serialize())
    assert read_end(stream).kind == "ok"


def test_a_reset_inside_the_reply_is_no_success() -> None:
    client = opened(1)
    headers = raw(1, flags=4, stream=1, payload=block(("grpc-status", "0"), (":status", "200")))
    (stream,) = feed(client, headers, raw(0, stream=1, payload=MESSAGE), hf.RstStreamFrame(1, error_code=2).serialize())
    assert read_end(stream) == ("reset", 0, "RST_STREAM INTERNAL_ERROR")


def test_informational_headers_are_skipped() -> None:
    client = opened(1)
    hints = block((":status", "103"), ("grpc-status", "9"), ("link", "</a>"))
    assert feed(client, raw(1, flags=4, stream=1, payload=hints), at_ns=3) == []
    (stream,) = feed(client, raw(1, flags=4, stream=1, payload=block((":status", "100"))), reply_frames(1))
    assert stream.headers == {b":status": b"200"}
    assert stream.first_byte_ns == 3, "a first byte all the same"
    assert read_end(stream).kind == "ok"


def test_the_end_without_trailers() -> None:
    client = opened(1)
    headers = raw(1, flags=4, stream=1, payload=block((":status", "200"), ("grpc-status", "0")))
    (stream,) = feed(client, headers, raw(0, flags=1, stream=1, payload=MESSAGE))
    assert stream.trailers is None
    assert read_end(stream) == ("protocol", 0, "the reply ended without a grpc-status (content-type none)")


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
