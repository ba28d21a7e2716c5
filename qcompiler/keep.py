"""What long work has come to, on disk: written whole or not at all, read by a run that goes on.

A file is written beside its place, flushed, and put there in one step, so that a kill at any moment
leaves the last whole one. What was kept for another program, other data or other options has
another key, and is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Keep:
    """A folder of such files."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Keep:
        """`folder`, new or from a run before; one with anything else in it is a `BadInput`."""
        if folder.exists() and not (folder.is_dir() and all(map(_is_ours, folder.iterdir()))):
            raise BadInput(
                f"{folder} is no folder for work in progress: it holds other files, and would be "
                "removed at the end; choose another place"
            )
        return cls(folder)

    def under(self, *key: object) -> Keep:
        """A folder in it for work that `key` names."""
        text = "\n".join(map(str, key))
        return Keep(self.folder / hashlib.sha256(text.encode()).hexdigest()[:16])

    def save(self, name: str, tensors: Mapping[str, Tensor], about: object = None) -> None:
        """Write `tensors`, and `about` (JSON) with them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"{name}.safetensors"
        beside = place.with_suffix(f".{os.getpid()}.part")
        held = {
            k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()
        }
        try:
            save_file(held, beside, {"about": json.dumps(about)})
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)

    def load(self, name: str) -> tuple[Tensors, object] | None:
        """What was written as `name`; None if nothing was, or it cannot be read."""
        place = self.folder / f"{name}.safetensors"
        try:
            with safe_open(place, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                return {k: file.get_tensor(k) for k in file.keys()}, about  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def clear(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"[0-9a-f]{16}", path.name) is not None


def pack_tensor(q: QTensor, stem: str) -> tuple[Tensors, str]:
    """A quantized tensor as tensors called `stem.…`, and the text of its format."""
    grid = q.grid
    found = {f"{stem}.data": q.data, f"{stem}.grid": grid.scale}
    if grid.zero is not None:
        found[f"{stem}.zero"] = grid.zero
    if grid.table is not None:
        found[f"{stem}.table"] = grid.table
    if grid.stored is not None:
        found |= pack_tensor(grid.stored, f"{stem}.scale")[0]
    return found, str(q.format)


def unpack_tensor(tensors: Tensors, stem: str, fmt: QFormat) -> QTensor:
    """The inverse of `pack_tensor`."""
    inner = fmt.scale if f"{stem}.scale.data" in tensors else None
    grid = Grid(
        fmt,
        tensors[f"{stem}.grid"],
        tensors.get(f"{stem}.zero"),
        tensors.get(f"{stem}.table"),
        None if inner is None else unpack_tensor(tensors, f"{stem}.scale", inner),
    )
    return QTensor(tensors[f"{stem}.data"], grid)


def check_file(place: Path) -> None:
    """Refuse what can be no file, before the work whose result goes there."""
    if place.name == "" or (place.exists() and not place.is_file()):
        raise BadInput(f"{place} cannot be written: it is no file")
    check_folder(place.parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is a file, or would lie in one."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise BadInput(f"{place} is a file; expected a folder to write to; choose another")


def write_whole(place: Path, text: str | bytes) -> None:
    """Write a file, whole or not at all."""
    check_file(place)
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise BadInput(f"{place} cannot be written: {error.strerror}") from error
