"""Running an ONNX file: session options that keep the arithmetic exact, tensors in and out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from qcompiler.backend import Artifact
from qcompiler.backends.onnxruntime.export import BYTES, KERNELS, output_numbers
from qcompiler.errors import BackendError
from qcompiler.program import Program
from qcompiler.samples import Flat

MODEL = "model.onnx"
DATA = "model.onnx.data"
LIMIT = 1_900_000_000
"""Bytes of weights above which they go to a file of their own: a protobuf file ends at 2 GiB."""


def session_options(exact: bool) -> ort.SessionOptions:
    """Options for kernels that compute what the program says."""
    options = ort.SessionOptions()
    # The process has one budget of threads, and torch is where the user sets it.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Errors come as exceptions, with the same text.
    options.log_severity_level = 4
    # Without VNNI, uint8 × int8 kernels add pairs of products in 16 bits, which saturates. This
    # makes weights uint8, whose kernels are exact and slower: so only where it is needed.
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    # A dequantized weight becomes MatMulNBits; by default that rounds float activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor's uint8 × int8 kernels get 255 · 127 + 255 · 127 + … wrong.

    Measured: ONNX Runtime's own test asks only if there are two kernels, which with VNNI costs half
    of the speed for nothing.
    """
    depth, columns = 64, 32
    weight = ir.tensor(np.full((depth, columns), 127, np.int8), name="w")
    x = ir.Value(name="x", shape=ir.Shape(["m", depth]), type=ir.TensorType(ir.DataType.UINT8))
    y = ir.Value(name="y", shape=ir.Shape(["m", columns]), type=ir.TensorType(ir.DataType.INT32))
    w = ir.Value(name="w", const_value=weight)
    node = ir.Node("", "MatMulInteger", [x, w], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 21})
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, session_options(exact=False))
    # One row and many rows are different kernels.
    return any(
        bool((session.run(None, {"x": np.full((m, depth), 255, np.uint8)})[0] != 255 * 127 * depth).any())
        for m in (1, 8)
    )


class OnnxArtifact(Artifact):
    """An ONNX Runtime session over a file."""

    def __init__(self, program: Program, folder: Path, temporary: object = None) -> None:
        """Open `folder`/model.onnx. `temporary` is kept alive: it owns a folder that will go."""
        self._folder = folder
        self._temporary = temporary
        try:
            self._session = ort.InferenceSession(
                str(folder / MODEL), session_options(saturates()), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot open {folder / MODEL}: {_line(error)}; "
                "if the file was made elsewhere or changed, compile again"
            ) from error
        meta = self._session.get_modelmeta().custom_metadata_map
        self.kernels: Mapping[str, str] = json.loads(meta[KERNELS])
        """Site id → the kernel that it was written for."""
        self._bytes = int(meta[BYTES])
        self._ports = program.io.ports
        self._names = [i.name for i in self._session.get_inputs()]
        self._numbers = output_numbers(program)
        output = next(n for n in program.graph.nodes if n.op == "output")
        self._outputs = tuple(output.args[0])

    @classmethod
    def write(cls, program: Program, model: ir.Model) -> OnnxArtifact:
        """Put `model` into a temporary folder, for as long as the artifact lives, and open it."""
        temporary = tempfile.TemporaryDirectory(prefix="qcompiler-")
        folder = Path(temporary.name)
        large = int(model.metadata_props[BYTES])
        ir.save(model, folder / MODEL, external_data=DATA if large > LIMIT else None)
        return cls(program, folder, temporary)

    def run(self, inputs: Flat) -> tuple[object, ...]:
        feed = {}
        for port, value in zip(self._ports, inputs, strict=True):
            if port.name in self._names:
                assert isinstance(value, Tensor)
                feed[port.name] = _to_numpy(value)
        try:
            results = self._session.run(None, feed)
        except Exception as error:  # see above
            raise BackendError(f"ONNX Runtime failed: {_line(error)}") from error
        return tuple(
            torch.from_numpy(results[self._numbers[at]]).to(value.meta["val"].dtype)
            if at in self._numbers else value
            for at, value in enumerate(self._outputs)
        )

    def save(self, folder: Path) -> None:
        for name in (MODEL, DATA):
            if (self._folder / name).exists():
                shutil.copy(self._folder / name, folder / name)
        if self._temporary is None:
            self._folder = folder  # the folder that it was loaded from may be replaced by this one

    @property
    def bytes(self) -> int | None:
        return self._bytes


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
