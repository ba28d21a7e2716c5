"""How good and how fast an artifact is, beside the float program on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.check import sqnr_db
from qcompiler.errors import BadInput
from qcompiler.samples import Flat
from qcompiler.timing import floors

Run = Callable[[Flat], tuple[object, ...]]


def perplexity(run: Run, batches: Sequence[Flat], watch: Callable[[], None] | None = None) -> float:
    """exp of the mean cross-entropy of each next token; output 0 holds logits (B, T, V)."""
    total, count = 0.0, 0
    for inputs in batches:
        ids, logits = inputs[0], _first_tensor(run(inputs))
        if not isinstance(ids, Tensor) or ids.is_floating_point() or logits.ndim != 3:
            raise BadInput(
                "perplexity needs a language model: token ids in, logits (batch, tokens, words) "
                f"out; found an output of shape {list(logits.shape)}"
            )
        flat = logits[:, :-1].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
        if watch is not None:
            watch()
    return math.exp(total / count)


def compare(
    run: Run, reference: Run, batches: Sequence[Flat], watch: Callable[[], None] | None = None
) -> tuple[float, float]:
    """(SQNR in dB, mean cosine along the last axis) of the first output against `reference`."""
    noise = signal = cosine = 0.0
    rows = 0
    for inputs in batches:
        want, have = (_first_tensor(r(inputs)).double() for r in (reference, run))
        signal += float(want.pow(2).sum())
        noise += float((want - have).pow(2).sum())
        similar = torch.nn.functional.cosine_similarity(want, have, dim=-1)
        cosine, rows = cosine + float(similar.sum()), rows + similar.numel()
        if watch is not None:
            watch()
    return sqnr_db(math.sqrt(noise / signal)), cosine / rows


def _first_tensor(outputs: tuple[object, ...]) -> Tensor:
    found = [o for o in pytree.tree_leaves(outputs) if isinstance(o, Tensor)]
    if not found:
        raise BadInput("the program has no tensor output to compare")
    return found[0]


def race(contenders: Mapping[str, Run], inputs: Flat) -> dict[str, float]:
    """Seconds of each contender on the same inputs, run in turn (`timing.py`)."""
    return floors({name: partial(run, inputs) for name, run in contenders.items()}, seconds=1.0)
