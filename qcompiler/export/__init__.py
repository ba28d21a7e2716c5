"""ONNX out: any program as an ONNX file, in standard operators or in those of one target.

`dialect.py` says what each operator becomes, `model.py` makes the model, `write.py` the file.
Needs `pip install 'qcompiler[onnx]'`.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from qcompiler.errors import BackendError, BadInput
from qcompiler.export.dialect import Dialect
from qcompiler.program import Program
from qcompiler.registry import backend_class, table

__all__ = ["Dialect", "dialect_of", "export_onnx"]

NEEDS = ("onnx", "onnx_ir", "onnxscript")


def export_onnx(
    program: Program, path: str | Path, *, target: str = "onnx", unsigned: bool = False
) -> Path:
    """Write `program` to `path` in standard ONNX operators, or in those of a `target`.

    With `unsigned`, int8 weights are written as uint8 with zero point 128: for runtimes that add
    products of uint8 and int8 in 16 bits, which saturates (see docs/onnx.md).
    """
    dialect = dialect_of(target, unsigned)
    from qcompiler.export.model import to_model
    from qcompiler.export.write import check_place, write_model

    check_place(Path(path))  # before minutes of work
    return write_model(to_model(program, dialect), Path(path))


def dialect_of(target: str, unsigned: bool = False) -> Dialect:
    """The dialect called `target`: `onnx`, or a backend's."""
    if missing := missing_packages(NEEDS):
        raise BackendError(f"cannot write ONNX: {missing}")
    if target == Dialect.name:
        return Dialect(unsigned)
    known = table("qcompiler.backends")
    found = backend_class(target).dialect() if target in known else None
    if found is not None:
        return found(unsigned)
    targets = [Dialect.name]
    for name in sorted(known):
        with suppress(BadInput):  # a broken plug-in is no target
            targets += [name] if backend_class(name).dialect() else []
    raise BadInput(
        f"{target!r} is no target of an ONNX export; expected one of {', '.join(targets)}"
    )


def missing_packages(needed: tuple[str, ...], extra: str = "onnx") -> str | None:
    """The sentence that says which of the packages `needed` is not installed."""
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} is not installed; pip install 'qcompiler[{extra}]'"
