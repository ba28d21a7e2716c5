"""Writing text with a program whose cache is an argument, a token at a time.

    logits, past = program(tokens, past)        next ~ softmax(logits[-1] / temperature)

Texts of unequal length are padded at the left, if the program was captured to be told.

Sampling as in A. Holtzman et al., "The curious case of neural text degeneration", 2020: of the
`top_k` likeliest words, those that together have at least the probability `top_p`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from qcompiler.capture.cached import MASK, PADDING, PAST
from qcompiler.errors import BadInput
from qcompiler.io import Signature, zeros_at_left

Prompts = Tensor | Sequence[Tensor | Sequence[int]]
TAKES = "input_ids are a tensor (batch, tokens) of ids, at least one, or a list of texts of ids"
COLD = 1e-6
"""Temperature below which the likeliest is taken."""


class Options(TypedDict, total=False):
    """How to write; without any of it, 128 of the likeliest tokens."""

    attention_mask: Tensor
    count: int
    temperature: float
    top_k: int
    top_p: float
    stop: Collection[int]
    seed: int


def generate(
    model: Callable[..., Any],
    io: Signature,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None = None,
    count: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next token of each row of `input_ids` (batch, tokens), as (batch,), `count` times.

    `input_ids` may be texts of unequal length, each of (tokens,), or padded at the left, which
    `attention_mask` (batch, tokens) then hides with zeros.
    `model` is a compiled one or a program, called with the signature `io`. `temperature` 0 takes
    the likeliest; else one is drawn, of the `top_k` likeliest (0: of all) that together have the
    probability `top_p`. It ends early when each row has had a token of `stop`; a row that has goes
    on with that token.
    """
    _check(io, count, temperature, top_k, top_p, stop)
    ids, padding = padded(input_ids, attention_mask)
    if padding is not None and (padding >= ids.shape[1]).any():
        raise BadInput("attention_mask leaves a row without a token")
    given: dict[str, Tensor] = {}
    if padding is not None and PADDING in io.optional:
        given[PADDING] = padding
    elif padding is not None and padding.any():
        raise BadInput(
            "these texts are of unequal length, and the program was captured for one; compile "
            "with example inputs that have an attention_mask beside input_ids"
        )
    return _written(model, ids, given, count, (temperature, top_k, top_p), stop, seed)


def padded(input_ids: object, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids (batch, tokens) and how many at the left of each row are none, if that is told."""
    if isinstance(input_ids, Tensor):
        ids = _ids(input_ids)
        if attention_mask is None:
            return ids, None
        padding = zeros_at_left(attention_mask, MASK)
        if attention_mask.shape != ids.shape:
            found = [*attention_mask.shape]
            raise BadInput(f"{MASK} has the shape of input_ids, {[*ids.shape]}; found {found}")
        return ids, padding
    if not isinstance(input_ids, Sequence) or not input_ids or attention_mask is not None:
        what = (
            ", which tells its lengths itself, and attention_mask"
            if attention_mask is not None
            else ""
        )
        raise BadInput(f"{TAKES}; found {repr(input_ids)[:60]}{what}")
    try:
        rows = [_ids(torch.as_tensor(row)[None])[0] for row in input_ids]
    except (TypeError, ValueError, RuntimeError) as error:  # what torch says of other things
        raise BadInput(f"{TAKES}; found {repr(input_ids)[:60]}") from error
    longest = max(map(len, rows))
    counts = [longest - len(row) for row in rows]
    ids = torch.stack(
        [torch.nn.functional.pad(r, (n, 0)) for r, n in zip(rows, counts, strict=True)]
    )
    return ids, torch.tensor(counts, device=ids.device)


def _ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.ndim != 2 or not ids.shape[1]:
        raise BadInput(f"{TAKES}; found {ids.dtype} of shape {[*ids.shape]}")
    return ids


def _written(
    model: Callable[..., Any],
    input_ids: Tensor,
    given: Mapping[str, Tensor],
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
        found = model(input_ids=tokens, **{PAST: past}, **given)
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
