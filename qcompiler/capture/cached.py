"""A language model whose cache is an argument: what a program that writes text is captured from.

    logits, past = model(tokens, past)

`past_key_values` is a tuple with keys and values (batch, heads, past, d) for each layer, in and
out. Its length may be 0, so that one program reads the prompt and writes what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qcompiler.capture.module import inference
from qcompiler.errors import BadInput
from qcompiler.io import Signature

Past = tuple[tuple[Tensor, Tensor], ...]
PAST = "past_key_values"
AXES = {"input_ids": {0: "batch", 1: "sequence"}, PAST: {0: "batch", 2: "past"}}
"""The dynamic axes of the two inputs."""
CURE = "capture it without a cache, or hand over a module of your own that takes it as an argument"


@contextmanager
def cached(module: torch.nn.Module, example: object) -> Iterator[dict[str, object]]:
    """`module` with a forward of (input_ids, past_key_values) while this lasts; example inputs
    for it, whose past is what `module` itself has of the first of the tokens in `example`."""
    from transformers import DynamicCache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    ids = _ids(module, example)
    forward: Callable[..., Any] = module.forward
    half = max(ids.shape[1] // 2, 1)

    def step(input_ids: Tensor, past_key_values: Past) -> CausalLMOutputWithPast:
        # Without a configuration it is whole, where a layer looks at a window too.
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, layer)
        out = forward(input_ids=input_ids, past_key_values=cache, use_cache=True)
        found = _layers(module, out.past_key_values)
        return CausalLMOutputWithPast(logits=out.logits, past_key_values=found)

    with inference(module), torch.no_grad():
        past = step(ids[:, :half], ()).past_key_values
    own = vars(module).get("forward")
    module.forward = step  # the module itself, so that its parameters keep their names
    try:
        # One more than the past, so that no two sizes of the example are equal by chance.
        yield {"input_ids": ids[:, -(half + 1) :], PAST: past}
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def check_cached(io: Signature, module: torch.nn.Module) -> None:
    """Refuse a program that cannot begin without a past."""
    if PAST not in io.optional:
        raise BadInput(
            f"{type(module).__name__} does more with its cache than to append to it, so that it is "
            f"not known to work without a past; {CURE}"
        )


def _ids(module: torch.nn.Module, example: object) -> Tensor:
    config: Any = getattr(module, "config", None)
    found = example.get("input_ids") if isinstance(example, dict) and len(example) == 1 else example
    found = found[0] if isinstance(found, tuple | list) and len(found) == 1 else found
    if not isinstance(found, Tensor) or found.is_floating_point() or found.ndim != 2:
        raise BadInput("a model with a cache takes token ids (batch, tokens) and nothing besides")
    if config is None or getattr(config, "is_encoder_decoder", False) or found.shape[1] < 3:
        what = "3 tokens or more" if config is not None else "a decoder of transformers"
        raise BadInput(f"a cache becomes an argument of {what}; {CURE}")
    return found.expand(2, -1) if len(found) == 1 else found


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
