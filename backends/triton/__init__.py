"""GPUs, by kernels in Triton: low-bit weights decoded in registers, int8 and e4m3 tensor cores.

Kernels are chosen by measured time on the GPU at hand, and so are their tile sizes (`tune.py`).
`TRITON_INTERPRET=1` runs the same kernels on the CPU, slowly, which is how they are tested.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import ClassVar

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.backends.triton.kernels import GATHER, KERNELS
from qcompiler.backends.triton.runtime import device, has, unavailable
from qcompiler.gather import GatherRows
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.spec import Value

OPERATORS = ("attention", "cache", "decoded", "hadamard", "rows", "scaled")
"""Modules that register operators."""


class TritonBackend(Backend):
    """One GPU."""

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = (
        "GPUs, by kernels in Triton: W4A16, W8A16, W8A8, FP8, W4A8, MXFP4, NVFP4"
    )
    capabilities: ClassVar[tuple[Capability, ...]] = (
        *(c for k in KERNELS.values() for c in k.capabilities),
        GATHER,
    )
    tolerance: ClassVar[float] = 2e-2
    """The whole program's; each kernel's own is in its capability."""
    prefers: ClassVar[Mapping[str, Mapping[str, Value]]] = {"rotate": {"transform": "hadamard"}}
    """Entries ±1 are exact on tensor cores."""

    def available(self) -> str | None:
        return unavailable()

    def has(self, feature: str) -> bool:
        return has(feature)

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        from qcompiler.backends.triton.lower import LowerLinear

        load_operators()
        from qcompiler.backends.triton.lower_cache import LowerCache

        left = tuple(sorted(exclude))
        kernels = tuple(n for n in KERNELS if self.kernels is None or n in self.kernels)
        passes: list[Pass] = [LowerCache(exclude=left)]
        if kernels:
            passes.append(LowerLinear(kernels=kernels, exclude=left, optional=True))
        if self.uses(GATHER):
            passes.append(GatherRows(exclude=left, optional=True))
        return tuple(passes)

    def build(self, program: Program) -> Artifact:
        from qcompiler.backends.triton.artifact import TritonArtifact

        load_operators()
        return TritonArtifact(program, device())


def load_operators() -> None:
    """Register `qc_triton::…`."""
    for module in OPERATORS:
        importlib.import_module(f"{__name__}.{module}")
