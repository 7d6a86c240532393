"""Early stopping against LoadGen's published numbers, the binomial definition, and LoadGen itself."""

from __future__ import annotations

import array
import itertools
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from synthetic import MS, synthetic_run

from servebench.judge import judge
from servebench.judge.early_stopping import (
    estimate_index,
    is_enough,
    max_over_latency,
    min_queries,
    min_under_latency,
    odds,
)

OVER = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 50, 100)
#: n_min(t) at 99 % confidence, tolerance 0, for t in OVER: made with LoadGen's own algorithm.
MIN_QUERIES = {
    0.50: (7, 11, 14, 17, 19, 22, 25, 27, 30, 33, 35, 59, 128, 237),
    0.90: (44, 64, 81, 97, 113, 127, 142, 156, 170, 183, 197, 325, 681, 1246),
    0.95: (90, 130, 165, 198, 229, 259, 288, 316, 344, 371, 398, 656, 1372, 2504),
    0.97: (152, 219, 277, 332, 383, 433, 482, 529, 576, 622, 667, 1097, 2293, 4182),
    0.99: (459, 662, 838, 1001, 1157, 1307, 1453, 1596, 1736, 1874, 2010, 3304, 6898, 12571),
    0.999: (4603, 6636, 8403, 10042, 11601, 13105, 14567, 15996, 17398, 18779, 20140, 33097, 69058, 125826),
}
#: The largest t that n queries bear.
MAX_OVER = {
    0.90: {1000: 78, 5000: 450, 10000: 930, 24576: 2348, 100000: 9779, 270336: 26670},
    0.95: {1000: 34, 5000: 214, 10000: 449, 24576: 1149, 100000: 4839, 270336: 13253},
    0.97: {1000: 17, 5000: 122, 10000: 260, 24576: 675, 100000: 2874, 270336: 7903},
    0.99: {1000: 2, 5000: 33, 10000: 77, 24576: 209, 100000: 927, 270336: 2583},
}


@pytest.mark.parametrize("quantile", MIN_QUERIES)
def test_loadgens_table_of_minimum_queries(quantile: float) -> None:
    assert tuple(min_queries(over, quantile) for over in OVER) == MIN_QUERIES[quantile]


@pytest.mark.parametrize("quantile", MIN_QUERIES)
def test_the_minimum_is_enough_and_one_less_is_not(quantile: float) -> None:
    for over, queries in zip(OVER, MIN_QUERIES[quantile], strict=True):
        assert is_enough(queries, over, quantile)
        assert not is_enough(queries - 1, over, quantile)


@pytest.mark.parametrize("quantile", MAX_OVER)
def test_loadgens_table_of_tolerable_over_latency(quantile: float) -> None:
    assert {queries: max_over_latency(queries, quantile) for queries in MAX_OVER[quantile]} == MAX_OVER[quantile]


def test_anchors_of_mlcommons_endpoints() -> None:
    assert min_under_latency(0, 0.99) == 459
    assert min_under_latency(0, 0.90) == 44
    assert min_under_latency(1, 0.99) == 661


@pytest.mark.parametrize(
    ("queries", "quantile", "index"),
    [
        pytest.param(10_000, 0.99, 10_000 - 77, id="of-10000-at-p99-76-are-discarded"),
        pytest.param(662, 0.99, 661, id="the-maximum-at-the-floor-of-p99"),
        pytest.param(661, 0.99, None, id="none-below-the-floor-of-p99"),
        pytest.param(64, 0.90, 63, id="the-maximum-at-the-floor-of-p90"),
        pytest.param(63, 0.90, None, id="none-below-the-floor-of-p90"),
        pytest.param(10, 0.99, None, id="none-where-not-even-zero-is-enough"),
    ],
)
def test_early_stopping_estimate(queries: int, quantile: float, index: int | None) -> None:
    assert estimate_index(queries, quantile) == index


@given(over=st.integers(0, 20_000), quantile=st.floats(0.01, 0.9999))
@settings(max_examples=150, deadline=None)
def test_is_the_binomial_test(over: int, quantile: float) -> None:
    queries = min_queries(over, quantile)
    assert binom.cdf(over, queries, 1 - quantile) < 0.01 * (1 + 1e-7)
    assert binom.cdf(over, queries - 1, 1 - quantile) >= 0.01 * (1 - 1e-7)


@given(queries=st.integers(1, 100_000), quantile=st.floats(0.01, 0.999))
@settings(max_examples=100, deadline=None)
def test_tolerable_over_latency_inverts_the_minimum(queries: int, quantile: float) -> None:
    over = max_over_latency(queries, quantile)
    if over is None:
        assert queries < min_queries(0, quantile)
    else:
        assert min_queries(over, quantile) <= queries < min_queries(over + 1, quantile)


