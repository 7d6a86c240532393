"""Are the latencies true? Real runs against a stub whose queue can be computed.

The oracle is Lindley's recursion on our own schedule: a single first-come-first-served server
makes query n wait W[n] = max(0, W[n-1] + S[n-1] - gap[n]), and its response time is W[n] + S[n].
What the network, the kernel and the client add to every reply is measured in the same run, on the
queries that found the stub idle.

A queue that was empty has forgotten its past, so each busy period is an experiment of its own. Those in
which the machine stood still, as a watcher on each CPU tells (see `witness`), are not compared.
"""

import io
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import pytest
from e2e import CPUS, Quiet, profile_data, run, stub
from servebench_servers.stub_queue import Service, service_times_ns
from witness import Witness

from servebench.clock import now_ns
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData

pytestmark = pytest.mark.load

MEAN_MS = 2.0
LOADED_QPS = 350.0  # 70 % of the server's capacity
CONSTRAINTS = ["p99 <= 500ms"]
MAX_MEDIAN_ERROR_NS = 150_000
MAX_P99_ERROR = 0.05
#: What the path may add to a reply: ten times what it takes on an idle machine.
MAX_FLOOR_NS = 2_000_000
MAX_TRIES = 6
QUERIES = 1500
#: Of them, at least so many must have waited in an undisturbed busy period.
MIN_COMPARED = 150
#: What client or stub may be late by at their 99th percentile, where the machine did not stand still.
MAX_DISTURBANCE_NS = 1_000_000
#: And what either may be late by at most: while one stands still for 10 ms, a queue grows that lasts for 30 ms.
MAX_PAUSE_NS = 5_000_000
#: The backlog of a freeze takes longer by what the CPUs stand still meanwhile: a run with more of that is made again, so often.
MAX_PAUSED_SHARE, MAX_FREEZES = 0.02, 3

Times = npt.NDArray[np.int64]


def lindley_ns(arrivals_ns: Times, service_ns: Times) -> Times:
    """Response times of a single first-come-first-served server."""
    response_ns = np.empty_like(arrivals_ns)
    wait_ns = 0
    for n in range(len(arrivals_ns)):
        if n:
            wait_ns = max(0, wait_ns + int(service_ns[n - 1]) - int(arrivals_ns[n] - arrivals_ns[n - 1]))
        response_ns[n] = wait_ns + service_ns[n]
    return response_ns


def loadgen_p99(values: Times) -> float:
    return float(np.sort(values)[int(len(values) * 0.99)])


def response_ns(data: RunData) -> Times:
    assert (data.outcome == Outcome.OK).all()
    return data.completed_ns - data.scheduled_ns


def service_time_ns(data: RunData) -> Times:
    return data.completed_ns - data.issued_ns


@pytest.fixture(params=["http", "grpc"], scope="module")
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass(frozen=True)
class Compared:
    """A run, and which of its queries may be compared with theory."""

    data: RunData
    undisturbed: npt.NDArray[np.bool_]
    found_idle: npt.NDArray[np.bool_]

    def floor_ns(self, service_ns: Times) -> int:
        """What everything but the stub's queue and service adds to a response: the median where no query waited."""
        idle = self.undisturbed & self.found_idle
        return int(np.median((response_ns(self.data) - service_ns)[idle]))

    def turnarounds_ns(self) -> Times:
        """From a reply to the next query, where that was waiting already."""
        data = self.data
        waiting = (data.scheduled_ns[1:] < data.completed_ns[:-1]) & self.undisturbed[1:]
        return (data.issued_ns[1:] - data.completed_ns[:-1])[waiting]


def errors(measured_ns: Times, predicted_ns: Times) -> tuple[float, float]:
    """(median absolute error in ns, relative error of the p99)."""
    median = float(np.median(np.abs(measured_ns - predicted_ns)))
    return median, abs(loadgen_p99(measured_ns) / loadgen_p99(predicted_ns) - 1)


