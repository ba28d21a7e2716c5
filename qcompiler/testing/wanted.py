"""How far an output may be from the reference's.

    ‖ y - y' ‖  ≤  tolerance · max(‖ y ‖, ‖ |W| |x| + |b| ‖ / √n)  +  what is no error of the kernel

The second size is what a sum of n terms has if their signs are random: where terms cancel further,
by chance, the last digits of any order of summation are a large share of what is left. No error is

  · in 16 bits, what the program itself is off float32;
  · what lies below float32's smallest normal number, which processors may take for 0;
  · where the claim says that its rounding `flips`, what the last digits of x do to the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.check import distance
from qcompiler.formats import QFormat
from qcompiler.program import Program
from qcompiler.run import evaluate_wide
from qcompiler.samples import Flat
from qcompiler.testing.subjects import Subject

SMALLEST = torch.finfo(torch.float32).tiny
DIGITS = 2.0**-21
"""Share of a range that scaling, rounding and scaling back lose in float32: a few last digits."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What one output is held against."""

    own: Tensor
    """The program's own."""
    value: Tensor
    """The one to compare with."""
    size: float
    """What errors are a share of."""
    allowed: float
    """The size of what is no error."""

    def error(self, found: Tensor) -> float:
        """Relative error of an output."""
        gap = max(0.0, distance(self.value, found) - self.allowed)
        return gap / self.size if gap and self.size else math.inf if gap else 0.0


def wanted(program: Program, subject: Subject, x: Flat, flips: bool) -> list[Wanted]:
    """Of each output of a quantized `subject` on `x`."""
    own = program.flat(x)
    plain = subject.dtype == torch.float32
    values = own if plain else evaluate_wide(program, x, dtype=torch.float32)
    # The rows of a table are no sums.
    many = 1 if subject.shape.op == "embedding" else math.prod(subject.shape.weight[1:])
    usual = [_norm(t) / math.sqrt(many) for t in _terms(subject, x)]
    lost = _lost(program, subject, x, _tensors(values)) if flips else [0.0] * len(own)
    return [
        Wanted(a, b, max(_norm(b), u), distance(b, a) + SMALLEST * math.sqrt(b.numel()) + e)
        for a, b, u, e in zip(_tensors(own), _tensors(values), usual, lost, strict=True)
    ]


def _terms(subject: Subject, x: Flat, bias: bool = True) -> list[Tensor]:
    """|W| |x| + |b| of each output."""
    parts = {name: p.abs() for name, p in subject.program.params.items()}
    if not bias:
        parts = {n: torch.zeros_like(p) if n.endswith("bias") else p for n, p in parts.items()}
    return _tensors(replace(subject.program, params=parts).flat(_each(x, Tensor.abs)))


def _lost(program: Program, subject: Subject, x: Flat, values: list[Tensor]) -> list[float]:
    """The codes that a last digit turns the other way, up and down, and those digits themselves."""
    sides = [_shifted(program, x, side) for side in (1, -1)]
    digit = max(digit for _, digit in sides)
    digits = _terms(subject, _each(x, lambda v: torch.full_like(v, digit)), bias=False)
    return [
        _norm(d) + sum(distance(a, b) for b in both)
        for d, a, *both in zip(digits, values, *(moved for moved, _ in sides), strict=True)
    ]


def _shifted(program: Program, x: Flat, side: int) -> tuple[list[Tensor], float]:
    """The outputs, with activations a few last digits of their range off as they are rounded, by
    scales that come of them as they were; and the largest such digits."""
    seen: dict[fx.Node, Any] = {}
    largest = 0.0

    def instead(node: fx.Node, compute: Callable[[], object]) -> object:
        nonlocal largest
        if node.target is not torch.ops.qc.fake_quantize.default:
            return compute()
        arguments: Any = node.args
        source, format, *grid = arguments
        value, (scale, zero) = seen[source], (*(seen.get(g) for g in grid), None, None)[:2]
        if scale is None:
            scale, zero = torch.ops.qc.dynamic_scale(value, format)
        step = float(scale.max()) if scale.numel() else 0.0
        digit = DIGITS * step * 2.0 ** QFormat.parse(str(format)).bits
        largest = max(largest, digit)
        return torch.ops.qc.fake_quantize(value + side * digit, format, scale, zero)

    outputs = evaluate_wide(program, x, seen.__setitem__, torch.float32, instead)
    return _tensors(outputs), largest


def _each(x: Flat, change: Callable[[Tensor], Tensor]) -> Flat:
    return tuple(change(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in x)


def _tensors(values: tuple[object, ...]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))
