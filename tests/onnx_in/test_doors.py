"""The same model by two doors gives the same program, and the way out gives the file back."""

from __future__ import annotations

from pathlib import Path

import pytest
from doors import open_doors, quantized_errors, round_trip_error
from files import MODELS

from qcompiler.spaces import KINDS

DIFFERENT = {
    ("resnet", "diagonal"): "torch's exporter has folded each BatchNorm into its convolution",
}
"""(model, kind) → why the two doors do not find the same number of spaces."""


@pytest.mark.parametrize("name", MODELS)
def test_both_doors(name: str, tmp_path: Path) -> None:
    doors = open_doors(name, tmp_path)
    for kind in KINDS:
        first, second = doors.spaces(kind)
        assert (first == second) != ((name, kind) in DIFFERENT), (kind, first, second)
    between, rounding = quantized_errors(doors)
    assert between <= rounding
    assert round_trip_error(doors, tmp_path) <= 1e-5
