"""An ONNX file as a program: interpreted node by node through torch functions, under torch.export.

`file.py` reads and checks, `interpret.py` walks the nodes, `table.py` and `ops/` say what each one
computes, `known.py` keeps shape arithmetic out of the tensors. Every node of the program is named
after the ONNX node that it came from, every parameter after its initializer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx.traceback import preserve_node_meta

from qcompiler.capture.dynamic import noted, stuck_dims
from qcompiler.capture.export import apart
from qcompiler.capture.exported import from_exported
from qcompiler.capture.onnx.call import NeedsValue
from qcompiler.capture.onnx.file import read_model
from qcompiler.capture.onnx.inputs import example_inputs
from qcompiler.capture.onnx.interpret import NODE, Interpreter, model_inputs
from qcompiler.capture.onnx.limits import check_sizes
from qcompiler.capture.onnx.ports import Axes, metadata_of, named_ports, open_axes, without
from qcompiler.capture.onnx.trial import quiet, run_once
from qcompiler.capture.onnx.types import to_array
from qcompiler.errors import BadInput, first_line
from qcompiler.program import Program
from qcompiler.recurrent import recurrent_shapes

BAKED = 64
"""Elements of the largest input whose values may be baked in as sizes."""


def load_onnx(
    path: Path, given: object = None, dynamic: object = None
) -> tuple[Program, tuple[Tensor, ...]]:
    """The program in the file `path`, and the example inputs that it was captured with.

    `given`: a tensor, a sequence, or a mapping by input name; without it, inputs are made from what
    the file says of them. The dimensions that the file leaves open are dynamic, or those of a
    mapping `dynamic`, or none if it is False. An input whose values decide a size is baked in, if
    it was given.
    """
    model = read_model(path)
    names = [str(v.name) for v in model_inputs(model)]
    example = example_inputs(model) if given is None else _arrange(given, names)
    open_ = open_axes(model, example, dynamic)
    baked: dict[str, np.ndarray] = {}
    stuck: dict[str, str] = {}
    interpreter = Interpreter(model)
    while True:  # each turn bakes one more input in, or takes an open axis away
        interpreter.baked, interpreter.open = baked, open_
        try:
            exported = _export(interpreter, example, open_)
        except NeedsValue as needed:
            baked |= _bake(needed, dict(zip(names, example, strict=True)), baked, given is None)
            continue
        except BadInput as error:
            if given is not None or not example:
                raise
            sizes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(names, example, strict=True))
            raise BadInput(
                f"{error}. The inputs were made up from what the file says ({sizes}); if the model "
                "does not take those sizes, hand over example_inputs"
            ) from error
        notes = [*stuck.values(), *(f"input {n} is baked in: it decides a size" for n in baked)]
        program = from_exported(
            exported, tuple(names), "; ".join(notes), interpreter.names, scope_key=NODE
        )
        check_sizes(program)
        program = replace(named_ports(program, names, open_, baked), metadata=metadata_of(model))
        run_once(program, example)
        fixed = stuck_dims(program, example)
        if not fixed:
            return noted(program, open_), example
        stuck |= fixed
        open_ = without(open_, program, fixed)


def _export(
    module: Interpreter, example: tuple[Tensor, ...], open_: Sequence[Axes]
) -> torch.export.ExportedProgram:
    shapes = tuple({axis: torch.export.Dim.AUTO for axis in axes} for axes in open_)
    wide = {"inputs": shapes} if shapes else None
    try:
        with preserve_node_meta(), torch.no_grad(), recurrent_shapes(), quiet():
            return torch.export.export(module, apart(example), dynamic_shapes=wide, strict=False)
    except (BadInput, NeedsValue):
        raise
    except Exception as error:  # torch.export raises dozens of types, most of them private
        raise BadInput(
            f"torch.export refuses this model: {first_line(error)}; "
            "capture it with dynamic=False, or with other example inputs"
        ) from error


def _bake(
    needed: NeedsValue,
    example: Mapping[str, Tensor],
    baked: Mapping[str, np.ndarray],
    made_up: bool,
) -> dict[str, np.ndarray]:
    """The inputs whose values are needed; refused when nobody gave them, or they are data."""
    found = {n: to_array(example[n]) for n in needed.inputs if n not in baked}
    large = [n for n, x in found.items() if x.size > BAKED or x.ndim > 1]
    if not found or large or made_up:
        raise needed.error
    return found


def _arrange(given: object, names: list[str]) -> tuple[Tensor, ...]:
    """The user's inputs in the order of the file."""
    if isinstance(given, Mapping):
        if set(given) != set(names):
            raise BadInput(f"the model takes {names}; found {list(given)}")
        values = [given[n] for n in names]
    else:
        values = list(given) if isinstance(given, list | tuple) else [given]
    if len(values) != len(names) or not all(isinstance(v, Tensor) for v in values):
        kinds = [type(v).__name__ for v in values]
        raise BadInput(f"the model takes tensors for {names}; found {kinds}")
    return tuple(values)
