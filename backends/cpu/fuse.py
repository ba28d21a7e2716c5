"""Fewer and larger calls around generated linears: what stands before, beside and behind them.

    linear(x, A), linear(x, B)              →  slices of linear(x, [A; B])      (q, k, v; gate, up)
    linear(norm(x)), linear(silu(g) · u)    →  linear(x, before=…)
    add(linear(x), r)                       →  linear(x, residual=r)

The glue between linears costs as much as they do once they are fast: each call reads and writes its
activations, and is dispatched.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Argument

from qcompiler.attention import arguments, scale_of
from qcompiler.backends.cpu.codegen.before import Before
from qcompiler.backends.cpu.codegen.butterfly import has_butterfly
from qcompiler.backends.cpu.codegen.layout import OUTPUTS
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id

aten = torch.ops.aten
LINEAR = torch.ops.qc_cpu.linear.default
ROPE = torch.ops.qc_cpu.rope.default
ATTEND = torch.ops.qc_cpu.attend.default
TENSORS = 8
"""Arguments of the operator that are tensors: x, the weight's, the bias, x_scale and x_zero."""
FLIPPED = 1e-2
"""Relative error: the same numbers up to float32's last digit, and so may be rounded otherwise."""


@dataclass(frozen=True, kw_only=True)
class Fuse(Pass):
    """What the passes here have in common."""

    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()
    """Ids of nodes to leave as they are."""
    optional: bool = True

    def tolerance(self, facts: Facts) -> float:
        return FLIPPED

    def run(self, edit: Edit, facts: Facts) -> None:
        if facts.program.dtype == torch.float32:
            self.fuse(edit)

    @abstractmethod
    def fuse(self, edit: Edit) -> None:
        """Rewrite all that fits."""

    def found(self, edit: Edit, *targets: object) -> list[fx.Node]:
        """The calls of these operators in float32 that are not excluded: one program may have
        several types, and what is rounded between two operators in 16 bits is part of both."""
        return [
            n
            for n in edit.calls(*targets)
            if n.meta["val"].dtype == torch.float32 and node_id(n) not in self.exclude
        ]


@dataclass(frozen=True, kw_only=True)
class MergeLinears(Fuse):
    """One product for all that read the same input in the same formats."""

    name: ClassVar[str] = "cpu_merge"

    def fuse(self, edit: Edit) -> None:
        groups: dict[object, list[fx.Node]] = {}
        for node in self.found(edit, LINEAR):
            if key := self._key(edit, node):
                groups.setdefault(key, []).append(node)
        for group in groups.values():
            if len(group) > 1:
                self._merge(edit, group)

    def _key(self, edit: Edit, node: fx.Node) -> object:
        """What must be equal; None for what cannot be merged."""
        x, weight, scale, zero, start, bias, x_scale, x_zero = node.args[:TENSORS]
        *formats, _ = node.args[TENSORS:]
        if node.kwargs:
            return None
        if any(edit.param_of(n) is None for n in (weight, scale, bias)):
            return None
        static = tuple(
            None if n is None else tuple(edit.tensor(n).flatten().tolist())
            for n in (x_scale, x_zero)
        )
        side = edit.tensor(scale)
        return x, static, zero is None, start is None, side.dtype, side.shape[1:], *formats

    def _merge(self, edit: Edit, group: list[fx.Node]) -> None:
        first = group[0]
        edit.spend(f"one product of {len(group)} that read the same input", *group)
        merged: list[fx.Node | None] = []
        for place, name in enumerate(("weight", "scale", "zero", "start", "bias"), 1):
            parts = [n.args[place] for n in group]
            whole = None
            if parts[0] is not None:
                value = torch.cat([edit.tensor(p) for p in parts])
                whole = edit.new_param(
                    f"{edit.param_of(first.args[1])}.merged_{name}", value, like=first
                )
            merged.append(whole)
        # Each has whole blocks of outputs, the last of which may be filled up.
        sizes = [OUTPUTS * edit.tensor(n.args[1]).shape[0] for n in group]
        rest = (*first.args[6:-1], sum(sizes))
        whole_y = edit.call(LINEAR, first.args[0], *merged, *rest, like=first)
        start = 0
        for node, size in zip(group, sizes, strict=True):
            end = start + node.args[-1]
            part = edit.call(aten.slice.Tensor, whole_y, -1, start, end, like=node, replaces=[node])
            edit.replace(node, part)
            start += size


@dataclass(frozen=True, kw_only=True)
class FuseBefore(Fuse):
    """Norms, gates and activations as the rows are made ready that the product reads."""

    name: ClassVar[str] = "cpu_before"

    def fuse(self, edit: Edit) -> None:
        for node in self.found(edit, LINEAR):
            if node.kwargs:
                continue
            chain, source, others = self._chain(edit, node.args[0])
            if not chain:
                continue
            words = " and ".join(b.name for b in chain)
            edit.spend(f"{words} as its input is read", node)
            text = "|".join(map(str, chain))
            new = edit.call(
                LINEAR, source, *node.args[1:], before=text, **others, like=node, replaces=[node]
            )
            edit.replace(node, new)

    def _chain(
        self, edit: Edit, source: fx.Node
    ) -> tuple[list[Before], fx.Node, dict[str, Argument]]:
        """What stands one before the other; what the first reads; what else they take."""
        chain: list[Before] = []
        others: dict[str, Argument] = {}
        while len(source.users) == 1:
            found = _before(edit, source)
            if found is None:
                break
            before, following, more = found
            if "gain" in more and "gain" in others:  # a norm, whose gain takes the signs over
                if chain[0].name != "times" or any(edit.param_of(p) is None for p in more.values()):
                    break
                edit.spend("the signs behind a norm become part of its gain", source)
                signs = edit.tensor(others.pop("gain"))
                for key, param in more.items():
                    name = f"{edit.param_of(param)}.signed"
                    more[key] = edit.new_param(name, edit.tensor(param) * signs, like=source)
                chain.pop(0)
            chain.insert(0, before)
            source, others = following, others | more
            if before.name not in ("times", "hadamard"):
                break
        return chain, source, others


