"""The checkpoint: a Hugging Face folder of the source's architecture, with the program's weights.

What was folded into weights (gains, rotations, smoothing) needs no operator: the same architecture
with other weights is the same function. Codes are written as compressed-tensors stores them, so
that transformers and vLLM load the folder. Here the reference stands in for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from qcompiler.backends.checkpoint.schemes import refusal
from qcompiler.export import missing_packages
from qcompiler.export.target import FileTarget, Written, check_free
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.sites import Site


class CheckpointBackend(FileTarget):
    """A Hugging Face folder with compressed-tensors' formats."""

    name: ClassVar[str] = "checkpoint"
    summary: ClassVar[str] = "a Hugging Face folder (compressed-tensors) for transformers and vLLM"
    tolerance: ClassVar[float] = 0.0

    def available(self) -> str | None:
        return missing_packages(("transformers", "compressed_tensors"), "checkpoint")

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if site.kind.name == "conv":
            return "a checkpoint stores no convolution in codes"
        return refusal(scheme)

    def write(self, program: Program, source: Path, output: Path) -> Written:
        from qcompiler.backends.checkpoint.compressed import compress
        from qcompiler.backends.checkpoint.folder import with_biases, write_folder
        from qcompiler.backends.checkpoint.source import Source
        from qcompiler.backends.checkpoint.weights import collect

        check_free(output)
        self.check(program)
        opened = Source.open(source, program)
        weights = collect(program, opened)
        changes, biases = with_biases(opened, weights.biases)
        made = compress(weights, opened.module)
        if weights.untied:
            changes["tie_word_embeddings"] = False
        if made.config:
            changes["quantization_config"] = made.config
        size = write_folder(output, opened, made.tensors | biases, changes)
        return Written(output, size, made.formats, tuple(made.notes))
