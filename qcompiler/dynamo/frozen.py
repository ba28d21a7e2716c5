"""Programs compiled from one graph of Dynamo's, each for the parameters that a call brought.

Dynamo runs one graph for all modules of a kind, as for the layers of a model that is interrupted in
each of them, and does not look at the values of parameters. So each program remembers whose weights
it has, and that they have not been written since.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from qcompiler.compiled import Compiled, compile
from qcompiler.dynamo.graph import Graph, Open, number
from qcompiler.dynamo.options import Empty, Options
from qcompiler.errors import BadInput

MOST = 8
"""Programs of one graph and one set of weights, as many as Dynamo makes graphs of one function."""
TRAINING = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}
"""Operator → which of its arguments says that the model is being trained."""


@dataclass(eq=False)
class Build:
    """A program and the weights that it was made of."""

    params: list[weakref.ref[Tensor]]
    state: list[tuple[int, int]]
    sizes: tuple[object, ...]
    """Sizes and numbers that are fixed in it, beyond those of the graph."""
    batches: list[tuple[Tensor, ...]] = field(default_factory=list)
    compiled: Compiled | Literal["float"] | None = None
    """None while it is calibrated; `float` if nothing in it is to be quantized."""

    def of(self, params: Sequence[Tensor]) -> bool:
        return all(own() is p for own, p in zip(self.params, params, strict=True))


class Frozen:
    """Runs one graph of Dynamo's."""

    def __init__(self, graph: Graph, options: Options) -> None:
        self.graph = graph
        self.options = options
        self.open: Open | None = graph.open
        self.builds: list[Build] = []

    def __call__(self, *args: object) -> Sequence[object]:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise BadInput(
                "backend='qcompiler' computes no gradients, and an input or a parameter requires "
                "one; call the model under torch.no_grad() or torch.inference_mode()"
            )
        build = self._build(args)
        inputs = self.graph.inputs(args)
        if build.compiled is None and len(build.batches) < self.options.calibrate:
            build.batches.append(tuple(x.clone() for x in inputs))
            return self.graph.module(*args)  # type: ignore[no-any-return]
        if build.compiled is None:
            build.compiled = self._compile(args, build) or "float"
        if build.compiled == "float":
            return self.graph.module(*args)  # type: ignore[no-any-return]
        return self.graph.outputs(build.compiled.artifact.run(inputs), args)

    def _build(self, args: Sequence[object]) -> Build:
        """The build of these parameters, for these sizes."""
        params = [x for i in self.graph.params if isinstance(x := args[i], Tensor)]
        state, sizes = [_state(p) for p in params], self._fixed(args)
        same = [b for b in self.builds if b.of(params)]
        if any(b.state != state for b in same):
            warnings.warn("weights were written: they are compiled again", stacklevel=3)
            self.builds = [b for b in self.builds if b not in same]
            same = []
        for build in same:
            if build.sizes == sizes:
                return build
        if len(same) >= MOST:
            raise BadInput(
                f"a graph was compiled for {MOST} sizes already and is called with another; pad "
                "inputs to fewer sizes, and hand over as tensors the numbers that change"
            )
        alive = [b for b in self.builds if all(r() is not None for r in b.params)]
        new = Build([weakref.ref(p) for p in params], state, sizes)
        self.builds = [*alive, new]
        return new

    def _fixed(self, args: Sequence[object]) -> tuple[object, ...]:
        """What a program is fixed to where Dynamo's graph is not."""
        numbers = tuple(number(args[i]) for i in self.graph.numbers)
        if self.open is not None:
            return numbers
        return (*numbers, *(tuple(x.shape) for x in self.graph.inputs(args)))

    def _compile(self, args: Sequence[object], build: Build) -> Compiled | None:
        try:
            exported = self.graph.export(args, self.open or {})
        except BadInput:
            if not any((self.open or {}).values()):
                raise
            self.open = None  # this program fixes a size that Dynamo left open
            build.sizes = self._fixed(args)
            exported = self.graph.export(args, {})
        for node in exported.graph.nodes:
            _refuse_training(node)
        try:
            return compile(
                exported,
                self.graph.inputs(args),
                passes=self.options.pipeline(),
                plan=self.options.plan,
                backend=self.options.backend,
                data=build.batches or None,
            )
        except Empty:
            names = ", ".join(self.graph.params.values())
            warnings.warn(
                f"a graph with {names} runs in float: nothing in it is to be quantized (the last "
                "layer of each graph is its head, which recipes may leave out)",
                stacklevel=3,
            )
            return None


def _state(param: Tensor) -> tuple[int, int]:
    """What differs when a tensor's values were replaced or written in place."""
    return param.data_ptr(), 0 if param.is_inference() else param._version


def _refuse_training(node: fx.Node) -> None:
    place = TRAINING.get(node.target)  # type: ignore[call-overload]
    if place is not None and node.args[place] is True:
        raise BadInput(
            f"{node.name} runs as in training; backend='qcompiler' is for inference: call "
            "model.eval() first"
        )
