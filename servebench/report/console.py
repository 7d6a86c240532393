"""A judged run as a page of text that a person reads in ten seconds: verdict, why, latencies, books, trust.

The input is ``run.json`` (schema ``servebench.run/1``). A part that is missing leaves its
lines out, so runs of other versions still print. Every string is printed literally: a
server's error text can neither be markup nor reach the terminal as control codes.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from servebench.judge.summary import percentile_index
from servebench.judge.wording import say_measured, say_number, say_percentile, say_queries, say_rate, say_share, say_time

_STYLES = {
    "PASS": "green",
    "FAIL": "red",
    "INCONCLUSIVE": "yellow",
    "INVALID": "magenta",
    "VALID": "green",
    "DEGRADED": "yellow",
}
_MARKS = {"PASS": "✓", "FAIL": "✗", "INCONCLUSIVE": "?", "INVALID": "✗", "DEGRADED": "!"}
_ASCII_MARKS = {**_MARKS, "PASS": "+", "FAIL": "x", "INVALID": "x"}
_SERIES = (("response_time", "response"), ("service_time", "service"), ("issue_delay", "issue delay"))
_LABEL_WIDTH = 10
_COLUMN_WIDTH = 13
_MAX_TEXT_WIDTH = 110  #: longer lines are hard to read, however wide the terminal
_COUNTED = "[num]?s|query|queries|process(?:es)?|torch|CPUs?"  #: words that stay with the number before them
_ERRORS_SHOWN = 5
_DETAIL_CHARACTERS = 300
#: Response time that is not service time matters from this share of the response time on, unless it is tiny against the bound.
_GAP_SHARE_OF_RESPONSE = 0.1
_GAP_SHARE_OF_BOUND = 0.01
#: What servers' error texts leave unsaid.
_HINTS = {"has no worker to serve inference request": "TorchServe says so also of a full queue, see its job_queue_size"}
#: Rules of trust that say why queries were not issued as planned.
_ISSUE_CODES = ("arrivals", "achieved_rate", "lateness", "loop_stall", "connection_cap", "connection_opening")


def format_duration(value_ns: float) -> str:
    """``6_100_000`` -> ``"6.10 ms"``: us, ms or s, three significant digits, zeros kept so that columns line up."""
    return say_time(value_ns)


def format_rate(per_second: float) -> str:
    """Queries per second, four significant digits or all whole ones: ``200/s``, ``198.7/s``, ``12,346/s``."""
    return say_rate(per_second)


def render(run: Mapping[str, Any], *, console: Console, directory: Path | None = None) -> None:
    """Print a ``run.json`` document. ``directory`` is where it lies, for the hints at the end."""
    page = _Page(console)
    page.headline(run.get("verdict") or "INVALID", _promise(run))
    page.line()
    if run.get("verdict") == "INVALID":
        _print_trust_reasons(page, run)
        page.line()
        page.line("What was measured, not to be relied on:")
    _print_constraints(page, run)
    _print_latencies(page, run)
    page.line()
    _print_books(page, run)
    _print_errors(page, run)
    _print_rates(page, run)
    _print_checks(page, run)
    _print_trust(page, run)
    if about := _server_facts(run.get("server") or {}):
        page.item("Server", about)
    if directory is not None:
        page.literal("Run", f"{directory}")
        page.literal("Again", f"servebench report {shlex.quote(str(directory))}")


def render_server(described: Mapping[str, Any], *, console: Console, indent: int) -> None:
    """Print what the report says of a server, from its own description, behind a label ``indent`` characters wide."""
    if about := _server_facts(described):
        _Page(console).item("server", about, style="none", indent=indent)


class _Page:
    """Prints lines no longer than the console is wide, broken between words and never between a number and its unit."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = max(40, min(console.width, _MAX_TEXT_WIDTH))
        self._marks = _ASCII_MARKS if console.options.ascii_only else _MARKS

    def line(self, text: str = "", style: str = "") -> None:
        """One line as it is."""
        self._print(Text(self._printable(text), style))

    def headline(self, verdict: str, text: str) -> None:
        """The verdict, and the promise in words."""
        first, *rest = self._wrapped(text, len(verdict) + 2)
        self._print(Text.assemble((verdict, f"bold reverse {_STYLES.get(verdict, '')}"), "  ", (first, "bold")))
        for line in rest:
            self._print(Text(" " * (len(verdict) + 2) + line, "bold"))

    def item(self, label: str, text: str, *, style: str = "", indent: int = _LABEL_WIDTH) -> None:
        """A label and its text, continued under itself."""
        first, *rest = self._wrapped(text, indent)
        self._print(Text.assemble((f"{label:<{indent}}", style or "bold"), first))
        for line in rest:
            self._print(Text(" " * indent + line))

    def marked(self, result: str, text: str) -> None:
        """A finding behind its coloured mark."""
        self.item(f" {self._marks.get(result, '?')} ", text, style=f"bold {_STYLES.get(result, '')}", indent=3)

    def literal(self, label: str, text: str) -> None:
        """A label and something to copy: never broken, however long."""
        self._print(Text.assemble((f"{label:<{_LABEL_WIDTH}}", "bold"), self._printable(text)))

    def _wrapped(self, text: str, indent: int) -> list[str]:
        glued = re.sub(rf"(?<=\d) (?=(?:{_COUNTED})\b)", "\N{NO-BREAK SPACE}", self._printable(text))
        lines = textwrap.wrap(glued, self._width - indent, break_on_hyphens=False) or [""]
        return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]

    def _printable(self, text: str) -> str:
        """Control characters and what the console cannot encode, as escapes."""
        text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)

    def _print(self, text: Text) -> None:
        text.rstrip()
        self._console.print(text, soft_wrap=True)


