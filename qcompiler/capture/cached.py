"""A language model whose cache is an argument: what a program that writes text is captured from.

    logits, past = model(tokens, past, padding)

`past_key_values` is a tuple with keys and values (batch, heads, past, d) for each layer, in and
out. Its length may be 0, so that one program reads the prompt and writes what follows. `padding`
(batch,) is how many tokens at the left of each row are none, for texts of unequal length; it is
there if the example has an `attention_mask`. A call may have such a mask instead, or neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompiler.capture.module import inference
from qcompiler.errors import BadInput
from qcompiler.io import zeros_at_left
from qcompiler.program import Program

Past = tuple[tuple[Tensor, Tensor], ...]
PAST, PADDING, MASK = "past_key_values", "padding", "attention_mask"
AXES = {
    "input_ids": {0: "batch", 1: "sequence"},
    PAST: {0: "batch", 2: "past"},
    PADDING: {0: "batch"},
}
"""The dynamic axes of the inputs."""
CURE = "capture it without a cache, or hand over a module of your own that takes it as an argument"


@contextmanager
def cached(module: torch.nn.Module, example: object) -> Iterator[dict[str, object]]:
    """`module` with a forward of (input_ids, past_key_values, padding) while this lasts; example
    inputs for it, whose past is what `module` itself has of the first of the tokens in `example`.
    """
    from transformers import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    ids, padding = _ids(module, example)
    forward: Callable[..., Any] = module.forward
    places = "position_ids" in inspect.signature(forward).parameters
    half = max(ids.shape[1] // 2, 1)

    def step(
        input_ids: Tensor, past_key_values: Past, padding: Tensor | None = None
    ) -> CausalLMOutputWithPast:
        # Without a configuration it is whole, where a layer looks at a window too.
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, layer)
        given = {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}
        if padding is not None:
            past = past_key_values[0][0].shape[2] if past_key_values else 0
            place = torch.arange(past + input_ids.shape[1], device=input_ids.device)
            place = place - padding[:, None]
            given[MASK] = (place >= 0).long()
            if places:
                given["position_ids"] = place[:, past:].clamp(min=0)
        out = forward(**given)
        found = _layers(module, out.past_key_values)
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=found)

    if padding is not None:
        padding = padding.clamp(max=half - 1)
    with inference(module), torch.no_grad():
        past = step(ids[:, :half], (), padding).past_key_values
    own = vars(module).get("forward")
    module.forward = step  # the module itself, so that its parameters keep their names
    try:
        # One more than the past, so that no two sizes of the example are equal by chance.
        more = {} if padding is None else {PADDING: padding}
        yield {"input_ids": ids[:, -(half + 1) :], PAST: past, **more}
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def checked(program: Program, module: torch.nn.Module) -> Program:
    """The program, told that masks may be given; refused if it cannot begin without a past."""
    io = program.io
    if PAST not in io.optional:
        raise BadInput(
            f"{type(module).__name__} does more with its cache than to append to it, so that it is "
            f"not known to work without a past; {CURE}"
        )
    counts = {MASK: (PADDING, "past", "sequence")} if PADDING in io.optional else {}
    return replace(program, io=replace(io, counts=counts))


def writes(module: torch.nn.Module) -> bool:
    """Whether it is a model of transformers that writes text, and reads none besides."""
    config: Any = getattr(module, "config", None)
    able: Any = getattr(module, "can_generate", None)
    return bool(able and able()) and not getattr(config, "is_encoder_decoder", False)


def _ids(module: torch.nn.Module, example: object) -> tuple[Tensor, Tensor | None]:
    """Token ids, and how many of each row are padding if the example tells."""
    if not writes(module):
        raise BadInput(f"a cache becomes an argument of a decoder of transformers; {CURE}")
    given = dict(example) if isinstance(example, Mapping) else {"input_ids": example}
    found, mask = given.pop("input_ids", None), given.pop(MASK, None)
    found = found[0] if isinstance(found, tuple | list) and len(found) == 1 else found
    if not isinstance(found, Tensor) or found.is_floating_point() or found.ndim != 2 or given:
        what = f"{found.dtype}{[*found.shape]}" if isinstance(found, Tensor) else repr(found)[:60]
        raise BadInput(
            "a model with a cache takes input_ids, token ids (batch, tokens), and, for texts of "
            f"unequal length, {MASK}; found {', '.join([what, *map(str, given)])}"
        )
    if found.shape[1] < 3:
        raise BadInput(f"a cache is captured with 3 tokens or more; found {found.shape[1]}")
    padding = None if mask is None else zeros_at_left(mask, MASK)
    if isinstance(mask, Tensor) and mask.shape != found.shape:
        raise BadInput(
            f"{MASK} has the shape of input_ids, {[*found.shape]}; found {[*mask.shape]}"
        )
    if len(found) == 1:
        found = found.expand(2, -1)
        padding = None if padding is None else padding.expand(2)
    return found, padding


def _layers(module: torch.nn.Module, cache: Any) -> Past:
    """Keys and values of each layer; refused where a layer keeps anything else."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if kinds != {"DynamicLayer"}:
        found = ", ".join(sorted(kinds)) or type(cache).__name__
        raise BadInput(
            f"{type(module).__name__} has a cache of {found}; expected keys and values of all "
            f"that went before (DynamicLayer) in each layer; {CURE}"
        )
    return tuple((layer.keys, layer.values) for layer in cache.layers)
