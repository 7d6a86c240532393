"""The printed report, word for word, for made-up run documents; and a printed schedule."""

import copy
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console
from run_documents import failing, inconclusive, invalid, judged, passing
from synthetic import MS, S, synthetic_run, with_outcome, with_stall

from servebench.judge.verdict import judge
from servebench.judge.wording import say_share
from servebench.record.outcome import Outcome
from servebench.report.console import format_duration, format_rate, render
from servebench.report.schedule import render_schedule


@pytest.fixture(autouse=True)
def no_colour_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def printed(
    run: dict[str, Any], *, width: int = 80, directory: Path | None = Path("runs/digits-1"), **console: Any
) -> list[str]:
    file = io.StringIO()
    render(run, console=Console(file=file, width=width, **console), directory=directory)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("make", [passing, failing, inconclusive, invalid])
def test_the_made_up_documents_are_run_documents(make: Any) -> None:
    schema = json.loads((resources.files("servebench.judge") / "run.schema.json").read_text())
    jsonschema.validate(make(), schema)


def test_pass_word_for_word() -> None:
    assert printed(passing()) == [
        "PASS  p99 <= 50ms at 200 queries/s: measured 6.11 ms",
        "",
        " ✓ p99 <= 50ms holds: measured 6.11 ms; 3 of 4,031 queries were over the bound,",
        "   up to 25 are allowed at 99% confidence.",
        "",
        "               response      service  issue delay",
        "  p50           4.12 ms      4.05 ms      81.0 us",
        "  p90           5.03 ms      4.96 ms       102 us",
        "  p95           5.41 ms      5.33 ms       110 us",
        "  p97           5.70 ms      5.62 ms       115 us",
        "  p99           6.11 ms      6.03 ms       130 us",
        "  p99.9         9.88 ms      9.80 ms       200 us",
        "  max           12.0 ms      12.0 ms       400 us",
        "  mean          4.20 ms      4.10 ms      85.0 us",
        "",
        "Queries   planned 4,031 = issued 4,031 + shed 0",
        "          issued 4,031 = ok 4,031 + error 0 + timeout 0 + unfinished 0",
        "Rates/s   scheduled 201.5, issued 201.5, completed 201.5, goodput(50.0 ms) 201.3",
        "          over 20.0 s",
        "Replies   256 checked against golden outputs, 0 wrong",
        "MLPerf    LoadGen would say VALID; p99 <= 6.31 ms with 99% confidence",
        "Trust     VALID",
        "Arrivals  mlperf ok: KS p 0.61, serial p 0.43, CV2 1.00, IDC 1.02 0.97",
        "Server    triton 2.51.0 on cpu (auto: torch 2.13.0 sees no accelerator), fp32;",
        "          1 process x 2 torch threads on 2 CPUs; weights: shipped, seed 2026",
        "Run       runs/digits-1",
        "Again     servebench report runs/digits-1",
    ]


def test_fail_word_for_word() -> None:
    assert printed(failing()) == [
        "FAIL  p99 <= 50ms at 200 queries/s: no value, 81 of 4,031 queries failed or were",
        "      never sent, mostly timeout, and 1 more broken",
        "",
        " ✓ errors < 5% holds: measured 2.01%.",
        " ✗ mean < 20ms fails: measured 33.3 ms.",
        " ✗ p99 <= 50ms fails: no value (over 10.0 s), because 81 of 4,031 queries failed",
        "   or were never sent; mend what failed first (mostly timeout, see errors).",
        "",
        "               response      service  issue delay",
        "  p50           30.0 ms      30.0 ms      81.0 us",
        "  p90           83.4 ms      83.4 ms       102 us",
        "  p95           90.1 ms      90.1 ms       110 us",
        "  p97           95.0 ms      95.0 ms       115 us",
        "  p99          > 10.0 s     > 10.0 s       130 us",
        "  p99.9        no value     no value       200 us",
        "  max           99.9 ms      99.8 ms       400 us",
        "  mean          33.3 ms      33.2 ms      85.0 us",
        "  81 of 4,031 queries have no latency (1 never sent) and count as over every",
        "  bound; max and mean are of the others.",
        "",
        "Queries   planned 4,031 = issued 4,030 + shed 1",
        "          issued 4,030 = ok 3,950 + error 30 + timeout 50 + unfinished 0",
        "Errors    50 x timeout (e.g. query 17)",
        r"          30 x status: 503 [/red] [bold]overloaded\x1b[31m",
        "Rates/s   scheduled 201.5, issued 201.4 over 20.0 s; completed 192.6,",
        "          goodput(50.0 ms) 170.2 over 20.5 s",
        "Replies   256 checked against golden outputs, 0 wrong",
        "MLPerf    LoadGen would say INVALID: perf constraints, early stopping",
        "Trust     VALID",
        "Arrivals  mlperf ok: KS p 0.61, serial p 0.43, CV2 1.00, IDC 1.02 0.97",
        "Server    triton 2.51.0 at http://gpu-7:8000",
        "Run       runs/digits-1",
        "Again     servebench report runs/digits-1",
    ]


