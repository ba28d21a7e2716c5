"""What is handed over for capture, looked at before torch.export raises something of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.jit._trace import TracedModule
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput

DYNAMIC = '{"x": {0: "batch", 1: "sequence"}}'


def check_module(module: torch.nn.Module) -> None:
    """Refuse modules that cannot be exported, or would write into their weights."""
    for path, part in module.named_modules():
        # What was traced runs under torch.export as it is, but for the model itself.
        traced = path and isinstance(part, TracedModule)
        if isinstance(part, torch.jit.ScriptModule) and not traced:
            raise BadInput(
                f"{path or 'the model'} is a TorchScript module, which has no Python code to "
                "export; hand over the nn.Module that it was scripted or traced from"
            )
        tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
        if isinstance(part, tables) and part.max_norm is not None:
            raise BadInput(
                f"{path or 'the model'} is an embedding with max_norm={part.max_norm}, which "
                "writes into its weight while it runs; expected a function without state. Rescale "
                "the rows of its weight once, and set max_norm to None"
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise BadInput(
                f"parameter {name!r} is not initialized yet; run the model once, so that its lazy "
                "modules take their sizes"
            )
        if tensor.is_meta:
            raise BadInput(
                f"parameter {name!r} is on the meta device and has no values; load the weights "
                "first (to_empty and load_state_dict)"
            )


def check_example(call: object) -> None:
    """Refuse example inputs that are no dense real tensors with values."""
    for path, x in pytree.tree_leaves_with_path(call):
        if not isinstance(x, Tensor):
            continue
        what = (
            "on the meta device, without values" if x.is_meta
            else "sparse" if x.layout != torch.strided
            else "complex; view_as_real makes it real" if x.is_complex()
            else ""
        )  # fmt: skip
        if what:
            where = pytree.keystr(path[1:])
            raise BadInput(f"the example input {where} is {what}; expected dense real tensors")


def check_dynamic(dynamic: object) -> None:
    """Refuse what is no answer to which dimensions are dynamic."""
    if dynamic is None or isinstance(dynamic, bool):
        return
    if not isinstance(dynamic, Mapping):
        raise BadInput(f"dynamic is None, False or a mapping such as {DYNAMIC}; found {dynamic!r}")
    for name, axes in dynamic.items():
        plain = isinstance(axes, Mapping) and all(
            isinstance(a, int) and isinstance(d, str) and d for a, d in axes.items()
        )
        if not plain:
            raise BadInput(
                f"dynamic of {name!r} is a mapping from axes to names, as in {DYNAMIC}; "
                f"found {axes!r}"
            )


def counted(name: str, axes: Mapping[int, str], value: object) -> dict[int, str]:
    """`axes` of an argument, counted from 0: negative ones count from the end."""
    found: dict[int, str] = {}
    for x in pytree.tree_leaves(value):
        if not isinstance(x, Tensor):
            continue
        for axis, dim in axes.items():
            if not -x.ndim <= axis < x.ndim:
                raise BadInput(
                    f"dynamic names axis {axis} of {name!r}, which has shape {[*x.shape]}"
                )
            if found.setdefault(axis % x.ndim, dim) != dim:
                raise BadInput(
                    f"dynamic names axis {axis % x.ndim} of {name!r} {found[axis % x.ndim]!r} and "
                    f"{dim!r}; expected one name"
                )
    return found


def check_names(dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """torch.export takes identifiers alone as names of dimensions."""
    for name, axes in dynamic.items():
        if bad := [d for d in axes.values() if not d.isidentifier()]:
            raise BadInput(
                f"dynamic of {name!r} calls a dimension {bad[0]!r}; expected a name of letters, "
                "digits and _"
            )