def test_odds_fall_with_every_query_within_the_bound() -> None:
    values = [odds(under, 5, 0.99) for under in range(0, 3_000, 10)]
    assert values[0] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_a_million_over_latency_queries_take_milliseconds() -> None:
    started = time.process_time()
    queries = min_queries(1_000_000, 0.99)
    assert time.process_time() - started < 0.05
    assert 100_000_000 < queries < 100_300_000  # 2.33 standard deviations of sqrt(n p q) above t / (1 - p)
    assert is_enough(queries, 1_000_000, 0.99)
    assert not is_enough(queries - 1, 1_000_000, 0.99)


@pytest.mark.parametrize("quantile", [0.0, 1.0])
def test_nothing_shows_a_certainty(quantile: float) -> None:
    with pytest.raises(ValueError, match="exclusive"):
        min_under_latency(0, quantile)


@pytest.mark.parametrize("over", [0, 1, 2, 5, 10])
def test_a_judged_run_turns_from_inconclusive_to_pass_at_the_minimum(over: int) -> None:
    needed = min_queries(over, 0.99)
    for queries, result, more in ((needed - 1, "INCONCLUSIVE", 1), (needed, "PASS", None)):
        document = judge(_run_with_over_latency(queries, over))
        (constraint,) = document["constraints"]
        assert (document["verdict"], constraint["result"], constraint["needed_queries"]) == (result, result, more)
        assert constraint["over"] == document["early_stopping"]["over_latency"] == over
        assert document["early_stopping"]["met"] is document["loadgen_validity"]["valid"] is (result == "PASS")


def _run_with_over_latency(queries: int, over: int, constraint: str = "p99 <= 50ms") -> Any:
    response_ns = np.full(queries, 5 * MS)
    response_ns[:: max(queries // max(over, 1), 1)][:over] = 60 * MS
    return synthetic_run(queries=queries, constraints=[constraint], response_ns=response_ns)


# --- LoadGen itself ------------------------------------------------------------------------

_VALIDITY = re.compile(r'"key": "(result_perf_constraints_met|early_stopping_met)", "value": (true|false)')
_MORE = re.compile(r"at least ([0-9]+) more queries")


@pytest.mark.parametrize(
    ("percentile", "queries", "over"),
    [
        pytest.param(99, 458, 0, id="p99-one-short-of-459"),
        pytest.param(99, 459, 0, id="p99-459"),
        pytest.param(90, 126, 5, id="p90-five-over-one-short-of-127"),
        pytest.param(90, 127, 5, id="p90-five-over-127"),
        pytest.param(90, 100, 10, id="p90-over-its-bound-by-one-index"),
    ],
)
def test_agrees_with_loadgen_itself(tmp_path: Path, percentile: int, queries: int, over: int) -> None:
    validity, more = _ask_loadgen(tmp_path, percentile / 100, queries, over)
    document = judge(_run_with_over_latency(queries, over, f"p{percentile} <= 50ms"))
    ours = document["loadgen_validity"]
    assert validity == {
        "result_perf_constraints_met": ours["perf_constraints_met"],
        "early_stopping_met": ours["early_stopping_met"],
    }
    assert more == (document["early_stopping"]["needed_queries"] or None)


def _ask_loadgen(folder: Path, quantile: float, queries: int, over: int) -> tuple[dict[str, bool], int | None]:
    """Run LoadGen's server scenario with exactly ``over`` queries held back past the target latency."""
    lg = pytest.importorskip("mlperf_loadgen", reason="needs LoadGen's wheel: pip install mlcommons-loadgen")
    reply = array.array("B", b"\0")
    address, _ = reply.buffer_info()
    held: list[Any] = []
    releasers: list[threading.Timer] = []

    def release() -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query, address, 1) for query in held])

    def issue(samples: list[Any]) -> None:
        for sample in samples:
            if len(held) < over:
                held.append(sample.id)
                if len(held) == over:
                    releasers.append(threading.Timer(0.7, release))
                    releasers[0].start()
            else:
                lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, address, 1)])

    test = lg.TestSettings()
    test.scenario = lg.TestScenario.Server
    test.mode = lg.TestMode.PerformanceOnly
    test.server_target_qps = 5_000
    test.server_target_latency_ns = 500 * MS  # far from what either kind of query takes
    test.server_target_latency_percentile = quantile
    test.min_duration_ms = 0
    test.min_query_count = test.max_query_count = queries
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    log = lg.LogSettings()
    log.log_output = output
    log.enable_trace = False
    sut = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(64, 64, lambda indices: None, lambda indices: None)
    try:
        lg.StartTestWithLogSettings(sut, library, test, log, audit_config_filename=str(folder / "no-audit.config"))
    finally:
        for releaser in releasers:
            releaser.join()
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
    found = _VALIDITY.findall((folder / "mlperf_log_detail.txt").read_text())
    more = _MORE.search((folder / "mlperf_log_summary.txt").read_text())
    return {key: value == "true" for key, value in found}, int(more[1]) if more else None
