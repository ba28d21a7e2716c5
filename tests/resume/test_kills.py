"""kill -9 at random moments: the run that goes on ends as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")
CALIBRATION = "assign{weight=int8:channel activation=int8:tensor},quantize{ranges=mse}"
GPTQ = "assign{weight=int4:group32},quantize{rounding=gptq}"

SENSITIVITY = "allocate{budgets=[5bits] formats=[int2:group32 int4:group32 int8:channel]},quantize"


@pytest.mark.parametrize(
    "passes", [CALIBRATION, GPTQ, SENSITIVITY], ids=["calibration", "gptq", "sensitivity"]
)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(passes: str, kills: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), passes, str(kills), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["found"] == [told["wanted"]] * kills
    assert told["broken"] == 0
    assert told["went_on"] > 0