def compared(data: RunData, witness: Witness) -> Compared:
    """``data`` with its busy periods, which begin where all that was due earlier has been answered."""
    answered_ns = np.maximum.accumulate(data.completed_ns)
    found_idle = np.concatenate([[True], data.scheduled_ns[1:] > answered_ns[:-1]])
    period, first = np.cumsum(found_idle) - 1, np.flatnonzero(found_idle)
    start_ns = data.facts["start_ns"]
    touched = witness.touched(start_ns + data.scheduled_ns[first], start_ns + np.maximum.reduceat(data.completed_ns, first))
    return Compared(data, ~touched[period], found_idle)


def loaded_run(
    tmp_path: Path, protocol: str, service: dict[str, Any], client: dict[str, Any] | None = None, **options: Any
) -> Compared:
    """A run that nothing disturbed, by its own records and the stub's stamps, but for pauses of the machine."""
    for attempt in range(MAX_TRIES):
        with stub(tmp_path, service=service, **options) as server, Witness(CPUS) as witness:
            load = {"target_qps": LOADED_QPS, "min_duration_s": 0, "min_query_count": QUERIES}
            settings = profile_data(server.urls[protocol], constraints=CONSTRAINTS, load=load, client=client or {})
            _, data = run(settings, tmp_path / f"run-{attempt}")
            stamps = np.load(io.BytesIO(urlopen(f"{server.urls['http']}/stub/stamps?format=npy").read()))
        found = compared(data, witness)
        if np.count_nonzero(found.undisturbed & ~found.found_idle) < MIN_COMPARED:
            continue
        late_ns = (stamps["departure_ns"] - stamps["due_ns"])[found.undisturbed]  # first come, first served: in their order
        delay_ns = (data.issued_ns - data.scheduled_ns)[found.undisturbed]
        if client or options:  # a narrow client is late by design: there, by how much later than usual it turns round
            delay_ns = found.turnarounds_ns() - int(np.median(found.turnarounds_ns()))
        if not any(disturbed(values_ns) for values_ns in (delay_ns, late_ns)):
            return found
    few = f"fewer than {MIN_COMPARED} queries that waited while no CPU stood still, or client or stub late for another reason"
    pytest.fail(f"the machine is too busy to compare with theory: each of {MAX_TRIES} tries had {few}")


def disturbed(late_ns: Times) -> bool:
    return loadgen_p99(late_ns) > MAX_DISTURBANCE_NS or late_ns.max() > MAX_PAUSE_NS


def narrow(protocol: str, width: int) -> dict[str, Any]:
    """Client and stub settings that let only ``width`` queries be out at once: the rest of the queue is in the client."""
    if protocol == "http":
        return {"client": {"max_connections": width}}
    return {"client": {"channels": 1}, "max_concurrent_streams": width}


@pytest.mark.parametrize(
    "service",
    [
        pytest.param({"kind": "constant", "mean_ms": MEAN_MS}, id="constant service"),
        pytest.param({"kind": "exponential", "mean_ms": MEAN_MS, "seed": 5}, id="exponential service"),
    ],
)
def test_every_response_time_is_what_lindley_predicts(tmp_path: Path, protocol: str, service: dict[str, Any]) -> None:
    found = loaded_run(tmp_path, protocol, service)
    scheduled_ns = found.data.scheduled_ns
    drawn_ns = service_times_ns(Service.model_validate(service), len(scheduled_ns))
    floor_ns = found.floor_ns(drawn_ns)
    assert 0 < floor_ns < MAX_FLOOR_NS
    predicted_ns = lindley_ns(scheduled_ns, drawn_ns) + floor_ns
    median_error_ns, p99_error = errors(response_ns(found.data)[found.undisturbed], predicted_ns[found.undisturbed])
    assert median_error_ns <= MAX_MEDIAN_ERROR_NS
    assert p99_error <= MAX_P99_ERROR


