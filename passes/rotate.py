"""Rotate: spread outliers over all channels by orthogonal maps that cancel out.

    x' = x Rᵀ,  W' = W Rᵀ,   x' W'ᵀ = x W ᵀ        R = H diag(±1) / √n

QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024). Every free orthogonal space that a layer
reads takes one: the residual stream (R1) once the norms' gains are absorbed, the values of heads
(R2). With `online`, so does a space that one operator would free, the input of the down projection
(R4), and with `heads` queries and keys behind their rotary embedding (R3); these are computed at
run time, as fast transforms: of an odd factor of a size, by a matrix of nearly equal entries (see
`cores.py`), which costs less than Hadamard's of four or more times it, and is there for all up to
512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompiler.cores import fast_core, random_hadamard, refuses_transform
from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.hadamard import random_signs
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.sites import sites
from qcompiler.spaces import Space
from qcompiler.spaces import find as find_spaces
from qcompiler.spaces.apply import apply_map, online_places
from qcompiler.spaces.demand import demand
from qcompiler.spaces.maps import Hadamard, Map, Matrix


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Random Hadamard (or random orthogonal) maps on all orthogonal spaces."""

    name: ClassVar[str] = "rotate"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("rotation", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("scales", "shifts", "order", "splits")

    kind: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    online: bool = False
    """Also rotate a layer's input where one operator at run time is needed (R4)."""
    heads: bool = False
    """Also rotate queries and keys, for a quantized KV cache: two operators at run time behind a
    rotary embedding (R3), none without one."""
    transform: Literal["auto", "fast", "hadamard"] = "auto"
    """What runs where a size has an odd factor: `hadamard` is of ±1 alone, which spreads an outlier
    most evenly; `fast` leaves it larger, mostly by less than a fifth, and costs a CPU less than
    half. `auto` is what the backend prefers, or else fast."""
    demand: tuple[str, ...] = ()
    """Patterns of weights that must be rotated; if one cannot be, nothing is done."""

    def run(self, edit: Edit, facts: Facts) -> None:
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"rotate: a seed is from 0 to 2⁶³ - 1; found {self.seed}")
        generator = torch.Generator().manual_seed(self.seed)
        inputs = _inputs(facts)
        taken, refused = [], []
        for number, space in enumerate(find_spaces(facts.program, "orthogonal")):
            read = not inputs.isdisjoint((m.node, m.axis) for m in space.activations)
            if not read and not (self.heads and _meet(space)):
                continue  # nothing that a quantized layer or cache reads
            online = self.online if space.params else self.heads
            places = online_places(space) if online else ()
            if space.blocked_by and not places:
                refused.append(space)
                edit.skip(space.blocked_by[0].node, _why(space))
                continue
            taken.append(space)
            self._rotate(edit, space, places, generator, f"rotate.{number}")
        demand(self.name, self.demand, taken, refused)

    def _rotate(
        self,
        edit: Edit,
        space: Space,
        places: tuple[fx.Node, ...],
        generator: torch.Generator,
        name: str,
    ) -> None:
        size = space.size
        signs = random_signs(size, generator)
        core = self._core(size) if places else None
        whole = core is None and self.kind == "hadamard"  # n² numbers, for what is folded alone
        matrix = random_hadamard(size, signs) if whole else None
        what = "rotation" if core is None and matrix is None else "Hadamard"
        why = f"random {what} of {size} channels"
        if core is not None and core > 1:
            why += f" ({core} × {size // core})"
        if places:
            why += f", computed behind {', '.join(map(node_id, places))}"
        edit.spend(why, *(m.node for m in space.params), *places)
        made: Map
        if core is not None:
            made = Hadamard(edit, space.home, signs, name, core)
        else:
            drawn = _random(size, generator) if matrix is None else matrix
            made = Matrix(edit, space.home, drawn, name)
        apply_map(edit, space, made, places)

    def _core(self, size: int) -> int | None:
        """Of the fast transform of `size` numbers, or None if there is none."""
        if self.kind != "hadamard":
            return None
        if self.transform == "hadamard":
            return None if refuses_transform(size, 1) else 1
        return fast_core(size)


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Uniform over rotations: QR with the signs of R's diagonal (Mezzadri 2007)."""
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(noise)
    uniform: Tensor = q * torch.sign(torch.diagonal(r))
    return uniform


def _inputs(facts: Facts) -> set[tuple[fx.Node, int]]:
    """(activation, axis) of what each layer contracts."""
    found = set()
    for site in sites(facts.program.graph.nodes):
        if site.x is not None:
            found.add((site.x, site.kind.channel % site.x.meta["val"].ndim))
    return found


def _meet(space: Space) -> bool:
    """Whether two computed values meet in a product: queries and keys."""
    return {m.exponent for m in space.activations} == {1, -1}


def _why(space: Space) -> str:
    first, more = space.blocked_by[0], len(space.blocked_by) - 1
    return f"{space.size} channels cannot be rotated: {first.reason}" + (
        f" (and at {more} other nodes)" if more else ""
    )
