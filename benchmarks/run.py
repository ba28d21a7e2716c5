"""How fast whole models run, beside what else there is, in one process on the same inputs.

    .venv/bin/python benchmarks/run.py [--cases decode,prefill,minilm,minilm8,resnet,mobilenet]
                                       [--threads 1,2] [--only NAME,…] [--json FILE]

`decode`    one token of a Llama (hidden 1024, 8 layers, vocabulary 8192) behind 128 others
`prefill`   256 tokens of it, without a cache
`minilm`    the real MiniLM on a sentence of 32 words; `minilm8` on eight
`resnet`    a ResNet-18 on a picture of 64×64; `mobilenet` a MobileNetV2 on one of 224×224

All contenders run in turn, so that a slow moment of a shared machine hits all alike; the figure is
the median of eager float32's seconds over theirs. `error` is the relative error of the first output
against eager float32, MB what the weights take (a file's size, where the peer works on a file).
Peers that are missing or fail are named with the reason; llama.cpp is there where llama-cpp-python
is installed (0.3.36 was measured; it is built from source).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from end_to_end import peers
from end_to_end.ours import OURS, compiled
from models import Logits, Step, Words, llama, mobilenet, resnet, step_inputs, tokens
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qcompiler.check import relative_error

HIDDEN, INTERMEDIATE, VOCABULARY, PAST = 1024, 2816, 8192, 128
ASLEEP = 0.02
"""Seconds after which a library's threads have stopped waiting for work busily."""


@dataclass
class Case:
    """A model and what it is run on."""

    name: str
    model: nn.Module
    inputs: dict[str, object]
    dynamic: dict[str, dict[int, str]]
    """Input → axis → name of its size, for exporters."""
    kind: str
    """`decoder`, `encoder` or `pictures`: what formats make sense."""
    calibration: list[dict[str, object]] = field(default_factory=list)


def main() -> None:
    """Build all contenders of each case, race them, print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="contenders whose names contain one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows: list[dict] = []
    failed: dict[str, str] = {}
    with torch.no_grad():
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)  # kernels are chosen for a number of threads
            for name in options.cases.split(","):
                case = CASES[name](options.layers)
                case.name = name
                contenders = build(case, threads, options.only.split(","), failed)
                rows += measure(case, contenders, threads, options.rounds)
                if options.json:
                    found = {"machine": machine(), "torch": torch.__version__, "rows": rows}
                    found |= {"layers": options.layers, "failed": failed}
                    options.json.write_text(json.dumps(found, indent=1))
    show(rows, failed)


def decode(layers: int) -> Case:
    """A step of a Llama with a cache."""
    model = Step(llama(HIDDEN, layers, INTERMEDIATE, VOCABULARY)).eval()
    inputs = step_inputs(layers, HIDDEN // 128, VOCABULARY, PAST)
    return Case("decode", model, inputs, {"keys": {2: "past"}, "values": {2: "past"}}, "decoder")


def prefill(layers: int) -> Case:
    """A prompt of a Llama."""
    model = Logits(llama(HIDDEN, layers, INTERMEDIATE, VOCABULARY)).eval()
    inputs: dict[str, object] = {**tokens(VOCABULARY, 256)}
    return Case("prefill", model, inputs, {"input_ids": {1: "sequence"}}, "decoder")


def minilm(batch: int, layers: int) -> Case:
    """Sentences of 32 words."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "embedding_search"))
    from search import model_folder

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, 32), generator=generator)
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # A length by name would have to end at the last of MiniLM's 512 positions.
    return Case("minilm", Words(model_folder()), inputs, {}, "encoder")


