"""A file of a few bytes can ask for any amount of memory; that is seen before anything is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput
from qcompiler.program import Program, node_id

LONGEST = 500
"""Characters of an error about a file, besides its path."""


def shortened(text: str, path: Path) -> str:
    """`text` without its middle, if it is long: names in a stranger's file may be of any length."""
    most = LONGEST + 2 * len(str(path.absolute()))
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def check_size(what: str, shape: Sequence[object], dtype: torch.dtype) -> None:
    """Refuse a value that would take half of this machine's memory. Open sizes count as 1."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    size = dtype.itemsize
    for n in shape:
        size *= n if isinstance(n, int) else 1
    if size > limit:
        raise BadInput(
            f"{what} has shape [{', '.join(map(str, shape))}]: {size / 2**30:,.0f} GiB or more; "
            f"this machine can hold {limit / 2**30:.0f}"
        )


def check_sizes(program: Program) -> None:
    """Refuse a program in which one value is too large."""
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor):
                check_size(f"the value of node {node_id(node)}", value.shape, value.dtype)
