"""Training what decides how weights round, all layers of a block together.

    min over θ  loss( W'(θ) )        W' differentiable, loss a block's (see `objectives.py`)

Every twentieth of the way the weights are rounded in earnest and judged, on batches that were held
out if there are enough. What comes back are the very codes that were best, nearest's among them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QTensor
from qcompiler.rounding.base import Block, Layer, Need, Rounding, gram_of
from qcompiler.rounding.nearest import nearest
from qcompiler.rounding.objectives import OBJECTIVES, Name, OfBlock, OfLayer, Task
from qcompiler.rounding.search import By, fit

LOOKS = 20
"""Times at which the weights are rounded and judged."""
ENOUGH = 8
"""Batches from which on an eighth of them is held out."""
MEAN, SQUARE, TINY = 0.9, 0.999, 1e-8
"""Of Adam: how much of the old a mean keeps, and the least root of a mean square."""


class Student(ABC):
    """One layer's weight in training."""

    leaves: tuple[Tensor, ...]
    """What is trained."""
    bounds: tuple[tuple[float, float], ...] = ()
    """Between which numbers each of these stays; without any they are free."""

    @abstractmethod
    def weight(self) -> Tensor:
        """W' (out, in), differentiable."""

    @abstractmethod
    def rounded(self) -> QTensor:
        """W' as codes."""

    def penalty(self, done: float) -> Tensor | None:
        """What to add to the loss, summed over weights, with this share of the way done."""
        return None


