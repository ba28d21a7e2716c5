"""Budgets as text: `4.2bits`, `60MB`, `12ms-prefill`, `0.7x-latency`.

| text | limits |
|---|---|
| `4.2bits` | bits per quantized weight, scales and zero points counted |
| `60MB`, `1.5GiB` | bytes of the whole program: KB = 1000, KiB = 1024 |
| `5Tbitops` | Σ MACs · weight bits · activation bits |
| `12ms-prefill`, `800us-decode` | seconds of one prefill, of one decoded token |
| `3ms-latency` | seconds of one prefill and one decoded token, added |
| `0.7x-latency`, `0.3x-bytes` | a share of what the program costs in floating point |
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from qcompiler.errors import BadInput

BYTES = {"B": 1.0} | {
    f"{prefix}{end}": float(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("iB", 1024))
}
BITOPS = {f"{prefix}bitops": 1000.0**power for power, prefix in enumerate(("", *"KMGTP"))}
PER_SECOND = {"s": 1, "ms": 1000, "us": 1_000_000}
TIMES = ("prefill", "decode", "latency")
SHARES = ("bytes", "bitops", *TIMES)
"""Costs of which the program in floating point has a total."""
UNITS = {
    "bits": "bits",
    **dict.fromkeys(BYTES, "bytes"),
    **dict.fromkeys(BITOPS, "bitops"),
    **{f"{unit}-{cost}": cost for unit in PER_SECOND for cost in TIMES},
    **{f"x-{cost}": cost for cost in SHARES},
}
"""What may follow the number, and the cost that it limits."""


@dataclass(frozen=True)
class Budget:
    """A limit on one cost."""

    amount: float
    unit: str
    """`bits`, `MB`, `ms`, … or `x`, a share."""
    cost: str
    """bits, bytes, bitops, prefill, decode or latency."""
    relative: bool

    def __post_init__(self) -> None:
        if not (self.amount > 0 and math.isfinite(self.amount)):
            raise BadInput(f"a budget is a positive number; found {self}")

    def __str__(self) -> str:
        end = f"-{self.cost}" if self.relative or self.cost in TIMES else ""
        return f"{float(self.amount)!r}".removesuffix(".0") + self.unit + end

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The inverse of `str`; what is wrong with a text is a `BadInput`."""
        number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
        match = re.fullmatch(rf"\s*({number}|)\s*(\S*)\s*", text)
        if match is None or not match[1]:
            raise BadInput(f"a budget is a number and a unit, as 4.2bits or 60MB; found {text!r}")
        amount, unit = match.groups()
        if not unit:
            raise BadInput(
                f"the budget {text!r} has no unit; write {amount}bits, {amount}MB, "
                f"{amount}ms-decode, …"
            )
        if unit in (*PER_SECOND, "x"):
            costs = SHARES if unit == "x" else TIMES
            listed = ", ".join(f"{amount}{unit}-{cost}" for cost in costs)
            raise BadInput(f"{amount}{unit} of what? write one of {listed}")
        if unit not in UNITS:
            raise BadInput(f"unknown unit {unit!r} in the budget {text!r}; {_nearest(unit)}")
        return cls(float(amount), unit.partition("-")[0], UNITS[unit], unit.startswith("x-"))

    @property
    def key(self) -> str:
        """The cost that it limits in a problem: bits are bytes of the quantized weights alone."""
        return "weight_bytes" if self.cost == "bits" else self.cost

    def limit(self, reference: float, weights: int) -> float:
        """In the unit of its cost: bytes, seconds, bitops.

        `reference` is what the program costs in floating point, `weights` how many numbers are
        quantized.
        """
        if self.relative:
            return self.amount * reference
        if self.cost == "bits":
            return self.amount * weights / 8
        if self.cost in TIMES:
            return self.amount / PER_SECOND[self.unit]
        return self.amount * {**BYTES, **BITOPS}[self.unit]


def _nearest(unit: str) -> str:
    folded = {known.casefold(): known for known in UNITS}
    near = difflib.get_close_matches(unit.casefold(), folded, n=1, cutoff=0.5)
    if near:
        return f"did you mean {folded[near[0]]!r}?"
    return "known: bits, MB, GiB, Gbitops, ms-prefill, ms-decode, ms-latency, x-bytes, x-latency, …"
