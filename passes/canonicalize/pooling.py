"""Pooling to one position is a mean."""

from __future__ import annotations

import torch

from qcompiler.edit import Edit

aten = torch.ops.aten
AXES = {
    aten.adaptive_avg_pool1d.default: [-1],
    aten.adaptive_avg_pool2d.default: [-2, -1],
    aten.adaptive_avg_pool3d.default: [-3, -2, -1],
}


def raise_means(edit: Edit) -> None:
    """adaptive_avg_pool(x, 1) = mean(x) over the spatial axes, which stay with size 1."""
    for node in edit.calls(*AXES):
        x, size = node.args
        if set(size) == {1}:  # type: ignore[arg-type]
            edit.spend("pooled to one position is the mean", node)
            axes = AXES[node.target]
            new = edit.call(aten.mean.dim, x, axes, True, like=node, replaces=[node])
            edit.replace(node, new)
