"""Instruction sets that kernels are generated for, and the one to use here.

========  =====  ====================================================================
`vnni`    512    AVX-512 with VNNI: u8 × s8 products, four to a lane, summed in 32 bits
`avx2`    256    AVX2 and FMA: u8 × s8 products, two to a lane, summed in 16 bits
`neon`    128    Armv8.2 dot products: s8 × s8, four to a lane, summed in 32 bits
`plain`   128    nothing but what LLVM has for every CPU
========  =====  ====================================================================

`QCOMPILER_CPU_ISA` forces one by name, as long as this CPU has it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from qcompiler.errors import BackendError

VARIABLE = "QCOMPILER_CPU_ISA"


@dataclass(frozen=True)
class Isa:
    """One instruction set."""

    name: str
    bits: int
    """Width of a vector."""
    features: tuple[str, ...]
    """LLVM's names of what a CPU must have."""
    architecture: str = ""
    """First part of the target triple; empty for any."""

    @property
    def lanes(self) -> int:
        """32-bit numbers in a vector."""
        return self.bits // 32

    @property
    def bytes(self) -> int:
        """Bytes of a vector."""
        return self.bits // 8


VNNI = Isa(
    "vnni",
    512,
    ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c"),
    "x86_64",
)
AVX2 = Isa("avx2", 256, ("avx2", "fma", "f16c"), "x86_64")
NEON = Isa("neon", 128, ("neon", "dotprod"), "aarch64")
PLAIN = Isa("plain", 128, ())
ISAS = {isa.name: isa for isa in (VNNI, AVX2, NEON, PLAIN)}
"""Best first."""


@lru_cache(maxsize=1)
def _available() -> tuple[str, ...]:
    import llvmlite.binding as llvm

    here = llvm.get_default_triple().partition("-")[0].replace("arm64", "aarch64")
    has = {name for name, on in llvm.get_host_cpu_features().items() if on}
    return tuple(
        isa.name
        for isa in ISAS.values()
        if isa.architecture in ("", here) and set(isa.features) <= has
    )


def host() -> Isa:
    """The best instruction set of this CPU, or the one that the environment asks for."""
    names = _available()
    wanted = os.environ.get(VARIABLE, names[0])
    if wanted not in names:
        raise BackendError(
            f"{VARIABLE}={wanted}: this CPU runs {', '.join(names)}; unset it, or name one of them"
        )
    return ISAS[wanted]
