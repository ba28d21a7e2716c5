"""Put the CPU's kernels in the place of the reference's operators.

linear( fakequant(x), dequantize(q, s), b )   →   linear_int8(x, q, s, b)
embedding( dequantize(q, s), ids )            →   dequantize( q[ids], s[ids] )
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompiler.backends.cpu.choose import refusals, seconds
from qcompiler.backends.cpu.kernels import KERNELS
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, QTensor, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import node_id
from qcompiler.sites import Site, sites
from qcompiler.stored import read

aten = torch.ops.aten
qc = torch.ops.qc
HALF = 3e-2
"""Relative error of a program whose `float` weights are held in a 16-bit type."""
OPERATORS = {
    "int8": torch.ops.qc_cpu.linear_int8.default,
    "packed8": torch.ops.qc_cpu.linear_packed8.default,
    "packed4": torch.ops.qc_cpu.linear_packed4.default,
}


@dataclass(frozen=True, kw_only=True)
class LowerLinear(Pass):
    """Serve the linears on which `kernel` measures fastest with it."""

    name: ClassVar[str] = "cpu_linear"
    effect: ClassVar[Effect] = Effect.LOWER

    kernel: str = "int8"
    exclude: tuple[str, ...] = ()

    def tolerance(self, facts: Facts) -> float:
        tolerance = KERNELS[self.kernel].capability.tolerance
        rounded = self.kernel == "float" and facts.program.dtype.itemsize < 4
        return max(tolerance, HALF) if rounded else tolerance

    def run(self, edit: Edit, facts: Facts) -> None:
        plan = edit.plan
        for site in sites(edit.nodes):
            scheme = plan.get(site.id)
            if scheme is None or site.kind.x is None or site.weight.op == "placeholder":
                continue
            stored = read(edit, site.weight)
            if self._chosen(site, scheme, stored) == self.kernel:
                edit.spend(self._reason(site, scheme), site.node)
                self._lower(edit, facts, site, stored)

    def _chosen(self, site: Site, scheme: Scheme, stored: QTensor | None) -> str:
        times = seconds(site, scheme)
        if stored is None or site.id in self.exclude or not times:
            return "float"
        return min(times, key=lambda n: times[n])

    def _reason(self, site: Site, scheme: Scheme) -> str:
        """`int8, 3.1 x float`, with the kernels that are out and why."""
        times = seconds(site, scheme)
        words = [self.kernel]
        if self.kernel != "float":
            words[0] += f", {times['float'] / times[self.kernel]:.1f} x float"
        elif not times:
            words.append(f"no low-precision kernel for a {site.kind.name}")
        else:
            words += [f"{n} measures slower" for n in times if n != "float"]
        words += [f"{name}: {reason}" for name, reason in refusals(site, scheme).items()]
        return "; ".join(words)

    def _lower(self, edit: Edit, facts: Facts, site: Site, stored: QTensor | None) -> None:
        node, stem = site.node, site.id.rpartition("/")[0] or site.id
        if self.kernel == "float":
            value = facts.value(site.weight)
            assert value is not None
            value = value.to(site.weight.meta["val"].dtype).contiguous()
            edit.rewire(node, site.kind.weight, edit.new_param(f"{stem}.weight", value, like=node))
            return
        assert stored is not None
        prepared = KERNELS[self.kernel].prepare(stored)
        params = [edit.new_param(f"{stem}.{k}", v, like=node) for k, v in prepared.items()]
        x, x_scale = _input(site)
        extra: list[fx.Node | int | None] = []
        if self.kernel == "int8":
            extra = [x_scale]
        elif self.kernel == "packed4":
            assert stored.format.block is not None
            extra = [stored.format.block[0], int(stored.data.shape[0])]
        new = edit.call(
            OPERATORS[self.kernel], x, *params, site.bias, *extra, like=node, replaces=[node]
        )
        edit.replace(node, new)


@dataclass(frozen=True, kw_only=True)
class LowerEmbedding(Pass):
    """Decode the rows that are read, not the whole table."""

    name: ClassVar[str] = "cpu_embedding"
    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()

    def tolerance(self, facts: Facts) -> float:
        return KERNELS["gather"].capability.tolerance

    def run(self, edit: Edit, facts: Facts) -> None:
        for site in sites(edit.nodes):
            table = site.weight
            if site.kind.name != "embedding" or table.target is not qc.dequantize.default:
                continue
            data, scale, zero, *rest = table.args
            if site.id in self.exclude or QFormat.parse(str(rest[0])).block is None:
                continue
            ids = site.node.args[1]
            edit.spend("gather", site.node)
            rows = [
                None if p is None else edit.call(aten.embedding.default, p, ids, like=site.node)
                for p in (data, _settled(edit, scale), _settled(edit, zero))
            ]
            new = edit.call(
                qc.dequantize.default, *rows, *rest, like=site.node, replaces=[site.node]
            )
            edit.replace(site.node, new)


def _settled(edit: Edit, node: object) -> fx.Node | None:
    """Scales or zero points as a parameter that rows can be taken of, decoded if they are stored in
    another form."""
    if not isinstance(node, fx.Node) or (kept := read(edit, node)) is None:
        return node if isinstance(node, fx.Node) else None
    dtype = node.meta["val"].dtype
    return edit.new_param(f"{node_id(node)}.decoded", kept.dequantize().to(dtype), like=node)


def _input(site: Site) -> tuple[fx.Node, fx.Node | None]:
    """(x before its rounding, static scale or None)."""
    x = site.x
    assert x is not None
    if x.target is not qc.fake_quantize.default:
        return x, None
    source = x.args[0]
    scale = x.args[2] if len(x.args) > 2 else None
    assert isinstance(source, fx.Node)
    return source, scale if isinstance(scale, fx.Node) else None
