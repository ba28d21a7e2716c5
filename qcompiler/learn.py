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
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site, sites

qc = torch.ops.qc


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
    only: Collection[str] | None = None,
) -> Learned:
    """Train the free maps of `program` (or `only` some) for `steps` batches.

    What it returns is never worse than what it began with.

    `rate` is the step of rotations, in the units of SpinQuant's (1.5 there); scales and matrices
    take hundredths of it.
    """
    if not batches:
        raise BadInput("training needs at least one batch of inputs")
    held, *feed = batches if len(batches) > 1 else (*batches, *batches)
    student = simulate(program)
    maps = [
        _TRAINERS[kind](name, program.params[name])
        for name, kind in student.maps.items()
        if only is None or name in only
    ]
    wanted = [program.flat(x) for x in (held, *feed)]

    def loss(inputs: Flat, target: tuple[object, ...]) -> Tensor:
        values = {m.name: m.value() for m in maps}
        params = [values.get(n, student.params[n]) for n in student.slots.values()]
        return objective(target, tuple(student.function(*params, *inputs)))

    def judge() -> float:
        with torch.no_grad():
            return float(loss(held, wanted[0]))

    best = first = judge()
    kept = {m.name: m.value().detach().clone() for m in maps}
    every = max(steps // 10, 1)
    for step in range(steps):
        number = step % len(feed)
        value = loss(feed[number], wanted[1 + number])
        if not bool(value.isfinite()):
            break  # what was best so far is kept
        grads = torch.autograd.grad(value, [m.leaf for m in maps])
        share = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for trained, grad in zip(maps, grads, strict=True):
                trained.step(grad, share)
        if (step + 1) % every == 0 or step + 1 == steps:
            now = judge()
            if now < best:
                best, kept = now, {m.name: m.value().detach().clone() for m in maps}
        tick(step + 1, steps)
    return Learned(kept, first, best)


class _Trainer:
    """One map, and how it moves."""

    def __init__(self, name: str, value: Tensor) -> None:
        self.name = name
        self.leaf = self.start(value).requires_grad_()
        self._moments: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def start(self, value: Tensor) -> Tensor:
        """What is trained, from the parameter's value."""
        return value.clone()

    def value(self) -> Tensor:
        """The parameter, from what is trained."""
        return self.leaf

    def step(self, grad: Tensor, rate: float) -> None:
        """Adam (Kingma and Ba 2015) with a hundredth of the rate of rotations."""
        self._steps += 1
        mean, square = self._moments or (torch.zeros_like(grad), torch.zeros_like(grad))
        mean, square = mean.lerp(grad, 0.1), square.lerp(grad * grad, 0.001)
        self._moments = mean, square
        mean_hat = mean / (1 - 0.9**self._steps)
        square_hat = square / (1 - 0.999**self._steps)
        self.leaf -= 0.01 * rate * mean_hat / (square_hat.sqrt() + 1e-12)


class _Scale(_Trainer):
    """Positive factors, by their logarithms."""

    def start(self, value: Tensor) -> Tensor:
        return value.log()

    def value(self) -> Tensor:
        return self.leaf.exp()


class _Rotation(_Trainer):
    """Cayley SGD on the Stiefel manifold (Li, Fuxin and Todorovic 2020), as SpinQuant does it."""

    def step(self, grad: Tensor, rate: float) -> None:
        x = self.leaf
        a = -grad.transpose(-2, -1) @ x
        half = a - 0.5 * x.transpose(-2, -1) @ (x @ a)
        skew = half - half.transpose(-2, -1)
        # The step that keeps the fixed point below a contraction.
        norm = skew.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
        length = torch.minimum(torch.full_like(norm, rate), 1 / (norm + 1e-8))
        identity = torch.eye(x.shape[-1], dtype=x.dtype)
        turned = torch.linalg.solve(
            identity - 0.5 * length * skew, (identity + 0.5 * length * skew) @ x.transpose(-2, -1)
        )
        x.copy_(_orthogonal(turned.transpose(-2, -1)))


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest rotation: one Newton step takes roundings off."""
    gram = matrix @ matrix.transpose(-2, -1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return (1.5 * identity - 0.5 * gram) @ matrix


_TRAINERS: Mapping[str, type[_Trainer]] = {
    "orthogonal": _Rotation,
    "diagonal": _Scale,
    "invertible": _Trainer,
    "shift": _Trainer,
}
