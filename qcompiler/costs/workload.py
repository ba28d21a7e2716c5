"""How a program will be used: what its seconds are measured for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import BadInput
from qcompiler.program import Program
from qcompiler.samples import Flat, random_inputs, sizes_for

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Workload:
    """`batch` sequences of `prefill` tokens at once; then, with `decode`, a token of each."""

    batch: int = 1
    prefill: int = 128
    decode: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1 or self.prefill < 1:
            raise BadInput(
                f"a workload has at least one sequence of one token; found batch {self.batch}, "
                f"prefill {self.prefill}"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """`prefill`, and `decode` where there is one."""
        return ("prefill", "decode") if self.decode else ("prefill",)

    def fitting(self, program: Program) -> Workload:
        """This workload for a program that may have no sequence: then a run is a `prefill` of its
        own sizes, and nothing is decoded."""
        if any("seq" in name.lower() for name in program.io.dims):
            return self
        return Workload(self.batch, 1, decode=False)

    def tokens(self, phase: Phase) -> int:
        """Tokens of one run."""
        return self.batch * (self.prefill if phase == "prefill" else 1)

    def inputs(self, program: Program, phase: Phase) -> Flat:
        """Random inputs of one run."""
        length = self.prefill if phase == "prefill" else 1
        return random_inputs(program.io, 0, sizes_for(program.io, self.batch, length))
