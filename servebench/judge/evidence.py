"""What the rules of trust look at, and what they answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from servebench.constraint import Constraint
from servebench.judge.arrivals import ArrivalChecks
from servebench.judge.constraints import limit_ns
from servebench.judge.summary import Summary, quantile_of
from servebench.record.rundata import Run

Severity = Literal["DEGRADED", "INVALID"]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a measurement is trusted less, or not at all."""

    code: str  #: stable name of the rule
    severity: Severity
    text: str  #: one sentence that names the resource
    remedy: str  #: what to do about it
    measured: float | None = None  #: in the unit that the text says
    bound: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The entry of ``run.json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LatencyPromise:
    """A bound on single queries' latency, and the share of queries that may be over it."""

    text: str
    bound_ns: int
    budget: float  #: 0-1; 0 for a maximum


@dataclass(frozen=True, slots=True)
class Evidence:
    """One run, its numbers, and the promises that it was made to judge."""

    run: Run
    summary: Summary
    constraints: tuple[Constraint, ...]
    arrivals: ArrivalChecks

    @property
    def promises(self) -> list[LatencyPromise]:
        """The promises that the client's lateness could break, tightest bound first; those on its delay judge it already."""
        promises = [
            LatencyPromise(constraint.text, limit_ns(constraint), 1 - self._promised_share(constraint))
            for constraint in self.constraints
            if constraint.latency_bound_ns is not None and constraint.series != "delay"
        ]
        return sorted(promises, key=lambda promise: promise.bound_ns)

    def _promised_share(self, constraint: Constraint) -> float:
        """The share of queries, 0-1, that must be within the constraint's latency bound."""
        if constraint.percentile is not None and constraint.kind == "percentile":
            return quantile_of(constraint.percentile)
        if constraint.kind == "within":
            return constraint.bound
        if constraint.kind == "goodput":
            return min(1.0, constraint.bound / (self.summary.scheduled_qps or constraint.bound or 1.0))
        return 0.5 if constraint.kind == "mean" else 1.0  # a mean moves with the bulk of the queries, as a median does

    def client(self, name: str) -> Any:
        """A setting of the load generator (the profile's ``client`` section), None where it is not known."""
        return (self.run.section("profile").get("client") or {}).get(name)

    def worker_total(self, name: str) -> int:
        """Sum of one of the workers' statistics, over the workers that left any."""
        return sum(int((worker.get("stats") or {}).get(name) or 0) for worker in self.run.workers)
