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
from torch import Tensor, fx

from qcompiler.backend import Artifact
from qcompiler.backends.onnxruntime.export import BYTES, KERNELS
from qcompiler.backends.onnxruntime.trace import first_line, output_numbers, outputs_of
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


class OnnxArtifact(Artifact):
    """An ONNX Runtime session over a file."""

    def __init__(self, program: Program, folder: Path, temporary: object = None) -> None:
        """Open `folder`/model.onnx. `temporary` is kept alive: it owns a folder that will go."""
        self._folder = folder
        self._temporary = temporary
        self._ports = program.io.ports
        self._outputs = outputs_of(program)
        self._numbers = output_numbers(program)
        try:
            self._session = ort.InferenceSession(
                folder / MODEL, session_options(saturates()), providers=["CPUExecutionProvider"]
            )
            meta = self._session.get_modelmeta().custom_metadata_map
            self._bytes = int(meta[BYTES])
            self.kernels: Mapping[str, str] = json.loads(meta[KERNELS])
            """Site id → the kernel that it was written for."""
        except Exception as error:  # ONNX Runtime's exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot open {folder / MODEL}: {first_line(error)}"
                "; compile again if the file was damaged or made by another version"
            ) from error

    @classmethod
    def write(cls, program: Program, model: ir.Model) -> OnnxArtifact:
        """Put `model` into a temporary folder, for as long as the artifact lives, and open it."""
        temporary = tempfile.TemporaryDirectory(prefix="qcompiler-")
        folder = Path(temporary.name)
        large = int(model.metadata_props[BYTES]) > LIMIT
        ir.save(model, folder / MODEL, external_data=DATA if large else None)
        return cls(program, folder, temporary)

    def run(self, inputs: Flat) -> tuple[object, ...]:
        tensors = [x for x, p in zip(inputs, self._ports, strict=True) if p.is_tensor]
        names = [i.name for i in self._session.get_inputs()]
        feed = {name: _to_numpy(x) for name, x in zip(names, tensors, strict=True)}
        try:
            results = self._session.run(None, feed)
        except Exception as error:  # see above; the text names the node by our id
            raise BackendError(f"ONNX Runtime failed: {first_line(error)}") from error
        return tuple(
            torch.from_numpy(results[self._numbers[at]]).to(value.meta["val"].dtype)
            if isinstance(value, fx.Node)
            else value
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


def _to_numpy(value: object) -> np.ndarray:
    assert isinstance(value, Tensor)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()
