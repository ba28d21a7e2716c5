"""Back to floating point, with the numbers that the quantized program has.

    dequantize(Q, s, z)  →  W = (Q - z) · s        fake_quantize(x)  →  x, or clamp(x, 0, top)

So that a model that somebody else quantized can be rotated, smoothed and quantized anew; what its
rounding lost is lost. A range that begins at zero stands for a Relu or a Clip, which quantizers
leave out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import QFormat
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.stored import DECODERS

aten = torch.ops.aten
qc = torch.ops.qc


@dataclass(frozen=True, kw_only=True)
class Unquantize(Pass):
    """Stored integers become floating point weights, and activations are no longer rounded."""

    name: ClassVar[str] = "unquantize"
    effect: ClassVar[Effect] = Effect.LOSSY
    destroys: ClassVar[tuple[str, ...]] = ("plan",)

    weights: bool = True
    activations: bool = True
    budget: float = 1.0
    """Largest relative error of an output against the program before."""

    def tolerance(self, facts: Facts) -> float:
        return self.budget

    def run(self, edit: Edit, facts: Facts) -> None:
        for node in [n for t in DECODERS for n in edit.calls(t)] if self.weights else ():
            if edit.is_weight(node) and not any(user.target in DECODERS for user in node.users):
                _store(edit, facts, node)
        for node in edit.calls(qc.fake_quantize.default) if self.activations else ():
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if (top := _top_from_zero(edit, node)) is not None:
                edit.spend("its range begins at zero, so that it stands for a Relu or Clip", node)
                args = (x, 0.0, top)
                edit.replace(node, edit.call(aten.clamp.default, *args, like=node, replaces=[node]))
                continue
            edit.spend("goes on in floating point", node)
            edit.replace(node, x)


def _top_from_zero(edit: Edit, node: fx.Node) -> float | None:
    """The largest number of a rounding with known scales that has no negative one."""
    fmt = QFormat.parse(str(node.args[1]))
    scale, zero = (*node.args[2:4], None, None)[:2]
    if edit.param_of(scale) is None or fmt.block is not None:
        return None
    offset = 0
    if zero is not None:
        if edit.param_of(zero) is None:
            return None
        offset = int(edit.tensor(zero))  # type: ignore[arg-type]
    step = float(edit.tensor(scale))  # type: ignore[arg-type]
    return (fmt.qmax - offset) * step if offset == fmt.qmin else None


def _store(edit: Edit, facts: Facts, node: fx.Node) -> None:
    """One parameter for a stored weight, in the shape in which it is read."""
    last = node
    while len(last.users) == 1 and (user := next(iter(last.users))).target is aten.reshape.default:
        last = user
    value = facts.value(last)
    data = node.args[0]
    assert value is not None and isinstance(data, fx.Node)
    name = node_id(data).removesuffix(".data")
    edit.spend(f"{name} in floating point, as it was rounded", last)
    param = edit.new_param(name, value.to(last.meta["val"].dtype).contiguous(), like=data)
    edit.replace(last, param)