def _promise(run: Mapping[str, Any]) -> str:
    """The sentence after the verdict: the constraint that decided it, the rate, what was measured."""
    verdict, trust = run.get("verdict"), run.get("trust") or {}
    headline = (run.get("early_stopping") or {}).get("constraint")
    deciding = [item for item in run.get("constraints") or [] if verdict in ("INVALID", item.get("result"))]
    deciding.sort(key=lambda item: item.get("text") != headline)  # stable: the headline first, then the profile's order
    if not deciding:
        return "no constraint was judged"
    first = deciding[0]
    target_qps = (run.get("rates") or {}).get("target_qps")
    text = f"{first.get('text')}{f' at {say_number(target_qps)} queries/s' if target_qps else ''}"
    if verdict == "INVALID":
        return f"{text}: unknown, the run cannot be trusted"
    text += f": {_measured(first, run)}"
    if verdict == "FAIL" and len(deciding) > 1:
        text += f", and {len(deciding) - 1} more broken"
    if verdict == "INCONCLUSIVE":
        needed = max(item.get("needed_queries") or 0 for item in deciding)
        text += f", but needs at least {needed:,} more queries"
    if trust.get("verdict") == "DEGRADED":
        text += " (trust is DEGRADED, see below)"
    return text


def _print_constraints(page: _Page, run: Mapping[str, Any]) -> None:
    for item in run.get("constraints") or []:
        result = item.get("result") or ""
        reason = item.get("reason") or f"{item.get('text')}: {_measured(item, run)}"
        page.marked(result, reason)


