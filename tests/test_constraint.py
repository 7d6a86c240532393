"""The constraint grammar: what each line means, what is refused and why, and that nothing else can happen."""

import re
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from servebench.constraint import Constraint, parse_constraint, parse_time_ns

LINES = [
    pytest.param("p99 <= 50ms", ("percentile", "response", "<=", 50_000_000, 99.0, 50_000_000), id="percentile"),
    pytest.param("p99.9 < 1.5s", ("percentile", "response", "<", 1_500_000_000, 99.9, 1_500_000_000), id="decimals"),
    pytest.param("response.p50 < 8us", ("percentile", "response", "<", 8_000, 50.0, 8_000), id="response"),
    pytest.param("service.p50 <= 8ns", ("percentile", "service", "<=", 8, 50.0, 8), id="service"),
    pytest.param("delay.p0.1 <= 1ms", ("percentile", "delay", "<=", 1_000_000, 0.1, 1_000_000), id="delay"),
    pytest.param("mean < 20ms", ("mean", "response", "<", 20_000_000, None, 20_000_000), id="mean"),
    pytest.param("delay.max <= 1s", ("max", "delay", "<=", 1_000_000_000, None, 1_000_000_000), id="max"),
    pytest.param("errors < 0.1%", ("errors", "response", "<", 0.001, None, None), id="errors"),
    pytest.param("errors <= 0%", ("errors", "response", "<=", 0.0, None, None), id="no errors"),
    pytest.param("completed >= 99%", ("completed", "response", ">=", 0.99, None, None), id="completed"),
    pytest.param("completed >= 100%", ("completed", "response", ">=", 1.0, None, None), id="all completed"),
    pytest.param("within(50ms) >= 99%", ("within", "response", ">=", 0.99, 99.0, 50_000_000), id="within"),
    pytest.param("service.within(1.5ms) > 99.9%", ("within", "service", ">", 0.999, 99.9, 1_500_000), id="service within"),
    pytest.param("within(50ms) >= 100%", ("within", "response", ">=", 1.0, None, 50_000_000), id="all within"),
    pytest.param("goodput(50ms) >= 380/s", ("goodput", "response", ">=", 380.0, None, 50_000_000), id="goodput"),
    pytest.param("goodput(50ms) > 0.5/s", ("goodput", "response", ">", 0.5, None, 50_000_000), id="slow goodput"),
]


@pytest.mark.parametrize(("text", "meaning"), LINES)
def test_a_line_means(text: str, meaning: tuple[object, ...]) -> None:
    kind, series, op, bound, percentile, latency_ns = meaning
    expected = Constraint(text, kind, series, op, bound, percentile, latency_ns)  # type: ignore[arg-type]
    assert parse_constraint(text) == expected


