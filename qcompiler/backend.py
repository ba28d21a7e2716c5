"""What a backend is: what it can do (data), what it refuses (sentences), how it lowers and builds.

A backend claims sites. A refusal is a sentence that the user reads; what nobody claims runs as the
reference. The smallest example is `backends/null.py`.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcompiler.formats import QFormat, Scheme
from qcompiler.passbase import Pass
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import Site

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
    """Site id → kernel."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Site id → why the reference runs there."""


class Artifact(ABC):
    """Something that runs. Calls take and return flat tensors; `Compiled` gives them structure."""

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


class Backend(ABC):
    """A target. Subclass it, and name the class in the entry points `qcompiler.backends`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    capabilities: ClassVar[tuple[Capability, ...]] = ()
    tolerance: ClassVar[float] = 1e-3
    """Largest relative error of an artifact's outputs against the reference program."""

    def available(self) -> str | None:
        """None, or the sentence that says why this backend cannot be used here."""
        return None

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        """None if a kernel serves the site, else a sentence: what is asked, what there is."""
        for capability in self.capabilities:
            if capability.fits(site, scheme):
                return None
        return f"{self.name} has no {site.kind.name} kernel for {scheme}"

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

    @abstractmethod
    def build(self, program: Program) -> Artifact:
        """Make something that runs from the lowered program."""

    def load(self, program: Program, folder: Path) -> Artifact:
        """Make it again from a saved folder; by default by building it anew."""
        return self.build(program)
