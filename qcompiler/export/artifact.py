"""An artifact that is an ONNX file: what all runtimes that open one have in common."""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, fx

from qcompiler.backend import Artifact
from qcompiler.export.dialect import Dialect
from qcompiler.export.model import to_model
from qcompiler.export.trace import outputs_of, tensor_outputs
from qcompiler.export.write import data_of, write_model
from qcompiler.program import Program
from qcompiler.samples import Flat

MODEL = "model.onnx"


class FileArtifact(Artifact):
    """A program that a runtime executes from `folder`/model.onnx, written in float32."""

    def __init__(self, program: Program, folder: Path, temporary: object = None) -> None:
        """Open the file. `temporary` is kept alive: it owns a folder that will go."""
        self._folder = folder
        self._temporary = temporary
        self._ports = program.io.ports
        self._outputs = outputs_of(program)
        self._written = tensor_outputs(program)
        self._bytes = self._open(folder / MODEL)

    @classmethod
    def write(cls, program: Program, dialect: Dialect) -> Self:
        """Put the file into a temporary folder, for as long as the artifact lives, and open it."""
        temporary = tempfile.TemporaryDirectory(prefix="qcompiler-")
        folder = Path(temporary.name)
        write_model(to_model(program, dialect), folder / MODEL)
        return cls(program, folder, temporary)

    @abstractmethod
    def _open(self, path: Path) -> int:
        """Get ready to infer from the file. Returns the bytes of its weights."""

    @abstractmethod
    def _infer(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs of the file for its inputs, both in the file's order."""

    def run(self, inputs: Flat) -> tuple[object, ...]:
        tensors = [x for x, p in zip(inputs, self._ports, strict=True) if p.is_tensor]
        found = self._infer([_to_numpy(x) for x in tensors])
        results = dict(zip(self._written, found, strict=True))
        return tuple(
            torch.from_numpy(results[at]).to(value.meta["val"].dtype)
            if isinstance(value, fx.Node)
            else value
            for at, value in enumerate(self._outputs)
        )

    def save(self, folder: Path) -> None:
        for file in (self._folder / MODEL, data_of(self._folder / MODEL)):
            if file.exists():
                shutil.copy(file, folder / file.name)
        if self._temporary is None:
            self._folder = folder  # the folder that it was loaded from may be replaced by this one

    @property
    def bytes(self) -> int | None:
        return self._bytes


def _to_numpy(value: object) -> np.ndarray:
    assert isinstance(value, Tensor)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous().numpy()
