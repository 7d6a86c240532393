"""The punctuality benchmark: what it says of arrival processes that are known, its tables, and who takes turns when."""

import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.request import Request, urlopen

import numpy as np
import pytest

from benchmarks import arrivals_seen, entry, punctuality, turns
from benchmarks.arrivals_seen import Seen, Stub, fetch_stamps, forget_stamps, path_added_ns, queue_stubs, see
from benchmarks.contestants import Contestant, Outcome, Own
from benchmarks.own_client import OwnRun
from benchmarks.punctuality import delay_of, delay_turns, witness
from benchmarks.punctuality_report import Delay, Witnessed, chart, delay_table, resolution_line, seen_table, targets
from benchmarks.turns import Turn, take_turns, text_table
from servebench.errors import RunError

RATE_QPS = 1000.0


def arrivals_ns(gaps_s: np.ndarray) -> np.ndarray:
    return np.cumsum(np.asarray(gaps_s) * 1e9).astype(np.int64)


# --- arrival processes ------------------------------------------------------------------


def test_a_poisson_process_looks_like_one() -> None:
    seen = see(arrivals_ns(np.random.default_rng(3).exponential(1 / RATE_QPS, 21_000)), RATE_QPS)
    assert seen.arrivals == pytest.approx(20_000, rel=0.02)  # half a second less at either end
    assert seen.rate_qps == pytest.approx(RATE_QPS, rel=0.03)
    assert seen.cv2 == pytest.approx(1, abs=0.06)  # 3 standard deviations: sqrt(8 / n)
    assert abs(seen.dispersion - 1) < 3 * seen.dispersion_error
    assert seen.dispersion_error == pytest.approx(math.sqrt(2 / 999), rel=0.02)
    assert seen.ks_distance < 1.2 * seen.ks_critical
    assert seen.ks_critical == pytest.approx(1.358 / math.sqrt(20_000), rel=0.02)


def test_constant_gaps_have_no_variance_and_the_textbooks_distance() -> None:
    seen = see(arrivals_ns(np.full(5_000, 1 / RATE_QPS)), RATE_QPS)
    assert seen.cv2 == pytest.approx(0, abs=1e-9)
    assert seen.dispersion == pytest.approx(0, abs=0.01)
    assert seen.ks_distance == pytest.approx(1 - 1 / math.e, abs=1e-3)  # all gaps at the mean of the distribution


def test_a_wrong_rate_is_a_distance_too() -> None:
    gaps_s = np.random.default_rng(4).exponential(2 / RATE_QPS, 20_000)
    assert see(arrivals_ns(gaps_s), RATE_QPS).ks_distance == pytest.approx(0.25, abs=0.015)  # max of exp(-x/2) - exp(-x)


def test_gaps_that_workers_repeat_show_only_in_the_dispersion() -> None:
    """Ten workers that share one seed: every gap comes ten times, each by itself exponential."""
    gaps_s = np.repeat(np.random.default_rng(5).exponential(1 / RATE_QPS, 4_000), 10)
    seen = see(arrivals_ns(gaps_s), RATE_QPS)
    assert seen.cv2 == pytest.approx(1, abs=0.2)
    assert seen.dispersion > 5


def test_what_happens_at_the_ends_does_not_count() -> None:
    middle = np.full(2_000, 1 / RATE_QPS)
    gaps_s = np.concatenate([np.zeros(300), [0.4], middle, [0.4], np.zeros(300)])
    seen = see(arrivals_ns(gaps_s), RATE_QPS)
    assert seen.arrivals == pytest.approx(1_800, abs=2)
    assert seen.cv2 == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [pytest.param(0, id="none"), pytest.param(1_050, id="50 are left")])
def test_too_few_arrivals_tell_nothing(count: int) -> None:
    with pytest.raises(ValueError, match="too few"):
        see(arrivals_ns(np.full(count, 1 / RATE_QPS)), RATE_QPS)


# --- tables -----------------------------------------------------------------------------


def test_delays_are_read_from_the_run_document() -> None:
    document = {
        "counts": {"planned": 1000, "ok": 998},
        "issue_delay": {"percentiles": {"50": 7, "99": 80}, "max_ns": 900},
        "workers": [{"stats": {"cpu_s": 0.5, "wall_s": 2.0}}],
    }
    delay = delay_of("grpc", "eco", 500, OwnRun(document, None))  # type: ignore[arg-type]
    assert delay == Delay("grpc", "eco", 500, 1000, 2, 7, 80, 900, 0.25)

    document["issue_delay"]["percentiles"]["99"] = None
    with pytest.raises(RunError, match="grpc, eco, 500/s: more than 1 % of the queries were never sent"):
        delay_of("grpc", "eco", 500, OwnRun(document, None))  # type: ignore[arg-type]


