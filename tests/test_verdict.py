"""The verdict, and the run.json document that carries it, against its published schema."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import MS, S, interrupted, killed, synthetic_run, with_delay, with_facts, with_outcome, with_stall

from servebench.judge import exit_code, judge
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData

SCHEMA = json.loads(resources.files("servebench.judge").joinpath("run.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
#: What the design fixes of run.json, by section.
DOCUMENTED = {
    "": "schema version command started_at state profile schedule counts rates response_time service_time issue_delay errors "
    "constraints early_stopping trust verdict server environment",
    "schedule": "arrivals target_qps seed planned sha256 checks",
    "counts": "planned issued ok error timeout shed unfinished not_due",
    "rates": "target_qps scheduled_qps issued_qps completed_qps goodput_qps",
    "response_time": "count min_ns mean_ns max_ns percentiles",
    "trust": "verdict reasons",
    "loadgen_validity": "min_duration_met min_queries_met perf_constraints_met early_stopping_met valid",
}


def document_of(run: RunData) -> dict[str, Any]:
    """The judged run, after a trip through strict JSON, checked against the schema."""
    document: dict[str, Any] = json.loads(json.dumps(judge(run), allow_nan=False))
    VALIDATOR.validate(document)
    return document


def slow_run(queries: int, slow: int, **settings: Any) -> RunData:
    response_ns = np.full(queries, 5 * MS)
    response_ns[:slow] = 80 * MS
    return synthetic_run(queries=queries, response_ns=response_ns, **settings)


def test_the_schema_is_one_and_describes_everything() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def walk(node: dict[str, Any], path: str) -> None:
        for name, child in node.get("properties", {}).items():
            assert child.get("description") or "$ref" in child, f"{path}.{name} has no description"
            walk(child, f"{path}.{name}")

    walk(SCHEMA, "run")
    for name, definition in SCHEMA["$defs"].items():
        assert definition["description"]
        walk(definition, name)


@pytest.mark.parametrize("section", DOCUMENTED)
def test_the_document_has_what_the_design_lists(section: str) -> None:
    document = document_of(synthetic_run())
    assert set(DOCUMENTED[section].split()) <= set(document[section] if section else document)


@pytest.mark.parametrize(
    ("run", "verdict", "code"),
    [
        pytest.param(slow_run(4_000, 0), "PASS", 0, id="pass"),
        pytest.param(slow_run(4_000, 50), "FAIL", 3, id="fail"),
        pytest.param(slow_run(400, 0), "INCONCLUSIVE", 4, id="inconclusive"),
        pytest.param(
            with_facts(slow_run(4_000, 0), {"state": "interrupted"}), "INVALID", 5, id="an-interrupted-run-never-passes"
        ),
        pytest.param(with_facts(slow_run(4_000, 50), {"state": "failed"}), "INVALID", 5, id="invalid-beats-fail"),
        pytest.param(slow_run(400, 0, constraints=["p99 <= 50ms", "mean < 1ms"]), "FAIL", 3, id="fail-beats-inconclusive"),
        pytest.param(
            slow_run(400, 0, constraints=["p90 <= 50ms", "p99 <= 50ms"]), "INCONCLUSIVE", 4, id="inconclusive-beats-pass"
        ),
        pytest.param(with_facts(slow_run(4_000, 0), {"host_cpu.steal_share": 0.5}), "PASS", 0, id="a-degraded-run-may-pass"),
    ],
)
def test_verdicts_and_exit_codes(run: RunData, verdict: str, code: int) -> None:
    document = document_of(run)
    assert document["verdict"] == verdict
    assert exit_code(verdict) == code


def test_reasons_are_one_sentence_a_constraint_after_what_made_the_run_invalid() -> None:
    run = with_facts(
        slow_run(4_000, 50, constraints=["p99 <= 50ms", "errors < 1%"]), {"state": "interrupted", "stop_reason": "a signal"}
    )
    reasons = document_of(run)["reasons"]
    assert len(reasons) == 3
    assert reasons[0] == "the run was interrupted before its end; run again."
    assert reasons[1].startswith("p99 <= 50ms fails: measured 80.0 ms; 50 of 4,000 queries were over the bound; ")
    assert reasons[2] == "errors < 1% holds: measured 0%; 0 of 4,000 queries failed, up to 25 are allowed at 99% confidence."


@pytest.mark.parametrize(
    ("constraint", "outcome", "rows", "reason"),
    [
        pytest.param(
            "p99 <= 50ms",
            Outcome.STATUS,
            1_000,
            "p99 <= 50ms fails: no value (over 5.00 ms), because 1,000 of 1,000 queries failed; "
            "mend what failed first (mostly status, see errors), or lower load.target_qps if the server was overloaded.",
            id="nothing but errors",
        ),
        pytest.param(
            "p99 <= 50ms",
            Outcome.SHED,
            600,
            "p99 <= 50ms fails: no value (over 80.0 ms), because 600 of 1,000 queries failed or were never sent; "
            "640 of 1,000 queries were over the bound; most of those were never sent, see errors for the reason.",
            id="never sent",
        ),
        pytest.param(
            "goodput(50ms) >= 150/s",
            Outcome.RESET,
            900,
            "940 of 1,000 queries failed or took longer than 50.0 ms; mend what failed first (mostly reset, see errors), ",
            id="goodput",
        ),
        pytest.param(
            "p99 <= 50ms",
            Outcome.RESET,
            15,
            "because 15 of 1,000 queries failed; 55 of 1,000 queries were over the bound; mend what failed first (mostly reset",
            id="mostly slow, but enough failed to leave no value",
        ),
        pytest.param(
            "p95 <= 50ms",
            Outcome.RESET,
            19,
            "p95 <= 50ms fails: measured 80.0 ms; 59 of 1,000 queries were over the bound; "
            "lower load.target_qps, or make the server faster.",
            id="mostly slow",
        ),
        pytest.param(
            "p95 <= 50ms",
            Outcome.RESET,
            40,
            "p95 <= 50ms fails: measured 80.0 ms; 80 of 1,000 queries were over the bound; mend what failed first ",
            id="half of them failed",
        ),
    ],
)
def test_failures_are_told_from_slowness(constraint: str, outcome: Outcome, rows: int, reason: str) -> None:
    """40 slow queries, and beside them some that failed."""
    slow = 0 if rows == 1_000 else 40
    run = with_outcome(slow_run(1_000, slow, constraints=[constraint]), slice(1_000 - rows, 1_000), outcome)
    assert reason in document_of(run)["constraints"][0]["reason"]


def test_a_bound_missed_by_a_hair_is_told_from_its_value() -> None:
    run = synthetic_run(queries=1_000, response_ns=50 * MS + 400)
    assert "p99 <= 50ms fails: measured 50.0004 ms; " in document_of(run)["constraints"][0]["reason"]


def test_named_percentiles_join_the_usual_ones() -> None:
    document = document_of(synthetic_run(constraints=["p99.5 <= 50ms", "service.p12.5 <= 50ms"]))
    assert list(document["response_time"]["percentiles"]) == ["12.5", "50", "90", "95", "97", "99", "99.5", "99.9", "99.99"]


def test_infinite_percentiles_are_null_with_a_lower_bound() -> None:
    run = with_outcome(synthetic_run(queries=1_000), slice(0, 20), Outcome.TIMEOUT)
    completed_ns = run.completed_ns.copy()
    completed_ns[:20] = run.scheduled_ns[:20] + 10 * S
    block = document_of(replace(run, completed_ns=completed_ns))["response_time"]
    assert block["percentiles"]["97"] < 50 * MS
    assert block["percentiles"]["99"] is block["percentiles"]["99.9"] is None
    assert block["above_ns"] == {"99": 10 * S, "99.9": 10 * S, "99.99": 10 * S}
    assert (block["count"], block["infinite"]) == (1_000, 20)


def test_the_headline_is_the_first_percentile_of_the_response_time() -> None:
    document = document_of(synthetic_run(constraints=["errors < 1%", "service.p99 <= 20ms", "p95 < 40ms", "p99 <= 50ms"]))
    stopping = document["early_stopping"]
    assert (stopping["constraint"], stopping["percentile"], stopping["latency_bound_ns"]) == ("p95 < 40ms", 95, 40 * MS)
    assert (stopping["queries"], stopping["over_latency"], stopping["required_queries"]) == (4_000, 0, 90)
    assert document["rates"]["goodput_qps"] == document["rates"]["completed_qps"]


def test_no_headline_no_early_stopping() -> None:
    document = document_of(synthetic_run(constraints=["errors < 1%", "service.p99 <= 20ms"]))
    assert document["early_stopping"] is document["loadgen_validity"] is document["rates"]["goodput_qps"] is None


@pytest.mark.parametrize(
    ("run", "failing"),
    [
        pytest.param(slow_run(4_000, 10), set(), id="valid"),
        pytest.param(slow_run(4_000, 10, load={"min_duration_s": 60}), {"min_duration_met"}, id="too-short"),
        pytest.param(slow_run(4_000, 10, load={"min_query_count": 4_001}), {"min_queries_met"}, id="too-few-queries"),
        pytest.param(slow_run(1_000, 5), {"early_stopping_met"}, id="five-of-1000-need-1307"),
        pytest.param(slow_run(1_000, 10), {"early_stopping_met", "perf_constraints_met"}, id="ten-of-1000-are-over"),
    ],
)
def test_loadgens_validity(run: RunData, failing: set[str]) -> None:
    validity = document_of(run)["loadgen_validity"]
    valid = validity.pop("valid")
    assert {name for name, met in validity.items() if not met} == failing
    assert valid is not bool(failing)


def test_early_stopping_estimate_is_an_order_statistic() -> None:
    response_ns = np.arange(10_000) + MS  # END's anchor: 10 000 values discard 76
    document = document_of(synthetic_run(queries=10_000, response_ns=response_ns))
    assert document["early_stopping"]["estimate_ns"] == MS + 10_000 - 77
    assert document["early_stopping"]["allowed_over_latency"] == 77


def test_a_killed_run_still_counts_its_errors_by_kind() -> None:
    run = with_outcome(with_outcome(synthetic_run(), slice(7, 10), Outcome.RESET), [12], Outcome.STATUS)
    document = document_of(with_facts(run, {"state": "running", "errors": None}))
    assert document["errors"] == [
        {"kind": "reset", "detail": "", "count": 3, "example": 7},
        {"kind": "status", "detail": "", "count": 1, "example": 12},
    ]
    recorded = [{"kind": "reset", "detail": "Connection reset by peer", "count": 3, "example": 7}]
    assert document_of(with_facts(run, {"errors": recorded}))["errors"] == [
        *recorded,
        {"kind": "status", "detail": "", "count": 1, "example": 12},
    ]


def test_errors_that_a_lost_worker_could_not_tell_are_counted_from_its_records() -> None:
    """Two workers with a third of their queries failed; the second is lost after a while, with one query out."""
    run = with_outcome(synthetic_run(queries=600, workers=2), slice(0, 300, 3), Outcome.STATUS)
    run = with_outcome(with_outcome(run, [301], Outcome.OUTSTANDING), slice(303, 600, 2), Outcome.NOT_ISSUED)
    told = [{"kind": "status", "detail": "HTTP 503", "count": 50, "example": 0}]  # rows 0, 6, ..., 294
    lost = {"state": "failed", "workers.1.state": "lost", "workers.1.stats": None, "errors": told}
    document = document_of(with_facts(run, lost))
    assert document["errors"] == [
        {"kind": "shed", "detail": "its process ended before it was sent", "count": 149, "example": 303},
        *told,
        {"kind": "status", "detail": "", "count": 50, "example": 0},
        {"kind": "unfinished", "detail": "its process ended before the reply was there", "count": 1, "example": 301},
    ]
    assert [reason["code"] for reason in document["trust"]["reasons"]] == ["failed", "worker_lost"]
    assert sum(error["count"] for error in document["errors"]) == 600 - document["counts"]["ok"]


def test_an_interrupted_run_is_judged_on_what_was_due() -> None:
    """4,000 queries, interrupted after 1,500 of which 3 failed: neither percentiles nor errors know of the other 2,500."""
    constraints = ["p99 <= 50ms", "errors < 1%", "goodput(50ms) >= 100/s", "delay.p99 <= 1ms", "max <= 50ms"]
    run = synthetic_run(constraints=constraints)
    at_ns = int(run.scheduled_ns[1_499])
    run = interrupted(with_outcome(run, [7, 8, 9], Outcome.STATUS), at_ns)
    document = document_of(run)
    assert (document["state"], document["verdict"]) == ("interrupted", "INVALID")
    counts = document["counts"]
    assert (counts["planned"], counts["issued"], counts["ok"]) == (4_000, 1_500, 1_497)
    assert (counts["shed"], counts["not_due"]) == (0, 2_500)
    for series, infinite in (("response_time", 3), ("service_time", 3), ("issue_delay", 0)):
        assert (document[series]["count"], document[series]["infinite"]) == (1_500, infinite)
        assert document[series]["percentiles"]["99"] is not None
    known_ns = np.sort((run.completed_ns - run.scheduled_ns)[run.outcome == Outcome.OK])
    assert document["response_time"]["percentiles"]["50"] == known_ns[750]
    assert document["errors"] == [{"kind": "status", "detail": "as made up", "count": 3, "example": 7}]
    by_text = {item["text"]: item for item in document["constraints"]}
    assert [item["result"] for item in by_text.values()] == ["PASS", "PASS", "PASS", "PASS", "FAIL"]
    assert (by_text["errors < 1%"]["queries"], by_text["errors < 1%"]["measured"]) == (1_500, pytest.approx(3 / 1_500))
    assert (by_text["p99 <= 50ms"]["queries"], by_text["p99 <= 50ms"]["over"]) == (1_500, 3)
    assert by_text["goodput(50ms) >= 100/s"]["queries"] == 1_500
    assert by_text["max <= 50ms"]["reason"].startswith("max <= 50ms fails: 3 of 1,500 queries have no latency")
    assert (document["early_stopping"]["queries"], document["early_stopping"]["over_latency"]) == (1_500, 3)


def test_what_was_due_and_not_sent_when_a_run_was_interrupted_stays_among_its_errors() -> None:
    """Interrupted at 5 s, while the client was 20 queries behind."""
    run = interrupted(synthetic_run(), 5 * S)
    first = int(np.searchsorted(run.scheduled_ns, 5 * S, side="right"))
    late = with_outcome(run, slice(first - 20, 4_000), Outcome.SHED)
    (error,) = document_of(late)["errors"]
    assert (error["kind"], error["detail"], error["count"]) == ("shed", "the run was interrupted", 20)
    assert error["example"] == first - 20


def test_a_killed_run_is_judged_on_what_was_due() -> None:
    run = synthetic_run(constraints=["p99 <= 50ms", "errors < 1%"])
    run = killed(run, int(run.issued_ns[2_000]) + MS)  # replies take 4 ms and more
    due = int((run.issued_ns >= 0).sum())
    document = document_of(run)
    assert document["counts"]["not_due"] == 4_000 - due
    out = int((run.outcome == Outcome.OUTSTANDING).sum())
    assert document["counts"]["unfinished"] == document["response_time"]["infinite"] == out > 0
    assert document["response_time"]["count"] == due
    assert document["response_time"]["percentiles"]["99"] < 50 * MS
    assert [item["result"] for item in document["constraints"]] == ["PASS", "PASS"]


def test_queries_that_were_never_sent_are_over_the_bound_of_a_promise_about_the_client() -> None:
    constraints = ["delay.p99 <= 2ms", "delay.p50 <= 2ms", "delay.max <= 2ms", "p99 <= 1s"]
    run = synthetic_run(queries=1_000, constraints=constraints, client={"max_outstanding": 5})
    document = document_of(with_outcome(run, slice(100, 300), Outcome.SHED))
    p99, p50, longest, _ = document["constraints"]
    assert (p99["result"], p99["queries"], p99["over"], p99["measured"]) == ("FAIL", 1_000, 200, None)
    assert p99["reason"].endswith("because 200 of 1,000 queries were never sent; see errors for the reason.")
    assert (p50["result"], p50["over"]) == ("PASS", 200)
    assert longest["result"] == "FAIL"
    late = document_of(with_delay(synthetic_run(queries=1_000, constraints=constraints), slice(100, 300), 3 * MS))
    assert "the client was late" in late["constraints"][0]["reason"]
    assert late["constraints"][0]["over"] == 200


def test_judging_changes_nothing_and_repeats() -> None:
    run = with_outcome(synthetic_run(queries=500), slice(0, 9), Outcome.SHED)
    before = {field.name: copy.deepcopy(getattr(run, field.name)) for field in fields(run)}
    for field in fields(run)[2:]:
        getattr(run, field.name).setflags(write=False)
    first = judge(run)
    assert first == judge(run)
    assert run.facts == before["facts"]
    assert all(np.array_equal(getattr(run, field.name), before[field.name]) for field in fields(run)[2:])


def test_a_run_that_got_nowhere_is_still_a_document() -> None:
    run = with_outcome(synthetic_run(queries=100), slice(0, 100), Outcome.NOT_ISSUED)
    bare = {"schema": "servebench.facts/1", "state": "running", "profile": run.facts["profile"]}
    document = document_of(replace(run, facts=bare, environment={}))
    assert (document["state"], document["verdict"]) == ("failed", "INVALID")
    assert (document["counts"]["shed"], document["counts"]["not_due"]) == (0, 100)
    assert document["response_time"]["count"] == 0
    empty = {field.name: getattr(run, field.name)[:0] for field in fields(run)[2:]}
    assert document_of(replace(run, facts=bare, **empty))["verdict"] == "INVALID"


@given(
    seed=st.integers(0, 1_000),
    queries=st.integers(1, 700),
    outcomes=st.lists(st.sampled_from(list(Outcome)), max_size=8),
    share=st.floats(0, 1),
    state=st.sampled_from(["complete", "interrupted", "running", "failed"]),
    delay_ms=st.floats(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_whatever_happened_is_a_document_and_only_a_sound_run_passes(
    seed: int, queries: int, outcomes: list[Outcome], share: float, state: str, delay_ms: float
) -> None:
    constraints = [
        "p99 <= 50ms",
        "service.p90 < 20ms",
        "errors < 5%",
        "within(50ms) >= 95%",
        "max < 1s",
        "goodput(50ms) > 10/s",
    ]
    run = with_facts(synthetic_run(queries=queries, seed=seed, constraints=constraints, workers=2), {"state": state})
    random = np.random.default_rng(seed)
    run = with_delay(run, np.flatnonzero(random.random(queries) < share).tolist(), int(delay_ms * MS))
    for outcome in outcomes:
        run = with_outcome(run, np.flatnonzero(random.random(queries) < share / 4).tolist(), outcome)
    document = document_of(run)
    counts = document["counts"]
    assert counts["planned"] == queries == counts["issued"] + counts["shed"] + counts["not_due"]
    assert counts["issued"] == counts["ok"] + counts["error"] + counts["timeout"] + counts["unfinished"]
    assert sum(error["count"] for error in document["errors"]) == queries - counts["ok"] - counts["not_due"]
    if document["verdict"] == "PASS":
        assert state == "complete"
        assert counts["ok"] >= 0.95 * queries
        assert document["trust"]["verdict"] != "INVALID"


def test_a_stalled_client_never_blames_the_server() -> None:
    document = document_of(with_stall(slow_run(2_000, 0), 4 * S, 300 * MS))
    assert document["constraints"][0]["result"] == "FAIL"
    assert document["verdict"] == "INVALID"
