"""torch.export, called quietly, and what it refuses in words."""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.capture.leave import left
from qcompiler.errors import BadInput
from qcompiler.recurrent import recurrent_shapes

T = TypeVar("T")
CALL = "The following call raised this error:"
"""What torch writes in front of the line of the model's own code."""


def export(
    module: torch.nn.Module,
    call: tuple[tuple[object, ...], dict[str, object]],
    shapes: tuple[object, object],
    named: bool = False,
) -> torch.export.ExportedProgram:
    """`module` exported for `call`, (args, kwargs), with dynamic `shapes` of them; what torch
    refuses is a `BadInput` that says why, and where in the model's own code."""
    args, kwargs = apart(call)
    positional = _gathered(module, shapes[0])  # type: ignore[arg-type]
    arranged: Any = (*positional, *shapes[1].values()) if kwargs else positional  # type: ignore
    by_name = None
    if kwargs:
        names = list(inspect.signature(module.forward).parameters)[: len(positional)]
        by_name = dict(zip(names, positional, strict=True)) | shapes[1]  # type: ignore
    try:
        with (
            torch.no_grad(), left(module), recurrent_shapes(), _mask_as_given(module), _silence(),
            _spelled_out(module, kwargs),
        ):  # fmt: skip
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=by_name or arranged,
                strict=False,
                # What torch cannot prove of a named size, as where a transposed tensor is appended
                # to a cache, is checked in runs instead of refused.
                prefer_deferred_runtime_asserts_over_guards=named,
            )
    except Exception as error:  # torch.export raises dozens of types, most of them private
        raise BadInput(_explain(error)) from error


def apart(call: T) -> T:
    """`call` with a copy for each tensor that is in it again: torch.export would take what one
    object stands for as one input, and leave the others unread."""
    seen: set[int] = set()

    def own(x: Tensor) -> Tensor:
        again = id(x) in seen
        seen.add(id(x))
        return x.clone() if again else x

    made: T = pytree.tree_map_only(Tensor, own, call)
    return made


def _gathered(module: torch.nn.Module, shapes: tuple[object, ...]) -> tuple[object, ...]:
    """Shapes of positional arguments, those that `*args` takes as one."""
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:before], tuple(shapes[before:])) if len(shapes) > before else shapes


@contextmanager
def _spelled_out(module: torch.nn.Module, kwargs: Mapping[str, object]) -> Iterator[None]:
    """What `**more` of a forward takes has arguments of its own: torch.export wants the shapes of
    all in one, and then does not find them."""
    own = module.forward
    parameters = inspect.signature(own).parameters
    kept = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own_names = {p.name for p in kept}
    if len(kept) == len(parameters) or own_names >= kwargs.keys():
        yield
        return

    def called(*args: object, **more: object) -> object:
        return own(*args, **more)

    named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs]
    kept += [p for p in named if p.name not in own_names]
    forward: Any = called
    forward.__signature__ = inspect.Signature(kept)
    module.forward = forward
    yield  # `left` takes it away


@contextmanager
def _silence() -> Iterator[None]:
    """torch prints the graph of what it refuses, and warns of attributes that forward assigns."""
    loggers = [v for k, v in logging.root.manager.loggerDict.items() if k.startswith("torch")]
    # Handlers have kept stderr as it was.
    handlers = [h for v in loggers if isinstance(v, logging.Logger) for h in v.handlers]
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(was|were) assigned during export", UserWarning)
        for handler in handlers:
            handler.addFilter(_nothing)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def _mask_as_given(module: torch.nn.Module) -> Iterator[None]:
    """torch's own decoders look whether a mask is causal, which is a branch on its values, to leave
    it out of attention: here it stays in."""
    name = "_detect_is_causal_mask"
    files = {inspect.getmodule(type(m)) for m in module.modules()}
    was = {file: getattr(file, name) for file in files if hasattr(file, name)}
    try:
        for file in was:
            setattr(file, name, lambda mask, is_causal=None, size=None: is_causal is True)
        yield
    finally:
        for file, function in was.items():
            setattr(file, name, function)


def _explain(error: Exception) -> str:
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = next((line for line in lines if line.startswith("File ") or ".py:" in line), "")
    if CALL in lines[:-2]:  # the user's own
        at = lines.index(CALL) + 1
        where = f"{lines[at]}: {lines[at + 1]}"
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        what = "its Python code branches on the values of a tensor"
        cure = "rewrite the branch with torch.where or torch.cond"
    else:
        what = lines[0].partition(" For more information")[0] if lines else type(error).__name__
        if "Suggested fixes:" in lines:
            fixes = itertools.takewhile(
                lambda line: " = " in line, lines[lines.index("Suggested fixes:") + 1 :]
            )
            what += f"; it suggests {', '.join(fixes)}"
        cure = "see what torch.export supports, or hand over another example input"
    return f"torch.export refuses this model: {what}{f' ({where})' if where else ''}; {cure}"
