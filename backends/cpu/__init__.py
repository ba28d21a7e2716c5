"""The CPU in this process, with torch's own low-precision kernels, chosen by measured time.

No library kernel is good on every CPU and at every size, and some are wrong on some CPUs: products
of 8-bit pairs summed in 16 bits saturate where there is no VNNI. So each kernel first proves itself
with weights at ±127 (`kernels.py`), and what passes is timed on each shape (`choose.py`).
"""

from __future__ import annotations

from typing import ClassVar

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.backends.cpu.kernels import KERNELS, self_test
from qcompiler.backends.cpu.lower import LowerEmbedding, LowerLinear
from qcompiler.formats import Scheme
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site


class CpuArtifact(Artifact):
    """The lowered program; it runs itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, inputs: Flat) -> tuple[object, ...]:
        return self.program.flat(inputs)

    @property
    def bytes(self) -> int:
        return self.program.bytes


class CpuBackend(Backend):
    """In-process CPU execution."""

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = (
        "this process, torch's int8 and int4 kernels where they are right and pay"
    )
    capabilities: ClassVar[tuple[Capability, ...]] = tuple(k.capability for k in KERNELS.values())
    tolerance: ClassVar[float] = 2e-2
    """The whole program's; each kernel's own is in its capability."""

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        reasons = []
        for kernel in KERNELS.values():
            if kernel.capability.fits(site, scheme):
                reason = self_test(kernel.name)
                if reason is None:
                    return None
                reasons.append(f"{kernel.name}: {reason}")
        return "; ".join(reasons) or super().refuses(site, scheme)

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        left = tuple(sorted(exclude))
        kernels = [n for n, k in KERNELS.items() if k.capability.op == "linear"]
        return (
            *(LowerLinear(kernel=n, exclude=left, optional=True) for n in kernels),
            LowerEmbedding(exclude=left, optional=True),
        )

    def build(self, program: Program) -> Artifact:
        return CpuArtifact(program)
