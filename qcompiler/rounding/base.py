"""`Rounding`: how the codes of a weight are found. A function of tensors that never sees a graph.

A rounding sees one layer, or one block of layers with what computes the block. Formats, roundings
and kernels are three things: any rounding serves any format, but for what its docstring refuses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.formats import QFormat, QTensor
from qcompiler.observers import Gram, Range
from qcompiler.options import Optioned

Need = Literal["gram", "range", "sample", "fisher", "block"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration saw of the input of one layer, in the basis of its weight's columns.

    A convolution's columns are input channels × taps, and the vectors are its patches.
    """

    range: Range | None = None
    """Minimum, maximum, means of each column."""
    gram: Gram | None = None
    """H = (1/n) Σ x xᵀ, float32 (in, in)."""
    sample: Tensor | None = None
    """Some of the vectors, float32 (vectors, in)."""
    fisher: Tensor | None = None
    """E (∂L/∂W)², float32 (out, in)."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight to round."""

    id: str
    weight: Tensor
    """(out, in) float32; a kernel (out, in, …) by rows."""
    format: QFormat
    inputs: Inputs = field(default_factory=Inputs)
    notes: list[str] = field(default_factory=list)
    """What a reader of the step should know: a rounding adds to it."""


class Block(Protocol):
    """Layers that are rounded together, and what they compute."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """What is to be rounded, by id."""

    @property
    def batches(self) -> int:
        """Batches of calibration data."""

    def wanted(self, batch: int) -> tuple[Tensor, ...]:
        """What the float program computes for the block's outputs."""

    def found(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the block computes with these `weights` (of layers, (out, in), differentiable), on
        what the quantized program hands it, with activations rounded as the plan says."""

    def counted(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is no padding of a block's outputs, or of predictions: (tokens, …)."""

    def predictions(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the rest of the float program makes of the block's `outputs`, differentiable."""

    def tick(self, done: int, total: int) -> None:
        """Say how far the optimization is."""


@dataclass(frozen=True, kw_only=True)
class Rounding(Optioned):
    """How codes are found. Options are fields, and `gptq{damping=0.05}` is its text."""

    what: ClassVar[str] = "rounding"
    needs: ClassVar[tuple[Need, ...]] = ()
    """What it reads of a layer's inputs; `block` where it optimizes over a block's outputs."""

    def needed(self) -> tuple[Need, ...]:
        """What it needs with these options."""
        return self.needs

    @abstractmethod
    def layer(self, layer: Layer) -> QTensor:
        """Codes and grid of one layer's weight."""

    def block(self, block: Block) -> dict[str, QTensor]:
        """Codes and grids of all layers of a block, by id. Each for itself, unless overridden."""
        return {id: self.layer(layer) for id, layer in block.layers.items()}


def gram_of(layer: Layer) -> Tensor:
    """The Gram matrix of a layer's inputs, (in, in); `BadInput` if calibration saw none."""
    if layer.inputs.gram is None:
        raise BadInput(f"no calibration data reached {layer.id}; is it computed at all?")
    return layer.inputs.gram.matrix


def output_error(layer: Layer, rounded: Tensor) -> Tensor:
    """tr(E H Eᵀ) / out with E = W - W': mean square of what rounding adds to an output.

    Without a Gram matrix every input counts the same.
    """
    error = layer.weight - rounded
    gram = layer.inputs.gram
    weighted = error if gram is None else error @ gram.matrix
    total: Tensor = torch.sum(weighted * error)
    return total / error.shape[0]
