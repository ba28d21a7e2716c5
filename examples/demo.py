"""`make demo`: a real model with outliers, compiled naively and smoothed, measured beside float.

The model is `examples/tiny_llama`: a Llama trained on Python's standard library. Its twin has
activation outliers put in exactly (same function, see `outliers.py`), as large models grow them by
themselves; int8 without care fails on it.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import qcompiler
from qcompiler.capture import open_model
from qcompiler.compiled import Compiled
from qcompiler.data import read_batches
from qcompiler.evaluate import perplexity, race
from qcompiler.samples import random_inputs, sizes_for
from qcompiler.show.terminal import steps_table

HERE = Path(__file__).resolve().parent / "tiny_llama"
TWIN = HERE / "outliers"
RECIPES = (
    "w8a8-dynamic",
    "w8a8-dynamic-smooth",
    "w8a8-static",
    "w8a8-static-smooth",
    "w4a16-smooth",
    "w4a8-rotated",
)
console = Console(soft_wrap=True)


def main() -> None:
    """Make the twin if it is missing, compile it by each recipe, print what came out."""
    if not (TWIN / "config.json").is_file():
        console.print("making the twin with outliers …")
        load_outliers().make(HERE / "model", TWIN)
    program, _, _ = open_model(TWIN)
    calibration = read_batches(HERE / "calibration.txt", program.io, TWIN, 8)
    heldout = read_batches(HERE / "heldout.txt", program.io, TWIN, 20)
    feed = [program.io.flatten((), b) for b in heldout]
    base = perplexity(program.flat, feed)
    table = Table(title="tiny Llama with outliers", title_justify="left")
    for name in ("recipe", "perplexity", "against float", "weights", "speed"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    table.add_row("float", f"{base:.3f}", "", f"{program.bytes / 1e6:.1f} MB", "")
    shown: Compiled | None = None
    for recipe in RECIPES:
        compiled = qcompiler.compile(TWIN, recipe=recipe, data=calibration)
        value = perplexity(compiled.artifact.run, feed)
        table.add_row(
            recipe,
            f"{value:.3f}",
            f"{value / base - 1:+.2%}",
            f"{compiled.bytes / 1e6:.1f} MB",
            f"{speed(program, compiled):.2f} ×",
        )
        if recipe == "w8a8-dynamic-smooth":
            shown = compiled
    assert shown is not None
    console.print(steps_table(shown.diff()))
    console.print(table)
    console.print("speed: against the captured float program, 1 × 256 tokens, run in turn")
    with tempfile.TemporaryDirectory() as folder:
        place = shown.save(Path(folder) / "out")
        again = qcompiler.load(place)
        same = all(
            torch.equal(a, b)  # type: ignore[arg-type]
            for a, b in zip(shown.artifact.run(feed[0]), again.artifact.run(feed[0]), strict=True)
        )
        console.print(f"saved and loaded again: {'equal outputs' if same else 'OUTPUTS DIFFER'}")
    console.print(
        "\nnext:\n"
        "  .venv/bin/qcompiler compile examples/tiny_llama/outliers -o out\n"
        "  .venv/bin/qcompiler diff out --stat\n"
        "  .venv/bin/qcompiler eval out --data examples/tiny_llama/heldout.txt\n"
        "  .venv/bin/qcompiler inspect examples/tiny_llama/outliers --spaces"
    )
    if not same:
        sys.exit(1)


def speed(program: qcompiler.Program, compiled: Compiled) -> float:
    """Float seconds over quantized seconds, 1 × 256 tokens, run in turn."""
    inputs = random_inputs(program.io, 0, sizes_for(program.io, 1, 256))
    times = race({"float": program.flat, "quantized": compiled.artifact.run}, inputs)
    return times["float"] / times["quantized"]


def load_outliers() -> object:
    """The script `outliers.py` as a module; `examples` is no package."""
    spec = importlib.util.spec_from_file_location("outliers", HERE / "outliers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["outliers"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
