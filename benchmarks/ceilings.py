"""The ceiling of servebench's client over one protocol, beside its peers', on one core: held, reported, and judged.

`benchmarks.ceiling` and `benchmarks.ceiling_grpc` say what a protocol's server, ladder, floors and targets are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.contest import Contest, Goal, Settings, hold
from benchmarks.entry import enter, need_cpus, say
from benchmarks.nghttpd import NullGrpcServer
from benchmarks.nginx import NullServer
from benchmarks.peers import ready_peers
from benchmarks.peers.base import PeerProtocol, Target
from benchmarks.report import write_result
from benchmarks.steps import header_line
from benchmarks.verdicts import announce, draw_contest, result_document


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What is asked of the client over one protocol."""

    name: str  #: of the benchmark, and of what it writes
    people: str  #: the protocol, for people
    protocol: PeerProtocol
    need_program: Callable[[], str]  #: the server's; raises `MachineLacks`
    server: Callable[[str, Sequence[int]], NullServer | NullGrpcServer]  #: of that program, on those CPUs
    target: Callable[[str], Target]  #: what peers ask, at the server's address
    ladder_qps: tuple[float, ...]
    first_rung: int
    floor_qps: int
    floors: tuple[Goal, ...]
    peers_required: bool  #: whether a floor is missed when its peer was not measured
    targets: tuple[Goal, ...]  #: wanted, and decide nothing
    version: int = 1  #: of the document that is written
    #: Saturated rates over OpenAI's API of peers that speak nothing else, of CPUs and settings; not asked when it is quick.
    openai_rates: Callable[[Sequence[int], Settings], dict[str, float]] | None = None

    def main(self, doc: str, argv: Sequence[str] | None) -> int:
        """Run the benchmark, whose module's text is ``doc``; returns the exit code."""
        return enter(self.measure, self.name, doc, argv, quick_help="one round of shorter runs, without open loops of peers")

    def settings(self, *, quick: bool) -> Settings:
        """How long and how often."""
        return Settings(
            rounds=1 if quick else 3,
            tries=3,
            step_s=1.5 if quick else 2.0,
            peer_s=2.0,
            shares=() if quick else (0.9, 0.6, 0.3),
            ladder_qps=self.ladder_qps,
            first_rung=self.first_rung,
        )

    def measure(self, *, quick: bool) -> int:
        """Hold the contest and report it."""
        program, cpus, settings = self.need_program(), need_cpus(), self.settings(quick=quick)
        peers = ready_peers(self.protocol, say)
        with self.server(program, cpus[:1]) as server:
            say(f"One core for each client in turn, another for {server.version}.\n{header_line(server.name)}")
            contest = hold(server, self.target(server.url), peers, cpus[-1:], settings, say=say)
        document = result_document(contest, server.version, quick=quick, floor_qps=self.floor_qps, floors=self.floors)
        openai: dict[str, float] = {}
        if self.openai_rates is not None:
            openai = document["openai_saturated_qps"] = {} if quick else self.openai_rates(cpus, settings)
        path = write_result(self.name, document, version=self.version)
        announce(contest, targets=self.targets, floors=self.floors, floor_qps=self.floor_qps)
        for name, rate_qps in openai.items():
            say(f"{name}, closed loop over OpenAI's API: {rate_qps:,.0f}/s")
        title = f"{self.people} queries a second on one core"
        draw_contest(contest, title, server.version, path.with_suffix(".png"), say)
        say(f"Written to {path}")
        return self.exit_code(contest)

    def exit_code(self, contest: Contest) -> int:
        """0 when the floors are met, else 1."""
        clean = contest.clean_qps
        enough = clean is not None and clean.median >= self.floor_qps
        return 0 if enough and contest.meets(self.floors, required=self.peers_required) else 1
