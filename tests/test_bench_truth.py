"""The truth benchmark: its formulas against published ones and an independent simulation, and what it makes of reports."""

import math
import os
from decimal import Decimal, localcontext

import numpy as np
import pytest
from servebench_servers.stub_queue import Service, simulate

from benchmarks import freezer, truth
from benchmarks.arrivals_seen import Stub, fetch_stamps, queue_stubs
from benchmarks.contestants import Own, PeerContestant
from benchmarks.peers.base import Target
from benchmarks.peers.hey import Hey
from benchmarks.queue_theory import (
    Freeze,
    md1_queue_lengths,
    md1_response_ns,
    md1_wait_cdf,
    percentiles_ns,
    relative_to,
    response_ns,
    simulate_runs,
)
from benchmarks.report import Spread
from benchmarks.truth import conditions, measure, plan
from benchmarks.truth_report import asked_line, chart, sharpest, summarize, table, target, turn_line
from benchmarks.truths import (
    Asked,
    Condition,
    Found,
    asked_truth,
    relative_errors,
    schedule_truth,
    seen_truth,
    stub_lateness_ns,
)

MS = 1_000_000
LOADS = [0.3, 0.5, 0.7, 0.9]


# --- M/D/1 ------------------------------------------------------------------------------


def erlang_wait_cdf(load: float, wait: float) -> float:
    """A. K. Erlang's formula of 1909, whose alternating terms cancel: hence 80 digits."""
    with localcontext() as context:
        context.prec = 80
        rho, t = Decimal(load), Decimal(wait)
        terms = ((-rho * (t - k)) ** k / math.factorial(k) * (rho * (t - k)).exp() for k in range(1, math.floor(wait) + 1))
        return float((1 - rho) * ((rho * t).exp() + sum(terms)))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("wait", [0.0, 0.25, 0.999, 1.0, 2.5, 7.0, 19.3, 30.7])
def test_the_wait_is_distributed_as_erlang_found(load: float, wait: float) -> None:
    assert md1_wait_cdf(load, wait) == pytest.approx(erlang_wait_cdf(load, wait), abs=1e-12)


