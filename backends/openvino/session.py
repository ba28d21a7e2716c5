"""Running an ONNX file in OpenVINO, with properties that keep the arithmetic exact."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.errors import BackendError, first_line
from qcompiler.export.artifact import FileArtifact
from qcompiler.export.model import BYTES


@lru_cache(maxsize=1)
def openvino() -> ModuleType:
    """OpenVINO without its telemetry, which reports over the network that it was imported."""
    modules: dict[str, Any] = sys.modules
    before = modules.get("openvino_telemetry")
    modules["openvino_telemetry"] = None  # which Python reads as: there is none
    try:
        return import_module("openvino")
    finally:
        del modules["openvino_telemetry"]
        if before is not None:
            modules["openvino_telemetry"] = before


def properties(exact: bool) -> dict[str, object]:
    """Compile properties for kernels that compute what the program says."""
    return {
        # Float32, and activations that the program leaves alone are not rounded to 8 bits.
        "EXECUTION_MODE_HINT": "ACCURACY",
        # The process has one budget of threads, and torch is where the user sets it.
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Without VNNI, products of uint8 and int8 are added in pairs in 16 bits, which saturates.
        # This computes what was rounded in float: so only where it is needed.
        **({"LP_TRANSFORMS_MODE": "NO"} if exact else {}),
    }


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor gets sums of 255 · 127 wrong in OpenVINO's kernels. Measured."""
    depth, columns = 64, 32
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "w": np.full((depth, columns), 127, np.int8),
        "scale": np.ones(columns, np.float32),
        "zeros": np.zeros(columns, np.int8),
    }
    given = {n: ir.Value(name=n, const_value=ir.tensor(a, name=n)) for n, a in constants.items()}
    x = ir.Value(name="x", shape=ir.Shape(["m", depth]), type=ir.TensorType(ir.DataType.FLOAT))
    q = ir.node("QuantizeLinear", [x, given["one"], given["zero"]])
    rounded = ir.node("DequantizeLinear", [*q.outputs, given["one"], given["zero"]])
    weight = ir.node(
        "DequantizeLinear", [given["w"], given["scale"], given["zeros"]], attributes={"axis": 1}
    )
    y = ir.node("MatMul", [rounded.outputs[0], weight.outputs[0]])
    graph = ir.Graph(
        [x],
        y.outputs,
        nodes=[q, rounded, weight, y],
        initializers=list(given.values()),
        opset_imports={"": 18},
    )
    content = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    core = openvino().Core()
    compiled = core.compile_model(core.read_model(content, b""), "CPU", properties(exact=False))
    for rows in (1, 8):  # one row and many may be different kernels
        total = compiled([np.full((rows, depth), 255, np.float32)])[0]
        if not np.allclose(total, 255 * 127 * depth):
            return True
    return False


class OpenVinoArtifact(FileArtifact):
    """A model compiled by OpenVINO from a file."""

    def _open(self, path: Path) -> int:
        ov = openvino()
        try:
            core = ov.Core()
            model = core.read_model(path)
            self._model = core.compile_model(model, "CPU", properties(saturates()))
            return int(model.get_rt_info(["framework", BYTES]).astype(str))
        except Exception as error:  # OpenVINO's exceptions share no base of their own
            raise BackendError(
                f"OpenVINO {ov.__version__} cannot open {path}: {first_line(error)}"
                "; compile again if the file was damaged or made by another version"
            ) from error

    def _infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        try:
            results = self._model(inputs, share_inputs=True)
            return [np.array(results[port]) for port in self._model.outputs]
        except Exception as error:  # see above; the text names the node by our id
            raise BackendError(f"OpenVINO failed: {first_line(error)}") from error
