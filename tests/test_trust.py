"""Each rule of trust fires on a run spoiled in one way, and stays silent on a clean one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from synthetic import MS, S, killed, synthetic_run, with_delay, with_facts, with_outcome, with_stall

from servebench.judge import judge
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData


def trust_of(run: RunData) -> tuple[str, dict[str, dict[str, Any]]]:
    """The verdict, and the reasons by code."""
    trust = judge(run)["trust"]
    return trust["verdict"], {reason["code"]: reason for reason in trust["reasons"]}


def noisy_run(delays_ms: list[float], *, queries: int = 4_000, **settings: Any) -> RunData:
    """A clean run in which some queries, spread evenly, were issued late."""
    run = synthetic_run(queries=queries, **settings)
    rows = np.linspace(100, queries - 100, len(delays_ms)).astype(int)
    return with_delay(run, rows, np.array(delays_ms) * MS)


# --- clean runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(synthetic_run(), id="clean"),
        pytest.param(synthetic_run(arrivals="constant"), id="clean-constant"),
        pytest.param(synthetic_run(queries=50), id="clean-and-short"),
        pytest.param(synthetic_run(queries=1), id="one-query"),
        pytest.param(synthetic_run(workers=3, queries=1_000), id="three-workers"),
        pytest.param(synthetic_run(constraints=["errors < 1%"]), id="no-promise-about-latency"),
        pytest.param(noisy_run([2, 4, 3, 2.5, 3.8, 2.2, 4]), id="a-handful-of-queries-2-to-4-ms-late-of-4000"),
        pytest.param(noisy_run([8]), id="one-accident-of-8-ms"),
        pytest.param(
            noisy_run([3, 4], constraints=["p99 <= 50ms", "delay.p99 <= 2ms"]), id="a-promise-about-the-client-judges-itself"
        ),
        pytest.param(noisy_run([20], constraints=["service.p50 < 8ms", "p99 <= 50ms"]), id="a-median-survives-a-pause"),
        pytest.param(
            with_outcome(synthetic_run(), slice(0, 400), Outcome.STATUS), id="a-server-that-fails-is-no-fault-of-ours"
        ),
        pytest.param(with_outcome(synthetic_run(), slice(0, 400), Outcome.TIMEOUT), id="nor-one-that-does-not-answer"),
    ],
)
def test_clean_runs_are_valid(run: RunData) -> None:
    assert trust_of(run) == ("VALID", {})


def test_connections_that_cannot_be_opened_are_the_servers_errors() -> None:
    run = with_outcome(synthetic_run(), slice(1_000, 4_000), Outcome.CONNECT)
    never_ns = run.issued_ns.copy()
    never_ns[1_000:] = -1
    assert trust_of(replace(run, issued_ns=never_ns))[0] == "VALID"


# --- rules that look at one fact -----------------------------------------------------------

CLEAN = synthetic_run()


@pytest.mark.parametrize(
    ("changes", "code", "severity"),
    [
        pytest.param({"state": "interrupted", "stop_reason": "a signal"}, "interrupted", "INVALID", id="interrupted"),
        pytest.param({"state": "failed"}, "failed", "INVALID", id="failed"),
        pytest.param({"state": "running"}, "failed", "INVALID", id="killed"),
        pytest.param({"workers.0.state": "lost", "workers.0.exit": -9}, "worker_lost", "INVALID", id="worker-lost"),
        pytest.param({"workers.0.state": "cut"}, "worker_lost", "INVALID", id="worker-cut-in-a-complete-run"),
        pytest.param({"profile.client.workers": 2}, "worker_lost", "INVALID", id="worker-without-a-record"),
        pytest.param({"workers.0.rows": 3_999}, "books", "INVALID", id="books-workers-do-not-add-up"),
        pytest.param({"schedule.planned": 4_001}, "books", "INVALID", id="books-rows-missing"),
        pytest.param({"schedule.sha256": "0" * 64}, "schedule_hash", "INVALID", id="another-schedule"),
        pytest.param({"schedule.arrivals": "constant"}, "arrivals", "INVALID", id="arrivals-not-as-claimed"),
        pytest.param({"workers.0.stats.cap_waits": 1}, "connection_cap", "DEGRADED", id="one-wait-under-the-cap"),
        pytest.param({"workers.0.stats.stream_waits": 1}, "stream_limit", "DEGRADED", id="one-wait-for-a-stream"),
        pytest.param({"workers.0.stats.stream_waits": 41}, "stream_limit", "INVALID", id="over-1%-of-waits-for-a-stream"),
        pytest.param({"workers.0.stats.cap_waits": 40}, "connection_cap", "DEGRADED", id="1%-of-waits-under-the-cap"),
        pytest.param({"workers.0.stats.cap_waits": 41}, "connection_cap", "INVALID", id="over-1%-of-waits-under-the-cap"),
        pytest.param({"output_check.wrong": 1}, "output_check", "INVALID", id="wrong-output"),
        pytest.param({"output_check.checked": 0}, "output_check", "DEGRADED", id="no-output-checked"),
        pytest.param({"output_check": None}, "output_check", "DEGRADED", id="no-output-check"),
        pytest.param({"host_cpu.steal_share": 0.06}, "cpu_steal", "DEGRADED", id="steal"),
        pytest.param({"host_cpu.throttled": 3}, "cpu_throttled", "DEGRADED", id="throttled"),
        pytest.param({"workers.0.stats.stalls": [{"at_ns": S, "duration_ns": 50 * MS}]}, "loop_stall", "INVALID", id="stall"),
        pytest.param(
            {"workers.0.stats.pacing": "eco", "workers.0.stats.cpu_s": 19.0}, "worker_cpu", "DEGRADED", id="eco-and-a-full-core"
        ),
    ],
)
def test_one_bad_fact(changes: dict[str, Any], code: str, severity: str) -> None:
    verdict, reasons = trust_of(with_facts(CLEAN, changes))
    assert (verdict, list(reasons)) == (severity, [code])
    assert reasons[code]["severity"] == severity
    assert reasons[code]["remedy"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"output_check": None, "profile.output_check.replies": 0}, id="no-output-check-was-asked-for"),
        pytest.param({"host_cpu.steal_share": 0.05}, id="a-little-steal"),
        pytest.param({"workers.0.stats.cpu_s": 19.0}, id="precise-pacing-spins"),
        pytest.param({"workers.0.stats.stalls": [{"at_ns": S, "duration_ns": 49 * MS}]}, id="a-stall-within-the-bound"),
        pytest.param({"workers.0.stats.stalls": [{"at_ns": -S, "duration_ns": 50 * MS}]}, id="a-stall-before-the-start"),
        pytest.param({"workers.0.stats": None, "clocks.end": None, "host_cpu": None}, id="facts-that-are-not-known"),
        pytest.param({"workers": [], "clocks": None, "errors": None}, id="facts-that-were-never-written"),
    ],
)
def test_one_harmless_fact(changes: dict[str, Any]) -> None:
    assert trust_of(with_facts(CLEAN, changes)) == ("VALID", {})


# --- clocks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clock", "shift_ns", "expected"),
    [
        pytest.param("realtime_ns", 19 * MS, None, id="under-a-thousandth-of-19.8-s"),
        pytest.param("realtime_ns", 30 * MS, ("clock_step", "DEGRADED"), id="over-a-thousandth"),
        pytest.param("realtime_ns", -300 * MS, ("clock_step", "INVALID"), id="over-a-hundredth-backwards"),
        pytest.param("boottime_ns", 40 * MS, None, id="boot-time-read-a-little-later"),
        pytest.param("boottime_ns", 5 * S, ("suspend", "INVALID"), id="suspended"),
    ],
)
def test_clocks(clock: str, shift_ns: int, expected: tuple[str, str] | None) -> None:
    end = CLEAN.facts["clocks"]["end"]
    changes = {f"clocks.end.{clock}": end[clock] + shift_ns}
    if clock == "boottime_ns":  # the wall clock goes on while the host sleeps
        changes["clocks.end.realtime_ns"] = end["realtime_ns"] + shift_ns
    _, reasons = trust_of(with_facts(CLEAN, changes))
    assert [(code, reason["severity"]) for code, reason in reasons.items()] == ([expected] if expected else [])


def test_a_short_run_is_not_judged_by_the_time_between_two_clock_readings() -> None:
    run = synthetic_run(queries=20)  # 0.1 s: 9 ms are 9 %
    end_ns = run.facts["clocks"]["end"]["realtime_ns"]
    assert trust_of(with_facts(run, {"clocks.end.realtime_ns": end_ns + 9 * MS}))[0] == "VALID"


# --- books ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        pytest.param("issued_ns", -1, id="answered-but-never-issued"),
        pytest.param("completed_ns", -1, id="answered-but-never-completed"),
        pytest.param("first_byte_ns", 0, id="answered-before-it-was-asked"),
        pytest.param("outcome", 99, id="an-outcome-that-does-not-exist"),
        pytest.param("outcome", Outcome.SHED, id="shed-and-yet-issued"),
        pytest.param("outcome", Outcome.OUTSTANDING, id="no-end-in-a-complete-run"),
    ],
)
def test_records_that_contradict_themselves(column: str, value: int) -> None:
    values = getattr(CLEAN, column).copy()
    values[2_000] = value
    verdict, reasons = trust_of(replace(CLEAN, **{column: values}))
    assert verdict == "INVALID"
    assert "books" in reasons


@pytest.mark.parametrize(
    ("counter", "change", "text"),
    [
        pytest.param("ended", 400, "worker 1 counted 2,400 queries ended, and has records of 2,000", id="ended twice"),
        pytest.param("ended", -1, "worker 1 counted 1,999 queries ended, and has records of 2,000", id="an end not counted"),
        pytest.param("ok", 1, "worker 1 counted 1,991 queries ok, and has records of 1,990", id="ok too many"),
        pytest.param("ok", -1, "worker 1 counted 1,989 queries ok, and has records of 1,990", id="ok too few"),
        pytest.param("begun", -3, "worker 1 counted 1,997 queries begun, and has records of 2,000", id="begun too few"),
    ],
)
def test_what_a_worker_counted_is_compared_with_its_records(counter: str, change: int, text: str) -> None:
    """Every tenth query that ends twice is 200 ends too many: the rows alone would not show it."""
    run = with_outcome(synthetic_run(workers=2), slice(1, 21, 2), Outcome.RESET)
    run = with_outcome(run, [23, 25], Outcome.OUTPUT)  # found wrong after the run: the worker counted them ok
    assert "books" not in trust_of(run)[1]
    counted = run.facts["workers"][1]["stats"]["counted"]
    verdict, reasons = trust_of(with_facts(run, {f"workers.1.stats.counted.{counter}": counted[counter] + change}))
    assert verdict == "INVALID"
    assert reasons["books"]["text"] == f"the books do not balance: {text}"


@pytest.mark.parametrize(
    ("kind", "count", "text"),
    [
        pytest.param("reset", 11, "11 queries told of as reset, but there are records of 10", id="one too many"),
        pytest.param("reset", 9, "9 queries told of as reset, but there are records of 10", id="one too few"),
        pytest.param("nonsense", 10, "0 queries told of as reset, but there are records of 10", id="a kind there is not"),
    ],
)
def test_the_failures_told_of_are_those_in_the_records(kind: str, count: int, text: str) -> None:
    run = with_outcome(CLEAN, slice(0, 10), Outcome.RESET)
    verdict, reasons = trust_of(
        with_facts(run, {"errors": [{"kind": kind, "detail": "Connection reset by peer", "count": count, "example": 0}]})
    )
    assert (verdict, list(reasons)) == ("INVALID", ["books"])
    assert reasons["books"]["text"] == f"the books do not balance: {text}"


def test_a_lost_worker_may_have_told_less_but_not_more() -> None:
    run = with_outcome(synthetic_run(workers=2), slice(0, 10), Outcome.RESET)
    lost = {"state": "failed", "workers.1.state": "lost", "workers.1.stats": None}
    error = {"kind": "reset", "detail": "", "count": 5, "example": 0}
    assert trust_of(with_facts(run, lost | {"errors": [error]}))[1].keys() == {"failed", "worker_lost"}
    assert "books" in trust_of(with_facts(run, lost | {"errors": [error | {"count": 11}]}))[1]


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome > Outcome.OUTSTANDING])
def test_only_what_never_had_a_connection_was_never_sent(outcome: Outcome) -> None:
    run = with_outcome(CLEAN, [2_000], outcome)
    issued_ns = run.issued_ns.copy()
    issued_ns[2_000] = -1
    may_be = outcome in (Outcome.SHED, Outcome.CONNECT, Outcome.CLIENT)
    assert ("books" in trust_of(replace(run, issued_ns=issued_ns))[1]) is not may_be


def test_an_outcome_that_does_not_exist_is_found_without_a_workers_statistics() -> None:
    outcome = CLEAN.outcome.copy()
    outcome[2_000] = max(Outcome) + 1
    silent = with_facts(replace(CLEAN, outcome=outcome), {"workers.0.stats": None})
    assert trust_of(silent)[1].keys() == {"books"}


def test_an_interrupted_run_whose_worker_was_cut_has_no_broken_books() -> None:
    run = with_facts(killed(CLEAN, 10 * S), {"state": "interrupted", "workers.0.state": "cut", "errors": []})
    assert trust_of(run)[1].keys() == {"interrupted", "output_check"}


def test_issued_before_it_was_due() -> None:
    verdict, reasons = trust_of(with_delay(CLEAN, [2_000], -2 * MS))
    assert (verdict, list(reasons)) == ("INVALID", ["books"])


def test_a_killed_run_is_counted_as_far_as_it_came() -> None:
    at_ns = int(CLEAN.completed_ns[2_990])
    run = killed(CLEAN, at_ns)
    due, issued = int((run.scheduled_ns <= at_ns).sum()), int((run.issued_ns >= 0).sum())
    document = judge(run)
    assert (document["state"], document["verdict"]) == ("failed", "INVALID")
    counts = document["counts"]
    assert (counts["issued"], counts["shed"], counts["not_due"]) == (issued, due - issued, 4_000 - due)
    assert counts["unfinished"] == (run.outcome == Outcome.OUTSTANDING).sum()
    codes = {reason["code"] for reason in document["trust"]["reasons"]}
    assert codes == {"failed", "output_check"}, "nobody was left to say how the workers ended"


# --- outcomes ------------------------------------------------------------------------------


def test_our_own_host_running_out_is_invalid() -> None:
    run = with_facts(
        with_outcome(CLEAN, [5], Outcome.CLIENT),
        {"errors": [{"kind": "client", "detail": "Too many open files", "count": 1, "example": 5}]},
    )
    verdict, reasons = trust_of(run)
    assert (verdict, list(reasons)) == ("INVALID", ["own_host"])
    assert "Too many open files" in reasons["own_host"]["text"]


def test_wrong_output_names_the_first_wrong_reply() -> None:
    changes = {"output_check.wrong": 2, "output_check.first_wrong": {"query": 17, "detail": "output PROBS is all zeros"}}
    _, reasons = trust_of(with_facts(CLEAN, changes))
    assert "query 17: output PROBS is all zeros" in reasons["output_check"]["text"]


def test_shed_queries_are_named_with_their_cap() -> None:
    run = with_outcome(synthetic_run(client={"max_outstanding": 5}), slice(1_000, 1_200), Outcome.SHED)
    verdict, reasons = trust_of(run)
    assert (verdict, list(reasons)) == ("DEGRADED", ["shed"])
    assert reasons["shed"]["text"] == (
        "200 of 4,000 queries (5%) were never sent: 200 x as made up (client.max_outstanding = 5 a worker); "
        "they count as over every bound"
    )


def test_all_reasons_for_shedding_are_named_with_their_counts() -> None:
    errors = [
        {"kind": "shed", "detail": "the client could not issue it before the run's end", "count": 1_872, "example": 1_000},
        {"kind": "status", "detail": "HTTP 500", "count": 7, "example": 1},
        {"kind": "shed", "detail": "no connection came free", "count": 128, "example": 2_872},
    ]
    run = with_facts(with_outcome(CLEAN, slice(1_000, 3_000), Outcome.SHED), {"errors": errors})
    assert trust_of(run)[1]["shed"]["text"] == (
        "2,000 of 4,000 queries (50%) were never sent: 1,872 x the client could not issue it before the run's end, "
        "128 x no connection came free; they count as over every bound"
    )


def test_a_worker_without_an_exit_status_has_none_named() -> None:
    lost = {"workers.0.state": "lost", "workers.0.exit": -9}
    killed, unknown = (
        trust_of(with_facts(CLEAN, lost | more))[1]["worker_lost"]["text"] for more in ({}, {"workers.0.exit": None})
    )
    assert killed == "worker process 0 ended before its books were closed (exit status -9)"
    assert unknown == "worker process 0 ended before its books were closed"


def test_queries_never_sent_without_a_cap_are_load_that_was_not_there() -> None:
    verdict, reasons = trust_of(with_outcome(CLEAN, slice(1_000, 1_200), Outcome.SHED))
    assert verdict == "INVALID"
    assert reasons["achieved_rate"]["severity"] == "INVALID"


def test_response_times_beyond_the_histogram() -> None:
    response_ns = np.full(4_000, 5 * MS)
    response_ns[7] = 3_601 * S
    verdict, reasons = trust_of(synthetic_run(response_ns=response_ns))
    assert (verdict, list(reasons)) == ("DEGRADED", ["histogram_overflow"])


# --- lateness ------------------------------------------------------------------------------


def test_a_stalled_client_is_invalid() -> None:
    run = with_stall(synthetic_run(queries=2_000), at_ns=4 * S, duration_ns=100 * MS)  # 10 s at 200/s, bound 50 ms
    document = judge(run)
    codes = {reason["code"]: reason["severity"] for reason in document["trust"]["reasons"]}
    assert codes == {"loop_stall": "INVALID", "lateness": "INVALID"}
    assert document["verdict"] == "INVALID"
    assert document["trust"]["stalls"] == [{"worker": 0, "at_ns": 4 * S, "duration_ns": 100 * MS}]
    assert "event loop" in document["reasons"][0]


def test_a_stalled_client_is_caught_by_its_queries_alone() -> None:
    run = with_facts(with_stall(synthetic_run(queries=2_000), 4 * S, 100 * MS), {"workers.0.stats": None})
    verdict, reasons = trust_of(run)
    assert (verdict, list(reasons)) == ("INVALID", ["lateness"])


@pytest.mark.parametrize(
    ("late", "severity"),
    [
        # p99 of 4000 queries: 40 may be over the bound; so many late ones void the run, a quarter of them marks it
        pytest.param(10, None, id="10-of-4000"),
        pytest.param(11, "DEGRADED", id="11-of-4000"),
        pytest.param(40, "DEGRADED", id="40-of-4000"),
        pytest.param(41, "INVALID", id="41-of-4000"),
    ],
)
def test_late_queries_are_weighed_against_the_budget(late: int, severity: str | None) -> None:
    verdict, reasons = trust_of(noisy_run([6] * late))  # over a tenth of 50 ms
    assert verdict == (severity or "VALID")
    assert list(reasons) == (["lateness"] if severity else [])


@pytest.mark.parametrize(
    ("service_ms", "verdict"),
    [
        pytest.param(40, "DEGRADED", id="within the bound all the same"),
        pytest.param(45, "INVALID", id="over the bound because of the client"),
        pytest.param(51, "DEGRADED", id="over the bound because of the server"),
    ],
)
def test_lateness_that_decides_counts_more(service_ms: int, verdict: str) -> None:
    """11 of 4000 queries 6 ms late: harmless, unless just that puts them over the 50 ms."""
    run = noisy_run([6] * 11)
    late = run.issued_ns - run.scheduled_ns >= 6 * MS
    assert late.sum() == 11
    slow = replace(run, completed_ns=np.where(late, run.issued_ns + service_ms * MS, run.completed_ns))
    found, reasons = trust_of(slow)
    assert found == verdict
    assert list(reasons) == ["lateness"]
    if verdict == "INVALID":
        assert "only because they were issued late" in reasons["lateness"]["text"]


def test_a_looser_percentile_has_a_larger_budget() -> None:
    assert trust_of(noisy_run([6] * 41, constraints=["p90 <= 50ms"]))[0] == "DEGRADED"
    assert trust_of(noisy_run([6] * 41, constraints=["within(50ms) >= 90%"]))[0] == "DEGRADED"
    assert trust_of(noisy_run([6] * 41, constraints=["service.p99 <= 50ms"]))[0] == "INVALID"
    assert trust_of(noisy_run([6] * 60, constraints=["goodput(50ms) >= 200/s"]))[0] == "INVALID"  # of 202/s offered


def test_the_tightest_promise_counts() -> None:
    assert trust_of(noisy_run([3] * 41, constraints=["p99 <= 200ms", "p99 <= 20ms"]))[0] == "INVALID"


@pytest.mark.parametrize(
    ("late", "delay_ms", "verdict"),
    [
        pytest.param(40, 2, "VALID", id="1%-are-2-ms-late"),
        pytest.param(41, 2, "DEGRADED", id="over-1%-are-2-ms-late-of-a-5-ms-service"),
        pytest.param(41, 0.9, "VALID", id="less-than-1-ms-is-not-late"),
    ],
)
def test_lateness_against_the_service_time(late: int, delay_ms: float, verdict: str) -> None:
    assert trust_of(noisy_run([delay_ms] * late))[0] == verdict


def test_a_slow_service_forgives_more() -> None:
    assert trust_of(noisy_run([2] * 400, response_ns=40 * MS))[0] == "VALID"


def test_a_delay_of_the_whole_bound_is_invalid() -> None:
    text = trust_of(noisy_run([50]))[1]["lateness"]["text"]
    assert text.startswith("1 query issued up to 50.0 ms late, no less than the bound of 'p99 <= 50ms': ")
    assert trust_of(noisy_run([50]))[0] == "INVALID"
    assert trust_of(noisy_run([49]))[0] == "VALID"


def test_waiting_under_the_cap_is_the_caps_fault() -> None:
    run = with_facts(
        noisy_run([60] * 20, client={"max_connections": 2}),
        {"workers.0.stats.cap_waits": 20, "workers.0.stats.connection_waits": 20, "workers.0.stats.cap_wait_ns": 20 * 60 * MS},
    )
    verdict, reasons = trust_of(run)
    assert (verdict, list(reasons)) == ("INVALID", ["connection_cap"])
    assert "max_connections" in reasons["connection_cap"]["remedy"]


def test_waiting_for_connections_to_open_only_degrades() -> None:
    run = with_facts(noisy_run([60] * 20), {"workers.0.stats.connection_waits": 20})
    verdict, reasons = trust_of(run)
    assert (verdict, list(reasons)) == ("DEGRADED", ["connection_opening"])
    assert "warm_connections" in reasons["connection_opening"]["remedy"]


def test_waits_of_one_worker_do_not_excuse_another() -> None:
    run = with_facts(synthetic_run(workers=2), {"workers.0.stats.connection_waits": 100})
    assert trust_of(with_delay(run, slice(1, 41, 2), 60 * MS))[1].keys() == {"lateness"}
    assert trust_of(with_delay(run, slice(0, 40, 2), 60 * MS))[1].keys() == {"connection_opening"}


def test_a_full_core_is_named_when_queries_were_late() -> None:
    run = with_facts(noisy_run([60] * 20), {"workers.0.stats.cpu_s": 19.5})
    assert trust_of(run)[1].keys() == {"lateness", "worker_cpu"}


def test_a_cpu_that_others_had_is_named_when_queries_were_late() -> None:
    wait = {"workers.0.stats.cpu_wait_s": 0.5, "workers.0.stats.wall_s": 20.0}
    assert trust_of(with_facts(CLEAN, wait)) == ("VALID", {})
    assert trust_of(with_facts(noisy_run([60] * 20), wait))[1].keys() == {"lateness", "cpu_wait"}
    little = wait | {"workers.0.stats.cpu_wait_s": 0.2}
    assert trust_of(with_facts(noisy_run([60] * 20), little))[1].keys() == {"lateness"}


def test_a_cpu_that_the_hypervisor_took_is_named_when_queries_were_late() -> None:
    stolen = {"host_cpu.client_steal_share": 0.012}
    assert trust_of(with_facts(CLEAN, stolen)) == ("VALID", {})
    reasons = trust_of(with_facts(noisy_run([60] * 20), stolen))[1]
    assert reasons.keys() == {"lateness", "cpu_steal"}
    assert reasons["cpu_steal"]["text"] == "the hypervisor gave 1.2% of the client's CPU time to others"
    assert reasons["lateness"]["remedy"] == reasons["cpu_steal"]["remedy"] == "measure on a quieter or a dedicated machine"
    little = {"host_cpu.client_steal_share": 0.01}
    assert trust_of(with_facts(noisy_run([60] * 20), little))[1].keys() == {"lateness"}


def test_steal_is_one_reason_and_no_excuse_for_a_full_core() -> None:
    late = noisy_run([60] * 20)
    much = {"host_cpu.client_steal_share": 0.2, "host_cpu.steal_share": 0.1}
    assert trust_of(with_facts(late, much))[1]["cpu_steal"]["measured"] == 0.2
    for cause in ({"workers.0.stats.cpu_s": 19.5}, {"workers.0.stats.cpu_wait_s": 2.0, "workers.0.stats.wall_s": 20.0}):
        assert "client.workers" in trust_of(with_facts(late, much | cause))[1]["lateness"]["remedy"]


# --- achieved rate -------------------------------------------------------------------------


def slowed(run: RunData, issue_qps: float) -> RunData:
    """A client that cannot issue faster than that."""
    issued_ns = run.scheduled_ns.copy()
    gap_ns = int(S / issue_qps)
    order = np.arange(run.planned) * gap_ns
    issued_ns = np.maximum.accumulate(issued_ns - order) + order
    return with_delay(run, slice(None), issued_ns - run.scheduled_ns)


def test_a_target_beyond_the_client_is_invalid() -> None:
    run = slowed(synthetic_run(queries=20_000, target_qps=100_000), issue_qps=30_000)
    verdict, reasons = trust_of(run)
    assert verdict == "INVALID"
    text = reasons["achieved_rate"]["text"]
    window_ns = run.scheduled_ns[-1]
    assert text.endswith(f"/s in the {window_ns / 1e6:.0f} ms of the schedule")
    assert text.startswith("the client could issue only 3")  # some 30 000/s in the 0.2 s, and what the grace allows
    assert reasons["achieved_rate"]["measured"] == pytest.approx(0.3, abs=0.03)
    assert "client.workers" in reasons["achieved_rate"]["remedy"]


@pytest.mark.parametrize(
    ("missing", "severity"),
    [
        pytest.param(20, None, id="99.5%"),
        pytest.param(21, "DEGRADED", id="under-99.5%"),
        pytest.param(81, "INVALID", id="under-98%"),
    ],
)
def test_the_share_issued_within_the_schedule(missing: int, severity: str | None) -> None:
    run = synthetic_run(constraints=["errors < 1%"])
    late_ns = run.scheduled_ns[-1] + 11 * MS - run.scheduled_ns[-missing:]
    _, reasons = trust_of(with_delay(run, slice(4_000 - missing, 4_000), late_ns))
    found = reasons.get("achieved_rate")
    assert (found and found["severity"]) == severity


def test_what_was_shed_on_purpose_was_not_missed() -> None:
    run = with_outcome(synthetic_run(client={"max_outstanding": 1}), slice(0, 2_000), Outcome.SHED)
    assert "achieved_rate" not in trust_of(run)[1]


def test_an_interruption_is_not_a_slow_client() -> None:
    run = with_facts(with_outcome(CLEAN, slice(2_000, 4_000), Outcome.SHED), {"state": "interrupted"})
    assert trust_of(run)[1].keys() == {"interrupted"}


def test_a_capped_client_is_told_to_raise_its_cap() -> None:
    run = with_facts(
        slowed(synthetic_run(queries=4_000, target_qps=4_000, client={"max_connections": 2}), issue_qps=2_000),
        {"workers.0.stats.cap_waits": 3_990, "workers.0.stats.connection_waits": 3_990},
    )
    _, reasons = trust_of(run)
    assert "client.max_connections = 2" in reasons["achieved_rate"]["text"]
    assert "lateness" not in reasons


def test_a_server_that_is_slow_to_accept_is_not_an_invalid_client() -> None:
    run = synthetic_run(queries=2_000)
    held = np.flatnonzero((run.scheduled_ns >= 2 * S) & (run.scheduled_ns < 5 * S))  # connections hang for up to 3 s
    run = with_delay(run, held, 5 * S - run.scheduled_ns[held])
    waited = with_facts(run, {"workers.0.stats.connection_waits": len(held)})
    assert trust_of(waited)[0] == "DEGRADED"
    assert trust_of(run)[0] == "INVALID"
    assert "arrivals" in trust_of(run)[1]
