"""A module is left as it was, whatever its forward writes into it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


@contextmanager
def left(module: torch.nn.Module) -> Iterator[None]:
    """Attributes that are first made in `forward`, such as a table of positions, would stay in the
    user's module as torch.export's tensors without values, and break it."""
    was = [(held, held.copy()) for held in _containers(module)]
    try:
        yield
    finally:
        for held, before in was:
            _restore(held, before)


def _containers(module: torch.nn.Module) -> list[Any]:
    """All that a module holds things in, also inside each other, and in objects of its own."""
    found: dict[int, Any] = {}
    todo: list[object] = [vars(m) for m in module.modules()]
    while todo:
        x = todo.pop()
        if id(x) in found or isinstance(x, (torch.nn.Module, torch.Tensor, type, ModuleType)):
            continue
        if isinstance(x, (dict, list, set, deque)):
            found[id(x)] = x
            todo += x.values() if isinstance(x, dict) else x
        elif isinstance(x, tuple):
            todo += x
        elif isinstance(space := getattr(x, "__dict__", None), dict):
            todo.append(space)
    return [*found.values()]


def _restore(held: Any, before: Any) -> None:
    """The contents of a container, where something in it is another than before."""
    if len(held) == len(before) and all(
        a is b for a, b in zip(_all(held), _all(before), strict=True)
    ):
        return
    if isinstance(held, list):
        held[:] = before
        return
    held.clear()
    if isinstance(held, deque):
        held.extend(before)
    else:
        held.update(before)


def _all(held: Any) -> list[object]:
    return [x for pair in held.items() for x in pair] if isinstance(held, dict) else [*held]
