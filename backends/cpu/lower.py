"""Put the CPU's kernels in the place of the reference's operators.

linear( fakequant(x), dequantize(q, s), b )   →   qc_cpu::linear(x, pack(q, s), b)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompiler.backends.cpu.choose import fits, refusals, seconds
from qcompiler.backends.cpu.kernels import KERNELS, Call, Static
from qcompiler.edit import Edit
from qcompiler.errors import BackendError
from qcompiler.facts import Facts
from qcompiler.formats import QTensor, Scheme
from qcompiler.history import Effect
from qcompiler.lowering import as_planned, unrounded
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites
from qcompiler.stored import read

aten = torch.ops.aten
qc = torch.ops.qc
HALF = 3e-2
"""Relative error of a program whose `float` weights are held in a 16-bit type."""


@dataclass(frozen=True, kw_only=True)
class LowerLinear(Pass):
    """Serve the linears on which `kernel` measures fastest with it."""

    name: ClassVar[str] = "cpu_linear"
    effect: ClassVar[Effect] = Effect.LOWER

    kernel: str = "int8"
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Kernels to use wherever they fit, if any: not only where they pay."""

    def tolerance(self, facts: Facts) -> float:
        tolerance = KERNELS[self.kernel].tolerance
        weights = (site.weight.meta["val"] for site in sites(facts.program.nodes))
        rounded = any(value.dtype.itemsize < 4 for value in weights)
        return max(tolerance, HALF) if rounded else tolerance

    def run(self, edit: Edit, facts: Facts) -> None:
        plan = edit.plan
        for site in sites(edit.nodes):
            scheme = plan.get(site.id)
            if scheme is None or site.kind.x is None or site.weight.op == "placeholder":
                continue
            stored = read(edit, site.weight)
            static = static_of(edit, site, scheme)
            if self._chosen(site, scheme, stored, static) == self.kernel:
                edit.spend(self._reason(site, scheme), site.node)
                if self.kernel == "float" or stored is None or static is None:
                    self._float(edit, facts, site)
                else:
                    self._lower(edit, facts, site, scheme, stored, static)

    def _chosen(
        self, site: Site, scheme: Scheme, stored: QTensor | None, static: Static | None
    ) -> str:
        if (
            stored is None
            or static is None
            or site.id in self.exclude
            or site.kind.name != "linear"
        ):
            return "float"
        out, width = (int(n) for n in site.weight.meta["val"].shape)
        forced = [n for n in self.only if fits(KERNELS[n], out, width, scheme)]
        times = {n: 0.0 for n in forced} or seconds(site, scheme)
        return min(times, key=lambda n: times[n])

    def _reason(self, site: Site, scheme: Scheme) -> str:
        """`integer, 5.1 x float`, with the kernels that are out and why."""
        if self.only:
            return self.kernel
        times, refused = seconds(site, scheme), refusals(site, scheme)
        words = [self.kernel]
        if self.kernel != "float":
            words[0] += f", {times['float'] / times[self.kernel]:.1f} x float"
        elif not times and not refused:
            words.append(f"no low-precision kernel for a {site.kind.name}")
        else:
            words += [f"{n} measures slower" for n in times if n != "float"]
        words += [f"{name}: {reason}" for name, reason in refused.items()]
        return "; ".join(words)

    def _float(self, edit: Edit, facts: Facts, site: Site) -> None:
        """Floating point numbers in the place of what decodes the weight."""
        value = facts.value(site.weight)
        assert value is not None
        value = value.to(site.weight.meta["val"].dtype).contiguous()
        stem = site.id.rpartition("/")[0] or site.id
        new = edit.new_param(f"{stem}.weight", value, like=site.node)
        edit.rewire(site.node, site.kind.weight, new)

    def _lower(
        self, edit: Edit, facts: Facts, site: Site, scheme: Scheme, stored: QTensor, static: Static
    ) -> None:
        bias = None if site.bias is None else facts.value(site.bias)
        prepare = KERNELS[self.kernel].prepare
        put_in(edit, site, stored, lambda: prepare(stored, bias, scheme.activation, static))


def put_in(edit: Edit, site: Site, stored: QTensor, prepare: Callable[[], Call]) -> None:
    """Put what `prepare` makes of the weight in the place of a site."""
    node, stem = site.node, site.id.rpartition("/")[0] or site.id
    try:
        call = prepare()
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error):
            raise
        out, width = stored.data.shape
        raise BackendError(
            f"no memory to pack the weight of {site.id}, {out} × {width} in {stored.format}: "
            f"{stored.bytes / 1e6:.0f} MB, and several times that while it is packed; free "
            "memory, or leave the layer in floating point"
        ) from error
    x, *_ = unrounded(site)
    params = [
        None if v is None else edit.new_param(f"{stem}.{k}", v, like=node)
        for k, v in call.parameters.items()
    ]
    new = edit.call(call.operator, x, *params, *call.constants, like=node, replaces=[node])
    edit.replace(node, new)


def static_of(edit: Edit, site: Site, scheme: Scheme) -> Static | None:
    """What is known of a site's activation; None if it is rounded by what a run computes, or
    otherwise than `scheme` says (a file that was quantized before has roundings of its own)."""
    if not as_planned(site, scheme):
        return None
    _, scale, zero = unrounded(site)
    values = [None if n is None else _value(edit, n) for n in (scale, zero)]
    missing = [v is None and n is not None for v, n in zip(values, (scale, zero), strict=True)]
    computed = site.bias is not None and edit.param_of(site.bias) is None
    return None if any(missing) or computed else Static(*values)


def _value(edit: Edit, node: object) -> Tensor | None:
    """A parameter's value; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    kept = read(edit, node)
    if kept is not None:
        return kept.data if node.meta["val"].dtype == torch.int16 else kept.dequantize()
    return None if edit.param_of(node) is None else edit.tensor(node)
