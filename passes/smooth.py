"""SmoothQuant on channel spaces: move magnitude from activations into weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        x' = x / s,  W' = W diag(s)

(Xiao et al. 2023, eq. 4.) The maximum over the weight is over all readers of that activation. Where
1/s goes is no table of module names: each diagonal `Space` says which parameters produce the
channels (a norm's gain and bias, up_proj's rows, v_proj's rows) and which read them. With `search`,
each space takes the alpha that costs its readers least under the plan's formats; with
`method=awq` it takes s = mean|X|^r by the same search (Lin et al. 2024, section 3.2), for weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.spaces import Group, inputs_of
from qcompiler.spaces.apply import apply_scale
from qcompiler.spaces.demand import demand
from qcompiler.spaces.trial import noise, of_consumers, of_inputs

FLOOR = 1e-5
"""Smallest maximum of a channel; dead channels would otherwise get an infinite scale."""
GRID = 20
"""Exponents that a search tries, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scale activation outliers down and the weights that read them up (SmoothQuant, AWQ)."""

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    makes: ClassVar[tuple[str, ...]] = ("scales", "maps")
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("splits",)
    needs: ClassVar[tuple[str, ...]] = ("activations",)

    method: Literal["smoothquant", "awq"] = "smoothquant"
    alpha: float = 0.5
    """Share of the difficulty that moves to the weights: 0 none, 1 all of it."""
    search: bool = False
    """Choose the share for each space, by what the plan's formats cost its readers."""
    norms: bool = True
    """Also scale what a norm produces. A rotation of the stream takes such scales away: before it,
    only the others are of use, values and up-projections."""
    demand: tuple[str, ...] = ()
    """Patterns of weights that must be smoothed; if one cannot be, nothing is done."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        return (*self.needs, "samples") if self._searches else self.needs

    def gives(self) -> tuple[str, ...]:
        return self.makes if self.norms else ("maps",)

    @property
    def _searches(self) -> bool:
        return self.search or self.method == "awq"

    def run(self, edit: Edit, facts: Facts) -> None:
        if not 0 <= self.alpha <= 1:
            raise BadInput(f"smooth: alpha is between 0 and 1; found {self.alpha}")
        if self._searches and not facts.program.plan:
            raise BadInput("smooth: a search is for the plan's formats; put `assign` before it")
        found = inputs_of(facts.program, "diagonal")
        for site, why in found.refusals:
            edit.skip(site, why)
        taken, left = [], []
        for number, group in enumerate(found.groups):
            facts.tick(number, len(found.groups))
            if not self.norms and _behind_a_norm(group):
                left.append((group.space, "a norm produces its inputs; `norms` is false"))
                edit.skip(group.sites[0].id, left[-1][1])
                continue
            share, scale, words = self._scale(facts, group)
            if share is None:
                left.append((group.space, f"no scale of its inputs pays{words}"))
                edit.skip(group.sites[0].id, left[-1][1])
                continue
            taken.append(group.space)
            producers = ", ".join(m.name for m in group.space.producers)
            edit.spend(f"inputs of {group.names} take 1/s from {producers}{words}")
            apply_scale(edit, group.space, 1 / scale, f"smooth.{number}")
        demand(self.name, self.demand, taken, found.blocked, left)

    def _scale(self, facts: Facts, group: Group) -> tuple[float | None, Tensor, str]:
        """(share, s with one factor per free channel, what a search found)."""
        x = of_inputs(facts, group, "absmean" if self.method == "awq" else "absmax")
        w = of_consumers(facts, group.space)
        if not self._searches:
            return self.alpha, self._candidate(x, w, self.alpha), ""
        plain = noise(facts, group, torch.ones_like(x))
        tried = [
            (noise(facts, group, 1 / self._candidate(x, w, share)), share)
            for share in torch.linspace(0, 1, GRID + 1).tolist()
        ]
        least, share = min(tried)
        words = f" (noise {plain:.3g} → {least:.3g} at {share:.2f})"
        if not least < plain:
            return None, torch.ones_like(x), words
        return share, self._candidate(x, w, share), words

    def _candidate(self, x: Tensor, w: Tensor, share: float) -> Tensor:
        if self.method == "awq":
            scale = x.clamp(min=1e-4) ** share
            return scale / (scale.max() * scale.min()).sqrt()
        scale = x.clamp(min=FLOOR) ** share / w.clamp(min=FLOOR) ** (1 - share)
        return torch.where(x > FLOOR, scale, torch.ones_like(scale))


def _behind_a_norm(group: Group) -> bool:
    """Whether a gain, with no weight beside it, produces the group's inputs."""
    return all(m.node.meta["val"].ndim == 1 for m in group.space.producers)
