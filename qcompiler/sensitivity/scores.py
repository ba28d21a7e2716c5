"""Numbers whose squared derivatives are, in the mean, the loss's second derivatives.

    words        s = Σ_t r_t log p(y_t | x) / √(2 positions)          y ~ p,  r = ±1
    otherwise    s = Σ_o ⟨r, f_o(x)⟩ / ‖f_o(x)‖                       r = ±1

E (∂s · Δ)² = ½ Δᵀ H Δ for H the Hessian of KL(float ‖ quantized), mean over positions, and the
relative squared error for any other output (Gauss and Newton; Hutchinson 1990). Both are sums over
the samples of a batch, so that each sample's part is a draw of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.samples import Flat
from qcompiler.sensitivity.study import Study


def floats(outputs: Sequence[object]) -> list[Tensor]:
    """The floating point outputs."""
    found = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
    if not found:
        raise BadInput("the program has no floating point output that could be compared")
    return found


def score(study: Study, batch: Flat, outputs: tuple[object, ...], draw: int) -> Tensor:
    """s of one batch without its padding, a scalar that can be differentiated."""
    generator = torch.Generator().manual_seed(draw)
    found = floats(study.padding.data(batch, outputs))
    if study.is_words:
        log_p = found[0].float().log_softmax(-1).flatten(0, -2)
        words = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        chosen = log_p.gather(1, words)
        return (chosen * _signs(chosen, generator)).sum() / math.sqrt(2 * len(log_p))
    parts = [
        (o.float() * _signs(o, generator)).sum() / o.detach().float().norm().clamp_min(1e-30)
        for o in found
    ]
    return torch.stack(parts).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1