@pytest.mark.parametrize("load", LOADS)
def test_queue_lengths_are_the_published_ones(load: float) -> None:
    # D. Gross and C. M. Harris, Fundamentals of Queueing Theory, M/D/1: the first three, in closed form.
    published = [
        1 - load,
        (1 - load) * (math.exp(load) - 1),
        (1 - load) * (math.exp(2 * load) - math.exp(load) * (1 + load)),
    ]
    assert md1_queue_lengths(load, 3) == pytest.approx(published, rel=1e-12)
    assert sum(md1_queue_lengths(load, 400)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("load", LOADS)
def test_the_mean_wait_is_pollaczek_and_khinchines(load: float) -> None:
    waits = np.arange(0, 150, 0.02) + 0.01  # midpoints
    mean = sum(1 - md1_wait_cdf(load, float(wait)) for wait in waits[: int(3000 * load)]) * 0.02
    assert mean == pytest.approx(load / (2 * (1 - load)), rel=2e-3)


def test_percentiles_agree_with_an_independent_simulation() -> None:
    rng = np.random.default_rng(11)
    arrivals_ns = np.cumsum(rng.exponential(2 * MS / 0.7, 400_000)).astype(np.int64)
    trace = simulate(arrivals_ns, Service(kind="constant", mean_ms=2.0))
    found_ns = np.percentile(trace.departure_ns - arrivals_ns, [50, 99, 99.9])
    exact_ns = [md1_response_ns(percentile, load=0.7, service_ns=2 * MS) for percentile in (50, 99, 99.9)]
    assert exact_ns[:2] == pytest.approx(found_ns[:2], rel=0.03)  # three standard deviations of the p99, by batch means
    assert exact_ns[2] == pytest.approx(found_ns[2], rel=0.10)


def test_those_who_do_not_wait_take_the_service_time() -> None:
    assert md1_response_ns(30, load=0.7, service_ns=2 * MS) == pytest.approx(2 * MS, abs=2)
    assert md1_response_ns(30.1, load=0.7, service_ns=2 * MS) > 2 * MS


@pytest.mark.parametrize("load", [0.0, 1.0, 1.3])
def test_a_queue_that_has_no_steady_state_is_refused(load: float) -> None:
    with pytest.raises(ValueError, match="load must be between 0 and 1"):
        md1_wait_cdf(load, 1.0)


# --- Lindley and the freeze -------------------------------------------------------------


def test_lindley_by_hand() -> None:
    arrivals_ns = np.array([0, 1, 2, 30, 31]) * MS
    assert (response_ns(arrivals_ns, 10 * MS) // MS).tolist() == [10, 19, 28, 10, 19]
    both = response_ns(np.stack([arrivals_ns, arrivals_ns * 5]), 10 * MS) // MS
    assert both.tolist() == [[10, 19, 28, 10, 19], [10, 15, 20, 10, 15]]


def test_a_freeze_by_hand() -> None:
    # Departing at 95 before the freeze; held at 105; two that arrive meanwhile and one after the thaw queue up from 200 on.
    arrivals_ns = np.array([85, 94, 150, 160, 205]) * MS
    found_ms = response_ns(arrivals_ns, 10 * MS, Freeze(100 * MS, 200 * MS)) // MS
    assert found_ms.tolist() == [10, 200 - 94, 210 - 150, 220 - 160, 230 - 205]
    assert relative_to(Freeze(150, 250), 50) == Freeze(100, 200)


def test_simulated_freezes_agree_with_the_arithmetic_of_a_fluid() -> None:
    # While frozen for F at load r, a query t after the beginning waits F - (1 - r) t, until F / (1 - r) has passed.
    rate_qps, load, duration_s = 2_000.0, 0.7, 8.0
    (p90, p99) = simulate_runs(
        (90, 99),
        rate_qps=rate_qps,
        service_ns=round(load / rate_qps * 1e9),
        duration_s=duration_s,
        freeze=Freeze(2 * 10**9, 3 * 10**9),
    )
    for spread, share in ((p90, 0.10), (p99, 0.01)):
        assert spread.median_ns == pytest.approx((1 - (1 - load) * share * duration_s) * 1e9, rel=0.015)
        assert spread.low_ns < spread.median_ns < spread.high_ns


def test_single_runs_scatter_around_theory() -> None:
    (p50, p99) = simulate_runs((50, 99), rate_qps=350, service_ns=2 * MS, duration_s=60)
    for spread, percentile in ((p50, 50), (p99, 99)):
        exact_ns = md1_response_ns(percentile, load=0.7, service_ns=2 * MS)
        assert spread.low_ns < exact_ns < spread.high_ns
        assert spread.median_ns == pytest.approx(exact_ns, rel=0.04)
    assert p99.high_ns / p99.low_ns > 1.1


def test_percentiles_are_loadgens() -> None:
    assert percentiles_ns(np.arange(1000, 0, -1), (50, 99, 99.9)).tolist() == [501, 991, 1000]
    assert percentiles_ns(np.array([[3, 1, 2], [6, 4, 5]]), (50,)).tolist() == [[2, 5]]


# --- the three truths -------------------------------------------------------------------


def stamps_of(*times_ms: tuple[int, int]) -> np.ndarray:
    rows = np.zeros(len(times_ms), dtype=[("arrival_ns", "<i8"), ("departure_ns", "<i8"), ("due_ns", "<i8")])
    rows["arrival_ns"], rows["departure_ns"] = np.array(times_ms).T * MS
    return rows


def test_the_stub_saw_the_last_queries_from_arrival_to_departure() -> None:
    stamps = stamps_of((0, 50), (100, 102), (200, 204), (300, 0))  # a warm-up query, two that count, one without a reply
    found = seen_truth(stamps, 2, np.array([1000]))
    assert found == {50.0: 4 * MS + 1000, 99.0: 4 * MS + 1000, 99.9: 4 * MS + 1000}
    assert seen_truth(stamps, 3, np.array([0]))[99.0] == 50 * MS
    assert seen_truth(stamps, 0, np.array([0])) is None
    assert seen_truth(stamps[:0], 3, np.array([0])) is None


def test_what_a_socket_adds_is_in_every_truth() -> None:
    condition = Condition("", 0.7, 2 * MS, 6.0)
    assert condition.rate_qps == pytest.approx(350)
    asked = asked_truth(condition, np.array([7]))
    assert asked.true_ns[99.0] == pytest.approx(md1_response_ns(99, load=0.7, service_ns=2 * MS) + 7, abs=2)
    assert asked.low_ns[99.0] < asked.true_ns[99.0] < asked.high_ns[99.0]
    assert asked.low_ns[50.0] - asked_truth(condition, np.array([0])).low_ns[50.0] == 7
    assert schedule_truth(np.array([0, 100]) * MS, 2 * MS, np.array([7]), None)[50.0] == 2 * MS + 7
    # Two responses of 2 ms, to each of which 1 ms comes as often as 3 ms: 3, 3, 5, 5.
    assert schedule_truth(np.array([0, 100]) * MS, 2 * MS, np.array([1, 3]) * MS, None)[50.0] == 5 * MS


@pytest.mark.parametrize("load", [0.5, 0.7, 0.9])
def test_truths_are_those_of_a_queue_behind_a_path_that_takes_now_more_now_less(load: float) -> None:
    rng, count, service_ns = np.random.default_rng(17), 60_000, 2 * MS

    def path_ns() -> np.ndarray:
        return (80_000 + rng.exponential(60_000, count)).astype(np.int64)

    due_ns = np.cumsum(rng.exponential(service_ns / load, count)).astype(np.int64)
    arrival_ns = np.maximum.accumulate(due_ns + path_ns())
    departure_ns = simulate(arrival_ns, Service(kind="constant", mean_ms=2.0)).departure_ns
    measured_ns = departure_ns + path_ns() - due_ns
    added_ns = (path_ns() + path_ns())[:300]  # what a bare socket meets
    told = [float(np.percentile(measured_ns, of)) for of in (50.0, 99.0, 99.9)]
    stamps = np.zeros(count, dtype=[("arrival_ns", "<i8"), ("departure_ns", "<i8"), ("due_ns", "<i8")])
    stamps["arrival_ns"], stamps["departure_ns"] = arrival_ns, departure_ns
    few = 10_000
    first = [float(np.percentile(measured_ns[:few], of)) for of in (50.0, 99.0, 99.9)]
    for found in (schedule_truth(due_ns[:few], service_ns, added_ns, None), seen_truth(stamps[:few], few, added_ns)):
        assert [found[50.0], found[99.0]] == pytest.approx(first[:2], rel=0.015)
        assert found[99.9] == pytest.approx(first[2], rel=0.05)  # ten queries
    if load < 0.9:  # there, even so many queries scatter by more
        asked = asked_truth(Condition("", load, service_ns, 1.0), added_ns).true_ns
        assert asked[50.0] == pytest.approx(told[0], rel=0.03)
    if load == 0.5:  # the median of what is added says too little where it falls upon those who do not wait
        naive_ns = np.median(response_ns(due_ns, service_ns)) + np.median(added_ns)
        assert naive_ns < 0.97 * told[0]


def test_the_stubs_lateness_leaves_out_what_a_freeze_made_late() -> None:
    stamps = np.zeros(203, dtype=[("arrival_ns", "<i8"), ("departure_ns", "<i8"), ("due_ns", "<i8")])
    stamps["due_ns"] = np.arange(1, 204) * 10 * MS
    stamps["departure_ns"] = stamps["due_ns"] + 5_000
    stamps["departure_ns"][99] = 1_400 * MS  # due at 1,000 ms, amid the freeze
    stamps["departure_ns"][144] += 30 * MS  # due at 1,450 ms, while the stub reads what has come
    stamps["departure_ns"][160] += 1 * MS
    stamps["departure_ns"][-1] = 0  # no reply: no lateness
    assert stub_lateness_ns(stamps, Freeze(990 * MS, 1_400 * MS)) == (5_000, MS + 5_000)
    assert stub_lateness_ns(stamps, None)[1] == 400 * MS
    assert stub_lateness_ns(stamps[:0], None) == (0, 0)


def test_errors_are_relative_to_the_truth() -> None:
    assert relative_errors({50.0: 3.0, 99.0: 8.0}, {50.0: 2.0, 99.0: 10.0, 99.9: 1.0}) == pytest.approx({50.0: 0.5, 99.0: -0.2})


# --- the plan and the tables ------------------------------------------------------------


def test_contestants_take_turns_and_some_take_fewer() -> None:
    ours, closed = Own(), PeerContestant(Hey(), "constant", "kserve-http")
    chat = PeerContestant(Hey(name="chat"), "poisson", "openai")
    of = conditions(quick=False)
    turns = [(number, condition.name, contestant.name) for number, condition, contestant in plan([ours, closed, chat], of, 2)]
    first = [name for number, *name in turns if number == 0]
    assert first == [
        ["70% load", "servebench"],
        ["70% load", "chat"],
        ["1 s freeze at 70% load", "servebench"],
        ["1 s freeze at 70% load", "hey"],
        ["1 s freeze at 70% load", "chat"],
        ["50% load", "servebench"],
        ["50% load", "chat"],
        ["90% load", "servebench"],
        ["90% load", "chat"],
    ]
    assert turns[2] == (1, "70% load", "servebench"), "the target's load comes before everything else"
    assert [name for number, *name in turns if number == 1] == [[f"{load}% load", "servebench"] for load in (70, 50, 90)]
    assert len(turns) == 12
    swift = PeerContestant(Hey(name="swift"), "poisson", "kserve-http")
    turns = [(condition.name, number) for number, condition, contestant in plan([ours, swift], of, 3) if contestant is swift]
    assert turns == [("70% load", 0), ("70% load", 1), ("70% load", 2), (of[1].name, 0), ("50% load", 0), ("90% load", 0)]
    assert [condition.rate_qps for condition in of] == pytest.approx([350, 350, 250, 450])


def found(
    contestant: str, p99_error: float, *, late_ns: int = 0, most_ns: int = 0, added_ns: int = 0, truth_name: str = "seen"
) -> Found:
    return Found(
        contestant=contestant,
        condition="70% load",
        completed=1000,
        not_ok=0,
        cpu_share=0.5,
        stub_late_p99_ns=late_ns,
        stub_late_max_ns=max(late_ns, most_ns),
        added_scatter_ns=added_ns,
        reported_ns={99.0: (1 + p99_error) * 10 * MS},
        true_ns={truth_name: {50.0: 2.0 * MS, 99.0: 10.0 * MS}},
        errors={truth_name: {99.0: p99_error}},
        honest={99.0: p99_error < 0.5},
    )


def test_disturbed_turns_are_marked_and_both_numbers_shown() -> None:
    turns = [
        found("a", 0.1, late_ns=600_000, most_ns=5 * MS, added_ns=600_000),  # just within all limits
        found("a", 0.9),
        found("a", 0.2),
        found("a", 5.0, late_ns=600_001),
        found("a", 6.0, most_ns=5 * MS + 1),
        found("a", 7.0, added_ns=600_001),
        found("b", 3.0, late_ns=10**7),
        found("c", 1.0),
    ]
    every, calm, b, c = rows = summarize(turns)
    assert [(row.contestant, row.turns, row.disturbed, row.calm_only) for row in rows] == [
        ("a", 6, 3, False),
        ("a", 3, 0, True),
        ("b", 1, 1, False),
        ("c", 1, 0, False),
    ]
    assert every.error == {99.0: Spread(2.95, 0.1, 7.0)}
    assert calm.error == {99.0: Spread(0.2, 0.1, 0.9)}
    assert calm.reported_ns == pytest.approx({99.0: 12 * MS})
    assert (every.honest, calm.honest) == ({99.0: 2}, {99.0: 2})
    assert sharpest(rows) == {"a": calm, "b": b, "c": c}
    lines = [" ".join(line.split()) for line in table(rows).splitlines()[2:]]
    assert lines == [
        "| a | seen | 6, 3 disturbed | - | 39.5 ms +295.0% (+10.0% to +700.0%) | - | 2 of 6 |",
        "| a | seen | 3 undisturbed | - | 12.0 ms +20.0% (+10.0% to +90.0%) | - | 2 of 3 |",
        "| b | seen | 1, 1 disturbed | - | 40.0 ms +300.0% | - | 0 of 1 |",
        "| c | seen | 1 undisturbed | - | 20.0 ms +100.0% | - | 0 of 1 |",
    ]
    assert turn_line(turns[4]).endswith("disturbed: stub late by 0 us (p99), 5.00 ms (max), socket before by 0 us (p99)")
    assert turn_line(turns[0]) == "p99 11.0 ms (true 10.0 ms); 1,000 ok, 0 not"


def test_the_target_tells_which_turns_it_is_about() -> None:
    some = summarize([found("servebench", 0.01), found("servebench", 0.4, late_ns=MS)])
    met, sentence = target(some)
    assert met
    assert "p99 off by 1.0% in 1 undisturbed turns (+20.5% in 2, 1 disturbed), required" in sentence
    met, sentence = target(summarize([found("servebench", 0.4, late_ns=MS)]))
    assert not met, "nothing calmer there"
    assert "p99 off by 40.0% in 1, 1 disturbed turns, required" in sentence


def test_the_line_below_a_table_states_the_sampling_error() -> None:
    every = dict.fromkeys((50.0, 99.0, 99.9), 4.0 * MS)
    asked = Asked(every, {of: value / 2 for of, value in every.items()}, {of: value * 2 for of, value in every.items()})
    assert "p99 4.00 ms (2.00 ms - 8.00 ms)" in asked_line(conditions(quick=True)[0], asked)
    assert asked_line(conditions(quick=True)[0], asked).startswith("M/D/1")
    assert asked_line(conditions(quick=True)[1], asked).startswith("Simulated")


@pytest.mark.parametrize(
    ("errors", "met", "words"),
    [
        pytest.param(
            {"servebench": -0.03, "peer": 0.04}, True, "off by 3.0%, required are 3%; below that of all 1 peers", id="met"
        ),
        pytest.param({"servebench": 0.031, "peer": -0.04}, False, "Target NOT met: p99 off by 3.1%", id="too far off"),
        pytest.param({"servebench": 0.02, "peer": -0.01}, True, "nearer to the truth: peer", id="a peer is better"),
        pytest.param({"peer": 0.0}, False, "servebench had no turn", id="ours is missing"),
    ],
)
def test_the_target_is_about_our_p99(errors: dict[str, float], met: bool, words: str) -> None:
    found_met, sentence = target(summarize([found(name, error) for name, error in errors.items()]))
    assert found_met is met
    assert words in sentence


@pytest.mark.parametrize(("error", "passed"), [(0.29, True), (0.31, False)])
def test_a_quick_run_fails_on_gross_errors_only(error: float, passed: bool) -> None:
    found_met, sentence = target(summarize([found("servebench", error)]), slack=10)
    assert found_met is passed
    assert sentence.startswith("Target NOT met"), "it is said all the same"


def test_the_sharpest_truth_counts() -> None:
    both = [found("servebench", 0.01, truth_name="schedule"), found("peer", 0.3), found("peer", 3.0, truth_name="asked")]
    rows = summarize(both)
    drawn = chart({"70% load": rows, "nobody": []})
    assert drawn.categories == ["servebench", "peer"]
    (series,) = drawn.series
    assert series.values == pytest.approx([1.01, 1.3])


def test_a_contestant_without_percentiles_has_no_row() -> None:
    silent = found("wrk", 0.0)
    silent.reported_ns.clear()
    silent.errors["seen"].clear()
    assert summarize([silent]) == []
    assert turn_line(silent) == "reports no percentiles"


# --- for real ---------------------------------------------------------------------------


@pytest.mark.load
def test_a_freeze_is_measured_truthfully(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "AFTER_S", 0.2)
    monkeypatch.setattr(freezer, "AFTER_QUERIES", 20)
    monkeypatch.setattr(truth, "FREEZE_S", 0.5)
    cpus = sorted(os.sched_getaffinity(0))
    condition = Condition("freeze", 0.1, MS, 2.0, Freeze(0, 5 * 10**8))
    with queue_stubs(1.0, cpus[:1]) as stubs:
        stub = stubs["kserve-http"]
        turn = measure(Own(), condition, added_ns=np.array([100_000]), stub=stub, cpus=cpus[-1:], seed=1)
        assert turn.completed == len(fetch_stamps(stub)) == pytest.approx(200, rel=0.3)
    assert turn.not_ok == 0
    assert set(turn.errors) == {"schedule", "asked"}
    # 100/s for half a second: a quarter of the queries waits, evenly spread over the half second.
    assert turn.reported_ns[99.0] == pytest.approx(0.5e9, rel=0.1)
    assert abs(turn.errors["schedule"][99.0]) < 0.05
    assert abs(turn.errors["asked"][99.0]) < 0.1
    assert turn.honest == {}


def test_a_freezer_that_sees_no_traffic_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "fetch_stamps", lambda stub: np.zeros(0))
    monkeypatch.setattr(freezer.os, "kill", lambda *_: pytest.fail("nothing is to be stopped"))
    with freezer.Freezer(Stub(Target("http://127.0.0.1:1", "m", "/", b""), os.getpid()), 1.0) as idle:
        pass
    assert idle.freeze is None
