"""A part of the mutated files that `fuzz.py` tries; in a process of its own, since it forks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FILES = 200


def test_mutated_files_are_captured_or_refused() -> None:
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, script, str(FILES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(part.split(": ") for part in done.stdout.strip().splitlines()[-1].split(", "))
    assert set(counts) == {"captured", "refused"}
    assert sum(map(int, counts.values())) == FILES
    assert int(counts["captured"]) >= FILES // 10, "mutations that break everything test nothing"
