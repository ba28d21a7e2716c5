"""OpenVINO: the quantized program as a standard ONNX file, executed by OpenVINO on the CPU.

`session.py` runs it. Needs `pip install 'qcompiler[openvino]'`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.export import NEEDS, Dialect, missing_packages
from qcompiler.export.dialect import unwritable
from qcompiler.export.draft import Draft
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.sites import Site

aten = torch.ops.aten
CAPABILITIES = tuple(
    Capability(kernel, op, "*", "*", 1e-5, "whichever OpenVINO takes for the formats", flips=True)
    for kernel, op in (("MatMul", "linear"), ("Convolution", "conv"), ("Gather", "embedding"))
)
BY_ROWS = {aten.linear.default, aten.reshape.default}
"""Readers of a stored weight that keep its groups along what is summed."""


class OpenVinoDialect(Dialect):
    """Standard operators, all in float32: what OpenVINO computes in on a CPU, when it is exact."""

    name: ClassVar[str] = "openvino"
    float32: ClassVar[bool] = True

    def dequantize(self, draft: Draft, node: fx.Node) -> None:
        """OpenVINO (2026.4) takes groups along the columns of a product for groups of its rows:
        it refuses the model, or divides by zero. Such a weight is written in floating point."""
        weight = self.weight(draft, node)
        grouped = weight is not None and weight.scale.shape[1] > 1
        if weight is None or not grouped or {u.target for u in node.users} <= BY_ROWS:
            super().dequantize(draft, node)
            return
        value = weight.floats().reshape(node.meta["val"].shape)
        floats = draft.constant(f"{weight.name}.floats", value)
        assert floats is not None
        node.replace_all_uses_with(floats)


class OpenVinoBackend(Backend):
    """ONNX files for OpenVINO's CPU plug-in."""

    name: ClassVar[str] = "openvino"
    summary: ClassVar[str] = "a standard ONNX file, run by OpenVINO on the CPU"
    capabilities: ClassVar[tuple[Capability, ...]] = CAPABILITIES
    tolerance: ClassVar[float] = 2e-2

    def available(self) -> str | None:
        return missing_packages((*NEEDS, "openvino"), "onnx,openvino")

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        if why := unwritable(scheme.activation):
            return f"{self.name}: its input {why}"
        return super().refuses(site, scheme)

    @classmethod
    def dialect(cls) -> type[Dialect]:
        return OpenVinoDialect

    def build(self, program: Program) -> Artifact:
        from qcompiler.backends.openvino.session import OpenVinoArtifact

        return OpenVinoArtifact.write(program, OpenVinoDialect())

    def load(self, program: Program, folder: Path) -> Artifact:
        from qcompiler.backends.openvino.session import OpenVinoArtifact

        return OpenVinoArtifact(program, folder)