@dataclass(frozen=True, kw_only=True)
class Learned(Rounding):
    """A rounding that is trained. Of one layer alone, it is trained on its Gram matrix."""

    signs: ClassVar[bool] = False
    """Train by the signs of gradients, rather than by Adam."""

    steps: int = 200
    rate: float = 0.0
    """Step size at first, which falls to zero linearly; 0 is the method's own."""
    batch: int = 1
    """Batches of calibration data that a step looks at."""
    seed: int = 0
    objective: Name = "block"
    search: By = "none"
    """How the first ranges are found, as in the rounding `search`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise BadInput(
                f"{self.name}: steps and batch are 1 or more, found {self.steps} and {self.batch}"
            )
        if not self.rate >= 0:
            raise BadInput(f"{self.name}: rate is 0 or more, found {self.rate}")

    def needed(self) -> tuple[Need, ...]:
        if self.objective == "layer":
            return ("gram",)
        return ("gram", "block") if self.search == "output" else ("block",)

    @property
    @abstractmethod
    def own_rate(self) -> float:
        """The step size that the method starts with by itself."""

    @abstractmethod
    def student(self, weight: Tensor, grid: Grid) -> Student:
        """What is trained so that `weight` rounds well, which begins on `grid`."""

    def layer(self, layer: Layer) -> QTensor:
        gram_of(layer)
        return self._train({layer.id: layer}, OfLayer(layer), _nobody)[layer.id]

    def block(self, block: Block) -> dict[str, QTensor]:
        if self.objective != "layer":
            task = OfBlock(block, OBJECTIVES[self.objective])
            return self._train(block.layers, task, block.tick)
        found = {}
        for number, (id, layer) in enumerate(block.layers.items()):
            found[id] = self.layer(layer)
            block.tick(number + 1, len(block.layers))
        return found

    def _student(self, layer: Layer) -> Student:
        # Evenly spaced, which is how a table starts without a search, is no way to leave one.
        search = "mse" if layer.format.is_codebook and self.search == "none" else self.search
        importance = None if layer.inputs.gram is None else layer.inputs.gram.matrix.diagonal()
        return self.student(layer.weight, fit(layer.weight, layer.format, search, importance))

    def _train(
        self, layers: Mapping[str, Layer], task: Task, tick: Callable[[int, int], None]
    ) -> dict[str, QTensor]:
        held, feed = _split(task.batches)
        best = _Best({k: nearest(v.weight, v.format) for k, v in layers.items()}, task, held)
        if best.loss == 0 or not math.isfinite(best.loss):
            return best.codes
        students = {id: self._student(layer) for id, layer in layers.items()}
        best.look(students)
        mover = _Signs() if self.signs else _Adam()
        first = self.rate or self.own_rate
        unit = 1 / best.first / self.batch
        order = _shuffled(feed, self.seed)
        every = max(self.steps // LOOKS, 1)
        for step in range(self.steps):
            batches = [next(order) for _ in range(self.batch)]
            if not _differentiate(students, task, batches, unit, step / self.steps):
                break  # what was best so far is kept
            _move(students.values(), mover, first * (1 - step / self.steps))
            if (step + 1) % every == 0 or step + 1 == self.steps:
                best.look(students)
            tick(step + 1, self.steps)
        return best.codes


class _Best:
    """The codes with the smallest loss so far."""

    def __init__(self, start: dict[str, QTensor], task: Task, held: Sequence[int]) -> None:
        self._task, self._held = task, held
        self.codes = start
        self.first = self.loss = self._judge(start)

    def look(self, students: Mapping[str, Student]) -> None:
        """Round the weights in earnest; keep the codes if they are better."""
        with torch.no_grad():
            codes = {id: s.rounded() for id, s in students.items()}
        loss = self._judge(codes)
        if loss < self.loss:
            self.codes, self.loss = codes, loss

    def _judge(self, codes: Mapping[str, QTensor]) -> float:
        weights = {id: q.dequantize() for id, q in codes.items()}
        return sum(self._task.loss(b, weights) for b in self._held) / max(len(self._held), 1)


def _differentiate(
    students: Mapping[str, Student],
    task: Task,
    batches: Sequence[int],
    unit: float,
    done: float,
) -> bool:
    """Leave gradients of the loss (times `unit`) and of the penalties in the leaves.

    False if the loss is not finite. The block is differentiated batch by batch, the weights once.
    """
    with torch.enable_grad():
        weights = {id: s.weight() for id, s in students.items()}
        penalties = [p for s in students.values() if (p := s.penalty(done)) is not None]
    total = {id: torch.zeros_like(w) for id, w in weights.items()}
    for batch in batches:
        loss, grads = task.gradient(batch, {id: w.detach() for id, w in weights.items()})
        if not math.isfinite(loss):
            return False
        for id, grad in grads.items():
            total[id] += unit * grad
    for student in students.values():
        for leaf in student.leaves:
            leaf.grad = None
    count = sum(w.numel() for w in weights.values())
    each = [torch.tensor(1 / count)] * len(penalties)
    torch.autograd.backward([*weights.values(), *penalties], [*total.values(), *each])
    return True


def _move(students: Iterable[Student], mover: _Signs, rate: float) -> None:
    """One step of all leaves, back into their bounds."""
    with torch.no_grad():
        for student in students:
            for leaf in student.leaves:
                if leaf.grad is not None:
                    leaf -= rate * mover.direction(leaf, leaf.grad)
            for leaf, (low, high) in zip(student.leaves, student.bounds, strict=False):
                leaf.clamp_(low, high)


class _Signs:
    """Each number by the sign of its gradient."""

    def direction(self, leaf: Tensor, grad: Tensor) -> Tensor:
        return grad.sign()


class _Adam(_Signs):
    """Adam (Kingma and Ba 2015, algorithm 1)."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Tensor, Tensor]] = {}
        """A leaf's steps, and mean and mean square of its gradients."""

    def direction(self, leaf: Tensor, grad: Tensor) -> Tensor:
        steps, mean, square = self._seen.get(id(leaf), (0, torch.zeros(()), torch.zeros(())))
        steps += 1
        mean = torch.lerp(grad, mean.expand_as(grad), MEAN)
        square = torch.lerp(grad * grad, square.expand_as(grad), SQUARE)
        self._seen[id(leaf)] = steps, mean, square
        root = (square / (1 - SQUARE**steps)).sqrt_().add_(TINY)
        return mean / (1 - MEAN**steps) / root


def _split(batches: int) -> tuple[list[int], list[int]]:
    """(batches to judge by, batches to train on)."""
    everything = list(range(batches))
    if batches < ENOUGH:
        return everything, everything
    held = everything[:: -(-batches // (batches // ENOUGH))]
    return held, [b for b in everything if b not in held]


def _shuffled(batches: Sequence[int], seed: int) -> Iterator[int]:
    """All batches in a random order, then in another one, and so on."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def _nobody(done: int, total: int) -> None:
    """Nobody asked how far it is."""
