"""A contest on one core: servebench's ceiling beside every peer's, in turns, against one null server on another core.

What each contestant is asked, in every round if nothing else is said:

- servebench climbs a ladder of Poisson rates; the last clean step (see `benchmarks.steps`) is its
  clean rate. Then it is asked for far more than it can send, over few connections; what was answered
  by the end of the schedule is its saturated rate.
- A peer runs its closed loop: its saturated rate. A peer that has an open loop is then asked for
  shares of that rate, the largest first, evenly spaced where it can; the first rate of which it delivers
  `MIN_DELIVERED_SHARE` without an error is its open rate. Nothing is asked about its punctuality, which
  only servebench measures: this is in the peers' favour.

Ratios are taken within a round, so that what a shared machine does to a round, it does to both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from benchmarks.peers.base import Arrivals, Load, Peer, PeerResult, Target
from benchmarks.report import Spread, rate_text, ratio_text
from benchmarks.steps import Server, Step, climb, measure_saturated_qps, measure_step, step_line
from benchmarks.turns import text_table
from servebench.errors import RunError

OURS = "servebench"
#: Which of our rates is meant.
Ours = Literal["clean", "saturated"]
CONNECTIONS = 16
MIN_DELIVERED_SHARE = 0.995
END_S = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how often."""

    rounds: int
    tries: int  #: how often a rung may fail before it counts as not clean
    step_s: float  #: of each of our runs, after `benchmarks.steps.WARMUP_S`
    peer_s: float  #: of each of a peer's
    shares: tuple[float, ...]  #: of its saturated rate that a peer's open loop is asked for, falling
    ladder_qps: tuple[float, ...]
    first_rung: int  #: where the first round begins to climb; it goes down from there if need be


@dataclass(frozen=True, slots=True)
class Goal:
    """Our clean or saturated rate is to be at least so many times a peer's saturated one."""

    ours: Ours
    peer: str
    least: float


@dataclass(slots=True)
class Figures:
    """What was found of one contestant, a value a round; rounds without one are left out."""

    saturated_qps: dict[int, float] = field(default_factory=dict)  #: round -> rate
    open_qps: dict[int, float] = field(default_factory=dict)  #: servebench's clean rate, or a peer's delivered one
    errors: int = 0
    commands: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Contest:
    """All that was found, by contestant; ours comes first."""

    figures: dict[str, Figures] = field(default_factory=lambda: {OURS: Figures()})
    steps: list[Step] = field(default_factory=list)

    @property
    def clean_qps(self) -> Spread | None:
        """Our clean rate; a round without a clean step counts as 0. None before the first round."""
        return Spread.of(list(self.figures[OURS].open_qps.values()))

    def ratio(self, ours: Ours, peer: str) -> Spread | None:
        """Our clean or saturated rate over the peer's saturated one, within a round; None without a common round."""
        mine = self.figures[OURS]
        rates = mine.open_qps if ours == "clean" else mine.saturated_qps
        theirs = self.figures[peer].saturated_qps if peer in self.figures else {}
        return Spread.of([rates[number] / theirs[number] for number in rates.keys() & theirs.keys()])

    def meets(self, goals: Sequence[Goal], *, required: bool) -> bool:
        """Whether the median ratios reach all goals.

        A peer that was not measured fails its goal only if that is ``required``.
        """
        ratios = [(self.ratio(goal.ours, goal.peer), goal.least) for goal in goals]
        return all(not required if ratio is None else ratio.median >= least for ratio, least in ratios)


def hold(
    server: Server,
    target: Target,
    peers: Sequence[Peer],
    cpus: Sequence[int],
    settings: Settings,
    *,
    say: Callable[[str], None],
) -> Contest:
    """Hold a contest of servebench and ``peers`` on ``cpus``; ``say`` gets a line on each run.

    `ServebenchError` when a run of servebench's own fails; a peer's failure costs only its place.
    """
    contest = Contest()
    start = settings.first_rung
    for number in range(settings.rounds):
        say(f"Round {number + 1} of {settings.rounds}")
        start = _our_turn(contest, number, server, cpus, settings, start, say)
        for peer in peers:
            figures = contest.figures.setdefault(peer.name, Figures())
            try:
                _peers_turn(figures, number, peer, target, cpus, settings, say)
            except RunError as error:
                say(f"  {peer.name}: {error}")
    return contest


