"""Budgets as text, and what is no budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.allocate import Budget
from qcompiler.allocate.budget import TIMES, UNITS
from qcompiler.errors import BadInput

AMOUNTS = st.floats(1e-9, 1e15) | st.integers(1, 10**9).map(float)


@given(AMOUNTS, st.sampled_from(sorted(UNITS)))
def test_text_parses_back(amount: float, unit: str) -> None:
    budget = Budget.parse(f"{amount!r}{unit}")
    assert budget.amount == amount
    assert budget.cost == UNITS[unit]
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "key", "limit"),
    [
        ("4.2bits", "weight_bytes", 525.0),
        ("60MB", "bytes", 60e6),
        ("1.5GiB", "bytes", 1.5 * 2**30),
        ("512 KiB", "bytes", 2**19),
        ("0.7x-latency", "latency", 7.0),
        ("0.7x-prefill", "prefill", 7.0),
        ("0.8x-decode", "decode", 8.0),
        ("0.3x-bytes", "bytes", 3.0),
        ("0.25x-bitops", "bitops", 2.5),
        ("5Tbitops", "bitops", 5e12),
        ("12ms-prefill", "prefill", 0.012),
        ("800us-decode", "decode", 0.0008),
        ("3ms-latency", "latency", 0.003),
    ],
)
def test_limits(text: str, key: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert str(budget) == text.replace(" ", "")
    assert budget.key == key
    assert budget.relative == ("x-" in text)
    assert budget.limit(reference=10.0, weights=1000) == pytest.approx(limit, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4.2", r"has no unit; write 4\.2bits, 4\.2MB"),
        ("60Mb", "did you mean 'MB'"),
        ("60mb", "did you mean 'MB'"),
        ("4bit", "did you mean 'bits'"),
        ("12ms-prefil", "did you mean 'ms-prefill'"),
        ("3parsecs", "known: bits"),
        ("12ms", "12ms of what\\? write one of " + ", ".join(f"12ms-{cost}" for cost in TIMES)),
        ("0.7x", "0.7x of what\\? write one of 0.7x-bytes"),
        ("0bits", "positive number; found 0bits"),
        ("-3MB", "positive number; found -3MB"),
        ("1e999MB", "positive number; found infMB"),
        ("", "a number and a unit"),
        ("small", "a number and a unit"),
        ("4 2 bits", "a number and a unit"),
    ],
)
def test_what_is_no_budget(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Budget.parse(text)
