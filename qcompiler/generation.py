"""Writing text with a program whose cache is an argument, a token at a time.

    logits, past = program(tokens, past)        next ~ softmax(logits[-1] / temperature)

Sampling as in A. Holtzman et al., "The curious case of neural text degeneration", 2020: of the
`top_k` likeliest words, those that together have at least the probability `top_p`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor

from qcompiler.capture.cached import PAST
from qcompiler.errors import BadInput
from qcompiler.io import Signature

COLD = 1e-6
"""Temperature below which the likeliest is taken."""


class Options(TypedDict, total=False):
    """How to write; without any of it, 128 of the likeliest tokens."""

    count: int
    temperature: float
    top_k: int
    top_p: float
    stop: Collection[int]
    seed: int


def generate(
    model: Callable[..., Any],
    io: Signature,
    input_ids: Tensor,
    *,
    count: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token of each row of `input_ids` (batch, tokens), as (batch,), `count` times.

    `model` is a compiled one or a program, called with the signature `io`. `temperature` 0 takes
    the likeliest; else one is drawn, of the `top_k` likeliest (0: of all) that together have the
    probability `top_p`. It ends early when each row has had a token of `stop`; a row that has goes
    on with that token.
    """
    _check(io, input_ids, count, temperature, top_k, top_p, stop)
    return _written(model, input_ids, count, (temperature, top_k, top_p), stop, seed)


def _written(
    model: Callable[..., Any],
    input_ids: Tensor,
    count: int,
    sampling: tuple[float, int, float],
    stop: Collection[int],
    seed: int,
) -> Iterator[Tensor]:
    where = input_ids.device
    generator = torch.Generator(where).manual_seed(seed)
    ends = torch.tensor(sorted(stop), dtype=input_ids.dtype, device=where)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=where)
    last, past, tokens = input_ids[:, -1], None, input_ids
    for _ in range(count):
        found = model(input_ids=tokens, **{PAST: past})
        past = found.past_key_values
        drawn = _next(found.logits[:, -1].float(), *sampling, generator)
        last = torch.where(ended, last, drawn)
        yield last
        ended = ended | torch.isin(last, ends)
        if ended.all():
            return
        tokens = last[:, None]


def _next(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """A word (batch,) for each row of `logits` (batch, words)."""
    if temperature < COLD:
        return logits.argmax(-1)
    likeliest, words = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)
    weights = ((likeliest - likeliest[:, :1]) / temperature).softmax(-1)
    before = weights.cumsum(-1) - weights
    weights = weights.masked_fill(before >= top_p, 0.0)  # never the first
    drawn = torch.multinomial(weights, 1, generator=generator)
    return words.gather(-1, drawn)[:, 0]


def _check(
    io: Signature,
    ids: object,
    count: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: object,
) -> None:
    if PAST not in io.optional:
        raise BadInput(
            f"the program takes ({', '.join(map(str, io.tensors))}) and no cache, so that it "
            "cannot go on from one token to the next; compile the model with cache=True (--cache)"
        )
    whole = isinstance(ids, Tensor) and not ids.is_floating_point()
    if not whole or not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.shape[1]:
        of = f"{ids.dtype} of shape {[*ids.shape]}" if isinstance(ids, Tensor) else repr(ids)[:60]
        raise BadInput(f"input_ids are a tensor (batch, tokens) of ids, at least one; found {of}")
    if not isinstance(stop, Collection) or not all(isinstance(n, int) for n in stop):
        raise BadInput(f"stop is a list of token ids; found {stop!r}")
    wrong = [
        f"{name} {said}; found {value}"
        for name, value, said, right in (
            ("count", count, "is 1 or more", count >= 1),
            ("temperature", temperature, "is 0 or more", temperature >= 0),
            ("top_k", top_k, "is 0 (all) or more", top_k >= 0),
            ("top_p", top_p, "is in (0, 1]", 0 < top_p <= 1),
        )
        if not right
    ]
    if wrong:
        raise BadInput("; ".join(wrong))
