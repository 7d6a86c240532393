"""The benchmark of gross regressions: its null server counts requests right, its ratios are judged right, and it runs."""

import http.client
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tritonclient.http import InferResult

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are run from the checkout, they are not installed

from benchmarks import entry, regressions
from benchmarks.nginx import INFER_PATH, REPLIES
from benchmarks.null_http import Connection, NullHttpServer, answer_to
from benchmarks.peers.query import BODY, HEADERS
from benchmarks.regressions import Round, judge
from benchmarks.steps import measure_saturated_qps
from servebench.wire.http1 import encode_request

REQUEST = encode_request("POST", INFER_PATH, "127.0.0.1:8000", HEADERS, BODY)
QUIET = Round(wire_qps=70_000, aiohttp_qps=10_000, service_p50_ns=105_000, ping_pong_p50_ns=100_000)


# --- the null server ------------------------------------------------------------------------


class Written:
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def replies_to(pieces: Sequence[bytes]) -> int:
    """How many replies a connection writes to a stream that arrives in pieces; nothing else may be in what it writes."""
    written, connection = Written(), Connection()
    connection.connection_made(cast("Any", written))
    for piece in pieces:
        connection.data_received(piece)
    reply = answer_to(REQUEST.partition(b"\r\n\r\n")[0])[1]
    count = written.data.count(reply)
    assert written.data == reply * count
    return count


@pytest.mark.parametrize(
    ("pieces", "count"),
    [
        pytest.param([REQUEST], 1, id="whole"),
        pytest.param([REQUEST[at : at + 1] for at in range(len(REQUEST))], 1, id="byte by byte"),
        pytest.param([REQUEST[:-1]], 0, id="the body's last byte is missing"),
        pytest.param([REQUEST[: REQUEST.index(b"\r\n\r\n") + 3]], 0, id="the blank line's last byte is missing"),
        pytest.param([REQUEST * 3 + REQUEST[:40], REQUEST[40:]], 4, id="pipelined, the last one in two pieces"),
        pytest.param([REQUEST.replace(BODY, (b"\r\n\r\n" * len(BODY))[: len(BODY)])] * 2, 2, id="blank lines in a body"),
    ],
)
def test_complete_requests_are_counted_however_they_arrive(pieces: Sequence[bytes], count: int) -> None:
    assert replies_to(pieces) == count


@pytest.mark.parametrize(
    ("head", "body_bytes", "status"),
    [
        pytest.param(f"POST {INFER_PATH} HTTP/1.1\r\nCONTENT-LENGTH:17\r\nhost: x", 17, b"200 OK", id="names in any case"),
        pytest.param("GET /v2 HTTP/1.1\r\nx-content-length: 9", 0, b"200 OK", id="no body, another header's name ends alike"),
        pytest.param("GET /nothing HTTP/1.1\r\nhost: x", 0, b"404 Not Found", id="a path that is not served"),
    ],
)
def test_what_a_head_says(head: str, body_bytes: int, status: bytes) -> None:
    length, reply = answer_to(head.encode())
    assert length == body_bytes
    assert reply.startswith(b"HTTP/1.1 " + status + b"\r\n")


# --- verdicts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "kept"),
    [
        pytest.param([QUIET], [True, True], id="a quiet machine"),
        pytest.param([Round(20_000, 10_000, 300, 100)], [True, True], id="exactly at the bounds"),
        pytest.param([Round(19_999, 10_000, 300, 100)], [False, True], id="not twice aiohttp's rate"),
        pytest.param([Round(20_000, 10_000, 301, 100)], [True, False], id="more than three ping-pongs"),
        pytest.param([Round(1, 10, 900, 100), QUIET, Round(1, 10, 900, 100)], [True, True], id="the best round counts"),
        pytest.param([Round(9, 1, 900, 100), Round(1, 9, 100, 100)], [True, True], id="of each ratio by itself"),
        pytest.param([Round(5, 0, 100, 100)], [True, True], id="aiohttp answered nothing"),
    ],
)
def test_ratios_are_held_against_their_bounds(rounds: Sequence[Round], kept: list[bool]) -> None:
    verdicts = judge(rounds)
    assert [one.kept for one in verdicts] == kept
    assert [str(one).endswith("kept") for one in verdicts] == kept


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        pytest.param(QUIET, 0, "7.00 times, >= 2 wanted: kept", id="kept"),
        pytest.param(Round(15_000, 10_000, 100, 100), 1, "1.50 times, >= 2 wanted: REGRESSION", id="a regression"),
    ],
)
def test_a_regression_decides_the_exit_code(
    found: Round, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rounds: list[Sequence[int]] = []

    def take_round(server: NullHttpServer, cpus: Sequence[int]) -> Round:
        rounds.append(cpus)
        return found

    monkeypatch.setattr(regressions, "need_cpus", lambda: [0, 1])
    monkeypatch.setattr(regressions, "take_round", take_round)
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    monkeypatch.setattr(regressions, "NullHttpServer", lambda cpus: NullHttpServer(()))
    assert regressions.main([]) == code
    assert rounds == [[1]] * 3
    assert words in capsys.readouterr().out
    document = json.loads((tmp_path / "regressions.json").read_text())
    assert [one["kept"] for one in document["verdicts"]] == [not code, True]


def test_one_cpu_is_too_few_to_tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(entry.os, "sched_getaffinity", lambda _: {0})
    assert regressions.main([]) == 2
    assert "one CPU is not enough" in capsys.readouterr().err


# --- for real -------------------------------------------------------------------------------


@pytest.mark.load
def test_the_null_server_answers_as_nginx_would() -> None:
    with NullHttpServer(()) as server:
        connection = http.client.HTTPConnection(server.url.rpartition("/")[2], timeout=5)
        connection.request("POST", INFER_PATH, BODY, dict(HEADERS))
        reply = connection.getresponse()
        assert reply.status == 200
        output = InferResult.from_response_body(reply.read()).as_numpy("OUTPUT")
        assert output.dtype == np.float32
        assert output.tolist() == [[0.0, 1.0, 2.0, 3.0]]
        for path, body in REPLIES.items():
            connection.request("GET", path)
            assert connection.getresponse().read().decode() == body
        connection.close()
        for transport in ("wire", "aiohttp"):
            assert measure_saturated_qps(server, [], duration_s=0.2, transport=transport) > 100
