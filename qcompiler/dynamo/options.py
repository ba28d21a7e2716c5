"""What `options` of `torch.compile` may say, and the passes that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from qcompiler.backend import Backend
from qcompiler.edit import Edit
from qcompiler.errors import BadInput, QCompilerError, unknown
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.recipe import DEFAULT, Recipe, load_recipe
from qcompiler.registry import make_passes


@dataclass(frozen=True)
class Options:
    """What `options` may say: arguments of `qcompiler.compile`, and where data come from."""

    recipe: str | Recipe | None = None
    passes: str | Sequence[Pass | str] | None = None
    plan: str | None = None
    backend: str | Backend = "cpu"
    calibrate: int = 0
    """Calls that run in float; their inputs are the calibration data."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        if "data" in given:
            raise BadInput(
                "options of torch.compile hold no data, as each graph has inputs of its own; with "
                "'calibrate': 4 the first 4 calls run in float, and are what is calibrated on"
            )
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                raise unknown("option", name, names)
        return cls(**given)

    def pipeline(self) -> tuple[Pass, ...] | None:
        """The passes, all optional, and a stop where there is nothing to quantize: a graph may be
        a piece of a model."""
        if self.recipe is not None and self.passes is not None:
            raise BadInput("give a recipe or passes, not both")
        if self.passes is not None:
            passes = make_passes(
                self.passes if isinstance(self.passes, str) else tuple(self.passes)
            )
        elif self.plan is not None and self.recipe is None:
            return None
        else:
            recipe = self.recipe or DEFAULT
            passes = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).passes()
        optional = (replace(p, optional=True) for p in passes)
        return tuple(
            q
            for p in optional
            for q in ((p, _StopIfEmpty(optional=True)) if p.name == "assign" else (p,))
        )


class Empty(QCompilerError):
    """Nothing in a graph is to be quantized."""


@dataclass(frozen=True, kw_only=True)
class _StopIfEmpty(Pass):
    """Goes on if there is a plan."""

    name: ClassVar[str] = "stop_if_empty"
    effect: ClassVar[Effect] = Effect.PLAN

    def run(self, edit: Edit, facts: Facts) -> None:
        if not edit.plan:
            raise Empty