def test_inconclusive_says_how_many_more() -> None:
    lines = printed(inconclusive())
    assert lines[:7] == [
        "INCONCLUSIVE  p99 <= 50ms at 200 queries/s: measured 6.11 ms, but needs at least",
        "              399 more queries (trust is DEGRADED, see below)",
        "",
        " ? p99 <= 50ms is undecided: measured 6.11 ms; 0 of 60 queries were over the",
        "   bound, too few queries to promise it with 99% confidence; run at least 399",
        "   more (2 s at 201.5/s).",
        "",
    ]
    assert lines[-8:-4] == [
        "Trust     DEGRADED",
        " ! cpu_steal: the hypervisor gave 8% of this machine's CPU time to others;",
        "   measure on a quieter or a dedicated machine.",
        "Arrivals  mlperf untested: 59 gaps are too few",
    ]


def test_invalid_names_the_resource_first() -> None:
    lines = printed(invalid())
    assert lines[:8] == [
        "INVALID  p99 <= 50ms at 200 queries/s: unknown, the run cannot be trusted",
        "",
        " ✗ lateness: 121 of 4,031 queries (3%) were issued over 5.00 ms late: the",
        "   client's event loop was late; use more client.workers or a lower rate.",
        "",
        "What was measured, not to be relied on:",
        " ✓ p99 <= 50ms holds: measured 6.11 ms; 3 of 4,031 queries were over the bound,",
        "   up to 25 are allowed at 99% confidence.",
    ]
    assert sum("lateness" in line for line in lines) == 1
    assert "Trust     INVALID" in lines


def test_a_gap_that_matters_is_explained() -> None:
    lines = printed(invalid())
    after = lines.index("  mean          5.20 ms      4.10 ms      1.10 ms")
    assert lines[after + 1 : after + 4] == [
        "  At p99 service is 31.1 ms smaller than response: queries waited up to 34.5 ms",
        "  in the client before they were sent. Users would feel that wait, so response",
        "  is judged.",
    ]


@pytest.mark.parametrize(
    ("response_ms", "service_ms"),
    [
        pytest.param(0.5, 0.1, id="most of the response, but 1 % of the bound"),
        pytest.param(100.0, 95.0, id="a twentieth of the response"),
    ],
)
def test_a_gap_that_changes_nothing_is_not_mentioned(response_ms: float, service_ms: float) -> None:
    run = passing()
    run["response_time"]["percentiles"]["99"] = round(response_ms * 1e6)
    run["service_time"]["percentiles"]["99"] = round(service_ms * 1e6)
    assert not any("smaller than response" in line for line in printed(run))


def test_what_was_not_due_when_a_run_was_interrupted_is_said_and_in_no_share() -> None:
    run = failing()
    run["counts"] |= {"planned": 9_031, "not_due": 5_000}
    text = " ".join(" ".join(printed(run)).split())
    assert "planned 9,031 = issued 4,030 + shed 1 + not due 5,000 issued 4,030 = ok" in text
    assert "queries/s: no value, 81 of 4,031 queries failed or were never sent" in text


def test_a_promise_about_the_client_without_a_value_says_what_was_never_sent() -> None:
    run = failing()
    run["issue_delay"] |= {"count": 4_031, "infinite": 81}
    run["constraints"] = [judged("delay.p99 <= 2ms", "ns", None, 2e6, "FAIL", "...")]
    run["constraints"][0]["measured_above"] = 4e5
    run["early_stopping"] = None
    run["rates"] = {"issued_qps": 200.0, "scheduled_qps": None, "completed_qps": None, "goodput_qps": None}
    text = " ".join(" ".join(printed(run)).split())
    assert "no value, 81 of 4,031 queries were never sent" in text
    assert "issued 200 over 19.7 s" in text  # 3,949 gaps, not 4,030


