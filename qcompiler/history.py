"""What happened to a program, step by step. Viewers read this and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcompiler.diff import Diff, Snapshot


class Effect(StrEnum):
    """What a pass promises. Each promise is checked after the pass (`check.py`)."""

    EXACT = "exact"
    """The same function over the reals: float64 outputs agree to 1e-9."""
    PLAN = "plan"
    """Graph and parameters stay untouched; only the plan changes."""
    LOSSY = "lossy"
    """The outputs change, by no more than the pass's declared budget."""
    LOWER = "lower"
    """The same as the quantized reference, up to the target's arithmetic."""


@dataclass(frozen=True)
class Reason:
    """One edit (or one refusal): why, and the nodes it concerns."""

    why: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """What one pass did. `diff` is computed from the two sealed programs, never logged."""

    name: str
    spec: str
    """The pass with its options, as text that parses back."""
    effect: Effect | None
    """None for the capture."""
    diff: Diff
    after: Snapshot
    """The program behind the step, summed up: what a later diff against another step reads."""
    edits: tuple[Reason, ...] = ()
    skipped: tuple[Reason, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`error` (relative, against the program before), `sqnr_db`, `capture_error`, …"""
    nodes: Mapping[str, float] = field(default_factory=dict)
    """SQNR in dB of each touched node, for a lossy pass."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
