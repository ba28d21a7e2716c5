"""What a learned rounding makes small.

================  ================================================================================
`layer`           tr(E H Eᵀ), E = W - W': the error of each layer's output, from its Gram matrix
`block`           Σ ‖y' - y‖² / ‖y‖² over the outputs y of the block (BRECQ, Li et al. 2021)
`prediction`      KL(softmax of the predictions), for scores of classes (PD-Quant, Liu et al. 2023)
`prediction_mse`  Σ ‖p' - p‖² / ‖p‖² over the predictions
`kl_top`          KL over the likeliest thousand words only (OSTQuant, Hu et al. 2025)
================  ================================================================================

Predictions are what the rest of the float program makes of the block's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.objective import Objective, kl_top, mse
from qcompiler.rounding.base import Block, Layer, gram_of, output_error

Name = Literal["layer", "block", "prediction", "prediction_mse", "kl_top"]
Weights = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]
BlockObjective = Callable[[Block, int, Outputs, Outputs], Tensor]
"""(block, batch, its outputs, the wanted ones) → a scalar that can be differentiated."""


def block_error(block: Block, batch: int, outputs: Outputs, wanted: Outputs) -> Tensor:
    """Σ ‖y' - y‖² / ‖y‖²."""
    return mse(block.counted(batch, wanted), block.counted(batch, outputs))


def kl(wanted: tuple[object, ...], found: tuple[object, ...]) -> Tensor:
    """KL(teacher ‖ student) over the last axis of the first output, mean over the others."""
    teacher, student = wanted[0], found[0]
    assert isinstance(teacher, Tensor) and isinstance(student, Tensor)
    if not teacher.ndim:
        raise BadInput("prediction needs scores (…, classes) as the first output; write block")
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def by_prediction(compare: Objective) -> BlockObjective:
    """`compare` of the network's predictions."""

    def objective(block: Block, batch: int, outputs: Outputs, wanted: Outputs) -> Tensor:
        with torch.no_grad():
            teacher = tuple(p.detach() for p in block.predictions(batch, wanted))
        found = block.predictions(batch, outputs)
        return compare(block.counted(batch, teacher), block.counted(batch, found))

    return objective


OBJECTIVES: Mapping[str, BlockObjective] = {
    "block": block_error,
    "prediction": by_prediction(kl),
    "prediction_mse": by_prediction(mse),
    "kl_top": by_prediction(kl_top),
}


class Task(Protocol):
    """What weights are trained for."""

    @property
    def batches(self) -> int: ...

    def loss(self, batch: int, weights: Weights) -> float: ...

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        """Loss and its gradient by each weight that it depends on."""


class OfLayer:
    """tr(E H Eᵀ) / out, of which the gradient by W' is -2 E H / out."""

    batches = 1

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def loss(self, batch: int, weights: Weights) -> float:
        return float(output_error(self._layer, weights[self._layer.id]))

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        id, weight = self._layer.id, self._layer.weight
        error = weight - weights[id]
        weighted = error @ gram_of(self._layer) / len(weight)
        return float((weighted * error).sum()), {id: -2 * weighted}


class OfBlock:
    """An objective of a block's outputs."""

    def __init__(self, block: Block, objective: BlockObjective) -> None:
        self._block, self._objective = block, objective
        self.batches = block.batches

    def loss(self, batch: int, weights: Weights) -> float:
        with torch.no_grad():
            return float(self._of(batch, weights))

    def gradient(self, batch: int, weights: Weights) -> tuple[float, dict[str, Tensor]]:
        leaves = {id: w.detach().requires_grad_() for id, w in weights.items()}
        with torch.enable_grad():
            loss = self._of(batch, leaves)
        # A layer that no data reached (an expert's) has no gradient.
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}

    def _of(self, batch: int, weights: Weights) -> Tensor:
        found = self._block.found(batch, weights)
        return self._objective(self._block, batch, found, self._block.wanted(batch))
