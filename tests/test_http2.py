"""The HTTP/2 client as pure bytes: conversations with the h2 library, flow control, the life of streams and connections.

h2 is an implementation of its own, and a strict one: whatever of ours it does not take ends the test.
"""

import random
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import pytest
from h2.settings import SettingCodes, Settings
from http2_frames import (
    BLOCK,
    MAX_WINDOW,
    MESSAGE,
    Split,
    at_random,
    block,
    byte_by_byte,
    feed,
    frames,
    opened,
    raw,
    reply_frames,
    sent_bytes,
    settings_frame,
    take,
    whole,
    window_update,
)
from hyperframe import frame as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from servebench.wire import http2
from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
from servebench.wire.http2 import Http2Client, Stream


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
