"""Take the schemes that a program has already into the plan.

A file that somebody else quantized comes with stored weights and rounded activations. This pass
writes down what they are, so that a backend serves them with its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class Adopt(Pass):
    """Read the plan off the weights and activations that are quantized already."""

    name: ClassVar[str] = "adopt"
    effect: ClassVar[Effect] = Effect.PLAN
    makes: ClassVar[tuple[str, ...]] = ("plan",)

    def run(self, edit: Edit, facts: Facts) -> None:
        for site in sites(edit.nodes):
            scheme = Scheme(_weight(site), _activation(site))
            if scheme.weight is None and scheme.activation is None:
                edit.skip(site.node, "neither its weight nor its input is quantized")
                continue
            edit.spend(f"{scheme}", site.node)
            edit.assign(site.node, scheme)


def _weight(site: Site) -> QFormat | None:
    """Format of the stored weight, in the shape of the site."""
    node = site.weight
    if node.target is aten.reshape.default:
        node = node.args[0]  # type: ignore[assignment]
    fmt = _format(node, qc.dequantize.default, 3) or _format(node, qc.lookup.default, 2)
    if fmt is not None and site.kind.name == "conv" and fmt.block is not None:
        # A convolution's rows are flattened where they are stored.
        fmt = replace(fmt, block=(-1,) * (site.weight.meta["val"].ndim - 1))
    return fmt


def _activation(site: Site) -> QFormat | None:
    return None if site.x is None else _format(site.x, qc.fake_quantize.default, 1)


def _format(node: fx.Node, target: object, place: int) -> QFormat | None:
    if node.op != "call_function" or node.target is not target:
        return None
    return QFormat.parse(str(node.args[place]))
