"""What a backend is: what it can do (data), what it refuses (sentences), how it lowers and builds.

A backend claims sites. A refusal is a sentence that the user reads; what nobody claims runs as the
reference. The smallest example is `backends/null.py`.
"""

from __future__ import annotations

import copy
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from qcompiler.formats import QFormat, Scheme
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site
from qcompiler.spec import Value

if TYPE_CHECKING:
    from qcompiler.export.dialect import Dialect


@dataclass(frozen=True)
class Capability:
    """One kernel: which sites it serves, and how exactly. Patterns are those of `fnmatch`."""

    kernel: str
    op: str
    """`linear`, `conv` or `embedding`."""
    weight: str
    """Pattern over the text of the weight's format, `int8:channel`, `int4:group*`, or `float`."""
    activation: str
    """Pattern over the text of the activation's format, or `float`."""
    tolerance: float
    """Largest relative error of its output against the reference, on the same input."""
    note: str = ""
    decoded: bool = False
    """It takes codes and scales as `stored.read` decodes them, in whatever form they are stored:
    patterns are over formats with scales in float32, not those in `scale(fp16)`."""
    accumulator: str = ""
    """What products are summed in: `int32`, `float32`; empty if it does not say."""
    needs: tuple[str, ...] = ()
    """Features of the machine that it cannot do without, see `Backend.has`: `avx512_vnni`."""
    multiple_of: tuple[int, int] = (1, 1)
    """What the outputs and the inputs of a weight must be multiples of."""
    flips: bool = False
    """It rounds activations by other arithmetic than x / s: one that lies between two codes, up to
    float32's last digits, may get either."""
    splits_sums: bool = False
    """Threads share its sums, so that last bits depend on their number, as a library's in float."""

    def __str__(self) -> str:
        return f"{self.kernel}: {self.op} {self.weight} × {self.activation}"

    @property
    def conditions(self) -> str:
        """What it asks for besides formats, and what it sums in, in words."""
        rows, columns = self.multiple_of
        said = {
            f"sums in {self.accumulator}": bool(self.accumulator),
            "what lies between two codes may get either": self.flips,
            "last bits depend on threads": self.splits_sums,
            f"needs {', '.join(self.needs)}": bool(self.needs),
            f"multiples of {rows} × {columns}": self.multiple_of != (1, 1),
            self.note: bool(self.note),
        }
        return "; ".join(words for words, holds in said.items() if holds)

    def refuses_shape(self, site: Site) -> str | None:
        """None if the site's weight has the sizes that it takes, else what it takes."""
        out, width = (int(n) for n in site.weight.meta["val"].shape[:2])
        rows, columns = self.multiple_of
        if out % rows == 0 and width % columns == 0:
            return None
        return f"takes multiples of {rows} × {columns} (outputs × inputs); found {out} × {width}"

    def fits(self, site: Site, scheme: Scheme) -> bool:
        """Whether this kernel is made for the site's operator and formats."""
        return self.op == site.kind.name and self.fits_formats(scheme)

    def fits_formats(self, scheme: Scheme) -> bool:
        """Whether it is made for these formats."""
        weight = scheme.weight.decoded if scheme.weight and self.decoded else scheme.weight
        return _matches(weight, self.weight) and _matches(scheme.activation, self.activation)


def _matches(fmt: QFormat | None, pattern: str) -> bool:
    """Whether `pattern` names `fmt`. Scales of another type and another order of bits must be named
    in words, unless all formats are: `int4:group*` is a kernel that reads float32 scales."""
    text = str(fmt or "float")
    special = [w for w in ("scale(", "planes", "unscaled", "clip") if w in text]
    return fnmatch.fnmatch(text, pattern) and (pattern == "*" or all(w in pattern for w in special))


