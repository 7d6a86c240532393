"""Our plans against MLPerf's LoadGen itself: its wheel runs the same settings, in real time, and must issue the same queries.

LoadGen's trace gives the due time of every query to the nanosecond, its detail log the
generated count and duration, its callbacks the loaded set and the issued samples.
"""

from __future__ import annotations

import array
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servebench.load.samples import performance_set
from servebench.load.scenario import plan_server
from servebench.profile import Load, Samples

lg = pytest.importorskip("mlperf_loadgen", reason="needs LoadGen's wheel: pip install mlcommons-loadgen")

_REPLY = array.array("B", b"\0")  # LoadGen reads the reply through this pointer until the run is over
_GENERATED = re.compile(r'"key": "generated_query_(count|duration)", "value": ([0-9]+)')
_TRACED_SAMPLE = re.compile(r'"name":"Sample".*"ph":"b".*"ts":([0-9]+)\.([0-9]{3}),.*"query_seq":([0-9]+)')


@dataclass(frozen=True)
class _Seen:
    loaded: list[int]
    issued: list[int]
    offsets_ns: list[int]
    generated_query_count: int
    generated_query_duration: int


def _run_loadgen(folder: Path, load: Load, samples: Samples, library_size: int) -> _Seen:
    test = lg.TestSettings()
    test.scenario = lg.TestScenario.Server
    test.mode = lg.TestMode.PerformanceOnly
    test.server_target_qps = load.target_qps
    test.server_target_latency_ns = 10**9
    test.min_duration_ms = round(load.min_duration_s * 1000)
    test.min_query_count = load.min_query_count
    test.schedule_rng_seed = load.schedule_seed
    test.qsl_rng_seed = samples.sample_set_seed
    test.sample_index_rng_seed = samples.sample_order_seed
    test.sample_concatenate_permutation = samples.order == "equal_issue"
    test.performance_issue_unique = samples.order == "unique"
    test.performance_issue_same = samples.order == "same"
    test.performance_issue_same_index = samples.same_index
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    log = lg.LogSettings()
    log.log_output = output
    log.enable_trace = True

    loaded: list[int] = []
    issued: list[int] = []
    address, _ = _REPLY.buffer_info()

    def issue(queries: list[Any]) -> None:
        issued.extend(query.index for query in queries)
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query.id, address, 1) for query in queries])

    sut = lg.ConstructSUT(issue, lambda: None)
    set_size = samples.performance_sample_count or library_size
    library = lg.ConstructQSL(library_size, set_size, loaded.extend, lambda indices: None)
    try:
        lg.StartTestWithLogSettings(sut, library, test, log, audit_config_filename=str(folder / "no-audit.config"))
    finally:
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)

    # Not parsed as JSON: LoadGen writes the rate of a single query as -nan, and a trace with stray quotes.
    generated = dict(_GENERATED.findall((folder / "mlperf_log_detail.txt").read_text()))
    # A traced sample begins when it is due; the trace counts microseconds with three decimals from an origin of its own.
    traced = _TRACED_SAMPLE.findall((folder / "mlperf_log_trace.json").read_text())
    due_ns = [ns for _, ns in sorted((int(query), int(whole + decimals)) for whole, decimals, query in traced)]
    return _Seen(
        loaded,
        issued,
        [ns - due_ns[0] for ns in due_ns],
        int(generated["count"]),
        int(generated["duration"]),
    )


def _check(load: Load, samples: Samples, library_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = _run_loadgen(Path(folder), load, samples, library_size)
    plan = plan_server(load, samples, library_size)
    set_size = samples.performance_sample_count or library_size
    assert seen.loaded == performance_set(set_size, seed=samples.sample_set_seed).tolist()
    assert seen.generated_query_count == plan.planned
    assert seen.generated_query_duration == plan.generated_duration_ns
    assert seen.offsets_ns == plan.offsets_ns.tolist()
    assert seen.issued == plan.sample_index.tolist()


_SEEDS = st.integers(0, 2**64 - 1)


@st.composite
def _short_runs(draw: st.DrawFn) -> tuple[Load, Samples, int]:
    """Runs of at most about 0.1 s, in which either minimum may decide, with passes of any length."""
    library_size = draw(st.integers(1, 300))
    set_size = draw(st.none() | st.integers(1, library_size))
    load = Load(
        target_qps=draw(st.floats(4_000, 20_000)),
        min_duration_s=draw(st.integers(0, 30)) / 1000,
        min_query_count=draw(st.integers(1, 200)),
        schedule_seed=draw(_SEEDS),
    )
    samples = Samples(
        order=draw(st.sampled_from(["with_replacement", "equal_issue", "unique", "same"])),
        performance_sample_count=set_size,
        same_index=draw(st.integers(0, (set_size or library_size) - 1)),
        sample_set_seed=draw(_SEEDS),
        sample_order_seed=draw(_SEEDS),
    )
    return load, samples, library_size


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=_short_runs())
def test_plans_are_loadgens(run: tuple[Load, Samples, int]) -> None:
    _check(*run)


@pytest.mark.parametrize("order", ["with_replacement", "equal_issue", "unique", "same"])
def test_default_seeds(order: str) -> None:
    samples = Samples(order=order, same_index=3)  # type: ignore[arg-type]
    _check(Load(target_qps=10_000, min_duration_s=0.05), samples, 128)


@pytest.mark.parametrize(
    "library_size",
    [
        pytest.param(24_576, id="llama2-70b-dataset"),
        pytest.param(65_535, id="largest-shuffled-in-pairs"),
        pytest.param(65_536, id="smallest-shuffled-singly"),
    ],
)
def test_large_libraries(library_size: int) -> None:
    _check(Load(target_qps=10_000, min_duration_s=0.02), Samples(), library_size)


def test_large_unique_set() -> None:
    _check(Load(target_qps=200_000), Samples(order="unique"), 13_368)
