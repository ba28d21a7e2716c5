"""Mutated ONNX files: each is captured and runs on its example, or is refused in plain words.

`python tests/onnx_in/fuzz.py [files] [first]` tries 2,000 of them, each in a process of its own
with bounds on time and memory, prints what came of them, and fails if one did anything else.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from mutate import mutated
from seeds import EXTERNAL, external, seeds

import qcompiler
from qcompiler.capture import open_model

SECONDS = 20
"""Of computing; three times as much on the clock, since others may compute beside it."""
BYTES = 3 * 2**30
"""Memory that a file may take beyond what the process has."""
LONGEST = 600
FILES = 2000


def outcome(path: Path) -> tuple[str, str]:
    """What comes of one file: (kind, message)."""
    try:
        program, _, example = open_model(path)
    except qcompiler.BadInput as error:
        text = str(error).replace(str(path.parent), "")
        return ("refused" if len(text) <= LONGEST else "message too long"), text
    except BaseException as error:
        return f"capture raises {type(error).__name__}", str(error)[:300]
    try:
        assert isinstance(example, tuple)
        program.flat(example)
    except BaseException as error:
        return f"captured, and run raises {type(error).__name__}", str(error)[:300]
    return "captured", ""


def bounded(path: Path) -> tuple[str, str]:
    """The outcome of a file in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        os.write(writer, json.dumps(outcome(path)).encode()[:60000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        number = os.WTERMSIG(status)
        late = number in (signal.SIGALRM, signal.SIGXCPU)
        return ("takes too long" if late else f"dies of signal {number}"), ""
    kind, message = json.loads(text)
    return kind, message


GOOD = ("captured", "refused")


def main(count: int = FILES, first: int = 0) -> int:
    """Number of files that did something else; they are printed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found, models = Counter[str](), seeds()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        (path.parent / EXTERNAL).write_bytes(external()[1])
        for model in models.values():  # they are valid; and what is loaded once need not be again
            path.write_bytes(model.SerializeToString())
            assert outcome(path)[0] == "captured", outcome(path)
        for number in range(first, first + count):
            rng = np.random.default_rng([number, 4])
            name = sorted(models)[number % len(models)]
            path.write_bytes(mutated(models[name], rng))
            kind, message = bounded(path)
            found[kind] += 1
            if kind not in GOOD:
                print(f"{number} ({name}): {kind}: {message}", flush=True)
    print(", ".join(f"{kind}: {n}" for kind, n in found.most_common()))
    return sum(n for kind, n in found.items() if kind not in GOOD)


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
