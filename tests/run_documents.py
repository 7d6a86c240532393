"""Made-up run documents, one of each verdict, that the shipped schema accepts."""

from typing import Any

PERCENTILES = ("50", "90", "95", "97", "99", "99.9", "99.99")


def distribution(
    count: int, values_ms: tuple[float | None, ...], max_ms: float, mean_ms: float, **changes: Any
) -> dict[str, Any]:
    values_ns = [None if value is None else round(value * 1e6) for value in values_ms]
    return {
        "count": count,
        "infinite": 0,
        "min_ns": 1_000,
        "mean_ns": round(mean_ms * 1e6),
        "max_ns": round(max_ms * 1e6),
        "percentiles": dict(zip(PERCENTILES, values_ns, strict=True)),
        "above_ns": {},
    } | changes


def judged(
    text: str, unit: str, measured: float | None, bound: float, result: str, reason: str, **changes: Any
) -> dict[str, Any]:
    return {
        "text": text,
        "unit": unit,
        "measured": measured,
        "measured_above": None,
        "bound": bound,
        "result": result,
        "queries": 4031,
        "over": 3,
        "needed_queries": None,
        "needed_seconds": None,
        "reason": reason,
    } | changes


def passing() -> dict[str, Any]:
    response = (4.12, 5.03, 5.41, 5.7, 6.114, 9.876, 12.04)
    service = (4.05, 4.96, 5.33, 5.62, 6.03, 9.8, 11.97)
    delay = (0.081, 0.102, 0.11, 0.115, 0.13, 0.2, 0.4)
    return {
        "schema": "servebench.run/1",
        "version": "0.1.0",
        "command": ["servebench", "run", "digits"],
        "started_at": "2026-01-01T00:00:00+00:00",
        "state": "complete",
        "stop_reason": None,
        "profile": {"name": "digits"},
        "schedule": {
            "arrivals": "mlperf",
            "target_qps": 200.0,
            "last_scheduled_ns": 20_000_000_000,
            "checks": {
                "result": "ok",
                "gaps": 4030,
                "cv2": 1.004,
                "ks_distance": 0.01,
                "ks_p_value": 0.613,
                "serial_correlation": 0.01,
                "serial_p_value": 0.431,
                "dispersion": [
                    {"window_s": 0.05, "windows": 400, "index": 1.02, "p_value": 0.7},
                    {"window_s": 1.0, "windows": 20, "index": 0.97, "p_value": 0.9},
                ],
                "issued_cv2": 1.0,
                "issued_ks_distance": 0.001,
                "issued_ks_p_value": 1.0,
                "problems": [],
                "issue_problems": [],
            },
        },
        "counts": {"planned": 4031, "issued": 4031, "ok": 4031, "error": 0, "timeout": 0, "shed": 0, "unfinished": 0},
        "rates": {
            "target_qps": 200.0,
            "scheduled_qps": 201.5,
            "issued_qps": 201.49,
            "completed_qps": 201.46,
            "goodput_qps": 201.3,
        },
        "response_time": distribution(4031, response, 12.04, 4.2),
        "service_time": distribution(4031, service, 11.97, 4.1),
        "issue_delay": distribution(4031, delay, 0.4, 0.085),
        "errors": [],
        "output_check": {"kept": 256, "checked": 256, "wrong": 0, "first_wrong": None, "golden": True},
        "constraints": [
            judged(
                "p99 <= 50ms",
                "ns",
                6_114_000,
                50_000_000,
                "PASS",
                "p99 <= 50ms holds: measured 6.11 ms; 3 of 4,031 queries were over the bound, "
                "up to 25 are allowed at 99% confidence.",
            )
        ],
        "early_stopping": {
            "constraint": "p99 <= 50ms",
            "percentile": 99.0,
            "latency_bound_ns": 50_000_000,
            "confidence": 0.99,
            "queries": 4031,
            "over_latency": 3,
            "allowed_over_latency": 25,
            "required_queries": 1000,
            "needed_queries": 0,
            "estimate_ns": 6_310_000,
            "met": True,
        },
        "loadgen_validity": {
            "min_duration_met": True,
            "min_queries_met": True,
            "perf_constraints_met": True,
            "early_stopping_met": True,
            "valid": True,
        },
        "trust": {"verdict": "VALID", "reasons": [], "stall_count": 0, "stalls": []},
        "verdict": "PASS",
        "reasons": ["p99 <= 50ms holds."],
        "workers": [],
        "server": {
            "url": "http://127.0.0.1:40905",
            "launch": "triton",
            "name": "triton",
            "version": "2.51.0",
            "device": "cpu",
            "device_reason": "auto: torch 2.13.0 sees no accelerator",
            "precision": "fp32",
            "threads": {"processes": 1, "each": 2, "total": 2, "cpus": 2},
            "weights": {"origin": "shipped, seed 2026", "sha256": "5c" * 32},
            "metadata": {"name": "triton", "version": "2.51.0"},
        },
        "environment": {},
    }


