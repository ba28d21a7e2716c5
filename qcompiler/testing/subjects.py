"""What kernels are tried on: one operator at a time, with weights and inputs that are hard.

A subject is a program of several sites that all read one input, each with a weight of its own kind,
so that what takes long, capturing and building, is done once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from qcompiler.capture import capture
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site, sites

TOKENS = (5, 1, 0, 33, 64)
"""Sizes of a batch, odd ones and whole tiles; on the first, a static format is calibrated."""
TINY = 1e-39
"""Below float32's smallest normal number."""


@dataclass(frozen=True)
class Shape:
    """One operator with its sizes."""

    op: str
    weight: tuple[int, ...]
    """(outputs, inputs, taps …), or (rows, width) of a table."""
    input: tuple[int, ...]
    """Sizes of an input, -1 for the batch."""
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        words = "×".join(map(str, self.weight))
        words += f" stride {self.stride}" if self.stride > 1 else ""
        words += f" groups {self.groups}" if self.groups > 1 else ""
        return f"{self.op} {words}"

    def rounded(self, multiple_of: tuple[int, int]) -> Shape:
        """With outputs and inputs rounded up to multiples."""
        out, width = (-(-n // m) * m for n, m in zip(self.weight, multiple_of, strict=False))
        sizes = tuple(width if n == self.weight[1] else n for n in self.input)
        return replace(self, weight=(out, width, *self.weight[2:]), input=sizes)

    def layer(self, weight: Tensor, bias: bool) -> nn.Module:
        """The operator with this weight; `bias` is for those that have one."""
        out, width, *taps = self.weight
        made: nn.Module
        if self.op == "linear":
            made = nn.Linear(width, out, bias)
        elif self.op == "embedding":
            made = nn.Embedding(out, width)
        else:
            conv = nn.Conv1d if len(taps) == 1 else nn.Conv2d
            around, size = width * self.groups, taps[0]
            made = conv(around, out, size, self.stride, size // 2, groups=self.groups, bias=bias)
        made.weight = nn.Parameter(weight)
        return made

    def behind(self) -> nn.Module:
        """The identity on what the operator yields, as another one of its kind."""
        out = self.weight[0]
        if self.op == "linear":
            made: nn.Module = nn.Linear(out, out, bias=False)
            made.weight = nn.Parameter(torch.eye(out))
            return made
        taps = len(self.weight) - 2
        made = (nn.Conv1d if taps == 1 else nn.Conv2d)(out, out, 1, bias=False)
        made.weight = nn.Parameter(torch.eye(out).reshape(out, out, *[1] * taps))
        return made

    def example(self, batch: int, seed: int) -> Tensor:
        """A random input."""
        sizes = [batch if n == -1 else n for n in self.input]
        generator = torch.Generator().manual_seed(seed)
        if self.op == "embedding":
            return torch.randint(0, self.weight[0], sizes, generator=generator)
        return torch.randn(sizes, generator=generator)


SHAPES = (
    Shape("linear", (64, 128), (-1, 128)),
    Shape("linear", (37, 41), (1, -1, 41)),
    Shape("linear", (48, 96), (-1, 2, 96)),
    Shape("linear", (1, 33), (-1, 33)),
    Shape("linear", (256, 512), (-1, 512)),
    Shape("conv", (8, 16, 3, 3), (-1, 16, 8, 8)),
    Shape("conv", (7, 3, 3, 3), (-1, 3, 9, 7), stride=2),
    Shape("conv", (16, 1, 3, 3), (-1, 16, 6, 6), groups=16),
    Shape("conv", (10, 6, 3), (-1, 6, 11)),
    Shape("conv", (5, 8, 1, 1), (-1, 8, 5, 5)),
    Shape("embedding", (48, 64), (1, -1)),
    Shape("embedding", (37, 33), (-1, 2)),
)


def _outlier(weight: Tensor) -> Tensor:
    """The first number is larger than all others by far."""
    first = torch.arange(weight.numel()).reshape(weight.shape) == 0
    return torch.where(first, 1e3, weight)


def _rows(weight: Tensor, factor: float) -> Tensor:
    """A factor for every other row, 1 for the rest."""
    rows = torch.where(torch.arange(weight.shape[0]) % 2 == 1, factor, 1.0)
    return rows.reshape(-1, *[1] * (weight.ndim - 1))


Kind = tuple[str, bool, Callable[[Tensor], Tensor]]
KINDS: tuple[Kind, ...] = (
    ("random", True, lambda w: w),
    ("random, another seed", False, lambda w: w),
    ("all at ±largest", False, lambda w: torch.where(w < 0, -0.5, 0.5)),
    ("all equal", True, lambda w: torch.full_like(w, 0.5)),
    ("zeros", False, torch.zeros_like),
    ("denormals in every other row", True, lambda w: w * _rows(w, TINY)),
    ("one huge outlier", False, _outlier),
)
"""Kinds of weights: in words, whether with a bias, and how it comes of random numbers."""


class Sites(nn.Module):
    """One layer for each weight, side by side; with `behind`, something that reads each."""

    def __init__(self, shape: Shape, weights: list[tuple[Tensor, bool]], behind: bool) -> None:
        super().__init__()
        layers = [shape.layer(w, bias) for w, bias in weights]
        self.layers = nn.ModuleList(
            nn.Sequential(layer, shape.behind()) if behind else layer for layer in layers
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


@dataclass(frozen=True, eq=False)
class Subject:
    """A float program of sites that read one input."""

    shape: Shape
    dtype: torch.dtype
    program: Program
    kinds: tuple[str, ...]
    """Of each output's weight, in words."""
    inputs: tuple[tuple[str, Flat], ...]
    """What it is run on, in words and numbers; the first is what it is calibrated with."""

    @property
    def sites(self) -> list[Site]:
        """The site that makes each output, or what `behind` reads."""
        found = sites(self.program.nodes)
        return found[:: len(found) // len(self.kinds)]

    def __str__(self) -> str:
        return f"{self.shape} in {str(self.dtype).removeprefix('torch.')}"


def _apart(x: Tensor) -> Tensor:
    """x, no two numbers side by side in memory."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@lru_cache(maxsize=32)
def subject(shape: Shape, dtype: torch.dtype = torch.float32, behind: bool = False) -> Subject:
    """The subject of `shape`; with `behind`, each site is read by another one of its format."""
    bound = 1 / math.sqrt(math.prod(shape.weight[1:]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [torch.empty(shape.weight).uniform_(-bound, bound) for _ in KINDS]
        made = [(make(w), bias) for w, (_, bias, make) in zip(drawn, KINDS, strict=True)]
        module = Sites(shape, made, behind)
    floating = shape.op != "embedding"

    def cast(x: Tensor) -> Flat:
        return (x.to(dtype) if floating else x,)

    inputs = [(f"batch of {n}", cast(shape.example(n, n))) for n in TOKENS]
    if floating:
        x = shape.example(TOKENS[0], 99)
        inputs += [
            ("all at 3", cast(torch.full_like(x, 3.0))),
            ("beyond the calibrated range", cast(10 * x)),
            ("zeros", cast(torch.zeros_like(x))),
            ("numbers with gaps between them in memory", (_apart(x.to(dtype)),)),
        ]
    program = capture(module.eval().to(dtype), inputs[0][1])
    words = [f"{name}{', with a bias' * (bias and floating)}" for name, bias, _ in KINDS]
    return Subject(shape, dtype, program, tuple(words), tuple(inputs))