def test_every_combination_has_its_run_in_every_round() -> None:
    planned = list(delay_turns([100, 1_000], 2))
    assert len(planned) == len(set(planned)) * 2 == 12
    assert planned[:6] == planned[6:]
    assert planned[:2] == [(100, "http", "precise"), (100, "http", "eco")]
    assert planned[2:6] == [(1_000, protocol, pacing) for protocol in ("http", "grpc") for pacing in ("precise", "eco")]


def test_the_table_of_delays_has_medians_and_the_range() -> None:
    base = Delay("http", "precise", 1000, 500, 0, 2_000, 50_000, 400_000, 0.2)
    text = delay_table(
        [base, replace(base, p99_ns=90_000, max_ns=700_000), replace(base, p99_ns=60_000, not_ok=1, cpu_share=0.3)]
    )
    (line,) = text.splitlines()[2:]
    assert (
        " ".join(line.split())
        == "| http | precise | 1,000 | 1,500 | 2.00 us | 60.0 us (50.0 us - 90.0 us) | 700 us | 20.0% | 1 |"
    )


@pytest.mark.parametrize(
    ("change", "met"),
    [
        pytest.param({}, True, id="exactly at the bounds"),
        pytest.param({"p50_ns": 20_001}, False, id="p50"),
        pytest.param({"p99_ns": 200_001}, False, id="p99"),
        pytest.param({"cpu_share": 0.9}, True, id="precise pacing may cost CPU"),
        pytest.param({"pacing": "eco", "p99_ns": 500_000, "p50_ns": 90_000, "cpu_share": 0.15}, True, id="eco, at the bounds"),
        pytest.param({"pacing": "eco", "p99_ns": 500_001}, False, id="eco p99"),
        pytest.param({"pacing": "eco", "cpu_share": 0.151}, False, id="eco CPU"),
        pytest.param({"rate_qps": 100}, False, id="nothing at the rate of the targets"),
    ],
)
def test_the_targets_at_1000_a_second(change: dict[str, object], met: bool) -> None:
    base = Delay("http", "precise", 1000, 500, 0, 20_000, 200_000, 10**8, 0.1)
    outlier = replace(base, p50_ns=10**7, p99_ns=10**8)  # of three rounds the median counts
    found, sentences = targets(
        [replace(one, **change) if one is base else one for one in (base, base)] + ([outlier] if not change else [])
    )
    assert found is met
    assert all(sentence.startswith("Target met" if met else "Target NOT met") for sentence in sentences)


@pytest.mark.parametrize(("p99_ns", "passed"), [(2_000_000, True), (2_000_001, False)])
def test_a_quick_run_fails_on_gross_regressions_only(p99_ns: int, passed: bool) -> None:
    found, sentences = targets([Delay("http", "precise", 1000, 500, 0, 20_000, p99_ns, 10**8, 0.1)], slack=10)
    assert found is passed
    assert sentences[0].startswith("Target NOT met"), "it is said all the same"


def test_the_picture_has_a_line_for_each_pacing_with_gaps_where_nothing_was_measured() -> None:
    base = Delay("http", "precise", 1000, 500, 0, 20_000, 200_000, 10**8, 0.1)
    drawn = chart([base, replace(base, p99_ns=400_000), replace(base, rate_qps=10), replace(base, pacing="eco")])
    assert drawn.xs == [10, 1000]
    precise, eco = drawn.series
    assert (precise.values, precise.lows, precise.highs) == ([200, 300], [200, 200], [200, 400])
    assert eco.values == [None, 200]


SEEN = Seen(1000, 990.0, 1.02, 0.9, 0.14, 0.02, 0.03)
OURS = Witnessed("servebench", 1000, SEEN, 0, 0.25, 60_000, 200_000, 50_000, 90_000)


def test_the_table_of_arrivals_says_who_tells_no_schedule() -> None:
    text = seen_table(
        [OURS, replace(OURS, from_schedule_p50_ns=80_000), Witnessed("peer", 1000, SEEN, 0, 0.5, None, None, None, None)]
    )
    ours, peer = text.splitlines()[2:]
    assert "70.0 us, 200 us" in ours
    assert "0.90 ± 0.14" in ours
    assert "0.020 (limit 0.030)" in ours
    assert "not told" in peer
    assert "50.0 us (p50), 90.0 us (p99)" in resolution_line([OURS])
    assert resolution_line([replace(OURS, from_issue_p50_ns=None)]) == ""


def test_columns_line_up() -> None:
    assert text_table([["a", "bcde"], ["efg", "h"]]) == "| a   | bcde |\n| --- | ---- |\n| efg | h    |"


# --- turns ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    name: str
    arrivals: str = "poisson"
    protocol: str = "kserve-http"


