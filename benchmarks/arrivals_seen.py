"""The stub as a witness: it stamps every query's arrival and departure, whoever sends them.

Stamps are CLOCK_MONOTONIC ns, comparable with the client's on the same host. The stub stamps an arrival when its
event loop reads the bytes, so a stamp is late by the loopback's time, by a wake-up, and by whatever the loop is busy
with: mostly the query that came just before. `benchmarks.punctuality` measures that resolution and prints it.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import numpy.typing as npt
from scipy.stats import kstest
from servebench_servers.stub import StubLauncher, StubOptions

from benchmarks.nginx import INPUT, MODEL
from benchmarks.openai_stub import OpenAIStub
from benchmarks.peers.base import PeerProtocol, Target
from benchmarks.peers.pingpong import ping_pong_ns
from benchmarks.peers.query import http_target
from servebench.errors import RunError

Int64s = npt.NDArray[np.int64]
#: Structured: `servebench_servers.stub_server.STAMPS`.
Stamps = npt.NDArray[Any]

#: Left out at either end: tools open connections, probe the server and ramp up before they do what they were asked.
TRIM_S = 0.5
ARRIVALS_PER_WINDOW = 20
MIN_ARRIVALS = 100
_TIMEOUT_S = 10.0
_IDLE_DEADLINE_S = 10.0
_RETRY_S = 0.05
_FLOOR_S = 2.0


@dataclass(frozen=True, slots=True)
class Stub:
    """A running stub: what peers ask it, and its process."""

    target: Target
    pid: int

    @property
    def url(self) -> str:
        """Where it listens, over HTTP."""
        return self.target.url


@contextlib.contextmanager
def queue_stubs(service_ms: float, cpus: Sequence[int]) -> Iterator[dict[PeerProtocol, Stub]]:
    """Stubs with the same constant service time on the same ``cpus``, one for each protocol; only one is asked at a time.

    Over KServe's the model has the null model's name and shape, so that all parties send the same bytes.
    """
    options = StubOptions.model_validate(
        {
            "service": {"kind": "constant", "mean_ms": service_ms},
            "input_elements": INPUT.shape[1],
            "output_elements": INPUT.shape[1],
            "cpus": list(cpus),
        }
    )
    with TemporaryDirectory(prefix="queue-stub-") as scratch, OpenAIStub(cpus, options) as openai:
        server = StubLauncher().launch(MODEL, options, Path(scratch))
        try:
            # The stub answers in the format it is asked for: it needs no second model for those who want binary replies.
            target = replace(http_target(server.urls["http"]), binary_model=None)
            yield {"kserve-http": Stub(target, server.describe()["pid"]), "openai": Stub(openai.target, openai.pid)}
        finally:
            server.stop()


def fetch_stamps(stub: Stub) -> Stamps:
    """The stamps of every query since the start or the last `forget_stamps`, in order of arrival. OSError when it is gone."""
    with urlopen(f"{stub.url}/stub/stamps?format=npy", timeout=_TIMEOUT_S) as reply:
        stamps: Stamps = np.load(io.BytesIO(reply.read()))
    return stamps


def forget_stamps(stub: Stub) -> None:
    """Begin anew, once the stub holds no more queries: tools may end before the last reply. `RunError` if that takes long."""
    end_s = time.monotonic() + _IDLE_DEADLINE_S
    while True:
        try:
            urlopen(Request(f"{stub.url}/stub/reset", method="POST"), timeout=_TIMEOUT_S).close()
        except HTTPError as refused:
            with refused:
                if time.monotonic() > end_s:
                    raise RunError(f"the stub was not idle within {_IDLE_DEADLINE_S:g} s: {refused.read().decode()}") from None
            time.sleep(_RETRY_S)
        else:
            return


def path_added_ns(stub: Stub, cpus: Sequence[int], rate_qps: float) -> Int64s:
    """What each query of a blocking socket on ``cpus`` meets beyond the stub's own time: loopback, kernel, wake-ups; ns.

    Each finds the stub idle, after a pause like those of Poisson arrivals of ``rate_qps``.
    """
    forget_stamps(stub)
    times_ns = ping_pong_ns(stub.url, cpus, rate_qps=rate_qps, duration_s=_FLOOR_S)
    stamps = fetch_stamps(stub)
    added_ns: Int64s = np.array(times_ns) - (stamps["departure_ns"] - stamps["arrival_ns"])
    return added_ns


@dataclass(frozen=True, slots=True)
class Seen:
    """An arrival process as the server saw it, beside the Poisson process of the rate that was asked for."""

    arrivals: int
    rate_qps: float
    cv2: float  #: squared coefficient of variation of the gaps; Poisson: 1
    dispersion: float  #: variance / mean of the counts in windows of `ARRIVALS_PER_WINDOW` arrivals; Poisson: 1
    dispersion_error: float  #: standard deviation of that for a Poisson process, sqrt(2 / (windows - 1))
    ks_distance: float  #: Kolmogorov-Smirnov, gaps against the exponential distribution of the asked rate; Poisson: 0
    ks_critical: float  #: what 5 % of Poisson processes exceed, 1.358 / sqrt(gaps)


def see(arrival_ns: Int64s, asked_qps: float) -> Seen:
    """Describe ascending arrivals, ns of any clock. `ValueError` when fewer than `MIN_ARRIVALS` are left without the ends."""
    first_ns, last_ns = (int(arrival_ns[0]), int(arrival_ns[-1])) if len(arrival_ns) else (0, 0)
    trim_ns = round(TRIM_S * 1e9)
    kept_ns = arrival_ns[(arrival_ns >= first_ns + trim_ns) & (arrival_ns <= last_ns - trim_ns)]
    if len(kept_ns) < MIN_ARRIVALS:
        raise ValueError(f"{len(kept_ns)} arrivals are too few to tell their process, {MIN_ARRIVALS} are needed")
    gaps_ns = np.diff(kept_ns)
    mean_gap_ns = float(gaps_ns.mean())
    windows = len(gaps_ns) // ARRIVALS_PER_WINDOW
    edges_ns = kept_ns[0] + np.arange(windows + 1) * (ARRIVALS_PER_WINDOW * mean_gap_ns)
    counts = np.histogram(kept_ns, edges_ns)[0]
    return Seen(
        arrivals=len(kept_ns),
        rate_qps=1e9 / mean_gap_ns,
        cv2=float(gaps_ns.var()) / mean_gap_ns**2,
        dispersion=float(counts.var(ddof=1) / counts.mean()),
        dispersion_error=float(np.sqrt(2 / (windows - 1))),
        ks_distance=float(kstest(gaps_ns, "expon", args=(0, 1e9 / asked_qps), method="asymp").statistic),
        ks_critical=1.358 / float(np.sqrt(len(gaps_ns))),
    )