@dataclass(frozen=True)
class Lowered:
    """A program for a target, which sites its kernels serve, and which it refused."""

    program: Program
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Site id → the reason of the edit that put a kernel there. It starts with the kernel's name,
    alone or before a comma or semicolon."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Site id → why the reference runs there."""


class Artifact(ABC):
    """Something that runs. Calls take and return flat tensors; `Compiled` gives them structure."""

    kernels: Mapping[str, str] | None = None
    """Site id → kernel, where they are chosen as the artifact is built; None if it does not tell,
    or `lowering` did."""

    @abstractmethod
    def run(self, inputs: Flat) -> tuple[object, ...]:
        """Flat outputs for flat inputs (see `Signature.flatten`)."""

    def save(self, folder: Path) -> None:
        """Write what `Backend.load` needs beyond the program into `folder` (it exists)."""
        return

    @property
    def bytes(self) -> int | None:
        """Bytes of weights that the artifact holds; None when they are the program's own."""
        return None


class ProgramArtifact(Artifact):
    """A lowered program, which runs itself: its operators are the kernels."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self, inputs: Flat) -> tuple[object, ...]:
        return self.program.flat(inputs)

    @property
    def bytes(self) -> int:
        return self.program.bytes


class Backend:
    """A target. Subclass it, and name the class in the entry points `qcompiler.backends`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[tuple[Capability, ...]] = ()
    tolerance: ClassVar[float] = 1e-3
    """Largest relative error of an artifact's outputs against the reference program."""
    prefers: ClassVar[Mapping[str, Mapping[str, Value]]] = {}
    """Pass → options that suit this target, for recipes that say nothing of them."""
    kernels: frozenset[str] | None = None
    """Kernels that it may use; None for all of them. See `only`."""

    def only(self, *kernels: str) -> Self:
        """This target with these kernels alone, used wherever they fit and not where they pay:
        what conformance tries them with."""
        limited = copy.copy(self)
        limited.kernels = frozenset(kernels)
        return limited

    def uses(self, capability: Capability) -> bool:
        """Whether its kernel is one of those it may use."""
        return self.kernels is None or capability.kernel in self.kernels

    def available(self) -> str | None:
        """None, or the sentence that says why this backend cannot be used here."""
        return None

    def has(self, feature: str) -> bool:
        """Whether this machine has a feature that a capability `needs`."""
        return True

    def lacks(self, capability: Capability) -> str | None:
        """None if this machine has what the kernel needs, else what is missing."""
        missing = ", ".join(f for f in capability.needs if not self.has(f))
        return f"needs {missing}, which this machine lacks" if missing else None

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        """None if a kernel serves the site, else a sentence: what is asked, what there is."""
        reasons = []
        for capability in self.capabilities:
            if self.uses(capability) and capability.fits(site, scheme):
                reason = self.lacks(capability) or capability.refuses_shape(site)
                if reason is None:
                    return None
                reasons.append(f"{capability.kernel} {reason}")
        return "; ".join(reasons) or f"{self.name} has no {site.kind.name} kernel for {scheme}"

    def cost(self, site: Site, scheme: Scheme, tokens: int) -> float | None:
        """Seconds of one run of the site on `tokens` tokens, from a model or a table of data (for
        samples of a convolution's); None: it is measured, through `lowering` and `build`."""
        return None

    def agree(self, sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
        """Groups of ids among `sites` that must share a scheme on this target, because one kernel
        serves them together, as it does packed queries, keys and values."""
        return ()

    @classmethod
    def dialect(cls) -> type[Dialect] | None:
        """What an ONNX file for this target is written in; None if it reads no ONNX files."""
        return None

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        """Passes of effect `lower` that put this target's operators in, but at `exclude`."""
        return ()

    def build(self, program: Program) -> Artifact:
        """Make something that runs from the lowered program; by default it runs itself."""
        return ProgramArtifact(program)

    def load(self, program: Program, folder: Path) -> Artifact:
        """Make it again from a saved folder; by default by building it anew."""
        return self.build(program)
