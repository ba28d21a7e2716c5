"""What quantization costs in perplexity, by our recipes and by a peer's own code.

    .venv/bin/python benchmarks/accuracy.py [--quick] [--peers] [--json FILE] [--only TEXT]

The model is the tiny Llama's twin with outliers, the text what it never saw. Weights are symmetric
integers per output channel, activations symmetric integers per token with scales found at run time;
embedding and lm_head stay float. Recipes with random matrices run once for each seed.

`bits per weight` counts all parameters as they are held, embedding, lm_head, scales and matrices of
online rotations included, over the parameters of the float model. `seconds` is what making the
quantized model takes, capture and evaluation left out.

`--peers` also runs llm-compressor on the same token windows, in an environment of its own, which it
makes when it is missing; `peers/llmcompressor_run.py` says what its rows are. Where the peer fails
at a recipe, the row says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qcompiler.capture import open_model
from qcompiler.data import BATCH, WINDOW, read_batches
from qcompiler.evaluate import perplexity
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program
from qcompiler.registry import make_passes
from qcompiler.samples import Flat

HERE = Path(__file__).resolve().parent
LLAMA = HERE.parent / "examples" / "tiny_llama"
TWIN = LLAMA / "outliers"
CALIBRATION_BATCHES = 16
FULL, QUICK = (40960, 10), (10240, 3)
"""(held-out tokens, seeds)"""

FORMATS = {"w4a4": 4, "w8a8": 8}
ASSIGN = "assign{{weight=int{bits}:channel:full activation=int{bits}:token:dynamic:full}}"
"""The grid of compressed-tensors: all of -8 … 7, s = max|x| / 7.5."""

# Name → pipeline. $assign becomes the row's formats, $seed makes a row of several runs. The budget
# lets through what is worse than no answer at all: how bad is what this benchmark shows.
START = "canonicalize,$assign"
STREAM = "untie{optional=true},absorb_norms"
LEARN = "learn_rotation{rate=1}"
END = "fold,quantize{budget=10}"
RECIPES: dict[str, str] = {
    "nearest": "canonicalize,$assign,quantize{budget=10}",
    "smooth": f"{START},smooth,{END}",
    "smooth, searched": f"{START},smooth{{search=true}},{END}",
    "rotate": f"{START},{STREAM},rotate{{seed=$seed}},{END}",
    "rotate online": f"{START},{STREAM},rotate{{seed=$seed online=true}},{END}",
    "smooth, rotate": f"{START},smooth{{norms=false}},{STREAM},rotate{{seed=$seed}},{END}",
    "smooth, rotate online": (
        f"{START},smooth{{norms=false}},{STREAM},rotate{{seed=$seed online=true}},{END}"
    ),
    "rotate online, learned": f"{START},{STREAM},rotate{{online=true}},{LEARN},{END}",
    "smooth, rotate online, learned": (
        f"{START},smooth{{norms=false}},{STREAM},rotate{{online=true}},{LEARN},{END}"
    ),
    "split outliers": f"{START},split_outliers,{END}",
}

PEER = "llm-compressor"
PEER_PACKAGE = "llmcompressor==0.14.0.1"
PEER_PINS = HERE / "peers" / "llmcompressor.txt"
PEER_SCRIPT = HERE / "peers" / "llmcompressor_run.py"
PEER_ENVIRONMENT = HERE / "peers" / ".venv-llmcompressor"


@dataclass(frozen=True)
class Row:
    """One recipe at one format: a perplexity for each seed, or why there is none."""

    tool: str
    recipe: str
    format: str
    """`w4a4`, `w8a8`, or `float`: not quantized."""
    perplexities: tuple[float, ...] = ()
    bits_per_weight: float = 0.0
    seconds: float = 0.0
    pipeline: str = ""
    error: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.perplexities)

    @property
    def spread(self) -> str:
        """Smallest … largest, and the standard deviation of a sample."""
        if len(self.perplexities) < 2:
            return ""
        low, high = min(self.perplexities), max(self.perplexities)
        return f"{low:.3f} … {high:.3f} / {statistics.stdev(self.perplexities):.3f}"


def main() -> None:
    """Read the windows once, run our recipes, then the peer's, print and write what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]} tokens, {QUICK[1]} seeds")
    parser.add_argument("--tokens", type=int, help=f"held-out tokens ({FULL[0]})")
    parser.add_argument("--seeds", type=int, help=f"seeds of random matrices ({FULL[1]})")
    parser.add_argument("--only", default="", metavar="TEXT", help="recipes with TEXT in the name")
    parser.add_argument("--peers", action="store_true", help=f"run {PEER} too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    length, seeds = QUICK if options.quick else FULL
    length, seeds = options.tokens or length, options.seeds or seeds
    if not (TWIN / "config.json").is_file():
        subprocess.run([sys.executable, LLAMA / "outliers.py"], check=True)

    program, _, _ = open_model(TWIN)
    calibration = read_batches(LLAMA / "calibration.txt", program.io, TWIN, CALIBRATION_BATCHES)
    heldout = read_batches(LLAMA / "heldout.txt", program.io, TWIN, length // (BATCH * WINDOW))
    rows = ours(program, calibration, heldout, seeds, options.only)
    versions = {p: version(p) for p in ("qcompiler", "torch", "transformers")}
    found = {
        "model": str(TWIN.relative_to(HERE.parent)),
        "tokens": sum(b["input_ids"].numel() for b in heldout),
        "seeds": seeds,
        "machine": machine(),
        "threads": options.threads,
        "versions": {"python": platform.python_version()} | versions,
    }
    if options.peers:
        theirs, found["peer_versions"] = peer(
            calibration, heldout, seeds, options.only, options.threads
        )
        rows += theirs
    show(rows, found)
    if options.json:
        records = [asdict(r) | ({"mean": r.mean} if r.perplexities else {}) for r in rows]
        options.json.write_text(json.dumps(found | {"rows": records}, indent=1) + "\n")


def ours(
    program: Program,
    calibration: list[dict[str, torch.Tensor]],
    heldout: list[dict[str, torch.Tensor]],
    seeds: int,
    only: str,
) -> list[Row]:
    """Float, then each recipe at each format."""
    observed, feed = (
        [program.io.flatten((), b) for b in batches] for batches in (calibration, heldout)
    )
    parameters = sum(t.numel() for t in program.params.values())
    base = perplexity(program.flat, feed)
    rows = [Row("qcompiler", "float", "float", (base,), program.bytes * 8 / parameters)]
    for fmt, bits in FORMATS.items():
        for name, text in RECIPES.items():
            if only not in name:
                continue
            print(f"qcompiler {name}, {bits} bits …", file=sys.stderr)
            pipeline = Template(text).safe_substitute(assign=ASSIGN.format(bits=bits))
            row = Row("qcompiler", name, fmt, pipeline=pipeline)
            runs = [
                one(program, Template(pipeline).substitute(seed=seed), observed, feed)
                for seed in range(seeds if "$seed" in pipeline else 1)
            ]
            values, sizes, times = zip(*runs, strict=True)
            size, spent = statistics.fmean(sizes) * 8 / parameters, statistics.fmean(times)
            rows.append(replace(row, perplexities=values, bits_per_weight=size, seconds=spent))
            print(f"    {rows[-1].mean:.3f}  {rows[-1].spread}", file=sys.stderr)
    return rows


def one(
    program: Program, pipeline: str, observed: list[Flat], feed: list[Flat]
) -> tuple[float, int, float]:
    """(perplexity, bytes, seconds of the pipeline) of the reference program."""
    start = time.perf_counter()
    quantized = run_pipeline(program, make_passes(pipeline), data=lambda: iter(observed))
    seconds = time.perf_counter() - start
    return perplexity(quantized.flat, feed), quantized.bytes, seconds


def peer(
    calibration: list[dict[str, torch.Tensor]],
    heldout: list[dict[str, torch.Tensor]],
    seeds: int,
    only: str,
    threads: int,
) -> tuple[list[Row], dict[str, str]]:
    """(the peer's rows, its versions); it reads the same windows from files."""
    try:
        python = peer_environment()
    except subprocess.CalledProcessError as error:
        why = f"its environment cannot be made: pip ended with {error.returncode}, see above"
        return [Row(PEER, "all", fmt, error=why) for fmt in FORMATS], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, batches in (("calibration", calibration), ("heldout", heldout)):
            windows = torch.cat([b["input_ids"] for b in batches])
            np.save(Path(folder) / f"{name}.npy", windows.numpy())
        command = [python, PEER_SCRIPT, TWIN, folder, "--only", only]
        command += ["--seeds", seeds, "--threads", threads]
        command += ["--bits", ",".join(map(str, FORMATS.values()))]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        why = f"{PEER_SCRIPT.name} ended with {done.returncode}, see above"
        return [Row(PEER, "all", fmt, error=why) for fmt in FORMATS], {}
    answer = json.loads(done.stdout)
    return list(gather(answer["rows"])), answer["versions"]


def gather(runs: list[dict]) -> Iterable[Row]:
    """The peer's single runs as rows, the seeds of a recipe together."""
    names = {bits: fmt for fmt, bits in FORMATS.items()} | {None: "float"}
    for bits, recipe in dict.fromkeys((r["bits"], r["recipe"]) for r in runs):
        mine = [r for r in runs if (r["bits"], r["recipe"]) == (bits, recipe)]
        errors = [r["error"] for r in mine if "error" in r]
        row = Row(PEER, recipe, names[bits])
        if errors:
            yield replace(row, error=errors[0])
        else:
            values = tuple(r["perplexity"] for r in mine)
            size, spent = (
                statistics.fmean(r[k] for r in mine) for k in ("bits_per_weight", "seconds")
            )
            yield replace(row, perplexities=values, bits_per_weight=size, seconds=spent)


def peer_environment() -> Path:
    """The Python of the peer's own environment, made when it is missing or its pins changed."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    stamp, wanted = PEER_ENVIRONMENT / ".ready", f"{PEER_PACKAGE}\n{PEER_PINS.read_text()}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    where = PEER_ENVIRONMENT.relative_to(HERE.parent)
    print(f"installing {PEER_PACKAGE} with its own torch in {where}, 1.5 GB …", file=sys.stderr)
    venv.create(PEER_ENVIRONMENT, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "-c", str(PEER_PINS), "torch"], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "-r", str(PEER_PINS)], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", PEER_PACKAGE], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


def machine() -> str:
    """The processor's name where the system tells it, what torch found in it, its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def show(rows: list[Row], found: dict) -> None:
    """A table for each format."""
    base = rows[0].mean
    console = Console(width=130)
    for fmt in ("float", *FORMATS):
        title = f"{fmt}: perplexity over {found['tokens']} tokens, float {base:.3f}"
        table = Table(title=title, title_justify="left")
        table.add_column("recipe", max_width=44)
        for name in ("perplexity", "spread / std", "against float", "bits per\nweight", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in (r for r in rows if r.format == fmt):
            name = row.recipe if row.tool == "qcompiler" else f"{row.tool} {row.recipe}"
            if row.error:
                table.add_row(name, "failed")
                continue
            table.add_row(
                name,
                f"{row.mean:.3f}",
                row.spread,
                f"{row.mean / base - 1:+.2%}",
                f"{row.bits_per_weight:.2f}",
                f"{row.seconds:.1f}",
            )
        console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.tool} {row.recipe}, {row.format}: {row.error}", markup=False)
    seeds = f"{found['seeds']} seeds; " if any(len(r.perplexities) > 1 for r in rows) else ""
    console.print(f"{seeds}{found['machine']}, threads {found['threads']}", markup=False)
    for key in ("versions", "peer_versions"):
        if found.get(key):
            console.print(", ".join(f"{p} {v}" for p, v in found[key].items()), markup=False)


if __name__ == "__main__":
    main()
