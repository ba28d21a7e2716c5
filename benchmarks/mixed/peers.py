"""The peers' choices, made by their own code on our data, measured in our formats."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

from accuracy.cases import Case
from accuracy.peers import write_data
from peers.environment import CHOOSING, Unavailable, chooser_of, python_of

from qcompiler.planning.units import FORMATS

from .trial import Choice, Trial

NAMES = tuple(CHOOSING)
CHANNELS = tuple(f"int{bits}:channel" for bits in (2, 3, 4, 6, 8))
HAS = dict.fromkeys(NAMES, FORMATS) | {"mct": CHANNELS}
"""Peer → the formats that it chooses from; the plan beside it has the same."""


def run_chooser(name: str, trial: Trial, budgets: list[str]) -> None:
    """For each budget the peer's choice, and the plan for its very bytes."""
    found = answer(name, trial.case, trial.formats, budgets)
    for choice in found.get("choices", ()):
        budget = f"{choice['bits']:g}"
        theirs = trial.row(budget, f"{name}'s choice", trial.given(placed(trial, choice["layers"])))
        size = trial.bytes(float(str(theirs["bits"])))
        trial.row(budget, "the plan for its bytes", trial.best(size * (1 + 1e-9)))
    if "error" in found:
        trial.add({"model": trial.case.name, "budget": "", "what": name, "error": found["error"]})


def answer(name: str, case: Case, formats: tuple[str, ...], budgets: list[str]) -> dict:
    """What the peer's script prints (`peers/choosing.py`), or why there is nothing."""
    try:
        python = python_of(name)
    except Unavailable as error:
        return {"error": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        write_data(case, Path(folder))
        command = [python, chooser_of(name), case.folder, folder, "--kind", case.kind]
        command += ["--formats", ",".join(map(called, formats)), "--bits", ",".join(budgets)]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        return {"error": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout)


def placed(trial: Trial, layers: dict[str, str]) -> Choice:
    """The candidate of each site; what the peer leaves alone has its largest."""
    problem = trial.plan.problem
    found = []
    for site, options, sizes in zip(
        problem.units, problem.options, problem.costs["weight_bytes"], strict=True
    ):
        wanted = layers.get(site.partition("/")[0])
        names = [called(text) for text in options]
        largest = max(range(len(options)), key=sizes.__getitem__)
        found.append(largest if wanted is None else names.index(wanted))
    return tuple(found)


def called(text: str) -> str:
    """`int3:group128:mirrored` as the peers' scripts call it, `w3g128`."""
    found = re.match(r"int(\d)(?::group(\d+))?", text)
    assert found is not None, text
    return f"w{found[1]}" + (f"g{found[2]}" if found[2] else "")
