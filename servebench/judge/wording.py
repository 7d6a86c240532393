"""Numbers in sentences: short, with their unit, rounded to what a reader needs."""

from __future__ import annotations

import math
from typing import Literal

Unit = Literal["ns", "share", "qps"]
_MOST_DIGITS = 17  #: any two different doubles differ in these


def say_time(value_ns: float, digits: int = 3) -> str:
    """``6_100_000`` -> ``"6.10 ms"``: us, ms or s, with that many significant digits; zeros are kept, so columns line up."""
    for unit, scale_ns in (("us", 1e3), ("ms", 1e6)):
        text = significant(value_ns / scale_ns, digits)
        if abs(float(text)) < 1_000:
            return f"{text} {unit}"
    return f"{significant(value_ns / 1e9, digits, ',')} s"


def say_share(share: float, digits: int = 3) -> str:
    """A fraction 0-1 as a percentage: ``0.063022`` -> ``"6.3%"``.

    Above a half the digits are those of what is missing, one fewer: ``0.99953`` -> ``"99.953%"``, and only all is ``"100%"``.
    """
    missing = 0.5 < share < 1
    part = 100 * (1 - share if missing else share)
    decimals = max(digits - missing - 1 - math.floor(math.log10(part)), 0) if part else 0
    text = f"{100 * share:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def say_rate(per_second: float, digits: int = 4) -> str:
    """Queries per second, that many significant digits or all whole ones: ``200/s``, ``198.7/s``, ``12,346/s``."""
    return f"{say_number(per_second, digits)}/s"


def say_number(value: float, digits: int = 4) -> str:
    """A rate without its unit: ``"198.7"``."""
    text = significant(value, digits, ",")
    return text.rstrip("0").rstrip(".") if "." in text else text


def say_measured(measured: float, unit: Unit, bound: float | None) -> str:
    """A measured value in its unit, with as many digits as it takes to tell it from the bound."""
    say, fewest = {"ns": (say_time, 3), "share": (say_share, 3), "qps": (say_rate, 4)}[unit]
    if bound is None or measured == bound:
        return say(measured, fewest)
    told_apart = (digits for digits in range(fewest, _MOST_DIGITS) if say(measured, digits) != say(bound, digits))
    return say(measured, next(told_apart, _MOST_DIGITS))


def say_queries(count: int) -> str:
    """``"1 query"``, ``"4,031 queries"``."""
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def say_percentile(percentile: float) -> str:
    """The percentile as a key and a word: ``99.0`` -> ``"99"``, ``99.9`` -> ``"99.9"``."""
    return repr(float(percentile)).removesuffix(".0")


def significant(value: float, digits: int, separator: Literal["", ","] = "") -> str:
    """Fixed-point with that many significant digits, or with all whole ones, whose thousands may be separated."""
    rounded = float(f"{value:.{digits}g}")
    whole_digits = math.floor(math.log10(abs(rounded))) + 1 if rounded else digits
    if whole_digits >= digits:
        return f"{value:{separator}.0f}"
    return f"{rounded:{separator}.{min(digits - whole_digits, digits)}f}"