@pytest.mark.parametrize(("text", "meaning"), LINES)
@pytest.mark.parametrize(
    "spaced", [lambda text: f"\t {text} \n", lambda text: text.replace(" ", ""), lambda text: text.replace(" ", "   ")]
)
def test_spaces_do_not_matter_and_the_text_comes_back_in_one_form(
    text: str, meaning: object, spaced: Callable[[str], str]
) -> None:
    assert parse_constraint(spaced(text)) == parse_constraint(text)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0ns", 0),
        ("50ms", 50_000_000),
        (" 50 ms ", 50_000_000),
        ("0.1us", 100),
        ("1.000000001s", 1_000_000_001),
        ("0.57s", 570_000_000),  # 0.57 * 1e9 is 569999999.9999999 in doubles
        ("2000000000000ns", 2_000_000_000_000),
    ],
)
def test_times_are_exact(text: str, ns: int) -> None:
    assert parse_time_ns(text) == ns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "'' is not a constraint; write for example: p99 <= 50ms", id="nothing"),
        pytest.param("p101 <= 5ms", "101 is not between 0 and 100 (exclusive); max is the largest", id="p101"),
        pytest.param("p99", "'p99' is not a constraint", id="no bound"),
        pytest.param("p99 = 50ms", "'p99 = 50ms' is not a constraint", id="equals"),
        pytest.param("<= 50ms", "'<= 50ms' is not a constraint", id="no subject"),
        pytest.param("50ms >= p99", "'50ms' is not something to constrain", id="turned round"),
        pytest.param("P99 <= 50ms", "'P99' is not something to constrain", id="upper case"),
        pytest.param("p99th <= 50ms", "'p99th' is not something to constrain", id="p99th"),
        pytest.param("p-1 <= 50ms", "'p-1' is not something to constrain", id="negative percentile"),
        pytest.param("p٩٩ <= 50ms", "'p٩٩' is not something to constrain", id="digits of another script"),
        pytest.param("p0 <= 50ms", "percentile 0 is not between 0 and 100 (exclusive)", id="p0"),
        pytest.param("p100 <= 50ms", "percentile 100 is not between 0 and 100 (exclusive); max is the largest", id="p100"),
        pytest.param("p99.999999999999999 <= 1s", "percentile 99.999999999999999 is not between", id="p100 in a double"),
        pytest.param("median <= 50ms", "'median' is not something to constrain", id="unknown word"),
        pytest.param(
            "latency.p99 <= 50ms", "'latency' is not a series; allowed: response, service, delay", id="unknown series"
        ),
        pytest.param("p99 <= 50", "'50' is not a time; write a number with ns, us, ms or s", id="no unit"),
        pytest.param("p99 <= 50min", "unit 'min' is not a time", id="minutes"),
        pytest.param("p99 <= 50MS", "unit 'MS' is not a time", id="upper-case unit"),
        pytest.param("p99 <= 50%", "unit '%' is not a time", id="a share for a time"),
        pytest.param("p99 <= -5ms", "'-5ms' is not a time", id="negative time"),
        pytest.param("p99 <= 1e3ms", "'1e3ms' is not a time", id="exponent"),
        pytest.param("p99 <= .5s", "'.5s' is not a time", id="no digit before the point"),
        pytest.param("p99 <= 5ms <= 6ms", "'5ms <= 6ms' is not a time", id="two bounds"),
        pytest.param("p99 <= " + "9" * 16 + "s", "is not a time", id="more digits than a double has"),
        pytest.param("p99 >= 50ms", "points the wrong way; allowed here: < and <=", id="percentile upward"),
        pytest.param("mean > 50ms", "points the wrong way; allowed here: < and <=", id="mean upward"),
        pytest.param("errors >= 1%", "points the wrong way; allowed here: < and <=", id="errors upward"),
        pytest.param("completed < 99%", "points the wrong way; allowed here: > and >=", id="completed downward"),
        pytest.param("within(5ms) <= 99%", "points the wrong way; allowed here: > and >=", id="within downward"),
        pytest.param("goodput(5ms) < 5/s", "points the wrong way; allowed here: > and >=", id="goodput downward"),
        pytest.param("mean(5ms) < 1s", "'mean(5ms)' is not something to constrain", id="mean with a time"),
        pytest.param("errors(5ms) < 1%", "'errors(5ms)' is not something to constrain", id="errors with a time"),
        pytest.param("within >= 99%", "'within' is not something to constrain", id="within without a time"),
        pytest.param("goodput >= 5/s", "'goodput' is not something to constrain", id="goodput without a time"),
        pytest.param("within() >= 99%", "'' is not a time", id="within nothing"),
        pytest.param("within(50) >= 99%", "'50' is not a time", id="within without a unit"),
        pytest.param(
            "response.errors < 1%", "'errors' has no series; write errors without 'response'", id="errors of a series"
        ),
        pytest.param(
            "service.goodput(5ms) > 5/s", "goodput judges response time; write goodput without", id="goodput of a series"
        ),
        pytest.param("errors < 1", "'1' is not a share; write a percentage", id="a number for a share"),
        pytest.param("errors < 0.01", "'0.01' is not a share; write a percentage, e.g. 0.1%", id="a fraction for a share"),
        pytest.param("completed >= 101%", "'101%' is over 100%", id="over 100%"),
        pytest.param("goodput(5ms) >= 5", "'5' is not a rate; write queries per second, e.g. 380/s", id="a number for a rate"),
        pytest.param("goodput(5ms) >= 5qps", "'5qps' is not a rate", id="qps"),
    ],
)
def test_what_is_not_a_constraint_says_why_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_constraint(text)
    assert "\n" not in str(caught.value)


_WORDS = [
    "p",
    "99",
    "p99.9",
    "mean",
    "max",
    "errors",
    "completed",
    "within",
    "goodput",
    "response.",
    "service.",
    "delay.",
    "x.",
]
_MARKS = [
    "(",
    ")",
    "<",
    "<=",
    ">",
    ">=",
    "=",
    "50",
    "0.1",
    "9" * 400,
    "9" * 1_000_001,
    "ms",
    "s",
    "ns",
    "%",
    "/s",
    ".",
    "-",
    " ",
    "\n",
    "٣",
]


@pytest.mark.parametrize("text", ["", "throughput >= 200"])
def test_the_examples_show_every_kind_and_are_constraints(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_constraint(text)
    examples = str(caught.value).partition("for example: ")[2].split(", ")
    kinds = {parse_constraint(example).kind for example in examples}
    assert kinds == {"percentile", "mean", "max", "errors", "completed", "within", "goodput"}
    with pytest.raises(ValueError, match=r"\(exclusive\)$"):  # max is no remedy for too small a one
        parse_constraint("p0 <= 5ms")


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(_WORDS + _MARKS), max_size=12).map("".join)))
@example("p99 <= " + "9" * 1_000_001 + "s")
@example("errors < " + "9" * 1_000_001 + "%")
@example("goodput(1s) >= " + "9" * 400 + "/s")
def test_any_text_is_a_constraint_or_a_value_error(text: str) -> None:
    try:
        constraint = parse_constraint(text)
    except ValueError:
        return
    assert parse_constraint(constraint.text) == constraint
    assert constraint.bound < 1e25
    assert constraint.percentile is None or 0 < constraint.percentile < 100


@settings(deadline=None)
@given(
    st.sampled_from(["", "response.", "service.", "delay."]),
    st.decimals(min_value="0.000001", max_value="99.999999", places=6),
    st.sampled_from(["<", "<="]),
    st.integers(0, 10**12),
    st.sampled_from(["ns", "us", "ms", "s"]),
)
def test_every_percentile_reads_back(series: str, percentile: object, op: str, amount: int, unit: str) -> None:
    found = parse_constraint(f"{series}p{percentile} {op} {amount}{unit}")
    assert found.percentile == float(str(percentile))
    assert found.latency_bound_ns == found.bound == amount * {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}[unit]
    assert (found.series, found.op) == (series[:-1] or "response", op)
