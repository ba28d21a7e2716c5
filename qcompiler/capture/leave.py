"""A module is left as it was, whatever its forward writes into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def left(module: torch.nn.Module) -> Iterator[None]:
    """Attributes that are first made in `forward`, such as a table of positions, would stay in the
    user's module as torch.export's tensors without values, and break it."""
    spaces = [vars(m) for m in module.modules()]
    inner = [v for space in spaces for v in space.values() if type(v) in (dict, list, set)]
    was = [(held, held.copy()) for held in [*spaces, *inner]]
    try:
        yield
    finally:
        for held, before in was:
            _restore(held, before)


def _restore(held: Any, before: Any) -> None:
    """The contents of a dictionary, list or set, where something in it is another than before."""
    if len(held) == len(before) and all(
        a is b for a, b in zip(_all(held), _all(before), strict=True)
    ):
        return
    if isinstance(held, list):
        held[:] = before
        return
    held.clear()
    held.update(before)


def _all(held: Any) -> list[object]:
    return [x for pair in held.items() for x in pair] if isinstance(held, dict) else [*held]