def test_books_that_do_not_balance_are_not_called_equal() -> None:
    run = passing()
    run["counts"]["ok"] = 4000
    assert "          issued 4,031 IS NOT ok 4,000 + error 0 + timeout 0 + unfinished 0" in printed(run)


@pytest.mark.parametrize(
    ("unit", "measured", "bound", "words"),
    [
        pytest.param("ns", 50_040_000, 50_000_000, "measured 50.04 ms", id="more digits where three would show the bound"),
        pytest.param("ns", 50_000_000, 50_000_000, "measured 50.0 ms", id="exactly the bound"),
        pytest.param("share", 0.000833, 0.001, "measured 0.0833%", id="share"),
        pytest.param("share", 0.0500012, 0.05, "measured 5.0001%", id="a share just over the bound"),
        pytest.param("qps", 379.96, 380.0, "measured 379.96/s", id="a rate just short of the bound"),
        pytest.param("ns", None, 50_000_000, "nothing was measured", id="nothing measured"),
    ],
)
def test_the_headline_has_the_unit_of_the_promise(unit: str, measured: float | None, bound: float, words: str) -> None:
    run = passing()
    run["constraints"] = [judged("it <= bound", unit, measured, bound, "PASS", "it holds.")]
    assert printed(run)[0] == f"PASS  it <= bound at 200 queries/s: {words}"


@pytest.mark.parametrize("make", [passing, failing, inconclusive, invalid])
@pytest.mark.parametrize("width", [80, 60, 200])
def test_no_line_is_wider_than_the_console(make: Any, width: int) -> None:
    lines = printed(make(), width=width)
    assert max(len(line) for line in lines) <= width
    assert not any(line != line.rstrip() for line in lines)
    # Nothing is lost or cut by wrapping: the same words at any width.
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(printed(make(), width=1000)).split())


def test_a_number_stays_with_its_unit() -> None:
    run = passing()
    run["constraints"][0]["reason"] = "waited 17.25 ms " * 12
    for width in range(40, 80):
        assert not any(line.endswith("17.25") for line in printed(run, width=width))


def test_a_path_is_never_broken() -> None:
    directory = Path("runs") / ("long-" * 20) / "a b"
    lines = printed(passing(), directory=directory)
    assert lines[-2:] == [f"Run       {directory}", f"Again     servebench report '{directory}'"]


def test_no_directory_no_hints() -> None:
    assert printed(passing(), directory=None)[-2].startswith("Server")


@pytest.mark.parametrize("make", [passing, failing, inconclusive, invalid])
def test_colour_is_for_terminals_only(make: Any) -> None:
    plain = printed(make())
    assert not any("\x1b" in line for line in plain)
    coloured = printed(make(), force_terminal=True, color_system="standard")
    assert coloured[0].startswith("\x1b[")
    assert not any("\x1b[31moverloaded" in line or "overloaded\x1b[31m" in line for line in coloured)


@pytest.mark.parametrize(("make", "colour"), [(passing, "32"), (failing, "31"), (inconclusive, "33"), (invalid, "35")])
def test_each_verdict_has_its_colour(make: Any, colour: str) -> None:
    run = make()
    first = printed(run, force_terminal=True, color_system="standard")[0]
    assert first.startswith(f"\x1b[1;7;{colour}m{run['verdict']}\x1b[0m  ")


def test_a_console_that_knows_only_ascii_gets_ascii() -> None:
    run = failing()
    run["errors"][0]["detail"] = "délai"
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    render(run, console=Console(file=file, width=80))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert " + errors < 5% holds" in text
    assert " x mean < 20ms fails" in text
    assert r"50 x timeout: d\xe9lai" in text


