"""A judged run as a page of text that a person reads in ten seconds: verdict, why, latencies, books, trust.

The input is ``run.json`` (schema ``servebench.run/1``). Keys that are missing leave their
line out, so runs of other versions still print. Every string is printed literally: a
server's error text can neither be markup nor reach the terminal as control codes.
"""

from __future__ import annotations

import math

_LABEL_WIDTH = 10
_PERCENTILES = ("50", "90", "95", "97", "99", "99.9", "99.99")
_SERIES = (("response_time", "response"), ("service_time", "service"), ("issue_delay", "issue delay"))
_VERDICT_STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "INVALID": "magenta"}
_TRUST_STYLES = {"VALID": "green", "DEGRADED": "yellow", "INVALID": "magenta"}
_MARKS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?"}
_ASCII_MARKS = {"PASS": "+", "FAIL": "x", "INCONCLUSIVE": "?"}
_ERROR_KINDS_SHOWN = 5
#: A gap between response and service time below this share of either the response time or the bound changes no decision.
_GAP_SHARE_OF_RESPONSE = 0.1
_GAP_SHARE_OF_BOUND = 0.01


def format_duration(value_ns: float, *, digits: int = 3) -> str:
    """``6_114_000`` -> ``"6.11 ms"``: us, ms or s, with ``digits`` significant digits (whole seconds keep all theirs)."""
    for unit, scale_ns in (("us", 1e3), ("ms", 1e6)):
        text = _significant(value_ns / scale_ns, digits)
        if abs(float(text)) < 1_000:
            return f"{text} {unit}"
    return f"{_significant(value_ns / 1e9, digits)} s"


def format_rate(per_second: float) -> str:
    """Queries per second with 4 significant digits or all whole ones: ``200/s``, ``198.7/s``, ``12346/s``."""
    text = _significant(per_second, 4)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}/s"


def format_share(share: float) -> str:
    """A fraction 0-1 as a percentage, to a millionth: ``0.1%``, ``99.9876%``."""
    return f"{share * 100:.4f}".rstrip("0").rstrip(".") + "%"


def _significant(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    whole_digits = math.floor(math.log10(abs(rounded))) + 1 if rounded else digits
    if whole_digits >= digits:
        return f"{value:.0f}"
    return f"{rounded:.{min(digits - whole_digits, digits)}f}"
