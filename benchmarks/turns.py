"""Contestants take turns until the time is spent; what a peer does wrong costs its turn, not the benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.contestants import Contestant, Own
from servebench.errors import RunError

T = TypeVar("T")

_SLOW = 1.5


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """Something to do for one contestant."""

    label: str  #: beside the contestant's name, in lines for those who watch
    contestant: Contestant
    take: Callable[[], T]


def take_turns(plan: Iterable[Turn[T]], *, time_s: float, guess_s: float, tell: Callable[[T], str]) -> list[T]:
    """Take the turns in order and print a line on each, ``tell`` of what it found; returns what was found.

    A turn is left out when it would end later than ``time_s`` from now, by what the contestant's last turn
    took, ``guess_s`` at first. A contestant that takes `_SLOW` times what was guessed, for its start or end, has
    only one turn of each label. `ServebenchError` when a run of servebench's own fails.
    """
    begin_s = time.monotonic()
    took_s: dict[str, float] = {}
    taken: set[tuple[str, str]] = set()
    found: list[T] = []
    skipped: list[str] = []
    for turn in plan:
        name, label = turn.contestant.name, f"{turn.contestant.name}, {turn.label}"
        started_s = time.monotonic()
        expected_s = took_s.get(name, guess_s)
        again = (name, turn.label) in taken
        if started_s - begin_s + expected_s > time_s or (again and expected_s > _SLOW * guess_s):
            skipped.append(label)
            continue
        try:
            result = turn.take()
        except (RunError, OSError, ValueError) as error:  # a peer's failure, or a report of its that cannot be read
            if isinstance(turn.contestant, Own):
                raise
            print(f"{label}: {error}", flush=True)
            continue
        finally:
            took_s[name] = time.monotonic() - started_s
        taken.add((name, turn.label))
        found.append(result)
        print(f"{label}: {tell(result)}", flush=True)
    if skipped:
        print(f"There was no time for {len(skipped)} turns: {'; '.join(dict.fromkeys(skipped))}")
    return found


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells, the head first, as a Markdown table, in columns as wide as their widest cell."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    head, *rest = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["-" * width for width in widths], *rest))
