"""The folder that a program came from, captured and canonicalized as the program once was."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.capture.folder import load_folder, read_config
from qcompiler.capture.module import export_module
from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.program import Program
from qcompiler.registry import make_passes
from qcompiler.samples import random_inputs


@dataclass(frozen=True, eq=False)
class Source:
    """A Hugging Face folder, as the modules that transformers makes of it."""

    folder: Path
    config: dict[str, Any]
    """`config.json`, parsed."""
    module: torch.nn.Module
    program: Program
    """The float model, in the form that the quantized program had before its first rewrite."""

    @classmethod
    def open(cls, folder: Path, program: Program) -> Source:
        """Load `folder` and capture it with inputs like those that `program` takes."""
        if not folder.is_dir():
            raise BadInput(
                f"{folder} is no folder; the files need config.json and the tokenizer of the model "
                "that was compiled: say where it is by --source FOLDER"
            )
        config = read_config(folder)
        module, _ = load_folder(folder)
        return cls(folder, config, module, _captured(module, program))

    @property
    def architecture(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def settings(self) -> Any:
        """The config as transformers reads it, with defaults."""
        return self.module.config

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the folder holds, tied ones under each of their names."""
        return {name: t.detach() for name, t in self.module.state_dict().items()}

    def same(self, one: str, other: str) -> bool:
        """Whether two names are those of one tensor."""
        return self.tensors[one].data_ptr() == self.tensors[other].data_ptr()


def _captured(module: torch.nn.Module, program: Program) -> Program:
    """`module` captured with inputs of the program's kind, canonicalized if that was."""
    io = program.io
    args, kwargs = pytree.tree_unflatten(list(random_inputs(io, 0)), io.in_spec)
    example = kwargs if kwargs else args
    captured = export_module(module, example, None if io.dims else False)
    for step in program.history:
        if step.name == "canonicalize":  # it was checked when the program was made
            edit = Edit(captured, step.name)
            make_passes(step.spec)[0].run(edit, Facts(captured))
            captured = edit.seal()[0]
    return captured
