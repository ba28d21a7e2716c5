"""The CPU in this process: kernels generated for it and torch's own, chosen by measured time.

No library kernel is good on every CPU and at every size, and some are wrong on some CPUs: products
of 8-bit pairs summed in 16 bits saturate where there is no VNNI. So each kernel first proves itself
with weights at ±127 (`kernels.py`), and what passes is timed on each shape (`choose.py`).
"""

from __future__ import annotations

from typing import ClassVar

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.backends.cpu.choose import refusals
from qcompiler.backends.cpu.kernels import GATHER, GENERATED, KERNELS, self_test
from qcompiler.backends.cpu.lower import LowerLinear
from qcompiler.formats import Scheme
from qcompiler.gather import GatherRows
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.sites import Site


def _convolutions() -> tuple[Capability, ...]:
    if not GENERATED:
        return ()
    from qcompiler.backends.cpu.choose_conv import CLAIMS

    return CLAIMS


class CpuBackend(Backend):
    """In-process CPU execution."""

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = "this process, by kernels generated for its CPU where they pay"
    capabilities: ClassVar[tuple[Capability, ...]] = (
        *(claim for kernel in KERNELS.values() for claim in kernel.claims),
        *_convolutions(),
        GATHER,
    )
    tolerance: ClassVar[float] = 2e-2
    """The whole program's; each kernel's own is in its capability."""

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if site.kind.name == "conv" and (found := refusals(site, scheme)):
            return "; ".join(f"{name}: {why}" for name, why in found.items())
        fitting = {c.kernel for c in self.capabilities if self.uses(c) and c.fits(site, scheme)}
        reasons = []
        for name in (n for n in KERNELS if n in fitting):
            reason = self_test(name) or _shape(name, site, scheme)
            if reason is None:
                return None
            reasons.append(f"{name}: {reason}")
        return "; ".join(reasons) or super().refuses(site, scheme)

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        left = tuple(sorted(exclude))
        only = tuple(sorted(self.kernels & KERNELS.keys())) if self.kernels is not None else ()
        return (
            *self._convolutions(left),
            *(LowerLinear(kernel=n, exclude=left, only=only, optional=True) for n in KERNELS),
            GatherRows(exclude=left, optional=True),
            *_fused(left),
        )

    def _convolutions(self, left: tuple[str, ...]) -> tuple[Pass, ...]:
        """One pass, which goes before what makes floating point of all that is left."""
        if not GENERATED or not self.uses(_convolutions()[0]):
            return ()
        from qcompiler.backends.cpu.lower_conv import LowerConv

        return (LowerConv(exclude=left, forced=self.kernels is not None, optional=True),)

    def build(self, program: Program) -> Artifact:
        return _executed(program) if GENERATED else super().build(program)


def _executed(program: Program) -> Artifact:
    """A program that runs in memory of its own, as far as generated kernels can be bound to it."""
    from qcompiler.backends.cpu.executor import CpuArtifact

    return CpuArtifact(program)


def _fused(left: tuple[str, ...]) -> tuple[Pass, ...]:
    """What fewer and larger calls are made by."""
    if not GENERATED:
        return ()
    from qcompiler.backends.cpu import fuse, fuse_conv, lower_append

    passes = (
        fuse_conv.FuseConv,
        fuse_conv.LowerMean,
        fuse_conv.KeepLast,
        fuse.MergeLinears,
        fuse.FuseBefore,
        fuse.FuseResidual,
        fuse.LowerRope,
        fuse.LowerAttention,
        lower_append.LowerAppend,
    )
    return tuple(cls(exclude=left) for cls in passes)


def _shape(name: str, site: Site, scheme: Scheme) -> str | None:
    if scheme.weight is None:
        return None
    out, width = (int(n) for n in site.weight.meta["val"].shape[:2])
    return KERNELS[name].shape(out, width, scheme.weight)
