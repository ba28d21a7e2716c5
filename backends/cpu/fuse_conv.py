"""What stands behind generated convolutions, done as they write; and how images lie between them.

relu(add(conv(x), r))        →  conv(x, residual=r, behind=relu)
conv(relu(conv(x)))          →  … with the channels last in memory, as both would have them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler.backends.cpu.fuse import Fuse, alike, gelu_of
from qcompiler.edit import Edit

aten = torch.ops.aten
CONV, MEAN = torch.ops.qc_cpu.conv.default, torch.ops.qc_cpu.mean.default
PASS = {
    aten.conv2d.default,
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.batch_norm.default,
    aten.cat.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    torch.ops.qc.fake_quantize.default,
}
"""Operators whose result lies as what they read does."""
END = {CONV, MEAN}
"""Operators that read numbers in any order, and whose result does not show it."""
FLAT = {aten.flatten.using_ints, aten.reshape.default}
"""The same, where an image becomes one row of numbers; other shapes may be views, which show it."""


FUNCTIONS: dict[object, str] = {
    aten.relu.default: "relu",
    aten.relu6.default: "relu6",
    aten.hardswish.default: "hardswish",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",  # or another, see `gelu_of`
}
"""Operator → its name in `codegen/functions.py`."""
CLAMPS = (aten.hardtanh.default, aten.clamp.default)
"""`relu6` where their ends are 0 and 6."""


@dataclass(frozen=True, kw_only=True)
class FuseConv(Fuse):
    """A sum with the convolution's result and a function of it, as it is written."""

    name: ClassVar[str] = "cpu_conv_behind"

    def fuse(self, edit: Edit) -> None:
        for add in self.found(edit, aten.add.Tensor):
            for node, other in (add.args[:2], add.args[1::-1]):
                conv = None if add.kwargs else _free(node, "residual", "behind")
                if conv is not None and alike(conv, other):
                    self._put(edit, add, conv, residual=other)
                    break
        for node in self.found(edit, *FUNCTIONS, *CLAMPS):
            name, conv = function_of(node), _free(node.args[0], "behind")
            if name and conv is not None:
                self._put(edit, node, conv, behind=name)

    def _put(self, edit: Edit, last: fx.Node, node: fx.Node, **more: Argument) -> None:
        words = [value if name == "behind" else name for name, value in more.items()]
        edit.spend(f"{words[0]} as the convolution is written", last)
        new = edit.call(CONV, *node.args, **{**node.kwargs, **more}, like=last, replaces=[last])
        edit.replace(last, new)


@dataclass(frozen=True, kw_only=True)
class KeepLast(Fuse):
    """Images with their channels last in memory, where whoever reads them does not mind."""

    name: ClassVar[str] = "cpu_channels_last"

    def fuse(self, edit: Edit) -> None:
        for node in self.found(edit, CONV):
            if node.meta["val"].ndim == 4 and anyhow(node):
                edit.spend("channels last in memory", node)
                named = {**node.kwargs, "last": True}
                new = edit.call(CONV, *node.args, **named, like=node, replaces=[node])
                edit.replace(node, new)


@dataclass(frozen=True, kw_only=True)
class LowerMean(Fuse):
    """The mean over an image that a convolution makes."""

    name: ClassVar[str] = "cpu_mean"

    def fuse(self, edit: Edit) -> None:
        for node in self.found(edit, aten.mean.dim):
            x, keep = node.args[0], bool(node.args[2]) if len(node.args) > 2 else False
            if _mean(node) and not node.kwargs and isinstance(x, fx.Node) and x.target is CONV:
                edit.spend("mean over channels that are last", node)
                new = edit.call(MEAN, x, keep, like=node, replaces=[node])
                edit.replace(node, new)


def function_of(node: fx.Node) -> str:
    """What an operator is called behind a convolution; nothing if it is another one."""
    if node.target in CLAMPS:
        return "relu6" if node.args[1:] == (0, 6) and not node.kwargs else ""
    return gelu_of(node) if node.target is aten.gelu.default else FUNCTIONS.get(node.target, "")


def _free(node: Argument, *names: str) -> fx.Node | None:
    """`node` if it is a convolution that one node reads, and none of these is done there yet."""
    if not isinstance(node, fx.Node) or node.target is not CONV or len(node.users) > 1:
        return None
    return None if node.kwargs.keys() & set(names) else node


def anyhow(node: fx.Node) -> bool:
    """Whether all that read `node` take it in any order, and what they make is taken so as well."""
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop()
        if user in seen or user.target in END or _mean(user) or _flat(user):
            continue
        if user.target not in PASS:
            return False
        seen.add(user)
        waiting.extend(user.users)
    return True


def _flat(node: fx.Node) -> bool:
    """A row of numbers for each image."""
    if node.target not in FLAT:
        return False
    shape = node.meta["val"].shape
    return len(shape) == 2 and str(shape[0]) == str(node.all_input_nodes[0].meta["val"].shape[0])


def _mean(node: fx.Node) -> bool:
    """A mean over images, behind which nothing is left of their order."""
    if node.target is not aten.mean.dim or node.all_input_nodes[0].meta["val"].ndim != 4:
        return False
    axes = node.args[1]
    return isinstance(axes, list | tuple) and sorted(axes) in ([2, 3], [-2, -1])
