"""Running an ONNX file: tensors in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from qcompiler.backends.onnxruntime.probe import saturates, session_options
from qcompiler.errors import BackendError, first_line
from qcompiler.export.artifact import FileArtifact
from qcompiler.export.model import BYTES, KERNELS
from qcompiler.export.notes import stored_format
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import sites


class OnnxArtifact(FileArtifact):
    """An ONNX Runtime session over a file."""

    kernels: Mapping[str, str]
    """Site id → the kernel that it was written for."""

    def __init__(self, program: Program, folder: Path, temporary: object = None) -> None:
        self._program = program
        super().__init__(program, folder, temporary)

    def run(self, inputs: Flat) -> tuple[object, ...]:
        if any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in inputs):
            return self._program.flat(inputs)  # its kernels fail on an axis without elements
        return super().run(inputs)

    def _open(self, path: Path) -> int:
        options = session_options(exact=saturates() and _has_eight_bits(self._program))
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            meta = self._session.get_modelmeta().custom_metadata_map
            self.kernels = json.loads(meta[KERNELS])
            return int(meta[BYTES])
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot open {path}: {first_line(error)}; if the "
                "file was damaged or made by another version, compile again"
            ) from error

    def _infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = [i.name for i in self._session.get_inputs()]
        try:
            return list(self._session.run(None, dict(zip(names, inputs, strict=True))))
        except Exception as error:  # see above; the text names the node by our id
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error


def _has_eight_bits(program: Program) -> bool:
    """Whether a product has weights of 8 bits: 255 · 64 · 2, with less, stays within 16 bits."""
    formats = map(stored_format, sites(program.nodes))
    return any(f is not None and f.bits >= 8 for f in formats)
