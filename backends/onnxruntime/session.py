"""Running an ONNX file: session options that keep the arithmetic exact, tensors in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from qcompiler.errors import BackendError, first_line
from qcompiler.export.artifact import FileArtifact
from qcompiler.export.model import BYTES, KERNELS
from qcompiler.program import Program
from qcompiler.samples import Flat


def session_options(exact: bool) -> ort.SessionOptions:
    """Options for kernels that compute what the program says."""
    options = ort.SessionOptions()
    # The process has one budget of threads, and torch is where the user sets it.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Errors come as exceptions, with the same text.
    options.log_severity_level = 4
    # Without VNNI, products of uint8 and int8 are added in pairs in 16 bits, which saturates. This
    # makes weights uint8, whose kernels are exact and slower: so only where it is needed.
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    # A dequantized weight may become MatMulNBits, which by default rounds activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor gets sums of 255 · 127 wrong in its kernels for uint8 and int8.

    Measured, because ONNX Runtime only asks if its kernels for uint8 are others: with VNNI it
    would give up more than half of the speed for nothing.
    """
    depth, columns = 64, 32
    w = ir.Value(name="w", const_value=ir.tensor(np.full((depth, columns), 127, np.int8), name="w"))
    x = ir.Value(name="x", shape=ir.Shape(["m", depth]), type=ir.TensorType(ir.DataType.UINT8))
    y = ir.Value(name="y", shape=ir.Shape(["m", columns]), type=ir.TensorType(ir.DataType.INT32))
    node = ir.Node("", "MatMulInteger", [x, w], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21})
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, session_options(exact=False))
    for rows in (1, 8):  # one row and many are different kernels
        total = session.run(None, {"x": np.full((rows, depth), 255, np.uint8)})[0]
        if not (total == 255 * 127 * depth).all():
            return True
    return False


class OnnxArtifact(FileArtifact):
    """An ONNX Runtime session over a file."""

    kernels: Mapping[str, str]
    """Site id → the kernel that it was written for."""

    def __init__(self, program: Program, folder: Path, temporary: object = None) -> None:
        super().__init__(program, folder, temporary)
        self._program = program

    def run(self, inputs: Flat) -> tuple[object, ...]:
        if any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in inputs):
            return self._program.flat(inputs)  # its kernels fail on an axis without elements
        return super().run(inputs)

    def _open(self, path: Path) -> int:
        try:
            self._session = ort.InferenceSession(
                path, session_options(saturates()), providers=["CPUExecutionProvider"]
            )
            meta = self._session.get_modelmeta().custom_metadata_map
            self.kernels = json.loads(meta[KERNELS])
            return int(meta[BYTES])
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot open {path}: {first_line(error)}"
                "; compile again if the file was damaged or made by another version"
            ) from error

    def _infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        names = [i.name for i in self._session.get_inputs()]
        try:
            return list(self._session.run(None, dict(zip(names, inputs, strict=True))))
        except Exception as error:  # see above; the text names the node by our id
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