def _print_latencies(page: _Page, run: Mapping[str, Any]) -> None:
    blocks = [(run.get(key) or {}, name) for key, name in _SERIES]
    if not any(block.get("count") for block, _ in blocks):
        return
    percentiles = _telling_percentiles(run, [block for block, _ in blocks])
    stopping = run.get("early_stopping") or {}
    headline = say_percentile(stopping["percentile"]) if stopping.get("percentile") is not None else None
    page.line()
    page.line(" " * _LABEL_WIDTH + "".join(f"{name:>{_COLUMN_WIDTH}}" for _, name in blocks), "bold")
    for key in percentiles:
        cells = "".join(f"{_percentile_cell(block, key):>{_COLUMN_WIDTH}}" for block, _ in blocks)
        page.line(f"  {f'p{key}':<{_LABEL_WIDTH - 2}}{cells}", "bold" if key == headline else "")
    for name in ("max", "mean"):
        cells = "".join(f"{_cell(block.get(f'{name}_ns')):>{_COLUMN_WIDTH}}" for block, _ in blocks)
        page.line(f"  {name:<{_LABEL_WIDTH - 2}}{cells}")
    response = blocks[0][0]
    if response.get("infinite"):
        others = "; max and mean are of the others" if response["infinite"] < response["count"] else ""
        none = f"{response['infinite']:,} of {say_queries(response['count'])} have no latency{_never_sent(run)}"
        page.item("", f"{none} and count as over every bound{others}.", indent=2)
    if gap := _gap(run, headline or "99", stopping.get("latency_bound_ns")):
        page.item("", gap, indent=2)


def _telling_percentiles(run: Mapping[str, Any], blocks: Iterable[Mapping[str, Any]]) -> list[str]:
    """The percentiles to show: those that are promised, and of the others those that are not merely the slowest query."""
    keys = {key for block in blocks for key in block.get("percentiles") or {}}
    promises = [re.match(r"(?:\w+\.)?p([\d.]+)", item.get("text") or "") for item in run.get("constraints") or []]
    promised = {say_percentile(float(match[1])) for match in promises if match}
    count = (run.get("response_time") or {}).get("count") or 0
    return sorted((key for key in keys if key in promised or percentile_index(count, float(key)) < count - 1), key=float)


def _never_sent(run: Mapping[str, Any]) -> str:
    shed = (run.get("counts") or {}).get("shed")
    return f" ({shed:,} never sent)" if shed else ""


def _gap(run: Mapping[str, Any], percentile: str, bound_ns: int | None) -> str | None:
    """What keeps service time below response time, where that matters."""
    response, service = (
        ((run.get(key) or {}).get("percentiles") or {}).get(percentile) for key in ("response_time", "service_time")
    )
    if response is None or service is None:
        return None
    gap_ns = response - service
    if gap_ns <= _GAP_SHARE_OF_RESPONSE * response or gap_ns <= _GAP_SHARE_OF_BOUND * (bound_ns or 0):
        return None
    longest = (run.get("issue_delay") or {}).get("max_ns")
    waited = f"waited up to {format_duration(longest)}" if longest else "waited"
    return (
        f"At p{percentile} service is {format_duration(gap_ns)} smaller than response: queries {waited} in the client "
        "before they were sent. Users would feel that wait, so response is judged."
    )


def _print_books(page: _Page, run: Mapping[str, Any]) -> None:
    counts = run.get("counts")
    if not counts:
        return
    never = ("shed", "not_due") if counts.get("not_due") else ("shed",)
    page.item("Queries", _equation(counts, "planned", ("issued", *never)))
    page.item("", _equation(counts, "issued", ("ok", "error", "timeout", "unfinished")))


def _equation(counts: Mapping[str, Any], total: str, parts: Iterable[str]) -> str:
    values = {name: counts.get(name) or 0 for name in (total, *parts)}
    sign = "=" if values[total] == sum(values[name] for name in parts) else "IS NOT"
    return f"{total} {values[total]:,} {sign} " + " + ".join(f"{name.replace('_', ' ')} {values[name]:,}" for name in parts)


