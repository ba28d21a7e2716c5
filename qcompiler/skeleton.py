"""The package that `qcompiler new-backend` writes: a backend that works, to go on from."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from qcompiler.errors import BadInput
from qcompiler.registry import table

RESERVED = ("aten", "prim", "prims", "qc")
"""Namespaces of operators that are others'."""
PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "NAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["qcompiler"]

[project.entry-points."qcompiler.backends"]
NAME = "NAME:CLASSBackend"

[tool.setuptools]
py-modules = ["NAME"]
"""
MODULE = '''\
"""NAME: what it is, in a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompiler import Backend, Capability, Pass, QTensor
from qcompiler.lowering import LowerSites

INT8 = Capability("int8", "linear", "int8:channel", "float", 1e-5, "float sums", splits_sums=True)
"""A claim: kernel, operator, formats of weight and activation, largest relative error."""


@torch.library.custom_op("NAME::int8_linear", mutates_args=())
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = (x qᵀ) s + b. Call your kernel here."""
    y = torch.nn.functional.linear(x.float(), codes.float()) * scale
    return (y if bias is None else y + bias).to(x.dtype)


@int8_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@dataclass(frozen=True, kw_only=True)
class LowerInt8(LowerSites):
    """Serve linears with `int8_linear`."""

    name: ClassVar[str] = "NAME_int8"
    capability: ClassVar[Capability] = INT8
    operator: ClassVar[Any] = torch.ops.NAME.int8_linear.default

    def pack(self, weight: QTensor) -> dict[str, Tensor]:
        """The arguments between `x` and `bias`; lay codes out as your kernel reads them."""
        return {"codes": weight.data.to(torch.int8), "scale": weight.scale.reshape(-1)}


class CLASSBackend(Backend):
    """See `qcompiler.Backend` for what else can be said: costs, agreements, an artifact."""

    name: ClassVar[str] = "NAME"
    summary: ClassVar[str] = "int8 linears on NAME"
    capabilities: ClassVar[tuple[Capability, ...]] = (INT8,)

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        return (LowerInt8(exclude=tuple(sorted(exclude))),)
'''
TEST = '''\
"""Every claim holds, and a model goes all the way."""

from pathlib import Path

import torch

import qcompiler
from qcompiler.testing import assert_conforms


def test_it_conforms() -> None:
    assert_conforms("NAME")


def test_a_model_is_compiled_and_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8))
    x = torch.randn(4, 40)
    passes = "canonicalize{optional=true},assign{weight=int8:channel head=same},quantize"
    compiled = qcompiler.compile(model.eval(), x, passes=passes, backend="NAME")
    assert set(compiled.kernels.values()) == {"int8"}
    compiled.save(tmp_path / "out")
    assert torch.equal(qcompiler.load(tmp_path / "out")(x), compiled(x))
'''
README = """\
# NAME

A backend for qcompiler.

    pip install -e .
    qcompiler check-backend NAME
    qcompiler compile MODEL -o OUT --backend NAME
    pytest
"""


def write_skeleton(name: str, folder: Path) -> Path:
    """Write the package of a backend called `name` to `folder`, which must not be there yet; it
    appears whole or not at all."""
    _check_name(name)
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} is there already; choose another place with --folder")
    if not folder.absolute().parent.is_dir():
        raise BadInput(f"{folder.absolute().parent} is no folder; make it first")
    words = "".join(part.title() for part in name.split("_"))
    files = {
        "pyproject.toml": PYPROJECT,
        f"{name}.py": MODULE,
        "README.md": README,
        f"tests/test_{name}.py": TEST,
    }
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.absolute().parent))
        for file, text in files.items():
            (temporary / file).parent.mkdir(exist_ok=True)
            (temporary / file).write_text(text.replace("NAME", name).replace("CLASS", words))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error}; nothing was left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    return folder


def _check_name(name: str) -> None:
    """Refuse what can be no module, entry point and operator namespace at once, or is taken."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise BadInput(f"a backend's name is a-z, 0-9 and _, as my_npu is; found {name!r}")
    if name in table("qcompiler.backends"):
        raise BadInput(f"there is a backend called {name!r} already; choose another name")
    if name in RESERVED or find_spec(name) is not None:
        raise BadInput(f"{name!r} is the name of an installed module; choose another name")
