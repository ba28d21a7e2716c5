"""A file of a few bytes can ask for any amount of memory; that is seen before anything is run."""

from __future__ import annotations

import os

from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput
from qcompiler.program import Program, node_id


def check_sizes(program: Program) -> None:
    """Refuse a program in which one value would take half of this machine's memory."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if not isinstance(value, Tensor):
                continue
            fixed = [int(n) for n in value.shape if isinstance(n, int)]
            size = value.element_size()
            for n in fixed:
                size *= n
            if size > limit:
                raise BadInput(
                    f"node {node_id(node)} yields a value of shape {list(map(str, value.shape))}: "
                    f"{size / 2**30:,.0f} GiB or more; this machine can hold {limit / 2**30:.0f}"
                )