def _our_turn(
    contest: Contest,
    number: int,
    server: Server,
    cpus: Sequence[int],
    settings: Settings,
    start: int,
    say: Callable[[str], None],
) -> int:
    """One round of ours; returns the rung where the next one starts."""

    def seen(step: Step) -> None:
        contest.steps.append(step)
        say(step_line(step))

    def measure(rate_qps: float) -> Step:
        return measure_step(server, cpus, rate_qps, duration_s=settings.step_s)

    rates = settings.ladder_qps
    best = climb(measure, rates, seen, tries=settings.tries, start=start)
    figures = contest.figures[OURS]
    figures.open_qps[number] = best.target_qps if best else 0.0
    figures.saturated_qps[number] = measure_saturated_qps(server, cpus, duration_s=settings.step_s)
    say(f"  {OURS}: clean at {figures.open_qps[number]:,.0f}/s, saturated at {figures.saturated_qps[number]:,.0f}/s")
    # A rung below the last clean one: a round that was lucky must not be the next one's start.
    return max(0, rates.index(best.target_qps) - 1) if best else 0


def _peers_turn(
    figures: Figures,
    number: int,
    peer: Peer,
    target: Target,
    cpus: Sequence[int],
    settings: Settings,
    say: Callable[[str], None],
) -> None:
    load = Load("closed", None, CONNECTIONS, settings.peer_s, cpus)
    closed = peer.run(target, load)
    figures.commands.append(closed.command)
    figures.errors += closed.errors
    if closed.errors or not closed.completed:
        raise RunError(f"{closed.errors:,} of its queries failed, {closed.completed:,} were answered: no rate")
    figures.saturated_qps[number] = closed.rate_qps
    say(f"  {peer.name}: closed loop {closed.rate_qps:,.0f}/s")
    arrivals = open_arrivals(peer)
    if arrivals is None:
        return
    for share in settings.shares:
        rate_qps = float(round(share * closed.rate_qps))
        opened = peer.run(target, replace(load, arrivals=arrivals, rate_qps=rate_qps))
        delivered = delivered_share(opened, rate_qps, settings.peer_s)
        say(f"  {peer.name}: asked for {rate_qps:,.0f}/s {arrivals}, delivered {delivered:.1%}, {opened.errors:,} errors")
        if delivered >= MIN_DELIVERED_SHARE and not opened.errors:
            figures.open_qps[number] = rate_qps
            figures.commands.append(opened.command)
            return


def delivered_share(result: PeerResult, rate_qps: float, asked_s: float) -> float:
    """How much of an open loop's plan was answered; the last replies may come up to `END_S` after the time asked for."""
    if asked_s <= result.duration_s <= asked_s + END_S:
        return result.completed / (rate_qps * asked_s)
    return result.rate_qps / rate_qps


def open_arrivals(peer: Peer) -> Arrivals | None:
    """The open loop that a peer has; evenly spaced arrivals rather than Poisson ones, whose number is random."""
    kinds: tuple[Arrivals, ...] = ("constant", "poisson")
    return next((kind for kind in kinds if kind in peer.arrivals), None)


def table(contest: Contest) -> str:
    """The contest as text: rates a second, medians with the outermost rounds, ratios of ours to each."""
    lines = [["", "saturated/s", "open loop/s", "our clean rate / its saturated", "our saturated / its saturated"]]
    for name, figures in contest.figures.items():
        lines.append(
            [
                name,
                rate_text(Spread.of(list(figures.saturated_qps.values()))),
                rate_text(Spread.of(list(figures.open_qps.values()))),
                ratio_text(contest.ratio("clean", name)),
                ratio_text(contest.ratio("saturated", name)) if name != OURS else "",
            ]
        )
    return text_table(lines)
