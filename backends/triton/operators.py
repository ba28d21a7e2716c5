"""Triton launches as operators of torch, through which `torch.compile` and export see.

On CUDA tensors an operator launches its kernels. On CPU tensors it runs in the interpreter, or, on
a machine with a GPU, goes there and back, so that a program that is lowered on the CPU can be
checked node by node with the kernels that it will run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.backends.triton.runtime import capability, device, interpreted, unavailable
from qcompiler.errors import BackendError

Result = TypeVar("Result")
Run = Callable[..., Result]


def operator(shape: Run[Result]) -> Callable[[Run[Result]], Run[Result]]:
    """Make a function that launches kernels the operator `qc_triton::<its name>`; `shape` computes
    empty results, for traces."""

    def make(run: Run[Result]) -> Run[Result]:
        name = run.__name__
        made: Any = torch.library.triton_op(f"qc_triton::{name}", run, mutates_args=())
        made.register_fake(shape)
        made.register_kernel("cpu", run if interpreted() else _there_and_back(name, run))
        return run

    return make


def _there_and_back(name: str, run: Run[Result]) -> Run[Result]:
    @wraps(run)
    def moved(*args: object, **kwargs: object) -> Result:
        if reason := unavailable():
            raise BackendError(f"qc_triton::{name} cannot run on the CPU: {reason}")
        there = pytree.tree_map_only(Tensor, lambda t: t.to(device()), (args, kwargs))
        back: Result = pytree.tree_map_only(Tensor, Tensor.cpu, run(*there[0], **there[1]))
        return back

    return moved


def rows_of(x: Tensor) -> Tensor:
    """(…, n) as a contiguous matrix of rows."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def early(x: Tensor) -> dict[str, bool]:
    """Options with which a kernel starts while the one in front of it ends: on Hopper and later
    ones (programmatic dependent launch); compilers do not know such launches."""
    if traced(x) or capability(x.device)[0] < 9:
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def traced(x: Tensor) -> bool:
    """Whether a compiler looks at a launch, rather than that it runs."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()