def test_long_lists_of_errors_are_cut() -> None:
    run = failing()
    run["errors"] = [{"kind": "status", "detail": "x" * 5_000, "count": 9, "example": 1}] * 8
    lines = printed(run)
    assert sum(line.count("x") for line in lines if set(line.strip()) <= {"x"}) < 5 * 300
    assert "          and 3 more kinds, see run.json" in lines


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        pytest.param(lambda run: run, "PASS", id="clean"),
        pytest.param(lambda run: with_outcome(run, slice(0, 400), Outcome.TIMEOUT), "FAIL", id="timeouts"),
        pytest.param(lambda run: with_outcome(run, slice(0, 30), Outcome.SHED), "INCONCLUSIVE", id="shed"),
        pytest.param(lambda run: with_stall(run, 3 * S, 200 * MS), "INVALID", id="stall"),
    ],
)
def test_what_the_judge_writes_can_be_printed(spoil: Any, verdict: str) -> None:
    run = spoil(synthetic_run(queries=4_000, response_ns=6 * MS))
    lines = printed(judge(run))
    assert lines[0].startswith(f"{verdict}  p99 <= 50ms at 200 queries/s: ")
    assert "  p50           6.00 ms" in "\n".join(lines)
    issued = int((run.issued_ns >= 0).sum())
    assert f"Queries   planned 4,000 = issued {issued:,} + shed {4000 - issued}" in lines


@pytest.mark.parametrize(
    ("queries", "shown"),
    [
        # Of n queries, p falls on the largest when int(n * p) is n - 1.
        pytest.param(298, ["p50", "p90", "p95", "p97", "p99"], id="298: index 297 is p99.9's"),
        pytest.param(1_001, ["p50", "p90", "p95", "p97", "p99", "p99.9"], id="1001: p99.9 is the one but largest"),
        pytest.param(20, ["p50", "p90", "p99"], id="20: a promise is shown all the same"),
    ],
)
def test_percentiles_that_are_the_maximum_are_left_out(queries: int, shown: list[str]) -> None:
    lines = printed(judge(synthetic_run(queries=queries)))
    assert [line.split()[0] for line in lines if line.startswith("  p")] == shown


def test_failures_name_the_commonest_kind() -> None:
    run = failing()
    run["errors"] = [
        {"kind": "timeout", "detail": "", "count": 30, "example": 17},
        {"kind": "status", "detail": "500 a", "count": 25, "example": 1},
        {"kind": "status", "detail": "500 b", "count": 25, "example": 2},
    ]
    assert printed(run)[1] == "      never sent, mostly status, and 1 more broken"


def test_each_rate_names_the_time_that_it_is_over() -> None:
    """(n - 1) / rate: 10 000 gaps at 1000/s, 1000 at 200/s, 500 at 50/s; what was never sent has no issue delay."""
    run = passing() | {"early_stopping": None}
    run["counts"] |= {"planned": 10_001, "issued": 1_001, "ok": 501, "shed": 9_000, "error": 500}
    run["issue_delay"] |= {"count": 10_001, "infinite": 9_000}
    run["rates"] = {"scheduled_qps": 1_000.0, "issued_qps": 200.0, "completed_qps": 50.0, "goodput_qps": 49.0}
    rates = "Rates/s   scheduled 1,000 over 10.0 s; issued 200 over 5.00 s; completed 50, goodput 49 over 10.0 s"
    assert rates in printed(run, width=200)


def test_max_and_mean_of_no_query_are_not_explained() -> None:
    lines = printed(judge(with_outcome(synthetic_run(queries=500), slice(0, 500), Outcome.STATUS)))
    assert "  500 of 500 queries have no latency and count as over every bound." in lines


def test_arrivals_that_only_the_client_spoiled_are_not_called_wrong() -> None:
    run = passing()
    checks = run["schedule"]["checks"]
    checks |= {"result": "wrong", "issue_problems": ["queries were not issued as planned"]}
    run["trust"]["reasons"] = [{"code": "achieved_rate", "severity": "INVALID", "text": "slow", "remedy": "do"}]
    assert "Arrivals  mlperf planned ok, issued not as planned (see achieved_rate): KS p" in printed(run)
    checks["problems"] = ["the gaps are not exponential"]
    assert "Arrivals  mlperf WRONG: KS p 0.61, serial p 0.43, CV2 1.00, IDC 1.02 0.97" in printed(run)


def test_torchserves_full_queue_is_explained() -> None:
    run = failing()
    detail = 'HTTP 503: Model "digits" has no worker to serve inference request. Please use scale workers API to add workers.'
    run["errors"] = [{"kind": "status", "detail": detail, "count": 1234, "example": 7}]
    text = " ".join(" ".join(printed(run)).split())
    assert f"1,234 x status: {detail} [TorchServe says so also of a full queue, see its job_queue_size] (e.g. query 7)" in text


THREADS = {"processes": 3, "each": 4, "total": 12, "cpus": 1}


