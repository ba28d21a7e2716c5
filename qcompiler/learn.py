"""Training the free maps of a program through its quantized graph.

    min over the maps of  loss( program with every site of the plan rounded, float program )

Whatever the maps are, the float program stays the same function (`Program.maps`), so only what
rounding does is trained. Rotations stay rotations by Cayley steps, scales stay positive as
exponentials, and other matrices are trained as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Tick
from qcompiler.formats import QFormat
from qcompiler.objective import Objective
from qcompiler.padding import Padding
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site, sites

qc = torch.ops.qc
MEAN, SQUARE = 0.9, 0.99
"""Decay of the first and second moments."""
ELEMENTS = 0.01
"""Step of scales and of elements of matrices, in units of that of rotations."""


@dataclass(frozen=True)
class Learned:
    """What training came to."""

    values: Mapping[str, Tensor]
    """Parameter → the map with the smallest loss on the inputs held out for that."""
    before: float
    after: float
    """Loss on these inputs before and after."""


def simulate(program: Program) -> Program:
    """`program` with every site rounded as its plan says, weights on their edges: differentiable.

    Static activations are rounded with each batch's own range.
    """
    edit = Edit(program, "simulate")
    edit.spend("as the plan says")
    for site in sites(edit.nodes):
        scheme = program.plan.get(site.id)
        if scheme is None:
            continue
        if scheme.weight is not None:
            _round(edit, site, site.kind.weight, scheme.weight)
        if scheme.activation is not None and site.kind.x is not None:
            _round(edit, site, site.kind.x, scheme.activation)
    return edit.seal()[0]


def _round(edit: Edit, site: Site, argument: int, fmt: QFormat) -> None:
    node, value = site.node, site.node.args[argument]
    rounded = edit.call(qc.fake_quantize.default, value, str(fmt), like=node)
    edit.rewire(node, argument, rounded)


def learn(
    program: Program,
    batches: Sequence[Flat],
    objective: Objective,
    *,
    steps: int,
    rate: float,
    tick: Tick,
    draws: int = 1,
    only: Collection[str] | None = None,
) -> Learned:
    """Train the free maps of `program` (or `only` some) for `steps` batches.

    An eighth of the batches is held out to judge by, and what comes back is never worse there than
    the start. `rate` is by how many radians a step turns a rotation at first; it falls to zero by a
    cosine. With `draws` above 1, training starts from the best of so many random rotations.
    """
    if not batches:
        raise BadInput("training needs at least one batch of inputs")
    aside = -(-len(batches) // 8)
    held, feed = batches[:aside], batches[aside:] or batches
    padding, student = Padding(program), simulate(program)
    maps = [
        _TRAINERS[kind](name, program.params[name])
        for name, kind in student.maps.items()
        if only is None or name in only
    ]

    def loss(inputs: Flat) -> Tensor:
        values = {m.name: m.value() for m in maps}
        params = [values.get(n, student.params[n]) for n in student.slots.values()]
        found = tuple(student.function(*params, *inputs))
        return objective(*(padding.data(inputs, y) for y in (program.flat(inputs), found)))

    def judge() -> float:
        with torch.no_grad():
            return sum(float(loss(inputs)) for inputs in held) / len(held)

    best = _Best(maps)
    first = best.look(judge())
    generator = torch.Generator().manual_seed(0)
    for draw in range(1, draws):
        for trained in maps:
            trained.draw(generator)
        best.look(judge())
        tick(draw, draws + steps)
    best.restore()
    every = max(steps // 10, 1)
    for step in range(steps):
        value = loss(feed[step % len(feed)])
        if not bool(value.isfinite()):
            break  # what was best so far is kept
        # A map that the loss does not see has no gradient, and stays what it is.
        grads = torch.autograd.grad(value, [m.leaf for m in maps], allow_unused=True)
        share = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for trained, grad in zip(maps, grads, strict=True):
                if grad is not None:
                    trained.step(grad, share)
        if (step + 1) % every == 0 or step + 1 == steps:
            best.look(judge())
        tick(draws + step + 1, draws + steps)
    best.restore()
    return Learned({m.name: m.value().detach().clone() for m in maps}, first, best.loss)


class _Best:
    """The maps as they were when the loss was smallest."""

    def __init__(self, maps: Sequence[_Trainer]) -> None:
        self._maps = maps
        self._kept: list[Tensor] = []
        self.loss = math.inf

    def look(self, loss: float) -> float:
        """Keep the maps as they are now, if `loss` is the smallest so far."""
        if loss < self.loss or not self._kept:
            self.loss = loss
            self._kept = [m.leaf.detach().clone() for m in self._maps]
        return loss

    def restore(self) -> None:
        with torch.no_grad():
            for trained, value in zip(self._maps, self._kept, strict=True):
                trained.leaf.copy_(value)


class _Trainer:
    """One map, and how it moves: by Adam (Kingma and Ba 2015) on what it is made of."""

    def __init__(self, name: str, value: Tensor) -> None:
        self.name = name
        self.leaf = self.start(value).requires_grad_()
        self._mean = torch.zeros_like(self.leaf)
        self._square = torch.zeros_like(self.leaf)
        self._steps = 0

    def start(self, value: Tensor) -> Tensor:
        """What is trained, from the parameter's value."""
        return value.clone()

    def value(self) -> Tensor:
        """The parameter, from what is trained."""
        return self.leaf

    def draw(self, generator: torch.Generator) -> None:
        """Start from another random map, if that makes sense."""

    def step(self, grad: Tensor, rate: float) -> None:
        """Move `leaf` against its gradient."""
        self._steps += 1
        self._mean = self._mean.lerp(grad, 1 - MEAN)
        self._square = self._square.lerp(grad * grad, 1 - SQUARE)
        mean = self._mean / (1 - MEAN**self._steps)
        square = self._square / (1 - SQUARE**self._steps)
        self.leaf -= ELEMENTS * rate * mean / (square.sqrt() + 1e-12)


