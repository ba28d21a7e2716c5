"""Put Triton's kernels in the place of the reference's operators.

linear( fakequant(x), dequantize(q, s), b )            →  linear_scaled( *round_rows(x), q, s, b )
linear( fakequant(hadamard(x)), dequantize(q, s), b )  →  linear_scaled( *turn_rows(x), q, s, b )
linear( x, dequantize(q, s), b )                       →  linear_decoded(x, q, s, b)

Layers that read one activation, as queries, keys and values do, share its rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompiler.backends.triton.choose import candidates, times
from qcompiler.backends.triton.kernels import KERNELS, Kernel
from qcompiler.backends.triton.weights import Weight
from qcompiler.edit import Edit
from qcompiler.errors import BackendError
from qcompiler.facts import Facts
from qcompiler.formats import QTensor, Scheme
from qcompiler.history import Effect
from qcompiler.lowering import unrounded
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites
from qcompiler.stored import read

qc = torch.ops.qc
HALF = 3e-2
"""Relative error of a program whose weights are held in a 16-bit type."""


@dataclass(frozen=True, kw_only=True)
class LowerLinear(Pass):
    """Serve linears with the kernels of this backend."""

    name: ClassVar[str] = "triton_linear"
    effect: ClassVar[Effect] = Effect.LOWER

    kernels: tuple[str, ...] = tuple(KERNELS)
    """Those that it may use."""
    exclude: tuple[str, ...] = ()

    def tolerance(self, facts: Facts) -> float:
        worst = max(c.tolerance for n in self.kernels for c in KERNELS[n].capabilities)
        types = {s.node.meta["val"].dtype for s in sites(facts.program.nodes)}
        return max(worst, HALF) if any(t.itemsize < 4 for t in types) else worst

    def run(self, edit: Edit, facts: Facts) -> None:
        plan = edit.plan
        rows = Rows(edit)
        for site in sites(edit.nodes):
            scheme = plan.get(site.id)
            if scheme is None or site.kind.x is None:
                continue
            if site.weight.op == "placeholder":
                edit.skip(site.node, "its weight is in floating point already")
                continue
            stored = read(edit, site.weight)
            if stored is None or site.kind.name != "linear" or site.id in self.exclude:
                if "float" in self.kernels:
                    self._float(edit, facts, site)
                continue
            kernel, why = self._chosen(site, scheme, stored)
            if kernel is None:
                edit.skip(site.node, why)
            else:
                edit.spend(why, site.node)
                self._lower(edit, site, kernel, stored, rows)

    def _chosen(self, site: Site, scheme: Scheme, stored: QTensor) -> tuple[Kernel | None, str]:
        """The kernel, and the reason in words: `w8a8, 3.1 x float; fp8: takes …`."""
        found, refused = candidates(site, scheme, stored)
        found = [
            k for k in found if k.name in self.kernels and (not k.rounds or _plain(site, scheme))
        ]
        words = [f"{name}: {reason}" for name, reason in refused.items()]
        if not found:
            return None, "; ".join([f"no kernel for {scheme}", *words])
        dtype = site.node.meta["val"].dtype
        measured: Mapping[str, float] = {}
        if len(found) > 1:
            shape = tuple(stored.data.shape)
            measured = times(found, scheme, shape, dtype, lambda k: prepared(k, stored, site))
        best = min(found, key=lambda k: measured.get(k.name, 0.0))
        ratio = measured["float"] / measured[best.name] if "float" in measured else 1.0
        first = (
            best.name
            if best.name == "float" or not measured
            else f"{best.name}, {ratio:.1f} x float"
        )
        return best, "; ".join([first, *words])

    def _lower(self, edit: Edit, site: Site, kernel: Kernel, stored: QTensor, rows: Rows) -> None:
        node, stem = site.node, site.id.rpartition("/")[0] or site.id
        dtype = node.meta["val"].dtype
        weight = prepared(kernel, stored, site)
        values = dict(weight.tensors)
        if kernel.name == "float":
            values["weight"] = values["weight"].to(dtype)
        params = {k: edit.new_param(f"{stem}.{k}", v, like=node) for k, v in values.items()}

        def call(target: Any, *args: Any) -> fx.Node:
            return edit.call(target, *args, like=node, replaces=[node])

        new = kernel.compute(
            call, site.x, lambda fp8: rows.of(site, fp8), params, weight, site.bias, dtype
        )
        edit.replace(node, new)

    def _float(self, edit: Edit, facts: Facts, site: Site) -> None:
        """Numbers in the place of codes."""
        other = site.kind.name != "linear"
        why = f"float; no low-precision kernel for a {site.kind.name}" if other else "float"
        edit.spend(why, site.node)
        value = facts.value(site.weight)
        assert value is not None
        value = value.to(site.weight.meta["val"].dtype).contiguous()
        stem = site.id.rpartition("/")[0] or site.id
        param = edit.new_param(f"{stem}.weight", value, like=site.node)
        edit.rewire(site.node, site.kind.weight, param)


def _plain(site: Site, scheme: Scheme) -> bool:
    """Whether the site's input is rounded per token, or with one scale, as its scheme says, and not
    with scales that a run computes otherwise (CrossQuant)."""
    x, (_, _, zero) = site.x, unrounded(site)
    if x is None or x.target is not qc.fake_quantize.default or zero is not None:
        return False
    return x.args[1] == str(scheme.activation)


class Rows:
    """Rounded inputs, each made once."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._known: dict[tuple[fx.Node, fx.Node | None, bool], tuple[fx.Node, fx.Node]] = {}
        self._factors: dict[int, fx.Node | None] = {}

    def of(self, site: Site, fp8: bool) -> tuple[fx.Node, fx.Node]:
        """Codes and scales of the site's input as its `fake_quantize` rounds it."""
        source, scale, _ = unrounded(site)
        key = (source, scale, fp8)
        if key not in self._known:
            pair = self._round(site.node, source, scale, fp8)
            first, second = (
                self._edit.call(operator.getitem, pair, i, like=site.node) for i in (0, 1)
            )
            self._known[key] = first, second
        return self._known[key]

    def _round(self, like: fx.Node, source: fx.Node, scale: object, fp8: bool) -> fx.Node:
        ops, call = torch.ops.qc_triton, self._edit.call
        alone = all(u.target is qc.fake_quantize.default for u in source.users)
        if source.target is qc.hadamard.default and len(source.args) == 1 and alone:
            x = source.args[0]
            if factor := self._hadamard(int(x.meta["val"].shape[-1]), like):
                return call(ops.turn_rows.default, x, factor, scale, fp8, like=like)
        return call(ops.round_rows.default, source, scale, fp8, like=like)

    def _hadamard(self, n: int, like: fx.Node) -> fx.Node | None:
        if n not in self._factors:
            from qcompiler.backends.triton.hadamard import factor

            found = factor(n)
            self._factors[n] = (
                None
                if isinstance(found, str)
                else self._edit.new_param(f"hadamard{n}", found, like=like)
            )
        return self._factors[n]


def prepared(kernel: Kernel, stored: QTensor, site: Site) -> Weight:
    """The weight for the kernel; too little memory for it is an error that says how much."""
    try:
        return kernel.prepare(stored)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            raise BackendError(
                f"triton: packing the weight of {site.id} for {kernel.name} wants some "
                f"{12 * stored.data.numel():,} bytes, which this machine does not have free; "
                "compile on one that has"
            ) from error
        raise
