"""The recorder: each event in its column, the header's counters, counted errors, kept replies, and the end of a drain."""

from collections.abc import Callable
from pathlib import Path

import pytest

from servebench.record.columns import COLUMNS, Columns, HeaderSlot
from servebench.record.outcome import Outcome
from servebench.record.recorder import Recorder
from servebench.record.replies import read_replies, write_replies
from servebench.transport.base import Sink

MAX_DISTINCT = 200


@pytest.fixture
def columns(tmp_path: Path) -> Columns:
    return Columns.create(tmp_path / "columns-0.bin", rows=1_000, worker=0, workers=1)


def row_of(columns: Columns, row: int) -> dict[str, int]:
    """What a row holds, without the columns that are still 0."""
    values = {name: int(columns.view(name)[row]) for name in COLUMNS}
    return {name: value for name, value in values.items() if value}


def counters(columns: Columns) -> tuple[int, int]:
    return columns.header[HeaderSlot.ENDED], columns.header[HeaderSlot.OK]


def end(recorder: Recorder, row: int, outcome: Outcome, detail: str = "because") -> None:
    """Hand over, issue and end one query."""
    recorder.outstanding += 1
    recorder.issued(row, 1, 0)
    if outcome is Outcome.OK:
        recorder.completed(row, 2, 3, 200, 0)
    else:
        recorder.failed(row, 0, 3, outcome, detail)


# --- the sink's events --------------------------------------------------------------------

EVENTS: list[object] = [
    pytest.param(lambda sink: None, {"issued_ns": 100, "connection": 7}, (0, 0), id="issued"),
    pytest.param(
        lambda sink: sink.completed(5, 150, 160, 200, 4_000_000_000),
        {
            "issued_ns": 100,
            "connection": 7,
            "first_byte_ns": 150,
            "completed_ns": 160,
            "status": 200,
            "response_bytes": 4_000_000_000,
            "outcome": Outcome.OK,
        },
        (1, 1),
        id="completed",
    ),
    pytest.param(
        lambda sink: sink.refused(5, 150, 160, 503, 12, "HTTP 503", b"overloaded"),
        {
            "issued_ns": 100,
            "connection": 7,
            "first_byte_ns": 150,
            "completed_ns": 160,
            "status": 503,
            "response_bytes": 12,
            "outcome": Outcome.STATUS,
        },
        (1, 0),
        id="refused",
    ),
    pytest.param(
        lambda sink: sink.failed(5, 0, 160, Outcome.TIMEOUT, "too late"),
        {"issued_ns": 100, "connection": 7, "completed_ns": 160, "outcome": Outcome.TIMEOUT},
        (1, 0),
        id="failed before the first byte",
    ),
    pytest.param(
        lambda sink: sink.failed(5, 150, 160, Outcome.RESET, "cut off"),
        {"issued_ns": 100, "connection": 7, "first_byte_ns": 150, "completed_ns": 160, "outcome": Outcome.RESET},
        (1, 0),
        id="failed inside the reply",
    ),
]


@pytest.mark.parametrize(("event", "row", "counted"), EVENTS)
def test_each_event_lands_in_its_own_columns(
    columns: Columns, event: Callable[[Sink], None], row: dict[str, int], counted: tuple[int, int]
) -> None:
    recorder = Recorder(columns)
    recorder.outstanding += 1
    assert recorder.issued(5, 100, 7) is False
    event(recorder)
    assert row_of(columns, 5) == row
    assert counters(columns) == counted
    assert recorder.outstanding == 1 - counted[0]
    assert not any(row_of(columns, other) for other in (4, 6))
    assert (recorder.issue_time_ns(5), recorder.connection_of(5)) == (100, 7)
    assert recorder.first_outstanding(5, 6) == (6 if counted[0] else 5)


def test_the_engines_side_sheds(columns: Columns) -> None:
    recorder = Recorder(columns)
    recorder.shed(3, "over the cap")
    assert row_of(columns, 3) == {"outcome": Outcome.SHED}
    recorder.outstanding += 1
    recorder.unsent(4, "no connection came free")
    assert row_of(columns, 4) == {"outcome": Outcome.SHED}
    recorder.shed_from(990, "the end")
    assert columns.array("outcome").tolist().count(Outcome.SHED) == 12
    recorder.shed_from(1_000, "nothing is left")
    assert counters(columns) == (12, 0)
    assert recorder.outstanding == 0
    assert recorder.first_outstanding(999, 1000) == 1000
    assert {(error.detail, error.count, error.example_row) for error in recorder.errors} == {
        ("over the cap", 1, 3),
        ("no connection came free", 1, 4),
        ("the end", 10, 990),
    }


def test_books_balance_over_every_end(columns: Columns) -> None:
    recorder = Recorder(columns)
    ends = [outcome for outcome in Outcome if outcome not in (Outcome.NOT_ISSUED, Outcome.OUTSTANDING, Outcome.SHED)]
    for row in range(500):
        end(recorder, row, ends[row % len(ends)])
    recorder.shed_from(500, "stopped")
    found = columns.array("outcome").tolist()
    assert counters(columns) == (1_000, found.count(Outcome.OK))
    assert sum(error.count for error in recorder.errors) == 1_000 - found.count(Outcome.OK)
    for error in recorder.errors:
        assert error.count == found.count(error.outcome), error.outcome
    assert recorder.outstanding == 0


