"""What is made small when something is trained or chosen by a whole program's outputs.

=============  ===================================================================================
`kl_top`       KL divergence over the teacher's k likeliest words (OSTQuant, Hu et al. 2025)
`mse`          relative squared error of all floating point outputs
=============  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput
from qcompiler.program import Program, is_tensor, shape_of

Objective = Callable[[tuple[object, ...], tuple[object, ...]], Tensor]
"""(outputs of the float program, outputs of the other) → a scalar that can be differentiated."""
TOP = 1000
"""Words that KL-Top looks at, at most."""


def kl_top(wanted: tuple[object, ...], found: tuple[object, ...]) -> Tensor:
    """KL(teacher ‖ student) over the teacher's likeliest words, mean over positions.

    The first output holds logits (…, words).
    """
    (teacher, student), *_ = _pairs(wanted, found)
    if not teacher.ndim:
        raise BadInput("kl_top needs logits (…, words) as the first output; write loss=mse")
    values, words = teacher.float().topk(min(TOP, teacher.shape[-1]), -1)
    log_p = values.log_softmax(-1)
    log_q = student.float().gather(-1, words).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def mse(wanted: tuple[object, ...], found: tuple[object, ...]) -> Tensor:
    """Σ ‖a - b‖² / ‖a‖² over the outputs."""
    total = torch.zeros(())
    for a, b in _pairs(wanted, found):
        size = a.float().pow(2).sum().clamp_min(1e-30)
        total = total + (a.float() - b.float()).pow(2).sum() / size
    return total


def fitting(program: Program) -> str:
    """`kl_top` for a language model: token ids in, scores of all words out; `mse` for the rest."""
    ids = next((p for p in program.io.ports if p.is_tensor), None)
    first = next(iter(program.graph.output_node().all_input_nodes), None)
    if ids is None or ids.dtype is None or ids.dtype.is_floating_point or not is_tensor(first):
        return "mse"
    assert first is not None
    words = shape_of(first)[-1] if shape_of(first) else 0
    return "kl_top" if isinstance(words, int) and words > ids.high else "mse"


OBJECTIVES: Mapping[str, Objective] = {"kl_top": kl_top, "mse": mse}


def _pairs(wanted: tuple[object, ...], found: tuple[object, ...]) -> list[tuple[Tensor, Tensor]]:
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()
    ]
    if not pairs:
        raise BadInput("the program has no floating point output to compare")
    return pairs