def _print_errors(page: _Page, run: Mapping[str, Any]) -> None:
    errors = run.get("errors") or []
    for number, error in enumerate(errors[:_ERRORS_SHOWN]):
        detail = _cut(" ".join(str(error.get("detail") or "").split()))
        detail += "".join(f" [{hint}]" for known, hint in _HINTS.items() if known in detail)
        example = f" (e.g. query {error['example']})" if error.get("example") is not None else ""
        text = f"{error.get('count') or 0:,} x {error.get('kind')}{': ' if detail else ''}{detail}{example}"
        page.item("" if number else "Errors", text, style="bold red")
    if len(errors) > _ERRORS_SHOWN:
        page.item("", f"and {len(errors) - _ERRORS_SHOWN} more kinds, see run.json")


def _print_rates(page: _Page, run: Mapping[str, Any]) -> None:
    """The rates, and the time that each is over: ``scheduled 200, issued 200 over 20.0 s; completed 190 over 21.0 s``."""
    rates, counts, delay = run.get("rates") or {}, run.get("counts") or {}, run.get("issue_delay") or {}
    bound_ns = (run.get("early_stopping") or {}).get("latency_bound_ns")
    parts: list[tuple[str, str]] = []  # and the time that each is over
    for name, queries in (  # the target is in the headline
        ("scheduled", counts.get("planned")),
        ("issued", (delay.get("count") or 0) - (delay.get("infinite") or 0)),
        ("completed", counts.get("ok")),
        ("goodput", None),  # over the same time as completed
    ):
        rate = rates.get(f"{name}_qps")
        if rate is None:
            continue
        before = parts[-1][1] if parts else ""
        bound = f"({say_time(bound_ns)})" if name == "goodput" and bound_ns else ""
        # A rate encloses one gap fewer than queries.
        parts.append(
            (f"{name}{bound} {say_number(rate)}", say_time((queries - 1) / rate * 1e9) if queries and rate else before)
        )
    stretches = [(over, ", ".join(text for text, _ in group)) for over, group in groupby(parts, key=itemgetter(1))]
    if stretches:
        page.item("Rates/s", "; ".join(f"{text} over {over}" if over else text for over, text in stretches))


def _print_checks(page: _Page, run: Mapping[str, Any]) -> None:
    check = run.get("output_check") or {}
    if "checked" in check:
        golden = " against golden outputs" if check.get("golden") else ""
        page.item("Replies", f"{check['checked']:,} checked{golden}, {check.get('wrong') or 0:,} wrong")
    validity, stopping = run.get("loadgen_validity"), run.get("early_stopping") or {}
    if validity is not None:
        unmet = [name.removesuffix("_met").replace("_", " ") for name, met in validity.items() if name != "valid" and not met]
        text = f"LoadGen would say {'INVALID: ' if unmet else 'VALID'}{', '.join(unmet)}"
        if stopping.get("estimate_ns") is not None:
            percentile, confidence = say_percentile(stopping["percentile"]), say_share(stopping.get("confidence") or 0)
            text += f"; p{percentile} <= {format_duration(stopping['estimate_ns'])} with {confidence} confidence"
        page.item("MLPerf", text)


def _print_trust(page: _Page, run: Mapping[str, Any]) -> None:
    trust, schedule = run.get("trust") or {}, run.get("schedule") or {}
    if trust.get("verdict"):
        page.item("Trust", trust["verdict"])
    if run.get("verdict") != "INVALID":  # else they stand at the top
        _print_trust_reasons(page, run)
    if schedule.get("checks"):
        codes = [reason.get("code") for reason in trust.get("reasons") or []]
        page.item("Arrivals", _arrivals(schedule.get("arrivals") or "", schedule["checks"], codes))


def _print_trust_reasons(page: _Page, run: Mapping[str, Any]) -> None:
    for reason in (run.get("trust") or {}).get("reasons") or []:
        remedy = f"; {reason['remedy']}" if reason.get("remedy") else ""
        page.marked(reason.get("severity") or "", f"{reason.get('code')}: {reason.get('text')}{remedy}.")


