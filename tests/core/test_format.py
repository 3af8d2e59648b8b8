from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from motet.core.format import (
    bandwidth,
    big,
    clock,
    count,
    decimals,
    duration,
    latency,
    loss,
    number,
    parameters,
    percent,
    short,
)

NAN = float("nan")


def test_numbers_of_a_table_are_short() -> None:
    assert [clock(s) for s in (42, 723, 11_220, 187_200, None, NAN)] == [
        "0:42", "12:03", "3:07:00", "2d 04:00", "?", "?",
    ]  # fmt: skip
    assert [short(r) for r in (950, 12_345, 4.5e6, 2e9, NAN)] == [
        "950", "12.3k", "4.5M", "2.0G", "?",
    ]  # fmt: skip
    assert [loss(v) for v in (None, NAN, 2.34567)] == ["nan", "nan", "2.346"]


def test_numbers_of_a_page_have_three_digits_and_what_is_missing_is_a_dash() -> None:
    assert [number(x) for x in (0, 1234567, 0.05, -2.5, 1e-7, 12345.6, None, True)] == [
        "0", "1.2 × 10⁶", "0.05", "−2.5", "1.0 × 10⁻⁷", "12,346", "–", "–",
    ]  # fmt: skip
    assert number(2, signed=True) == "+2"
    assert [percent(x) for x in (0, 0.021, 0.5, 1.0, 0.00012, None)] == [
        "0 %", "2.1 %", "50 %", "100 %", "0.012 %", "–",
    ]  # fmt: skip
    assert [big(x) for x in (9_999, 9.83e6, 2e9, 1.5e12)] == [
        "9,999", "9.83 million", "2 billion", "1.5 trillion",
    ]  # fmt: skip
    assert [count(x) for x in (12345, None)] == ["12,345", "–"]
    assert [duration(x) for x in (42, 312, 11_220, 187_200, None)] == [
        "42 s", "5 min 12 s", "3 h 07 min", "2 d 4 h", "–",
    ]  # fmt: skip


def test_sizes_and_links_have_their_unit() -> None:
    assert [parameters(1.34e9), parameters(1.25e8, 2)] == ["1.3 B", "125.00 M"]
    assert [bandwidth(450), bandwidth(0.0125)] == ["450 GB/s", "12.5 MB/s"]
    assert [latency(3.0), latency(5000.0)] == ["3 µs", "5 ms"]


@given(st.floats(1e-4, 1e9), st.integers(1, 5))
def test_so_many_decimals_show_so_many_digits(value: float, digits: int) -> None:
    places = decimals(value, digits)
    error = abs(round(value, places) - value)
    assert error <= 0.51 * 10 ** -min(6, digits - 1 - math.floor(math.log10(value)))
    assert places == 0 or places == 6 or 10**places * value >= 10 ** (digits - 1)
