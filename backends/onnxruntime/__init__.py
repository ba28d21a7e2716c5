"""ONNX Runtime: the quantized program as an ONNX file, executed by quantized kernels on the CPU.

`capabilities.py` says which kernel serves which format, `rewrite.py` puts it in, `export.py` writes
the file, `session.py` runs it. Needs `pip install 'qcompiler[onnx]'`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.backends.onnxruntime.capabilities import CAPABILITIES, kernel_of
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.sites import Site

NEEDS = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


class OnnxRuntimeBackend(Backend):
    """ONNX files for ONNX Runtime's CPU kernels."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "an ONNX file with quantized kernels, run by ONNX Runtime on the CPU"
    capabilities: ClassVar[tuple[Capability, ...]] = CAPABILITIES
    tolerance: ClassVar[float] = 2e-2

    def available(self) -> str | None:
        missing = [name for name in NEEDS if find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed; pip install 'qcompiler[onnx]'"
        return None

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if kernel_of(site, scheme) is not None:
            return None
        return f"{self.name} has no {site.kind.name} kernel for {scheme}"

    def build(self, program: Program) -> Artifact:
        from qcompiler.backends.onnxruntime.export import to_onnx
        from qcompiler.backends.onnxruntime.session import OnnxArtifact

        return OnnxArtifact.write(program, to_onnx(program))

    def load(self, program: Program, folder: Path) -> Artifact:
        from qcompiler.backends.onnxruntime.session import OnnxArtifact

        return OnnxArtifact(program, folder)
