"""`LowerSites`: one operator of a target in the place of each site that its kernel serves.

    linear( fakequant(x), dequantize(q, s), b )   →   operator( x, *pack(q, s), b )

A kernel is then three things: a capability, an operator (a `torch.library.custom_op` and its fake),
and how it wants a weight packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from qcompiler.backend import Capability
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, QTensor, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites
from qcompiler.stored import read

ROUNDED_OTHERWISE = "its input is rounded otherwise than the plan says"


@dataclass(frozen=True, kw_only=True)
class LowerSites(Pass):
    """Serve what `capability` fits with `operator`; what has another shape is left, with why."""

    effect: ClassVar[Effect] = Effect.LOWER
    capability: ClassVar[Capability]
    operator: ClassVar[Callable[..., Any]]

    exclude: tuple[str, ...] = ()
    """Ids of sites to leave to the reference."""
    optional: bool = True

    @abstractmethod
    def pack(self, weight: QTensor) -> dict[str, Tensor]:
        """A weight (outputs, inputs · taps) as the operator takes it: parameters by name."""

    def arguments(self, site: Site, packed: list[fx.Node]) -> tuple[Argument, ...]:
        """What the operator is called with; `packed` are the parameters of `pack`."""
        return (unrounded(site)[0], *packed, site.bias)

    def tolerance(self, facts: Facts) -> float:
        return self.capability.tolerance

    def run(self, edit: Edit, facts: Facts) -> None:
        for site in sites(edit.nodes):
            scheme = edit.plan.get(site.id)
            if scheme is None or site.id in self.exclude:
                continue
            found = stored(edit, site.weight)
            if found is None or not self.capability.fits(site, scheme):
                continue
            if not as_planned(site, scheme):
                edit.skip(site.node, ROUNDED_OTHERWISE)
                continue
            if why := self.capability.refuses_shape(site):
                edit.skip(site.node, f"{self.capability.kernel} {why}")
                continue
            edit.spend(self.capability.kernel, site.node)
            stem = site.id.rpartition("/")[0] or site.id
            packed = [
                edit.new_param(f"{stem}.{name}", value, like=site.node)
                for name, value in self.pack(found).items()
            ]
            new = edit.call(
                self.operator, *self.arguments(site, packed), like=site.node, replaces=[site.node]
            )
            edit.replace(site.node, new)


def unrounded(site: Site) -> tuple[fx.Node | None, Argument, Argument]:
    """What a site reads before it is rounded, and its static scale and zero point (or None)."""
    x = site.x
    if x is None or x.target is not torch.ops.qc.fake_quantize.default:
        return x, None, None
    source, _, scale, zero = (*x.args, None, None)[:4]
    assert isinstance(source, fx.Node)
    return source, scale, zero


def as_planned(site: Site, scheme: Scheme) -> bool:
    """Whether the site's input is rounded in the graph as its scheme says, and not also otherwise:
    an operator that rounds takes the place of both."""
    x = site.x
    if x is None or x.target is not torch.ops.qc.fake_quantize.default:
        return scheme.activation is None
    return QFormat.parse(str(x.args[1])) == scheme.activation


def stored(edit: Edit, weight: fx.Node) -> QTensor | None:
    """The codes of a weight; those of a convolution's are shaped back from rows."""
    if weight.target is torch.ops.aten.reshape.default and isinstance(weight.args[0], fx.Node):
        weight = weight.args[0]
    return read(edit, weight)
