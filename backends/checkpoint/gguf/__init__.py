"""GGUF: a Llama-like model as one file for llama.cpp. Here the reference stands in for it.

Codes are the program's own. Weights in floating point stay in their type, norms in float32, as
llama.cpp wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from qcompiler.backends.checkpoint.gguf.formats import refusal
from qcompiler.export import missing_packages
from qcompiler.export.target import FileTarget, Written, check_free
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.sites import Site


class GgufBackend(FileTarget):
    """A GGUF file."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "a GGUF file of a Llama-like model, for llama.cpp and its kin"
    tolerance: ClassVar[float] = 0.0

    def available(self) -> str | None:
        return missing_packages(("transformers", "gguf"), "checkpoint")

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if site.kind.name == "conv":
            return "a GGUF file stores no convolution in codes"
        return refusal(scheme)

    def write(self, program: Program, source: Path, output: Path) -> Written:
        from qcompiler.backends.checkpoint.gguf.file import tensors_of, write_file
        from qcompiler.backends.checkpoint.gguf.llama import Naming
        from qcompiler.backends.checkpoint.source import Source
        from qcompiler.backends.checkpoint.weights import collect

        check_free(output)
        self.check(program)
        opened = Source.open(source, program)
        weights = collect(program, opened)
        naming = Naming(opened, weights)
        tensors = tensors_of(weights, naming)
        size = write_file(output, opened, naming, tensors)
        return Written(output, size, dict(tensors.stored), tuple(tensors.notes))
