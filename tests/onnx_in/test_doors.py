"""The same model by two doors gives the same program, and the way out gives the file back."""

from __future__ import annotations

from pathlib import Path

import pytest
from doors import EVALUATED, UNTIED, open_doors, quantized_errors, round_trip_error
from files import MODELS

from qcompiler.spaces import KINDS

TIED = ("gpt2", "bert", "opt", "gemma2", "gemma3_text", "whisper", "t5")
CHANGED = {**{name: [UNTIED] for name in TIED}, "swin": [EVALUATED]}
"""Model → what torch's exporter does to it, so that the file has other spaces than the module."""


@pytest.mark.parametrize("name", MODELS)
def test_both_doors(name: str, tmp_path: Path) -> None:
    doors = open_doors(name, tmp_path)
    assert doors.differences() == CHANGED.get(name, [])
    counts = [doors.spaces(kind) for kind in KINDS]
    assert (name in CHANGED) != all(first == second for first, second in counts), counts
    assert all(abs(first - second) <= 1 for first, second in counts), counts

    between, rounding = quantized_errors(doors)
    assert between <= rounding
    assert round_trip_error(doors, tmp_path) <= 1e-5
