"""How fast the artifacts run, beside what else there is, in one process on the same inputs.

    .venv/bin/python benchmarks/run.py [--tokens 1,256] [--layers 8] [--threads 1,2] [--json]

A Llama of hidden 1024, without a cache: one token stands for decoding, 256 for a prompt. All
contenders run in turn, so that a slow moment of a shared machine hits all alike; the figure is
the median of eager float32's seconds over theirs. `error` is the relative error of the logits
against eager float32. Peers that are missing or fail are named with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import llama, tokens
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qcompiler
from qcompiler.check import relative_error
from qcompiler.evaluate import race

HIDDEN, INTERMEDIATE, VOCABULARY = 1024, 2816, 8192
OURS = (
    ("cpu", "w8a8-dynamic"),
    ("cpu", "w4a16"),
    ("onnxruntime", "w8a8-dynamic"),
    ("onnxruntime", "w4a16"),
)
Run = Callable[[Tensor], Tensor]


class Logits(nn.Module):
    """ids (1, tokens) → logits, nothing else: every exporter and compiler takes this."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def main() -> None:
    """Build all contenders, race them at each length and thread count, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="1,256")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows, failed = [], {}
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        model = Logits(llama(HIDDEN, options.layers, INTERMEDIATE, VOCABULARY))
        contenders, failed = build(model, threads)  # kernels are chosen for a number of threads
        for length in map(int, options.tokens.split(",")):
            rows += measure(contenders, length, threads, options.rounds)
    if options.json:
        found = {"machine": machine(), "layers": options.layers, "rows": rows, "failed": failed}
        print(json.dumps(found, indent=1))
    else:
        show(rows, failed)


def build(model: Logits, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """(contenders by name, those that could not be built and why)."""
    example = {"input_ids": tokens(VOCABULARY, 16)["input_ids"]}
    makers: dict[str, Callable[[], Run]] = {
        "eager float32": lambda: model,
        "torch.compile float32": lambda: torch.compile(model, dynamic=True),
    }
    for backend, recipe in OURS:
        makers[f"qcompiler {backend} {recipe}"] = lambda b=backend, r=recipe: ours(
            model, example, b, r
        )
    makers["onnxruntime quantize_dynamic"] = lambda: ort_dynamic(model, example, threads)
    makers["torchao int8 dynamic"] = lambda: torchao(model, "Int8DynamicActivationInt8WeightConfig")
    makers["torchao int8 weight-only"] = lambda: torchao(model, "Int8WeightOnlyConfig")
    found, failed = {}, {}
    for name, make in makers.items():
        print(f"{name}, {threads} threads …", file=sys.stderr)
        try:
            run = make()
            with torch.no_grad():
                run(example["input_ids"])
            found[name] = run
        except Exception as error:  # a peer's failure is a result, not the end of the benchmark
            if name.startswith(("qcompiler", "eager")):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return found, failed


def ours(model: nn.Module, example: dict[str, Tensor], backend: str, recipe: str) -> Run:
    """One of our artifacts."""
    dynamic = {"input_ids": {1: "sequence"}}
    compiled = qcompiler.compile(model, example, recipe=recipe, backend=backend, dynamic=dynamic)
    return lambda ids: compiled(input_ids=ids)


def ort_dynamic(model: nn.Module, example: dict[str, Tensor], threads: int) -> Run:
    """onnxruntime's own dynamic quantization of the exported model."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        shapes = {"input_ids": {1: torch.export.Dim("sequence")}}
        torch.onnx.export(
            model, (), str(path), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        quantize_dynamic(path, small, weight_type=QuantType.QInt8)
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            small.read_bytes(), session_options, providers=["CPUExecutionProvider"]
        )
    return lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


def torchao(model: nn.Module, config: str) -> Run:
    """torchao's `quantize_`, compiled as its documentation advises."""
    from torchao import quantization

    copied = copy.deepcopy(model)
    quantization.quantize_(copied, getattr(quantization, config)())
    return torch.compile(copied, dynamic=True)


def measure(
    contenders: dict[str, Run], length: int, threads: int, rounds: int
) -> list[dict[str, object]]:
    """A row for each contender at one prompt length."""
    ids = tokens(VOCABULARY, length)["input_ids"]
    with torch.no_grad():
        wanted = contenders["eager float32"](ids)
        errors = {n: relative_error(wanted, run(ids)) for n, run in contenders.items()}
        flat = {n: lambda x, run=run: (run(x[0]),) for n, run in contenders.items()}
        seconds = race(flat, (ids,), rounds)
    base = seconds["eager float32"]
    return [
        {
            "contender": name,
            "threads": threads,
            "tokens": length,
            "seconds": seconds[name],
            "against_eager": base / seconds[name],
            "error": errors[name],
        }
        for name in contenders
    ]


def machine() -> str:
    """The instruction set that torch found, and the number of cores."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def show(rows: list[dict], failed: dict[str, str]) -> None:
    """Print ratios, a column for each (threads, tokens)."""
    columns = list(dict.fromkeys((r["threads"], r["tokens"]) for r in rows))
    title = f"times eager float32 (more is faster), {machine()}"
    table = Table(title=title, title_justify="left")
    table.add_column("contender", no_wrap=True)
    for threads, length in columns:
        table.add_column(f"tokens {length}\nthreads {threads}", justify="right")
    table.add_column("error", justify="right")
    for name in dict.fromkeys(r["contender"] for r in rows):
        mine = {(r["threads"], r["tokens"]): r for r in rows if r["contender"] == name}
        cells = [f"{mine[c]['against_eager']:.2f}" if c in mine else "" for c in columns]
        table.add_row(name, *cells, f"{max(r['error'] for r in mine.values()):.1e}")
    console = Console(soft_wrap=True)
    console.print(table)
    for name, why in failed.items():
        console.print(f"{name} is missing: {why}", markup=False)


if __name__ == "__main__":
    main()