def _server_facts(server: Mapping[str, Any]) -> str:
    """The server in one sentence: what it is, where and how it computes, which weights it has; only what is known.

    Servers and launchers of others describe themselves as they like, so nothing is taken to be there.
    """
    itself, threads, weights = (_mapping(server.get(key)) for key in ("metadata", "threads", "weights"))
    name = server.get("name") or itself.get("name") or server.get("launch")
    what = " ".join(str(word) for word in (name, server.get("version") or itself.get("version")) if word)
    if server.get("launch") is None and server.get("url"):
        what += f" at {server['url']}"
    if server.get("device"):
        what += f" on {server['device']}" + (f" ({server['device_reason']})" if server.get("device_reason") else "")
    parts = [", ".join(str(word) for word in (what, server.get("precision")) if word), server.get("service")]
    if server.get("device") == "cpu" and {"processes", "each", "cpus"} <= threads.keys():
        each = _several(threads["each"], "torch thread")
        parts.append(f"{_several(threads['processes'], 'process', 'es')} x {each} on {_several(threads['cpus'], 'CPU')}")
    if weights.get("origin"):
        parts.append(f"weights: {weights['origin']}")
    return _cut("; ".join(str(part).strip() for part in parts if part))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _several(count: object, noun: str, ending: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else ending}"


def _cut(text: str) -> str:
    """What somebody else says, no longer than a reader bears."""
    return text if len(text) <= _DETAIL_CHARACTERS else text[:_DETAIL_CHARACTERS] + " ..."


def _arrivals(claimed: str, checks: Mapping[str, Any], codes: Iterable[str | None]) -> str:
    """The arrival tests in one line: two p-values, then what is 1 for Poisson (IDC: index of dispersion, by window size)."""
    if checks.get("result") == "too_few":
        return f"{claimed} untested: {checks.get('gaps')} gaps are too few"
    numbers = [("KS p", checks.get("ks_p_value")), ("serial p", checks.get("serial_p_value")), ("CV2", checks.get("cv2"))]
    parts = [f"{name} {value:.2f}" for name, value in numbers if value is not None]
    if checks.get("dispersion"):
        parts.append("IDC " + " ".join(f"{item['index']:.2f}" for item in checks["dispersion"]))
    result = "ok" if checks.get("result") == "ok" else "WRONG"
    if result == "WRONG" and not checks.get("problems") and checks.get("issue_problems"):
        why = next((f" (see {code})" for code in _ISSUE_CODES if code in codes), "")
        result = f"planned ok, issued not as planned{why}"
    return f"{claimed} {result}: {', '.join(parts)}"


def _measured(item: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """A constraint's measured value, or why it has none."""
    measured = item.get("measured")
    if measured is not None:
        return f"measured {say_measured(measured, item.get('unit') or 'ns', item.get('bound'))}"
    if item.get("measured_above") is None:
        return "nothing was measured"
    counts, kinds = run.get("counts") or {}, Counter[str]()
    for error in run.get("errors") or []:
        kinds[error.get("kind") or ""] += error.get("count") or 0
    due = (counts.get("planned") or 0) - (counts.get("not_due") or 0)
    if (item.get("text") or "").startswith("delay."):
        return f"no value, {(run.get('issue_delay') or {}).get('infinite') or 0:,} of {say_queries(due)} were never sent"
    mostly = "".join(f", mostly {kind}" for kind, _ in kinds.most_common(1))
    failed = "failed or were never sent" if counts.get("shed") else "failed"
    return f"no value, {due - (counts.get('ok') or 0):,} of {say_queries(due)} {failed}{mostly}"


def _percentile_cell(block: Mapping[str, Any], key: str) -> str:
    percentiles = block.get("percentiles") or {}
    if key not in percentiles or not block.get("count"):
        return "-"
    if percentiles[key] is not None:
        return format_duration(percentiles[key])
    above_ns = (block.get("above_ns") or {}).get(key)
    return f"> {format_duration(above_ns)}" if above_ns else "no value"


def _cell(value_ns: float | None) -> str:
    return "-" if value_ns is None else format_duration(value_ns)
