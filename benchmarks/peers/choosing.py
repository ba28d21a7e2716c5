"""What the peers' choices of formats share: the data, the budgets and the answer's form.

    PYTHON <name>_choice.py MODEL_FOLDER DATA_FOLDER --kind digits --formats w2g32,w8 --bits 3,4

Model and data as in `common.py`. A script prints one JSON object on stdout: the versions, the
seconds, and for each number of bits per weight, which counts scales, what the peer gives each
linear, `{"bits": 3, "layers": {"blocks.0.up": "w4g32"}}`; or an `error` in the peer's own words.
Nothing is measured here: the choice is the answer.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from common import BATCH, Format, Task, claim_stdout  # isort: skip - sets the environment

import torch

Choose = Callable[[Task, list[Format], list[float]], Iterator[dict[str, str]]]
"""(task, formats, bits per weight) → for each number of bits, linear → name of its format."""


def main(about: str | None, packages: tuple[str, ...], choose: Choose) -> None:
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kind", choices=tuple(BATCH), required=True)
    parser.add_argument("--formats", required=True, help="w2g32,w3g128,w8 …")
    parser.add_argument("--bits", required=True, help="3,3.5,4 …")
    options = parser.parse_args()
    answer = claim_stdout()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    forms = [Format.parse(name) for name in options.formats.split(",")]
    bits = [float(text) for text in options.bits.split(",")]
    task = Task(options.model, options.data, options.kind)
    found: dict[str, object] = {"versions": {p: version(p) for p in packages}}
    found["versions"] |= {"python": platform.python_version()}
    start = time.perf_counter()
    try:
        layers = choose(task, forms, bits)
        found["choices"] = [
            {"bits": target, "layers": named} for target, named in zip(bits, layers, strict=True)
        ]
    except Exception as error:  # a peer's failure is a result, not the end of the benchmark
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found["seconds"] = time.perf_counter() - start
    answer.write(json.dumps(found) + "\n")


def effective(task: Task, form: Format) -> float:
    """Bits per weight with scales of 16 bits, mean over all linears."""
    return task.stored(form, 16) / task.weights
