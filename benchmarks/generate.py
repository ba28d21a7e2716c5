"""How fast text is written behind a past that grows, by a Llama of hidden 1024 and 8 layers.

    .venv/bin/python benchmarks/generate.py [--past 128,1024,4096] [--threads 1] [--layers 8]
                                            [--tokens 24] [--only NAME,…] [--json FILE]

Each contender reads the same random tokens and then takes one token after another, by turns with
the others, each with a cache of its own that goes on growing. The figures are the median seconds
of a token, and their ratio to transformers' own in the same turn. `error` is the relative error of
the last logits against transformers in float32 on the same tokens; MB is what the cache takes.
llama.cpp is there where llama-cpp-python is installed, on files that `export --format gguf` writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from end_to_end.ours import INT8, W4
from end_to_end.peers import gguf_file
from models import llama, tokens
from rich.console import Console
from rich.table import Table
from run import HIDDEN, INTERMEDIATE, VOCABULARY, machine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qcompiler
from qcompiler.check import relative_error

EAGER = "transformers float32"


@dataclass
class Writer:
    """Something that reads tokens (1, n) and goes on from there."""

    begin: Callable[[Tensor], Any]
    """Tokens → its state."""
    step: Callable[[Tensor, Any], tuple[Tensor, Any]]
    """A token (1, 1), its state → logits of what follows (words,), the next state."""
    cache: Callable[[Any], int | None]
    """Bytes of a state."""


def eager(model: nn.Module) -> Writer:
    """transformers with a cache of its own."""

    def step(ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        return out.logits[0, -1], out.past_key_values

    def size(past: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)

    return Writer(lambda ids: step(ids, None)[1], step, size)


def ours(model: nn.Module, weight: str, rounded: bool) -> Writer:
    """A compiled model, its cache in 8 bits or not."""
    assign = f"assign{{weight={weight} activation={INT8} head={weight}}}"
    passes = f"canonicalize{{optional=true}},fold{{optional=true}},{assign},quantize"
    passes += ",round_cache" * rounded
    made = qcompiler.compile(model, tokens(VOCABULARY, 16), passes=passes, cache=True)

    def step(ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        out: Any = made(input_ids=ids, past_key_values=past)
        return out.logits[0, -1], out.past_key_values

    def size(past: Any) -> int:
        parts = [
            (getattr(t, "codes", t), getattr(t, "scales", None)) for t in pytree.tree_leaves(past)
        ]
        return sum(p.nbytes for pair in parts for p in pair if p is not None)

    return Writer(lambda ids: step(ids, None)[1], step, size)


def llama_cpp(model: nn.Module, kind: str, cache: str, threads: int, longest: int) -> Writer:
    """llama.cpp, its cache in 16 bits (its default) or Q8_0 (which needs its flash attention)."""
    import llama_cpp

    type_ = {"F16": llama_cpp.GGML_TYPE_F16, "Q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
    with tempfile.TemporaryDirectory() as folder:
        made = llama_cpp.Llama(
            str(gguf_file(model, kind, Path(folder))), n_ctx=longest, n_batch=512,
            n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False,
            type_k=type_, type_v=type_, flash_attn=cache == "Q8_0", logits_all=False,
        )  # fmt: skip

    def begin(ids: Tensor) -> None:
        made.reset()
        made.eval(ids[0].tolist())

    def step(ids: Tensor, _: Any) -> tuple[Tensor, Any]:
        made.eval(ids[0].tolist())
        last = made._ctx.get_logits_ith(-1)  # `scores` holds what `logits_all` asks for
        return torch.from_numpy(numpy.ctypeslib.as_array(last, shape=(made.n_vocab(),))), None

    bits = {"F16": 16, "Q8_0": 8.5}[cache]
    config: Any = model.config
    width = config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers
    return Writer(begin, step, lambda _: int(made.n_tokens * width * bits / 8))


def contenders(model: nn.Module, threads: int, longest: int) -> dict[str, Callable[[], Writer]]:
    """How each is made, by name."""
    makers: dict[str, Callable[[], Writer]] = {EAGER: lambda: eager(model)}
    for name, weight in (
        ("W4A8 g32", W4),
        ("W4A8 g128", W4.replace("32", "128")),
        ("W8A8", "int8:channel"),
    ):
        for rounded in (False, True):
            words = f"qcompiler {name}, cache {'int8' if rounded else 'float32'}"
            makers[words] = lambda weight=weight, rounded=rounded: ours(model, weight, rounded)
    for kind in ("Q4_0", "Q8_0"):
        for cache in ("F16", "Q8_0"):
            makers[f"llama.cpp {kind}, cache {cache}"] = lambda kind=kind, cache=cache: llama_cpp(
                model, kind, cache, threads, longest
            )
    return makers


def measure(writers: dict[str, Writer], past: int, count: int) -> list[dict]:
    """A row for each: `count` tokens behind `past`, by turns."""
    ids = tokens(VOCABULARY, past + count + 4)["input_ids"]
    states, read, logits = {}, {}, {}
    for name, writer in writers.items():
        start = time.perf_counter()
        states[name] = writer.begin(ids[:, :past])
        read[name] = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(count + 4):
        for name, writer in writers.items():
            token = ids[:, past + turn : past + turn + 1]
            start = time.perf_counter()
            logits[name], states[name] = writer.step(token, states[name])
            if turn >= 4:  # the first settle what repeats
                times[name].append(time.perf_counter() - start)
    base = times[EAGER]
    return [
        {
            "past": past,
            "contender": name,
            "seconds": statistics.median(times[name]),
            "against_eager": statistics.median(
                b / t for b, t in zip(base, times[name], strict=True)
            ),
            "prompt_seconds": read[name],
            "error": relative_error(logits[EAGER], logits[name].clone()),
            "cache_bytes": writer.cache(states[name]),
        }
        for name, writer in writers.items()
    ]


def main() -> None:
    """Build all, race them, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--past", default="128,1024,4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--only", default="", help="contenders whose names contain one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [int(n) for n in options.past.split(",")]
    model = llama(HIDDEN, options.layers, INTERMEDIATE, VOCABULARY)
    writers, failed = {}, {}
    makers = contenders(model, options.threads, max(lengths) + options.tokens + 8)
    for name, make in makers.items():
        if name != EAGER and not any(part in name for part in options.only.split(",")):
            continue
        print(f"{name} …", file=sys.stderr)
        try:
            writers[name] = make()
        except ImportError as error:
            failed[name] = str(error)
    rows: list[dict] = []
    with torch.no_grad():
        for past in lengths:
            rows += measure(writers, past, options.tokens)
    if options.json:
        found = {"machine": machine(), "torch": torch.__version__, "threads": options.threads}
        options.json.write_text(json.dumps({**found, "rows": rows, "failed": failed}, indent=1))
    show(rows, lengths)
    for name, why in failed.items():
        print(f"{name} is missing: {why}")


def show(rows: list[dict], lengths: list[int]) -> None:
    """Milliseconds of a token and times transformers' speed, a column for each past."""
    table = Table(title=f"a token behind a past of so many, {machine()}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for past in lengths:
        table.add_column(f"{past}", justify="right")
        table.add_column("×", justify="right")
    table.add_column("error", justify="right")
    table.add_column("cache MB", justify="right")
    for name in dict.fromkeys(r["contender"] for r in rows):
        mine = [r for r in rows if r["contender"] == name]
        cells = [
            c for r in mine for c in (f"{r['seconds'] * 1e3:.2f} ms", f"{r['against_eager']:.2f}")
        ]
        size = f"{mine[-1]['cache_bytes'] / 1e6:.0f}"
        table.add_row(name, *cells, f"{mine[-1]['error']:.1e}", size)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
