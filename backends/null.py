"""The smallest backend: claims everything, computes nothing, costs nothing.

It makes the whole road testable without a kernel, and is the file to copy for a new backend.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from qcompiler.backend import Artifact, Backend
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site


class NullArtifact(Artifact):
    """Zeros in the shapes of the program's outputs."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def run(self, inputs: Flat) -> tuple[object, ...]:
        outputs = self._program.flat(inputs)
        return tuple(torch.zeros_like(o) if isinstance(o, torch.Tensor) else o for o in outputs)


class NullBackend(Backend):
    """Zeros of the right shape; for tests of everything around a backend."""

    name: ClassVar[str] = "null"
    summary: ClassVar[str] = "claims everything, returns zeros: the smallest example"
    tolerance: ClassVar[float] = float("inf")

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        return None

    def cost(self, site: Site, scheme: Scheme, tokens: int) -> float | None:
        return 0.0

    def build(self, program: Program) -> Artifact:
        return NullArtifact(program)
