"""Capture: many doors, one graph. Everything ends as one `Program` by way of `torch.export`.

=====================  ===========================================================================
what                   how
=====================  ===========================================================================
`torch.nn.Module`      exported (non-strict) with dynamic batch and sequence, see `module.py`
folder                 a Hugging Face model: `config.json` and safetensors, see `folder.py`
`file.pt2`             an exported program that somebody saved
`file.onnx`            an ONNX model of anybody's, interpreted node by node, see `onnx/`
`module:factory`       a Python factory that returns a module, or (module, example inputs)
=====================  ===========================================================================
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from qcompiler.capture.against import by_guards
from qcompiler.capture.cached import AXES, cached, checked
from qcompiler.capture.checks import check_dynamic
from qcompiler.capture.dynamic import fixed, stuck_dims
from qcompiler.capture.exported import from_exported
from qcompiler.capture.module import export_module
from qcompiler.errors import BadInput
from qcompiler.program import Program

Model = torch.nn.Module | torch.export.ExportedProgram | str | Path
Dynamic = bool | dict[str, dict[int, str]] | None

ALREADY = "a graph already; a cache becomes an argument as a folder or a module is captured"

__all__ = ["Dynamic", "Model", "Source", "capture", "open_model"]


@dataclass(frozen=True)
class Source:
    """Where a program came from: enough to load the float model again."""

    kind: str
    """`module`, `exported`, `folder`, `pt2`, `onnx` or `factory`."""
    place: str = ""
    """Absolute path, or `module:factory`; empty for objects handed over in Python."""
    cache: bool = False
    """Whether the model's cache was made an argument."""

    def open(self) -> Program:
        """The float program again."""
        return open_model(self.place, cache=self.cache)[0]


def capture(
    model: Model,
    example_inputs: object = None,
    *,
    dynamic: Dynamic = None,
    cache: bool = False,
) -> Program:
    """Capture `model` as a `Program`, without changing it; the tensors are shared, not copied.

    `example_inputs`: a tensor, a tuple of positional inputs, or a mapping of keyword inputs.
    Folders and factories bring their own when none are given.

    `dynamic`: None makes the batch of every input and the sequence of token inputs dynamic where
    the model allows it; False keeps the example's sizes; a mapping such as
    `{"input_ids": {0: "batch", 1: "sequence"}}` says it exactly, and a dimension that the model
    then fixes is an error.

    `cache` makes an argument of a language model's cache (see `cached.py`), so that what is
    compiled can `generate`; its batch, tokens and past are then dynamic.
    """
    return open_model(model, example_inputs, dynamic=dynamic, cache=cache)[0]


def open_model(
    model: Model, example_inputs: object = None, *, dynamic: Dynamic = None, cache: bool = False
) -> tuple[Program, Source, object]:
    """Like `capture`, and also tell the source and the example inputs that were used."""
    check_dynamic(dynamic)
    if cache and dynamic is not None:
        raise BadInput(
            "with cache=True the batch, the tokens and the past are dynamic; leave out `dynamic`"
        )
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise BadInput("a torch module needs example_inputs: a tensor, a tuple or a mapping")
        return _export(model, Source("module", cache=cache), example_inputs, dynamic)
    if isinstance(model, torch.export.ExportedProgram) and not cache:
        return _as_guarded(model), Source("exported"), _example_of(model, example_inputs)
    if isinstance(model, torch.export.ExportedProgram):
        raise BadInput(f"an exported program is {ALREADY}")
    path = Path(model)
    if path.is_dir():
        from qcompiler.capture.folder import load_folder

        module, own = load_folder(path)
        example = own if example_inputs is None else example_inputs
        source = Source("folder", str(path.resolve()), cache)
        return _export(module, source, example, dynamic)
    if ":" in str(model) and not path.exists():
        made, given = _load_factory(str(model), example_inputs)
        return _export(made, Source("factory", str(model), cache), given, dynamic)
    if cache and path.exists():
        raise BadInput(f"{path} is {ALREADY}")
    if path.suffix == ".pt2":
        exported = _load_pt2(path)
        source = Source("pt2", str(path.resolve()))
        return _as_guarded(exported), source, _example_of(exported, example_inputs)
    if path.suffix == ".onnx":
        return _open_onnx(path, example_inputs, dynamic)
    raise BadInput(
        f"{str(model)!r} is no model: expected a folder with config.json and safetensors, a .pt2 "
        "or .onnx file, or module:factory"
        + ("" if path.exists() else "; nothing exists at that path")
    )


def _export(
    module: torch.nn.Module, source: Source, example: object, dynamic: Dynamic
) -> tuple[Program, Source, object]:
    if not source.cache:
        return export_module(module, example, dynamic), source, example
    with cached(module, example) as inputs:
        program = export_module(module, inputs, {name: AXES[name] for name in inputs})
    program = checked(program, module)
    return program, source, inputs


def _open_onnx(
    path: Path, example_inputs: object, dynamic: Dynamic
) -> tuple[Program, Source, object]:
    try:
        from qcompiler.capture.onnx import load_onnx
        from qcompiler.capture.onnx.limits import shortened
    except ImportError as error:
        raise BadInput(
            f"reading ONNX files needs {error.name}; pip install 'qcompiler[onnx]'"
        ) from error
    try:
        program, example = load_onnx(path, example_inputs, dynamic)
    except BadInput as error:
        raise BadInput(shortened(str(error), path)) from error
    return program, Source("onnx", str(path.resolve())), example


def _as_guarded(exported: torch.export.ExportedProgram) -> Program:
    """The program, with sizes fixed that torch's own guards fix by a number computed from them."""
    program = from_exported(exported)
    if exported.example_inputs is None:  # torch checks no guards then
        return program
    example = tuple(pytree.tree_leaves(exported.example_inputs))
    stuck = stuck_dims(program, example, by_guards(exported))
    return fixed(program, example, stuck) if stuck else program


def _load_pt2(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise BadInput(f"no file at {path}")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many types here, down to zipfile and json errors
        raise BadInput(
            f"{path} is no exported program of torch {torch.__version__}: {error}"
        ) from error


def _load_factory(text: str, example_inputs: object) -> tuple[torch.nn.Module, object]:
    module_name, _, attribute = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"cannot load {text!r} (module:factory): {error}") from error
    finally:
        sys.path.pop(0)
    made = factory()
    module, example = made if isinstance(made, tuple) else (made, None)
    example = example if example_inputs is None else example_inputs
    if not isinstance(module, torch.nn.Module) or example is None:
        raise BadInput(
            f"{text!r} returned {type(made).__name__}; expected (torch.nn.Module, example inputs)"
        )
    return module, example


def _example_of(exported: torch.export.ExportedProgram, given: object) -> object:
    if given is not None or exported.example_inputs is None:
        return given
    args, kwargs = exported.example_inputs
    return kwargs if kwargs else args
