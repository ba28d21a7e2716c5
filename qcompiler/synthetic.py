"""Calibration data for lack of real ones, made from the model itself.

* A network with batch norms says what its activations were like in training. Inputs are optimized
  until theirs are alike (ZeroQ, Cai et al. 2020, eq. 2)::

      min over x of  Σ_l ‖mean(z_l) - μ_l‖² + ‖std(z_l) - σ_l‖²

* A language model writes its data: from a random first token on, each next one is drawn from what
  the model predicts (LLM-QAT, Liu et al. 2023, section 2.1).
* Any other network gets random inputs from the range of its example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.blocks import Runner, Values, blocks, compute
from qcompiler.objective import fitting
from qcompiler.program import Program
from qcompiler.samples import Flat, random_inputs, sizes_for, synthetic_data

aten = torch.ops.aten
BATCH, LENGTH = 8, 32
"""Images, or texts and their tokens, of one batch."""
STEPS = 100
RATE = 0.1

Tick = Callable[[int, int], None]


def synthesize(
    program: Program, batches: int = 4, tick: Tick = lambda done, total: None, seed: int = 0
) -> list[Flat]:
    """`batches` of flat inputs for a captured `program` (before batch norms are folded)."""
    if any(n.target is aten.batch_norm.default for n in program.graph.nodes):
        return [_distill(program, seed + i, i, batches, tick) for i in range(batches)]
    if fitting(program) == "kl_top":
        return [_write(program, seed + i, i, batches, tick) for i in range(batches)]
    return list(synthetic_data(program.io, batches))


def _distill(program: Program, seed: int, number: int, of: int, tick: Tick) -> Flat:
    start = random_inputs(program.io, seed, sizes_for(program.io, BATCH, LENGTH))
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(x.shape, generator=generator).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else None
        for x in start
    ]
    trained = [leaf for leaf in leaves if leaf is not None]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    runners = [Runner(program, b) for b in blocks(program)]
    for step in range(STEPS):
        inputs = [x if leaf is None else leaf for x, leaf in zip(start, leaves, strict=True)]
        loss = _mismatch(program, runners, dict(zip(program.inputs, inputs, strict=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick(number * STEPS + step + 1, of * STEPS)
    return tuple(
        x if leaf is None else leaf.detach().to(x.dtype)  # type: ignore[attr-defined]
        for x, leaf in zip(start, leaves, strict=True)
    )


def _mismatch(program: Program, runners: list[Runner], values: Values) -> Tensor:
    """How far the inputs of all batch norms are from what these have seen in training."""
    terms: list[Tensor] = []

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        if node.target is aten.batch_norm.default:
            x, _, _, mean, variance = args[:5]
            axes = [a for a in range(x.ndim) if a != 1]
            terms.append((x.mean(axes) - mean).pow(2).mean())
            deviation = (x.var(axes, unbiased=False) + 1e-6).sqrt()
            terms.append((deviation - variance.sqrt()).pow(2).mean())
        return compute(node, args, kwargs)

    with torch.enable_grad():
        for runner in runners:
            values = runner.run(values, call)
        return torch.stack(terms).sum()


def _write(program: Program, seed: int, number: int, of: int, tick: Tick) -> Flat:
    generator = torch.Generator().manual_seed(seed)
    inputs = list(random_inputs(program.io, seed, sizes_for(program.io, BATCH, LENGTH)))
    place = next(i for i, p in enumerate(program.io.ports) if p.is_tensor)
    ids = inputs[place]
    assert isinstance(ids, Tensor)
    for t in range(1, ids.shape[1]):
        # The whole length each time: a causal model does not look at what comes behind.
        logits = program.flat(tuple(inputs))[0]
        assert isinstance(logits, Tensor)
        likely = logits[:, t - 1].float().softmax(-1)
        ids[:, t] = torch.multinomial(likely, 1, generator=generator).squeeze(1)
        tick(number * ids.shape[1] + t, of * ids.shape[1])
    return tuple(inputs)