class _Scale(_Trainer):
    """Positive factors, by their logarithms."""

    def start(self, value: Tensor) -> Tensor:
        return value.log()

    def value(self) -> Tensor:
        return self.leaf.exp()


class _Rotation(_Trainer):
    """Cayley Adam on the rotations (Li, Fuxin and Todorovic 2020, algorithm 2).

    One second moment for the whole matrix, so that a step turns it by `rate` radians in all,
    whatever the loss is measured in.
    """

    def draw(self, generator: torch.Generator) -> None:
        """R diag(±1): of a random Hadamard matrix, another one."""
        signs = torch.randint(0, 2, self.leaf.shape[-1:], generator=generator) * 2 - 1
        with torch.no_grad():
            self.leaf *= signs

    def step(self, grad: Tensor, rate: float) -> None:
        self._steps += 1
        x = self.leaf
        self._mean = self._mean.lerp(grad, 1 - MEAN)
        size = grad.pow(2).sum((-2, -1), keepdim=True)
        self._square = torch.lerp(self._square[..., :1, :1], size, 1 - SQUARE)
        length = (self._square / (1 - SQUARE**self._steps)).sqrt() + 1e-12
        # The part of the gradient along the manifold is (W x) with a skew-symmetric W.
        turn = self._mean @ x.mT
        skew = (turn - turn.mT) / (2 * length * (1 - MEAN**self._steps))
        half = -0.5 * rate * skew
        identity = torch.eye(x.shape[-1], dtype=x.dtype)
        x.copy_(_orthogonal(torch.linalg.solve(identity - half, (identity + half) @ x)))


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest rotation: one Newton step takes roundings off."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return (1.5 * identity - 0.5 * matrix @ matrix.mT) @ matrix


_TRAINERS: Mapping[str, type[_Trainer]] = {
    "orthogonal": _Rotation,
    "diagonal": _Scale,
    "invertible": _Trainer,
    "shift": _Trainer,
}
