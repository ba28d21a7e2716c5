"""The diagonal of the Fisher information of each site's weight: how much the outputs feel a change.

    F = E (∂/∂W Σ_i r_i log p(y_i | x))²        y_i ~ p( · | x),  r_i = ±1

for a model whose first output are logits of words, and E (∂/∂W Σ r ∘ f(x))² = diag(JᵀJ) for any
other. With random signs r the products of different positions vanish in the mean, so that one
gradient serves a whole batch (Hutchinson 1990; the true Fisher of Kunstner et al. 2019, not the
empirical one, which takes the labels from the data).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompiler.objective import fitting
from qcompiler.padding import Padding
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import sites

Tick = Callable[[int], None]


def fisher(
    program: Program, batches: Sequence[Flat], tick: Tick | None = None
) -> dict[str, Tensor]:
    """Site id → F of its weight by rows, float32 (out, in · taps), mean over `batches`.

    Sites whose weight is an expression are left out. Memory: the float program's activations for
    one batch, and twice its weights.
    """
    found = {s.id: s.weight for s in sites(program.graph.nodes)}
    names = {id: str(program.param_of(w)) for id, w in found.items() if program.param_of(w)}
    leaves = {n: program.params[n].detach().requires_grad_() for n in set(names.values())}
    total = {n: torch.zeros_like(leaf, dtype=torch.float32) for n, leaf in leaves.items()}
    logits = fitting(program) == "kl_top"
    generator, padding = torch.Generator().manual_seed(0), Padding(program)
    for number, inputs in enumerate(batches, 1):
        params = [leaves.get(n, program.params[n]) for n in program.slots.values()]
        outputs = [
            t
            for t in padding.data(inputs, program.function(*params, *inputs))
            if isinstance(t, Tensor) and t.is_floating_point()
        ]
        score = _likelihood(outputs[0], generator) if logits else _projection(outputs, generator)
        grads = torch.autograd.grad(score, list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                total[name] += grad.float().pow(2)
        if tick is not None:
            tick(number)
    return {id: (total[n] / len(batches)).reshape(total[n].shape[0], -1) for id, n in names.items()}


def _likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    log_p = logits.float().log_softmax(-1).flatten(0, -2)
    words = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return (log_p.gather(1, words) * _signs(words, generator)).sum()


def _projection(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    return torch.stack([(o.float() * _signs(o, generator)).sum() for o in outputs]).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator) * 2.0 - 1