def pictures(model: nn.Module, size: int) -> Case:
    """One picture."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input": torch.randn(1, 3, size, size, generator=generator)} for _ in range(16)]
    inputs: dict[str, object] = {"input": torch.randn(1, 3, size, size, generator=generator)}
    return Case("pictures", model, inputs, {}, "pictures", batches)


CASES = {
    "decode": decode,
    "prefill": prefill,
    "minilm": lambda layers: minilm(1, layers),
    "minilm8": lambda layers: minilm(8, layers),
    "resnet": lambda layers: pictures(resnet(), 64),
    "mobilenet": lambda layers: pictures(mobilenet(), 224),
}


def build(
    case: Case, threads: int, only: list[str], failed: dict[str, str]
) -> dict[str, peers.Contender]:
    """Contenders by name; those that could not be built go to `failed` with the reason."""
    makers = {"eager float32": lambda: peers.Contender(lambda x: case.model(**x), peers.size(case))}
    for name, how in OURS[case.kind].items():
        makers[name] = lambda how=how: compiled(case, *how)
    for name, make in peers.PEERS[case.kind].items():
        makers[name] = lambda make=make: make(case, threads)
    found: dict[str, peers.Contender] = {}
    for name, make in makers.items():
        if name != "eager float32" and not any(part in name for part in only):
            continue
        print(f"{case.name}: {name}, {threads} threads …", file=sys.stderr)
        try:
            found[name] = make()
            found[name].run(case.inputs)
        except Exception as error:  # a peer's failure is a result, not the end of the benchmark
            if name in OURS[case.kind]:
                raise
            found.pop(name, None)
            why = (str(error).strip() or repr(error)).splitlines()[0][:160]
            failed[f"{case.name}: {name}"] = f"{type(error).__name__}: {why}"
    return found


def measure(
    case: Case, contenders: dict[str, peers.Contender], threads: int, rounds: int
) -> list[dict]:
    """A row for each contender."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):
        for name, contender in contenders.items():
            time.sleep(ASLEEP)
            contender.run(case.inputs)  # to wake its own threads
            start = time.perf_counter()
            contender.run(case.inputs)
            if turn >= 2:  # the first turns warm up
                times[name].append(time.perf_counter() - start)
    wanted = first(contenders["eager float32"].run(case.inputs))
    base = times["eager float32"]
    return [
        {
            "case": case.name,
            "contender": name,
            "threads": threads,
            "seconds": statistics.median(times[name]),
            "against_eager": statistics.median(
                b / t for b, t in zip(base, times[name], strict=True)
            ),
            "error": relative_error(wanted, first(contender.run(case.inputs)))
            if contender.comparable
            else None,
            "bytes": contender.bytes,
        }
        for name, contender in contenders.items()
    ]


def first(outputs: object) -> Tensor:
    """The first tensor of what a model returns."""
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]  # type: ignore[index]
    return outputs


def machine() -> str:
    """The instruction set that torch found, and the number of cores."""
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def show(rows: list[dict], failed: dict[str, str]) -> None:
    """A table for each case: ratios, a column for each number of threads."""
    console = Console(width=120)
    threads = list(dict.fromkeys(r["threads"] for r in rows))
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = [r for r in rows if r["case"] == case]
        base = next(r for r in mine if r["contender"] == "eager float32")
        title = (
            f"{case}: times eager float32, {base['seconds'] * 1e3:.2f} ms with {base['threads']} "
            f"thread(s) (more is faster), {machine()}"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("contender", no_wrap=True)
        for number in threads:
            table.add_column(f"threads {number}", justify="right")
        table.add_column("error", justify="right")
        table.add_column("MB", justify="right")
        for name in dict.fromkeys(r["contender"] for r in mine):
            own = {r["threads"]: r for r in mine if r["contender"] == name}
            cells = [f"{own[t]['against_eager']:.2f}" if t in own else "" for t in threads]
            sizes = [r["bytes"] for r in own.values() if r["bytes"]]
            size = f"{sizes[0] / 1e6:.1f}" if sizes else ""
            errors = [r["error"] for r in own.values() if r["error"] is not None]
            table.add_row(name, *cells, f"{max(errors):.1e}" if errors else "", size)
        console.print(table)
    for name, why in failed.items():
        console.print(f"{name} is missing: {why}", markup=False)


if __name__ == "__main__":
    main()
