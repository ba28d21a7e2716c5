"""Training what decides how weights round, all layers of a block together.

    min over θ  loss( W'(θ) )        W' differentiable, loss a block's (see `objectives.py`)

Every twentieth of the way the weights are rounded in earnest and judged, on batches that were held
out if there are enough. What comes back are the very codes that were best, nearest's among them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qcompiler.formats import QTensor
from qcompiler.rounding.base import Block, Layer, Need, Rounding, gram_of, output_error
from qcompiler.rounding.nearest import nearest
from qcompiler.rounding.objectives import OBJECTIVES, BlockObjective, Name

LOOKS = 20
"""Times at which the weights are rounded and judged."""
ENOUGH = 8
"""Batches from which on an eighth of them is held out."""

Weights = Mapping[str, Tensor]


class Student(ABC):
    """One layer's weight in training."""

    leaves: tuple[Tensor, ...]
    """What is trained."""

    @abstractmethod
    def weight(self) -> Tensor:
        """W' (out, in), differentiable."""

    @abstractmethod
    def rounded(self) -> QTensor:
        """W' as codes."""

    def penalty(self, done: float) -> Tensor | None:
        """What to add to the loss, summed over weights, with this share of the way done."""
        return None

    def settle(self) -> None:
        """Bring the leaves back to where they may be."""


@dataclass(frozen=True, kw_only=True)
class Learned(Rounding):
    """A rounding that is trained. Of one layer alone, it is trained on its Gram matrix."""

    signs: ClassVar[bool] = False
    """Train by the signs of gradients, rather than by Adam."""

    steps: int = 200
    rate: float = 0.01
    """Step size at first; it falls to zero linearly."""
    batch: int = 1
    """Batches of calibration data that a step looks at."""
    seed: int = 0
    objective: Name = "block"

    def needed(self) -> tuple[Need, ...]:
        return ("gram",) if self.objective == "layer" else ("block",)

    @abstractmethod
    def student(self, layer: Layer) -> Student:
        """Where training of a layer starts."""

    def layer(self, layer: Layer) -> QTensor:
        gram_of(layer)
        return self._train({layer.id: layer}, _OfLayer(layer), _nobody)[layer.id]

    def block(self, block: Block) -> dict[str, QTensor]:
        if self.objective != "layer":
            task = _OfBlock(block, OBJECTIVES[self.objective])
            return self._train(block.layers, task, block.tick)
        found = {}
        for number, (id, layer) in enumerate(block.layers.items()):
            found[id] = self.layer(layer)
            block.tick(number + 1, len(block.layers))
        return found

    def _train(
        self, layers: Mapping[str, Layer], task: _Task, tick: Callable[[int, int], None]
    ) -> dict[str, QTensor]:
        held, feed = _split(task.batches)
        best = _Best({k: nearest(v.weight, v.format) for k, v in layers.items()}, task, held)
        if best.loss == 0 or not math.isfinite(best.loss):
            return best.codes
        students = {id: self.student(layer) for id, layer in layers.items()}
        best.look(students)
        leaves = [leaf for s in students.values() for leaf in s.leaves]
        adam = None if self.signs else torch.optim.Adam(leaves, lr=self.rate)
        unit = 1 / best.first / self.batch
        order = _shuffled(feed, self.seed)
        every = max(self.steps // LOOKS, 1)
        for step in range(self.steps):
            batches = [next(order) for _ in range(self.batch)]
            if not _differentiate(students, task, batches, unit, step / self.steps):
                break  # what was best so far is kept
            rate = self.rate * (1 - step / self.steps)
            _move(leaves, adam, rate)
            for student in students.values():
                student.settle()
            if (step + 1) % every == 0 or step + 1 == self.steps:
                best.look(students)
            tick(step + 1, self.steps)
        return best.codes


class _Task(Protocol):
    """What weights are trained for."""

    @property
    def batches(self) -> int: ...

    def loss(self, batch: int, weights: Weights) -> float: ...

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        """Loss and its gradient by each weight that it depends on."""


class _OfLayer:
    """tr(E H Eᵀ) / out, of which the gradient by W' is -2 E H / out."""

    batches = 1

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def loss(self, batch: int, weights: Weights) -> float:
        return float(output_error(self._layer, weights[self._layer.id]))

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        id, weight = self._layer.id, self._layer.weight
        error = weight - weights[id]
        weighted = error @ gram_of(self._layer) / len(weight)
        return float((weighted * error).sum()), {id: -2 * weighted}


class _OfBlock:
    """An objective of a block's outputs."""

    def __init__(self, block: Block, objective: BlockObjective) -> None:
        self._block, self._objective = block, objective
        self.batches = block.batches

    def loss(self, batch: int, weights: Weights) -> float:
        with torch.no_grad():
            return float(self._of(batch, weights))

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        leaves = {id: w.detach().requires_grad_() for id, w in weights.items()}
        with torch.enable_grad():
            loss = self._of(batch, leaves)
        # A layer that no data reached (an expert's) has no gradient.
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return float(loss), {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}

    def _of(self, batch: int, weights: Weights) -> Tensor:
        found = self._block.found(batch, weights)
        return self._objective(self._block, batch, found, self._block.wanted(batch))


class _Best:
    """The codes with the smallest loss so far."""

    def __init__(self, start: dict[str, QTensor], task: _Task, held: Sequence[int]) -> None:
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
    task: _Task,
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


def _move(leaves: Sequence[Tensor], adam: torch.optim.Adam | None, rate: float) -> None:
    """One step: of Adam (Kingma and Ba 2015), or of `rate` against each gradient's sign."""
    if adam is None:
        with torch.no_grad():
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf -= rate * leaf.grad.sign()
        return
    adam.param_groups[0]["lr"] = rate
    adam.step()


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
