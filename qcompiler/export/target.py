"""Targets that are files: what a backend is that others run, from files in a format of theirs."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qcompiler.backend import Artifact, Backend
from qcompiler.errors import BackendError, BadInput
from qcompiler.program import Program, Tag, node_id, op_name
from qcompiler.registry import backend_class, get_backend, table
from qcompiler.samples import Flat
from qcompiler.sites import site_of

ONLINE = (torch.ops.qc.hadamard.default, torch.ops.qc.sparse_linear.default)
"""Operators that no architecture has."""


@dataclass(frozen=True)
class Written:
    """What was written."""

    output: Path
    bytes: int
    """Of all files together."""
    formats: Mapping[str, int] = field(default_factory=dict)
    """What weights are stored in, in the words of the format → how many of them."""
    notes: tuple[str, ...] = ()
    """What a reader should know: numbers that were rounded, parts that are left out."""


class FileTarget(Backend):
    """A target that others run: it writes files. Here the reference stands in for them.

    Formats that it `refuses` cannot be written, so that they are an error and not a site that runs
    as the reference.
    """

    def check(self, program: Program) -> None:
        """Refuse a program that no file of this target can hold, as far as one sees without the
        source."""
        for id, scheme in program.plan.items():
            site = site_of(program.by_id[id]) if id in program.by_id else None
            if site is not None and (why := self.refuses(site, scheme)):
                raise BackendError(f"node {id}: {why}; assign another format to it")
            if scheme.attention or (site is None and id in program.by_id):
                raise BackendError(
                    f"node {id}: {self.name} files do not say how attention or sums are rounded "
                    f"({scheme}); leave out `key`, `value`, `probabilities` and `sum` of assign"
                )
        for node in program.nodes:
            if node.target in ONLINE:
                raise BackendError(
                    f"node {node_id(node)} ({op_name(node.target)}) was put in by "
                    f"`{Tag.of(node).by}` and runs online, for which {self.name} files have no "
                    "place; compile without it: `rotate{online=false heads=false}`, no `split_*`"
                )

    def build(self, program: Program) -> Artifact:
        self.check(program)
        return _Reference(program)

    @abstractmethod
    def write(self, program: Program, source: Path, output: Path) -> Written:
        """Write `program`, which was captured from the Hugging Face folder `source`, to `output`.

        Nothing is there before everything is; what the format cannot say is a `BackendError`.
        """


class _Reference(Artifact):
    """A program that runs itself."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def run(self, inputs: Flat) -> tuple[object, ...]:
        return self._program.flat(inputs)


def file_target(name: str) -> FileTarget:
    """The target of an export called `name`, ready to write."""
    known = table("qcompiler.backends")
    cls = backend_class(name) if name in known else None
    if cls is None or not issubclass(cls, FileTarget):
        raise BadInput(
            f"{name!r} is no format of an export; expected one of {', '.join(file_targets())}"
        )
    target = get_backend(name)
    assert isinstance(target, FileTarget)
    return target


def file_targets() -> list[str]:
    """Names of the formats that programs are exported to, ONNX first."""
    names = ["onnx"]
    for name in sorted(table("qcompiler.backends")):
        with suppress(BadInput):  # a broken plug-in is no target
            names += [name] if issubclass(backend_class(name), FileTarget) else []
    return names


def check_free(output: Path) -> None:
    """Refuse an `output` where something is, or that cannot be made."""
    if not output.parent.is_dir():
        raise BadInput(f"{output}: the folder {output.parent} does not exist; create it first")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise BadInput(f"{output} exists; choose another place, or remove it first")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A place to write to, which is moved to `output` when all went well, in one step.

    A kill on the way leaves a hidden file or folder next to `output`, never half of it there.
    """
    check_free(output)
    place = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield place / output.name
        os.replace(place / output.name, output)
    except OSError as error:
        raise BadInput(f"cannot write {output}: {error}; nothing was changed there") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