@pytest.mark.parametrize(
    ("server", "text"),
    [
        pytest.param(
            {"launch": "stub", "name": "stub", "version": "0.1.0", "service": "fixed:2ms; no limit"},
            "stub 0.1.0; fixed:2ms; no limit",
            id="the stub",
        ),
        pytest.param(
            {"launch": "triton", "name": "triton", "device": "cpu", "device_reason": "asked for", "threads": THREADS},
            "triton on cpu (asked for); 3 processes x 4 torch threads on 1 CPU",
            id="threads",
        ),
        pytest.param(
            {"launch": "triton", "name": "triton", "device": "cuda:0,1", "precision": "bf16", "threads": THREADS},
            "triton on cuda:0,1, bf16",
            id="threads of a CPU that computes nothing",
        ),
        pytest.param({"launch": "mine", "threads": 4, "weights": "w", "metadata": None}, "mine", id="somebody's own words"),
        pytest.param({"launch": None, "url": "grpc://h:1", "metadata": {}}, "at grpc://h:1", id="a server that says nothing"),
        pytest.param(
            {"launch": None, "url": "http://h:1", "metadata": {"name": "[red]xy\x1b", "version": "9 " * 500}},
            rf"[red]xy\x1b {'9 ' * 146}...",
            id="a server that says too much",
        ),
    ],
)
def test_the_server_is_shown_as_far_as_it_is_known(server: dict[str, Any], text: str) -> None:
    lines = printed(passing() | {"server": server}, width=1000)
    after = next(index for index, line in enumerate(lines) if line.startswith("Arrivals"))
    assert " ".join(line.removeprefix("Server").strip() for line in lines[after + 1 : -2]) == text


def test_missing_and_unknown_parts_are_survived() -> None:
    run = passing()
    for key in run:
        part = copy.deepcopy(run)
        del part[key]
        assert printed(part)
        assert printed(part | {"new_in_a_later_version": 1})
    assert printed({"verdict": "FAIL"}, directory=None)[0] == "FAIL  no constraint was judged"


@pytest.mark.parametrize(
    ("value_ns", "text"),
    [
        (0, "0 us"),
        (512, "0.512 us"),
        (81_000, "81.0 us"),
        (999_499, "999 us"),
        (999_500, "1.00 ms"),
        (6_114_000, "6.11 ms"),
        (83_449_999, "83.4 ms"),
        (999_600_000, "1.00 s"),
        (12_345_000_000, "12.3 s"),
        (3_600_000_000_000, "3,600 s"),
        (-3_200, "-3.20 us"),
    ],
)
def test_durations_have_three_digits(value_ns: int, text: str) -> None:
    assert format_duration(value_ns) == text


@pytest.mark.parametrize(
    ("per_second", "text"),
    [(200.0, "200/s"), (198.73, "198.7/s"), (0.5, "0.5/s"), (1_234.4, "1,234/s"), (12_345.6, "12,346/s"), (0.0, "0/s")],
)
def test_rates_have_four_digits(per_second: float, text: str) -> None:
    assert format_rate(per_second) == text


def test_a_schedule_is_never_broken() -> None:
    document = {
        "planned": 5_030,
        "last_offset_ns": 20_001_000_000,
        "arrivals": "mlperf",
        "target_qps": 250.0,
        "scheduled_qps": 251.44,
        "seed": 7,
        "sha256": "c8" * 32,
        "gaps_ns": {"min": 1_040, "median": 2_750_000, "max": 42_300_000},
        "rate_over_time": [{"from_s": 0.0, "qps": 2_480.0}, {"from_s": 1.0, "qps": 0.0}],
    }
    file = io.StringIO()
    render_schedule("digits", document, console=Console(file=file, width=40))
    assert file.getvalue().splitlines() == [
        "digits: 5,030 queries over 20.001 s",
        "mlperf arrivals, target 250/s, scheduled 251.4/s, seed 7",
        f"sha256 of the arrival times {'c8' * 32}",
        "gaps: min 1.04 us, median 2.75 ms, max 42.3 ms",
        "      0.00 s    2,480.0/s " + "█" * 40,
        "      1.00 s        0.0/s",
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (0.063022, "6.3%"),
        (0.100033, "10%"),
        (0.000833, "0.0833%"),
        (0.98618, "98.6%"),
        (0.99953, "99.953%"),
        (0.9999996, "99.99996%"),
        (1.0, "100%"),
        (1.014, "101%"),
    ],
)
def test_shares_have_three_digits_and_only_all_is_all(share: float, text: str) -> None:
    assert say_share(share) == text
