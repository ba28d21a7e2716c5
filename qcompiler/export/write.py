"""An ONNX model as files: written beside their places and moved there when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from qcompiler.errors import BadInput
from qcompiler.export.model import BYTES

LIMIT = 1_900_000_000
"""Bytes of weights above which they go to a file of their own: a protobuf file ends at 2 GiB."""


def check_place(path: Path) -> None:
    """Refuse a `path` that no file can be written to."""
    if not path.parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; expected the name of a file, as in {path}/model.onnx")


def write_model(model: ir.Model, path: Path) -> Path:
    """Write `model` to `path`, and weights above `LIMIT` to `path`.data. Returns `path`."""
    data = data_of(path)
    large = int(model.metadata_props[BYTES]) > LIMIT
    with _beside(path) as folder:
        ir.save(model, folder / path.name, external_data=data.name if large else None)
        if large:
            path.unlink(missing_ok=True)  # it would read weights that are not its own
            os.replace(folder / data.name, data)
        os.replace(folder / path.name, path)
    return path


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden folder next to `path`, as long as files are written."""
    try:
        made = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written: {error.strerror} in {path.parent}; choose another folder"
        ) from error
    with made as name:
        yield Path(name)


def check_ours(path: Path) -> None:
    """Refuse a `path` where something is that no export wrote: the source of a model, say."""
    if not path.exists():
        return
    try:
        found = onnx.load(path, load_external_data=False)
        ours = any(p.key == BYTES for p in found.metadata_props)
    except (OSError, ValueError, DecodeError):
        ours = False
    if not ours:
        raise BadInput(
            f"{path} exists, and is no file that export wrote; choose another name, or remove it "
            "first"
        )


def data_of(path: Path) -> Path:
    """Where the weights of `path` are if they are in a file of their own."""
    return path.with_name(path.name + ".data")
