"""Numbers in sentences: short, with their unit, rounded to what a reader needs."""

from __future__ import annotations


def say_time(value_ns: float) -> str:
    """``38_214_000`` -> ``"38.2 ms"``: three significant digits in the largest fitting unit."""
    for unit, scale in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        if abs(value_ns) / scale < 999.5:
            return f"{value_ns / scale:.3g} {unit}"
    seconds = value_ns / 1e9
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"


def say_share(share: float) -> str:
    """A fraction 0-1 as a percentage with at most four decimals: ``0.000833`` -> ``"0.0833%"``."""
    return f"{100 * share:.4f}".rstrip("0").rstrip(".") + "%"


def say_rate(per_second: float) -> str:
    """Queries per second: ``198.65`` -> ``"198.7/s"``."""
    return f"{per_second:.1f}/s" if per_second < 1_000 else f"{per_second:.0f}/s"


def say_percentile(percentile: float) -> str:
    """The percentile as a key and a word: ``99.0`` -> ``"99"``, ``99.9`` -> ``"99.9"``."""
    return repr(float(percentile)).removesuffix(".0")