def gelu_of(node: fx.Node) -> str:
    """Which of the two a GELU is: `gelu` or `gelu_tanh`."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("approximate")
    return "gelu_tanh" if given == "tanh" else "gelu"


def _before(edit: Edit, x: fx.Node) -> tuple[Before, fx.Node, dict[str, Argument]] | None:
    """(what it is, what it reads, what else) if `x` is something that rows can be made by."""
    args = x.args
    if x.target in (aten.rms_norm.default, aten.layer_norm.default):
        source, axes, gain, *rest = args
        if len(axes) != 1 or gain is None:
            return None
        if x.target is aten.rms_norm.default:
            eps = rest[0] if rest else None
            return None if eps is None else (Before("rms_norm", eps), source, {"gain": gain})
        shift, eps = (*rest, None, 1e-5)[:2] if len(rest) < 2 else rest[:2]
        if shift is None:
            return None
        return Before("layer_norm", eps), source, {"gain": gain, "shift": shift}
    if x.target is aten.gelu.default:
        return Before(gelu_of(x)), args[0], {}
    if x.target is torch.ops.qc.hadamard.default:
        size, core = x.meta["val"].shape[-1], args[1] if len(args) > 1 else 1
        if not isinstance(size, int) or not has_butterfly(size, core):
            return None
        return Before("hadamard", size, core), args[0], {}
    if x.target is aten.mul.Tensor:
        for value, factors in (args[:2], args[1::-1]):
            known = edit.param_of(factors) is not None and edit.tensor(factors)
            if known is not False and alike(x, value) and known.shape == x.meta["val"].shape[-1:]:
                return Before("times"), value, {"gain": factors}
        for gate, other in (args[:2], args[1::-1]):
            silu = isinstance(gate, fx.Node) and gate.target is aten.silu.default
            if silu and len(gate.users) == 1 and alike(gate, other):
                return Before("silu_mul"), gate.args[0], {"other": other}
    return None


@dataclass(frozen=True, kw_only=True)
class FuseResidual(Fuse):
    """A sum with the product's result, as it is written."""

    name: ClassVar[str] = "cpu_residual"

    def fuse(self, edit: Edit) -> None:
        for add in self.found(edit, aten.add.Tensor):
            for node, other in self._pairs(add):
                edit.spend("added as the product is written", add)
                new = edit.call(
                    LINEAR, *node.args, **node.kwargs, residual=other, like=add, replaces=[add]
                )
                edit.replace(add, new)
                break

    def _pairs(self, add: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(a linear that only the sum reads, what is added to it)"""
        if add.kwargs or len(add.args) != 2:
            return
        for node, other in (add.args, add.args[::-1]):
            linear = isinstance(node, fx.Node) and node.target is LINEAR and len(node.users) == 1
            if linear and "residual" not in node.kwargs and alike(node, other):
                yield node, other


@dataclass(frozen=True, kw_only=True)
class LowerRope(Fuse):
    """Rotary embeddings in one kernel instead of five operators."""

    name: ClassVar[str] = "cpu_rope"

    def fuse(self, edit: Edit) -> None:
        for node in self.found(edit, torch.ops.qc.rope.default):
            x, cos, sin, *interleaved = node.args
            known = [n.meta.get("val") for n in (x, cos, sin)]
            plain = all(v.ndim == 4 and v.dtype == torch.float32 for v in known)
            if not plain or any(interleaved) or node.kwargs.get("interleaved"):
                edit.skip(node, "takes float32 of four axes, rotated by halves")
                continue
            edit.spend("rope", node)
            new = edit.call(ROPE, x, cos, sin, like=node, replaces=[node])
            edit.replace(node, new)


@dataclass(frozen=True, kw_only=True)
class LowerAttention(Fuse):
    """Attention that is fast for one query, too, and joins heads without a copy."""

    name: ClassVar[str] = "cpu_attention"

    def fuse(self, edit: Edit) -> None:
        for node in self.found(edit, aten.scaled_dot_product_attention.default):
            named = arguments(node)
            q, k, v = named["query"], named["key"], named["value"]
            shapes = [n.meta["val"].shape for n in (q, k, v)]
            plain = all(len(s) == 4 and isinstance(s[1], int) for s in shapes)
            plain = plain and all(n.meta["val"].dtype == torch.float32 for n in (q, k, v))
            plain = plain and len({str(s[0]) for s in shapes}) == 1
            if not plain or named.get("dropout_p") or str(shapes[0][3]) != str(shapes[2][3]):
                edit.skip(node, "takes float32 of four axes, values as wide as queries")
                continue
            edit.spend("attend", node)
            causal = bool(named.get("is_causal"))
            new = edit.call(
                ATTEND, q, k, v, named.get("attn_mask"), scale_of(node), causal, like=node,
                replaces=[node],
            )  # fmt: skip
            edit.replace(node, new)


def alike(a: fx.Node, b: object) -> bool:
    """Whether `b` is a tensor of the shape and type of `a`."""
    if not isinstance(b, fx.Node):
        return False
    one, two = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(two, torch.Tensor)
        and one.dtype == two.dtype
        and [str(n) for n in one.shape] == [str(n) for n in two.shape]
    )
