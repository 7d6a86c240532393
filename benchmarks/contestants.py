"""Who is compared on the stub: servebench, and every peer that can ask it over HTTP, behind one call.

A peer sends Poisson arrivals where it can, else evenly spaced ones, else a closed loop. Peers that speak
neither protocol of the stubs, and those that are not installed, are left out with a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.arrivals_seen import Stub
from benchmarks.own_client import OwnRun, run_own
from benchmarks.peers import ready_peers
from benchmarks.peers.base import Arrivals, Load, Peer, PeerProtocol, Progress
from servebench.errors import RunError

#: How many queries may be outstanding. Of an open loop: more than a second's freeze makes wait. Evenly spaced
#: arrivals come from tools whose every connection waits for its reply before it keeps its pace again: six times what
#: is outstanding on average at 70 % load. A closed loop: enough to keep the server busy, and its queue short.
CONNECTIONS: dict[Arrivals, int] = {"poisson": 512, "constant": 16, "closed": 4}

_PREFERENCE: tuple[Arrivals, ...] = ("poisson", "constant", "closed")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a contestant says that it did."""

    percentiles: Mapping[float, int] | None  #: of what it calls latency: percentile (50, 99, 99.9) -> ns
    completed: int
    not_ok: int
    rate_qps: float  #: completed queries a second
    cpu_share: float  #: CPU seconds of all its processes a second of measurement
    own: OwnRun | None = None  #: servebench's records


class Contestant(Protocol):
    """A load generator that takes its turn."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def arrivals(self) -> Arrivals:
        """When it sends."""

    @property
    def protocol(self) -> PeerProtocol:
        """Which of the stubs it asks."""

    def send(self, stub: Stub, *, rate_qps: float, duration_s: float, cpus: Sequence[int], seed: int) -> Outcome:
        """Load a stub; ``rate_qps`` means nothing to a closed loop, ``seed`` only to ours. `ServebenchError` when it fails."""


@dataclass(frozen=True, slots=True)
class Own:
    """servebench's own client."""

    pacing: Literal["precise", "eco"] = "precise"
    arrivals: Arrivals = "poisson"
    protocol: PeerProtocol = "kserve-http"

    @property
    def name(self) -> str:
        """With the pacing, unless it is the default."""
        return "servebench" if self.pacing == "precise" else f"servebench {self.pacing}"

    def send(self, stub: Stub, *, rate_qps: float, duration_s: float, cpus: Sequence[int], seed: int) -> Outcome:
        """An ordinary run."""
        endpoint = {"model": stub.target.model, "tensor_format": "json"}
        run = run_own(
            stub.url,
            endpoint,
            rate_qps=rate_qps,
            duration_s=duration_s,
            cpus=cpus,
            pacing=self.pacing,
            schedule_seed=seed,
        )
        response = run.document["response_time"]["percentiles"]
        counts = run.document["counts"]
        return Outcome(
            percentiles={float(name): value for name, value in response.items() if value is not None},
            completed=counts["ok"],
            not_ok=run.not_ok,
            rate_qps=run.document["rates"]["completed_qps"],
            cpu_share=run.cpu_share,
            own=run,
        )


@dataclass(frozen=True, slots=True)
class PeerContestant:
    """A peer, with the way it is used here."""

    peer: Peer
    arrivals: Arrivals
    protocol: PeerProtocol

    @property
    def name(self) -> str:
        """The peer's own."""
        return self.peer.name

    def send(self, stub: Stub, *, rate_qps: float, duration_s: float, cpus: Sequence[int], seed: int) -> Outcome:
        """Let the peer run. `RunError` when it fails."""
        asked_qps = None if self.arrivals == "closed" else rate_qps
        result = self.peer.run(stub.target, Load(self.arrivals, asked_qps, CONNECTIONS[self.arrivals], duration_s, cpus))
        if result.duration_s <= 0:
            raise RunError(f"{self.name} measured for {result.duration_s:g} s")
        return Outcome(result.percentiles, result.completed, result.errors, result.rate_qps, result.cpu_s / result.duration_s)


def contestants(progress: Progress, *, quick: bool) -> list[Contestant]:
    """servebench first, then the peers that can take part, open loops before closed ones.

    ``quick`` leaves out those that speak only OpenAI's API: they take longer to start than to measure. ``progress`` is told who
    cannot take part, and what is being installed.
    """
    ready: dict[str, tuple[Peer, PeerProtocol]] = {}
    protocols: tuple[PeerProtocol, ...] = ("kserve-http",) if quick else ("kserve-http", "openai")
    for protocol in protocols:
        for peer in ready_peers(protocol, progress):
            ready.setdefault(peer.name, (peer, protocol))
    peers = [
        PeerContestant(peer, next(kind for kind in _PREFERENCE if kind in peer.arrivals), protocol)
        for peer, protocol in ready.values()
    ]
    return [Own(), *sorted(peers, key=lambda peer: _PREFERENCE.index(peer.arrivals))]