# --- errors -------------------------------------------------------------------------------


def test_errors_are_counted_by_kind_and_detail_most_frequent_first(columns: Columns) -> None:
    recorder = Recorder(columns)
    for row, (outcome, detail) in enumerate(
        [(Outcome.RESET, "a"), (Outcome.CONNECT, "a"), (Outcome.RESET, "b"), (Outcome.CONNECT, "a"), (Outcome.CONNECT, "a")]
    ):
        end(recorder, row, outcome, detail)
    found = [(error.outcome, error.detail, error.count, error.example_row) for error in recorder.errors]
    assert found[0] == (Outcome.CONNECT, "a", 3, 1)
    assert set(found[1:]) == {(Outcome.RESET, "a", 1, 0), (Outcome.RESET, "b", 1, 2)}


def test_the_first_refusal_of_a_status_gives_the_servers_words(columns: Columns) -> None:
    recorder = Recorder(columns)
    for row, status in enumerate((503, 503, 400)):
        recorder.outstanding += 1
        recorder.refused(row, 1, 2, status, 3, f"HTTP {status}", b"reply %d" % row)
    assert [(error.detail, error.count, error.example_reply) for error in recorder.errors] == [
        ("HTTP 503", 2, b"reply 0"),
        ("HTTP 400", 1, b"reply 2"),
    ]


def test_distinct_details_are_bounded_and_nothing_goes_uncounted(columns: Columns) -> None:
    recorder = Recorder(columns)
    for row in range(300):
        end(recorder, row, Outcome.PROTOCOL, f"garbage {row}")
    for row in range(300, 400):
        end(recorder, row, Outcome.RESET, f"reset {row}")
    end(recorder, 400, Outcome.PROTOCOL, "garbage 0")
    errors = {(error.outcome, error.detail): error for error in recorder.errors}
    assert len(errors) == MAX_DISTINCT + 2
    assert errors[Outcome.PROTOCOL, "other details"].count == 300 - MAX_DISTINCT
    assert errors[Outcome.PROTOCOL, "other details"].example_row == MAX_DISTINCT
    assert errors[Outcome.RESET, "other details"].count == 100
    assert errors[Outcome.PROTOCOL, "garbage 0"].count == 2
    assert sum(error.count for error in recorder.errors) == 401


def test_a_long_detail_is_cut(columns: Columns) -> None:
    recorder = Recorder(columns)
    end(recorder, 0, Outcome.PROTOCOL, "x" * 100_000)
    end(recorder, 1, Outcome.PROTOCOL, "x" * 100_001)
    (error,) = recorder.errors
    assert (error.detail, error.count) == ("x" * 300, 2)


# --- replies ------------------------------------------------------------------------------


def test_only_rows_to_keep_are_asked_for(columns: Columns) -> None:
    recorder = Recorder(columns, keep=[0, 999, 5])
    assert [row for row in range(1_000) if recorder.issued(row, 1, 0)] == [0, 5, 999]
    recorder.reply(5, [b"HTTP/1.1 200 OK\r\n", b"", b"\r\n"])
    assert recorder.replies == {5: b"HTTP/1.1 200 OK\r\n\r\n"}


REPLIES = [
    pytest.param({}, id="none"),
    pytest.param({7: b""}, id="an empty one"),
    pytest.param({3: b"a", 1: b"", 2: bytes(range(256)) * 5000}, id="several, unordered, large"),
]


@pytest.mark.parametrize("replies", REPLIES)
def test_replies_travel_through_their_file(tmp_path: Path, replies: dict[int, bytes]) -> None:
    write_replies(tmp_path / "replies", replies)
    assert read_replies(tmp_path / "replies") == replies


def test_a_replies_file_that_a_killed_worker_left_half_written_counts_as_none(tmp_path: Path) -> None:
    assert read_replies(tmp_path / "missing") == {}
    path = tmp_path / "replies"
    write_replies(path, {1: b"x" * 100, 2: b"y"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert read_replies(path) == {}, size
    path.write_bytes(b"rubbish" * 100)
    assert read_replies(path) == {}


# --- the drain ----------------------------------------------------------------------------


def test_drained_is_told_once_when_the_last_query_ends(columns: Columns) -> None:
    recorder = Recorder(columns)
    told: list[int] = []
    recorder.outstanding += 2
    recorder.on_drained(lambda: told.append(counters(columns)[0]))
    recorder.completed(0, 1, 2, 200, 0)
    assert told == []
    recorder.failed(1, 0, 2, Outcome.RESET, "gone")
    assert told == [2], "the last end was counted already"
    end(recorder, 2, Outcome.OK)
    assert told == [2]


def test_drained_is_told_at_once_when_nothing_is_outstanding(columns: Columns) -> None:
    told: list[bool] = []
    Recorder(columns).on_drained(lambda: told.append(True))
    assert told == [True]
