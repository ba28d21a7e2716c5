"""One model by two doors: captured from torch, and from the ONNX file that torch writes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from files import export
from torch import Tensor

import qcompiler
from qcompiler.check import relative_error
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program, op_name
from qcompiler.registry import make_passes
from qcompiler.samples import Flat, random_inputs
from qcompiler.sites import sites
from qcompiler.spaces import find

RECIPE = "w8a8-dynamic-smooth"
UNTIED = "the file holds the tied table twice, for the embedding and for the head"
EVALUATED = "the file holds the value of an expression of parameters instead of them"


@dataclass(frozen=True)
class Doors:
    """What came of one model by both doors."""

    torch: Program
    """Canonical, from the module."""
    onnx: Program
    """Canonical, from the file."""
    captured: Program
    """From the file, as it was captured."""
    path: Path
    example: dict[str, Tensor]

    def spaces(self, kind: str) -> tuple[int, int]:
        """Free spaces of a kind that weights write and read: from torch, from ONNX."""
        first, second = (
            sum(not s.blocked_by for s in find(p, kind)) for p in (self.torch, self.onnx)
        )
        return first, second

    def differences(self) -> list[str]:
        """What the exporter changed in the model, which explains other numbers of spaces."""
        found = []
        tied = _tied(self.torch) - _tied(self.onnx)
        if tied > 0:
            found.append(UNTIED)
        first, second = (p.params.values() for p in (self.torch, self.onnx))
        turned = _shapes(t.t() for t in second if t.ndim == 2)
        if {*_shapes(first)} - {*_shapes(second), *turned}:
            found.append(EVALUATED)
        return found

    def operators(self) -> tuple[Counter[str], Counter[str]]:
        """Operators that only one of the two programs has, and how many more."""
        first, second = (
            Counter(op_name(n.target) for n in p.nodes if n.op == "call_function")
            for p in (self.torch, self.onnx)
        )
        return first - second, second - first


def _tied(program: Program) -> int:
    """Parameters that are a table and a matrix at once."""
    count = 0
    for node in program.nodes:
        if program.param_of(node) is not None:
            kinds = {s.kind.name for s in sites(program.nodes) if s.weight is node}
            count += len(kinds) > 1
    return count


def _shapes(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors if t.is_floating_point()]


def open_doors(name: str, folder: Path) -> Doors:
    """Capture the architecture called `name` both ways, and bring both to canonical form."""
    path = folder / f"{name}.onnx"
    model, example = export(name, path)
    captured = qcompiler.capture(path, example)
    canonical = make_passes("canonicalize{optional=true}")
    from_torch = run_pipeline(qcompiler.capture(model, example), canonical)
    return Doors(from_torch, run_pipeline(captured, canonical), captured, path, example)


def other_sizes(program: Program, seed: int) -> Flat:
    """Random inputs of sizes that no example had."""
    sizes = {d: 2 + seed if "batch" in d else 5 + 2 * seed for d in program.io.dims}
    return random_inputs(program.io, seed, sizes)


def under_onnxruntime(path: Path, program: Program, inputs: Flat) -> list[Tensor]:
    """The file's own outputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed: dict[str, np.ndarray] = {}
    for port, x in zip(program.io.ports, inputs, strict=True):
        if port.is_tensor:
            assert isinstance(x, Tensor)
            feed[port.name] = x.numpy()
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def round_trip_error(doors: Doors, folder: Path) -> float:
    """Largest relative error of file → program → file against the file, both by ONNX Runtime."""
    written = qcompiler.export_onnx(doors.captured, folder / "again.onnx")
    worst = 0.0
    for seed in (1, 2):
        inputs = other_sizes(doors.captured, seed)
        want = under_onnxruntime(doors.path, doors.captured, inputs)
        got = under_onnxruntime(written, doors.captured, inputs)
        worst = max(worst, relative_error(tuple(want), tuple(got)))
    return worst


def quantized(program: Program, seed: int = 7) -> Program:
    """`program` by the recipe, calibrated on the same batches by both doors."""
    batches = [random_inputs(program.io, seed + i) for i in range(4)]
    passes = qcompiler.load_recipe(RECIPE).passes()
    return run_pipeline(program, passes, data=lambda: iter(batches))


def quantized_errors(doors: Doors) -> tuple[float, float]:
    """(between the quantized programs of both doors, of quantization itself), relative."""
    first, second = quantized(doors.torch), quantized(doors.onnx)
    between = rounding = 0.0
    for seed in (1, 2):
        inputs = other_sizes(doors.torch, seed)
        exact = doors.torch.flat(inputs)
        a, b = first.flat(inputs), second.flat(inputs)
        between = max(between, relative_error(a, b))
        rounding = max(rounding, relative_error(exact, a))
    return between, rounding