def test_latency_from_the_send_would_fail_the_same_test(tmp_path: Path, protocol: str) -> None:
    """One connection (or stream) moves the queue into the client: only counting from the due time still sees it."""
    found = loaded_run(tmp_path, protocol, {"kind": "constant", "mean_ms": MEAN_MS}, **narrow(protocol, 1))
    data = found.data
    # Server and connection are now one resource, taken for the whole service time of each query, and until
    # the client has turned round to the next one: what that takes shows where the next one was already waiting.
    turnaround_ns = int(np.median(found.turnarounds_ns()))
    assert 0 < turnaround_ns < 0.1 * MEAN_MS * 1e6
    predicted_ns = lindley_ns(data.scheduled_ns, service_time_ns(data) + turnaround_ns) - turnaround_ns
    median_error_ns, p99_error = errors(response_ns(data)[found.undisturbed], predicted_ns[found.undisturbed])
    assert median_error_ns <= MAX_MEDIAN_ERROR_NS
    assert p99_error <= MAX_P99_ERROR
    naive_median_error_ns, naive_p99_error = errors(service_time_ns(data)[found.undisturbed], predicted_ns[found.undisturbed])
    assert naive_median_error_ns > 3 * MAX_MEDIAN_ERROR_NS
    assert naive_p99_error > 10 * MAX_P99_ERROR


def frozen_run(
    tmp_path: Path, protocol: str, width: int | None, qps: float, service_ms: float
) -> tuple[dict[str, Any], RunData, list[int]]:
    """Document and records of a run of 8 s whose server stands still for 1 s of it, and when that began and ended."""
    tmp_path.mkdir()
    freeze_s = 1.0
    stamps: list[int] = []

    settings = narrow(protocol, width) if width is not None else {}
    client = settings.pop("client", {})
    with stub(tmp_path, service={"kind": "constant", "mean_ms": service_ms}, **settings) as server:
        pid = server.describe()["pid"]

        def thaw() -> None:
            os.kill(pid, signal.SIGCONT)
            stamps.append(now_ns())

        def freeze(snapshot: Any) -> None:
            if not stamps and snapshot.elapsed_s > 2:
                stamps.append(now_ns())
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(freeze_s, thaw).start()

        load = {"target_qps": qps, "min_duration_s": 8}
        data_of = profile_data(server.urls[protocol], constraints=["p99 <= 2s"], load=load, client=client)
        document, data = run(data_of, tmp_path / "run", Quiet(freeze))
    return document, data, stamps


@pytest.mark.parametrize("width", [pytest.param(None, id="no cap"), pytest.param(4, id="4 at once")])
def test_a_frozen_server_is_felt_by_every_query_that_was_due(tmp_path: Path, protocol: str, width: int | None) -> None:
    qps, service_ms = 200.0, 1.0
    for attempt in range(MAX_FREEZES):
        with Witness(CPUS) as witness:
            document, data, stamps = frozen_run(tmp_path / f"{attempt}", protocol, width, qps, service_ms)
        if witness.paused_share() <= MAX_PAUSED_SHARE:
            break

    begin_ns, end_ns = (stamp - data.facts["start_ns"] for stamp in stamps)
    arrivals_ns = np.where((data.scheduled_ns > begin_ns) & (data.scheduled_ns < end_ns), end_ns, data.scheduled_ns)
    taken_ns = np.full(len(arrivals_ns), int(service_ms * 1e6))
    predicted_ns = lindley_ns(arrivals_ns, taken_ns) + arrivals_ns - data.scheduled_ns

    over_ns = 100_000_000
    predicted_over = int((predicted_ns > over_ns).sum())
    assert predicted_over > 0.8 * qps, "the arithmetic: 0.9 s of queries, and the backlog"
    measured_ns = response_ns(data)
    assert int((measured_ns > over_ns).sum()) == pytest.approx(predicted_over, rel=0.05)
    assert loadgen_p99(measured_ns) == pytest.approx(loadgen_p99(predicted_ns), rel=0.05)
    assert document["response_time"]["percentiles"]["99"] == loadgen_p99(measured_ns)
    if width is not None:
        naive_ns = service_time_ns(data)
        assert int((naive_ns > over_ns).sum()) <= width < 0.1 * predicted_over
        assert loadgen_p99(naive_ns) < 0.1 * loadgen_p99(predicted_ns)
