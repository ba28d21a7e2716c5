"""A compiled model beside the float one: how far its outputs are off, and how fast both are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from qcompiler.check import output_errors, sqnr_db
from qcompiler.errors import BadInput
from qcompiler.timing import floors


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. `str()` is one line."""

    seconds: float
    float_seconds: float
    errors: Mapping[str, float]
    """Output → ‖float - compiled‖ / ‖float‖; of integers, the share that differ."""

    @property
    def speedup(self) -> float:
        """Times as fast as float."""
        return self.float_seconds / self.seconds

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__, default="")
        which = f" at {worst}" if len(self.errors) > 1 else ""
        error = self.errors.get(worst, 0.0)
        return (
            f"float {self.float_seconds * 1e3:.2f} ms, compiled {self.seconds * 1e3:.2f} ms: "
            f"{self.speedup:.2f} × float speed; off by {error:.2g} ({sqnr_db(error):.1f} dB){which}"
        )


def compare(
    run: Callable[..., object],
    model: Callable[..., object],
    names: tuple[str, ...],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Comparison:
    """`run` beside `model` on one input, in turn, each until its fastest time repeats."""
    with torch.no_grad():
        wanted, found = model(*args, **kwargs), run(*args, **kwargs)
        theirs, ours = len(pytree.tree_leaves(wanted)), len(pytree.tree_leaves(found))
        if ours > theirs:
            raise BadInput(
                f"the compiled model returns {ours} tensors, the other one {theirs}; is it the "
                "model that was compiled?"
            )
        # What the capture leaves out, a cache, comes last.
        errors = output_errors(pytree.tree_leaves(wanted)[:ours], found)
        times = floors(
            {"float": lambda: model(*args, **kwargs), "compiled": lambda: run(*args, **kwargs)}
        )
    return Comparison(times["compiled"], times["float"], dict(zip(names, errors, strict=True)))
