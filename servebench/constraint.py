"""The constraint grammar: one line of text, one frozen value.

    [response.|service.|delay.]p<percentile>   <|<=  <time>      p99 <= 50ms     service.p50 < 8ms
    [response.|service.|delay.](mean|max)      <|<=  <time>      response.max < 1s
    errors                                     <|<=  <share>     errors < 0.1%
    completed                                  >|>=  <share>     completed >= 99%
    [response.|service.|delay.]within(<time>)  >|>=  <share>     within(50ms) >= 99%
    goodput(<time>)                            >|>=  <rate>      goodput(50ms) >= 380/s

Times carry a unit (ns, us, ms, s), shares a percent sign, rates ``/s``. Numbers are plain
decimals of at most 15 digits on either side of the point. Percentiles are 0-100
exclusive. ``response`` (completed - scheduled) is the default series.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

Series = Literal["response", "service", "delay"]
Kind = Literal["percentile", "mean", "max", "errors", "completed", "within", "goodput"]
Op = Literal["<", "<=", ">", ">="]

_TIME_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"  # what a double can hold
_LINE = re.compile(r"^\s*(?P<subject>.+?)\s*(?P<op><=|>=|<|>)\s*(?P<bound>.+?)\s*$")
_SUBJECT = re.compile(
    r"^(?:(?P<series>[a-z]+)\.)?(?:p(?P<percentile>[0-9]{1,15}(?:\.[0-9]{1,15})?)|(?P<word>[a-z]+)(?:\((?P<argument>[^)]*)\))?)$"
)
_EXAMPLES = (
    "p99 <= 50ms, response.p99.9 < 80ms, service.p50 < 8ms, mean < 20ms, max < 1s, "
    "errors < 0.1%, completed >= 99%, within(50ms) >= 99%, goodput(50ms) >= 380/s"
)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One promise. ``bound`` is in ns for times, a fraction 0-1 for shares, 1/s for rates."""

    text: str
    kind: Kind
    series: Series
    op: Op
    bound: float
    percentile: float | None = None  #: 0-100, for ``percentile``
    latency_bound_ns: int | None = None  #: the time that over-latency is counted against, where there is one


def parse_time_ns(text: str) -> int:
    """``"50ms"`` -> 50_000_000. `ValueError` says what is allowed."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([a-zA-Zµ%/]*)\s*", text)
    if match is None or match[2] not in _TIME_UNITS:
        found = f"unit {match[2]!r}" if match and match[2] else repr(text.strip())
        raise ValueError(f"{found} is not a time; write a number with ns, us, ms or s, e.g. 50ms")
    return int(Decimal(match[1]) * _TIME_UNITS[match[2]])


def parse_constraint(text: str) -> Constraint:
    """Read one constraint; `ValueError` names what was found and what is allowed."""
    line = _LINE.match(text)
    if line is None:
        raise ValueError(f"{text!r} is not a constraint; write for example: {_EXAMPLES}")
    subject = _SUBJECT.match(line["subject"])
    if subject is None:
        raise ValueError(f"{line['subject']!r} is not something to constrain; write for example: {_EXAMPLES}")
    op = cast(Op, line["op"])
    canonical = f"{line['subject']} {op} {line['bound']}"
    word, series_text = subject["word"], subject["series"]
    if series_text not in (None, "response", "service", "delay"):
        raise ValueError(f"{series_text!r} is not a series; allowed: response, service, delay")
    series = cast(Series, series_text or "response")

    if subject["percentile"] is not None:
        percentile = float(subject["percentile"])
        if not 0 < percentile < 100:
            largest = "; max is the largest" if percentile >= 100 else ""
            raise ValueError(f"percentile {subject['percentile']} is not between 0 and 100 (exclusive){largest}")
        _require_op(op, ("<", "<="), canonical)
        bound_ns = parse_time_ns(line["bound"])
        return Constraint(canonical, "percentile", series, op, bound_ns, percentile, bound_ns)
    if word in ("mean", "max") and subject["argument"] is None:
        _require_op(op, ("<", "<="), canonical)
        bound_ns = parse_time_ns(line["bound"])
        return Constraint(canonical, cast(Kind, word), series, op, bound_ns, None, bound_ns)
    if word in ("errors", "completed") and subject["argument"] is None:
        if series_text is not None:
            raise ValueError(f"{word!r} has no series; write {word} without {series_text!r}")
        _require_op(op, ("<", "<=") if word == "errors" else (">", ">="), canonical)
        return Constraint(canonical, cast(Kind, word), series, op, _parse_share(line["bound"]))
    if word in ("within", "goodput") and subject["argument"] is not None:
        if word == "goodput" and series_text is not None:
            raise ValueError("goodput judges response time; write goodput without a series")
        _require_op(op, (">", ">="), canonical)
        latency_ns = parse_time_ns(subject["argument"])
        bound = _parse_share(line["bound"]) if word == "within" else _parse_rate(line["bound"])
        percentile_of_share = bound * 100 if word == "within" and 0 < bound < 1 else None
        return Constraint(canonical, cast(Kind, word), series, op, bound, percentile_of_share, latency_ns)
    raise ValueError(f"{line['subject']!r} is not something to constrain; write for example: {_EXAMPLES}")


def _require_op(op: Op, allowed: tuple[str, str], text: str) -> None:
    if op not in allowed:
        raise ValueError(f"{text!r} points the wrong way; allowed here: {allowed[0]} and {allowed[1]}")


def _parse_share(text: str) -> float:
    match = re.fullmatch(rf"{_NUMBER}\s*%", text)
    if match is None:
        raise ValueError(f"{text!r} is not a share; write a percentage, e.g. 0.1%")
    share = float(Decimal(match[1]) / 100)
    if share > 1:
        raise ValueError(f"{text!r} is over 100%")
    return share


def _parse_rate(text: str) -> float:
    match = re.fullmatch(rf"{_NUMBER}\s*/\s*s", text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write queries per second, e.g. 380/s")
    return float(match[1])
