"""ONNX Runtime: the quantized program as an ONNX file, executed by quantized kernels on the CPU.

`capabilities.py` says which kernels serve which format, `choose.py` times them on this machine,
`dialect.py` puts them in, `session.py` runs the file. Needs `pip install 'qcompiler[onnx]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.backends.onnxruntime.capabilities import CAPABILITIES, kernels_of
from qcompiler.backends.onnxruntime.dialect import OnnxRuntimeDialect
from qcompiler.export import NEEDS, Dialect, missing_packages
from qcompiler.export.dialect import unwritable
from qcompiler.formats import Scheme
from qcompiler.program import Program, digest
from qcompiler.sites import Site, sites


class OnnxRuntimeBackend(Backend):
    """ONNX files for ONNX Runtime's CPU kernels."""

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "an ONNX file with quantized kernels, run by ONNX Runtime on the CPU"
    capabilities: ClassVar[tuple[Capability, ...]] = CAPABILITIES
    tolerance: ClassVar[float] = 2e-2

    def available(self) -> str | None:
        return missing_packages((*NEEDS, "onnxruntime"))

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if why := unwritable(scheme.activation):
            return f"{self.name}: its input {why}"
        if kernels_of(site, scheme, self.kernels):
            return None
        return f"{self.name} has no {site.kind.name} kernel for {scheme}"

    @classmethod
    def dialect(cls) -> type[Dialect]:
        return OnnxRuntimeDialect

    def build(self, program: Program) -> Artifact:
        from qcompiler.backends.onnxruntime.probe import saturates
        from qcompiler.backends.onnxruntime.session import OnnxArtifact

        # Told to make weights uint8, ONNX Runtime fails on one that two products read: it gives
        # both copies one name. So they are written as such.
        unsigned = saturates() and _shares_weights(program)
        return OnnxArtifact.write(program, OnnxRuntimeDialect(unsigned, self.kernels))

    def load(self, program: Program, folder: Path) -> Artifact:
        from qcompiler.backends.onnxruntime.session import OnnxArtifact

        return OnnxArtifact(program, folder)


def _shares_weights(program: Program) -> bool:
    """Whether two sites read one weight, as a layer does that is applied twice, or equal ones,
    which are written once."""
    codes = []
    for site in sites(program.nodes):
        names = (program.slots.get(n.name) for n in site.weight.all_input_nodes)
        codes += [digest(program.params[name]) for name in names if name is not None][:1]
    return len(codes) > len(set(codes))