class Watch:
    """A clock that only turns move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def turn(self, who: Contestant | Named, takes_s: float, label: str = "x", error: Exception | None = None) -> Turn[str]:
        def take() -> str:
            self.now_s += takes_s
            if error is not None:
                raise error
            return who.name

        return Turn(label, who, take)  # type: ignore[arg-type]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(turns.time, "monotonic", lambda: watch.now_s)
    return watch


def taken(plan: Sequence[Turn[str]], time_s: float) -> list[str]:
    return take_turns(plan, time_s=time_s, guess_s=10, tell=str)


def test_turns_that_would_end_too_late_are_left_out(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = Named("a"), Named("b")
    # After 17 s, a has 13 s left and takes 5 as before; then b needs the 12 it took: too much for what is left of 30.
    plan = [watch.turn(a, 5), watch.turn(b, 12), watch.turn(a, 5), watch.turn(b, 12), watch.turn(a, 5)]
    assert taken(plan, 30) == ["a", "b", "a", "a"]
    assert "There was no time for 1 turns: b, x" in capsys.readouterr().out


def test_who_is_slow_has_one_turn_of_each_kind(watch: Watch) -> None:
    slow = Named("slow")
    plan = [watch.turn(slow, 21, "x"), watch.turn(slow, 21, "y"), watch.turn(slow, 21, "x"), watch.turn(Named("quick"), 1, "x")]
    assert taken(plan, 1000) == ["slow", "slow", "quick"]


def test_a_peer_that_fails_loses_its_turn_and_ours_ends_the_benchmark(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    peer = Named("peer")
    plan = [
        watch.turn(peer, 1, error=RunError("peer fell over")),
        watch.turn(peer, 1, error=ValueError("gibberish")),
        watch.turn(peer, 1),
    ]
    assert taken(plan, 1000) == ["peer"]
    assert "peer, x: peer fell over\npeer, x: gibberish\npeer, x: peer\n" in capsys.readouterr().out
    with pytest.raises(RunError, match="our own"):
        taken([watch.turn(Own(), 1, error=RunError("our own"))], 1000)


# --- for real ---------------------------------------------------------------------------


def test_without_null_servers_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "find_nghttpd", lambda: None)
    assert punctuality.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "apt install nghttp2-server" in err


class Silent:
    """A contestant that sends nothing, and tells nothing about its schedule."""

    name = "silent"
    arrivals = "poisson"
    protocol = "kserve-http"

    def send(self, stub: Stub, **_: object) -> Outcome:
        return Outcome(None, 0, 0, 0.0, 0.0)


def test_stamps_are_forgotten_once_the_stub_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with queue_stubs(300.0, cpus[:1]) as stubs:
        stub = stubs["kserve-http"]
        with urlopen(Request(f"{stub.url}{stub.target.path}", stub.target.body, dict(stub.target.headers))) as reply:
            assert reply.status == 200
        assert len(fetch_stamps(stub)) == 1
        with socket.create_connection(("127.0.0.1", int(stub.url.rpartition(":")[2]))) as sock:
            head = f"POST {stub.target.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(stub.target.body)}\r\n\r\n"
            sock.sendall(head.encode() + stub.target.body)
            while len(fetch_stamps(stub)) < 2:  # the pytest timeout bounds it
                pass
            begin_s = time.monotonic()
            forget_stamps(stub)
            assert time.monotonic() - begin_s > 0.1  # it was in service for 300 ms
            assert len(fetch_stamps(stub)) == 0
            sock.sendall(head.encode() + stub.target.body)
            while len(fetch_stamps(stub)) < 1:
                pass
            monkeypatch.setattr(arrivals_seen, "_IDLE_DEADLINE_S", 0.0)
            with pytest.raises(RunError, match="1 queries are still in the queue"):
                forget_stamps(stub)


@pytest.mark.load
def test_arrivals_at_a_real_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_seen, "_FLOOR_S", 0.3)
    cpus = sorted(os.sched_getaffinity(0))
    with queue_stubs(0.05, cpus[:1]) as stubs:
        stub = stubs["kserve-http"]
        added_ns = path_added_ns(stub, cpus[-1:], 500.0)
        assert len(added_ns) == pytest.approx(0.3 * 500, rel=0.5)  # less, because the pauses come after the replies
        assert 10_000 < np.median(added_ns) < 5_000_000
        turn = witness(Own(), stub, 300.0, duration_s=2.0, cpus=cpus[-1:], seed=4)
        assert turn.seen.arrivals == pytest.approx(300, rel=0.25)  # one second of the two, four standard deviations
        assert turn.seen.rate_qps == pytest.approx(300, rel=0.25)
        assert turn.from_schedule_p50_ns is not None
        assert turn.from_issue_p50_ns is not None
        assert 0 < turn.from_issue_p50_ns <= turn.from_schedule_p50_ns < 20_000_000
        with pytest.raises(ValueError, match="too few"):
            witness(Silent(), stub, 300.0, duration_s=2.0, cpus=cpus[-1:], seed=4)  # type: ignore[arg-type]
