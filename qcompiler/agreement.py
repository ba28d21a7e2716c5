"""Whether an artifact computes what its program says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.backend import Artifact, Backend
from qcompiler.check import is_decided, output_errors
from qcompiler.errors import BackendError
from qcompiler.program import Program
from qcompiler.samples import Flat

SHAKEN = 1e-5
"""Relative error of numbers that may be summed in another order, at most; in 16 bits, that of a
last digit."""
MOST = 0.1
"""How far that may take an artifact: beyond, it is no program that can be checked."""
TURNED = 0.02
"""Share of an integer output that may be decided otherwise than by the reference."""


def check_artifact(
    program: Program, artifact: Artifact, backend: Backend, capture: Program, inputs: Flat
) -> None:
    """The artifact is the reference program, up to the backend's tolerance.

    Where activations are rounded, a last digit may turn a rounding the other way, and from there
    on the two are different quantizations of one model, as far from each other as either is from
    float. Then the artifact must be as near to float as the reference is, up to a quarter, or as
    near to the reference as that is to itself when last digits of its numbers differ: a file that
    was quantized before has no float. Integers are what somebody decided by such numbers (an
    argmax): a few may turn with them.
    """
    reference, found = program.flat(inputs), artifact.run(inputs)
    errors = output_errors(reference, found)
    if max(errors, default=0.0) <= max(backend.tolerance, 1e-12):
        return
    exact = capture.flat(inputs)
    rows = zip(
        program.io.output_names, reference, errors,
        output_errors(exact, reference), output_errors(exact, found), strict=True,
    )  # fmt: skip
    unrest: list[float] = []
    for number, (name, value, error, own, mine) in enumerate(rows):
        turned = max(TURNED, 1 / max(value.numel(), 1)) if is_decided(value) else 0.0
        if error <= max(backend.tolerance, 1e-12) or mine <= 1.25 * own + turned:
            continue
        unrest = unrest or _unrest(program, inputs, reference)
        if not error <= min(unrest[number], MOST):
            raise BackendError(
                f"{name} of the {backend.name} artifact differs from the reference program by "
                f"{error:.1e} (allowed {backend.tolerance:.0e}), and from float by {mine:.1e} "
                f"where the reference does by {own:.1e}; compile with --backend reference, and "
                "report this"
            )


def _unrest(program: Program, inputs: Flat, outputs: Sequence[object]) -> list[float]:
    """How far each output goes, at most, where inputs and parameters are off by `SHAKEN`."""
    found = [0.0] * len(outputs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def shaken(x: Any, generator: torch.Generator = generator) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            by = max(SHAKEN, torch.finfo(x.dtype).eps)
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            return (x.double() * (1 + by * noise)).to(x.dtype)

        params = {name: shaken(t) for name, t in program.params.items()}
        moved = replace(program, params=params).flat(tuple(map(shaken, inputs)))
        found = [max(pair) for pair in zip(found, output_errors(outputs, moved), strict=True)]
    return found