def failing() -> dict[str, Any]:
    """Timeouts at the tail, sheds, and an error whose text is hostile; the server was there before."""
    run = passing() | {"verdict": "FAIL"}
    itself = {"name": "triton", "version": "2.51.0"}
    run["server"] = {"url": "http://gpu-7:8000", "launch": None, "metadata": itself, "model": {"name": "digits"}}
    run["counts"] = {"planned": 4031, "issued": 4030, "ok": 3950, "error": 30, "timeout": 50, "shed": 1, "unfinished": 0}
    tail = {"99": 10_000_500_000, "99.9": 0, "99.99": 0}
    run["rates"] |= {"issued_qps": 201.45, "completed_qps": 192.63, "goodput_qps": 170.2}  # 3949 gaps in 20.5 s
    run["issue_delay"]["count"] = 4030
    known = (30.0, 83.4, 90.1, 95.0)
    run["response_time"] = distribution(4031, (*known, None, None, None), 99.9, 33.3, infinite=81, above_ns=tail)
    run["service_time"] = distribution(4031, (*known, None, None, None), 99.8, 33.2, infinite=81, above_ns=tail)
    run["constraints"] = [
        judged("errors < 5%", "share", 81 / 4031, 0.05, "PASS", "errors < 5% holds: measured 2.01%."),
        judged("mean < 20ms", "ns", 33_300_000, 20_000_000, "FAIL", "mean < 20ms fails: measured 33.3 ms."),
        judged(
            "p99 <= 50ms",
            "ns",
            None,
            50_000_000,
            "FAIL",
            "p99 <= 50ms fails: no value (over 10.0 s), because 81 of 4,031 queries failed or were never sent; "
            "mend what failed first (mostly timeout, see errors).",
            measured_above=10_000_500_000,
        ),
    ]
    run["errors"] = [
        {"kind": "timeout", "detail": "", "count": 50, "example": 17},
        {"kind": "status", "detail": "503 [/red] [bold]overloaded\x1b[31m\n", "count": 30, "example": None},
    ]
    run["loadgen_validity"] |= {"perf_constraints_met": False, "early_stopping_met": False, "valid": False}
    run["early_stopping"] |= {"estimate_ns": None, "met": False}
    return run


def inconclusive() -> dict[str, Any]:
    run = passing() | {"verdict": "INCONCLUSIVE", "output_check": None, "loadgen_validity": None}
    run["constraints"] = [
        judged(
            "p99 <= 50ms",
            "ns",
            6_114_000,
            50_000_000,
            "INCONCLUSIVE",
            "p99 <= 50ms is undecided: measured 6.11 ms; 0 of 60 queries were over the bound, too few "
            "queries to promise it with 99% confidence; run at least 399 more (2 s at 201.5/s).",
            needed_queries=399,
            needed_seconds=2.0,
        )
    ]
    run["schedule"]["checks"] |= {"result": "too_few", "gaps": 59}
    run["trust"] = {
        "verdict": "DEGRADED",
        "reasons": [
            {
                "code": "cpu_steal",
                "severity": "DEGRADED",
                "text": "the hypervisor gave 8% of this machine's CPU time to others",
                "remedy": "measure on a quieter or a dedicated machine",
                "measured": 0.08,
                "bound": 0.05,
            }
        ],
        "stall_count": 0,
        "stalls": [],
    }
    return run


def invalid() -> dict[str, Any]:
    """The client itself was 31 ms late at p99."""
    run = passing() | {"verdict": "INVALID", "output_check": None, "loadgen_validity": None}
    run["response_time"] = distribution(4031, (4.12, 5.03, 5.41, 12.0, 37.1, 40.0, 41.0), 41.0, 5.2)
    run["issue_delay"] = distribution(4031, (0.081, 0.102, 0.11, 8.0, 31.0, 33.0, 34.5), 34.5, 1.1)
    run["trust"] = {
        "verdict": "INVALID",
        "reasons": [
            {
                "code": "lateness",
                "severity": "INVALID",
                "text": "121 of 4,031 queries (3%) were issued over 5.00 ms late: the client's event loop was late",
                "remedy": "use more client.workers or a lower rate",
                "measured": 0.03,
                "bound": 0.0025,
            }
        ],
        "stall_count": 0,
        "stalls": [],
    }
    return run
