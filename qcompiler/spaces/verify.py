"""Does every space really take any map? A random one on each, in float64, and a control.

The control puts the map on one parameter alone: that must be seen, or a passing check says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompiler.check import relative_error
from qcompiler.edit import Edit
from qcompiler.program import Program
from qcompiler.run import evaluate_wide
from qcompiler.samples import random_inputs
from qcompiler.spaces import Space, find
from qcompiler.spaces.apply import apply_map, apply_matrix, apply_scale, apply_shift
from qcompiler.spaces.maps import Order

MAPS = ("diagonal", "shift", "permutation", "orthogonal", "invertible")
"""Kinds of which there are many maps to choose from."""


@dataclass(frozen=True)
class Verified:
    """Result for one space."""

    space: Space
    error: float
    """Relative error of the outputs with a random map on the whole space, in float64."""
    one_sided: float
    """The same with the map on its first parameter only."""

    @property
    def holds(self) -> bool:
        """The map cancels out, and half of it would have been seen."""
        return self.error <= 1e-9 < 1e-7 < self.one_sided


def verify(program: Program, kinds: Sequence[str] = MAPS, seed: int = 0) -> list[Verified]:
    """A random map on each free space of each kind; `program` itself is not changed."""
    inputs = random_inputs(program.io, seed)
    wanted = evaluate_wide(program, inputs)
    found = []
    for kind in kinds:
        for space in find(program, kind):
            if space.blocked_by or len(space.params) < 2:
                continue
            # A space of one tensor alone has no other side: its two members are told apart.
            half = replace(space, params=space.params[:1])
            errors = [
                relative_error(wanted, evaluate_wide(changed(program, s, seed), inputs))
                for s in (space, half)
            ]
            found.append(Verified(space, *errors))
    return found


def changed(program: Program, space: Space, seed: int) -> Program:
    """`program` with a random map on `space`."""
    edit = Edit(program, "verify")
    edit.spend("a random map")
    generator = torch.Generator().manual_seed(seed + space.id)
    if space.kind == "diagonal":
        apply_scale(edit, space, torch.rand(space.size, generator=generator) + 0.5, "verify.map")
    elif space.kind == "shift":
        apply_shift(edit, space, torch.randn(space.size, generator=generator), "verify.map")
    elif space.kind == "permutation":
        apply_map(
            edit, space, Order(edit, space.home, random_order(space.size, generator), "verify.map")
        )
    else:
        apply_matrix(edit, space, random_matrix(space, generator), "verify.map")
    return edit.seal()[0]


def random_order(size: int, generator: torch.Generator) -> Tensor:
    """One cycle through all channels, so that none stays where it was. int64 (size,)."""
    cycle = torch.randperm(size, generator=generator)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def random_matrix(space: Space, generator: torch.Generator) -> Tensor:
    """Orthogonal, or with singular values between 0.5 and 1.5; one for each index of `space.maps`.

    Shape (*maps, size, size), float64.
    """
    shape = (*space.maps, space.size, space.size)
    noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    turns: Tensor = torch.linalg.qr(noise)[0]
    if space.kind == "orthogonal":
        return turns[0]
    values = torch.rand(space.size, generator=generator, dtype=torch.float64) + 0.5
    return turns[0] * values @ turns[1]
