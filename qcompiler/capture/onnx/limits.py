"""A file of a few bytes can ask for any amount of memory; that is seen before anything is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput
from qcompiler.program import Program, node_id

LONGEST = 500
"""Characters of an error about a file, besides its path."""


def shortened(text: str, path: Path) -> str:
    """`text` without its middle, if it is long: names in a stranger's file may be of any length."""
    most = LONGEST + 2 * len(str(path.absolute()))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def check_size(what: str, shape: Sequence[object], dtype: torch.dtype, beside: int = 0) -> int:
    """Bytes of a value and of what is held `beside` it; half of this machine's memory at most.

    Open sizes count as those of the example.
    """
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    size = dtype.itemsize
    for n in shape:
        size *= n if isinstance(n, int) else _of_example(n)
    if beside + size > limit:
        others = f" beside {beside / 2**30:,.0f} GiB of others" if beside else ""
        raise BadInput(
            f"{what} has shape [{', '.join(map(str, shape))}]: {size / 2**30:,.0f} GiB{others}; "
            f"this machine can hold {limit / 2**30:.0f}"
        )
    return beside + size


def _of_example(size: object) -> int:
    """1 where the size follows from values."""
    if isinstance(size, torch.SymInt) and size.node.has_hint():
        return int(size.node.hint)
    return 1


def check_sizes(program: Program) -> None:
    """Refuse a program whose values are too large: one of them, or all that are held at a time."""
    last = {given: node for node in program.graph.nodes for given in node.all_input_nodes}
    taken: dict[fx.Node, int] = {}
    held = 0
    for node in program.graph.nodes:
        before = held
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and node.name not in program.slots:
                what = f"the value of node {node_id(node)}"
                held = check_size(what, value.shape, value.dtype, held)
        taken[node] = held - before
        held -= sum(taken[n] for n in {node, *node.all_input_nodes} if last.get(n, node) is node)
