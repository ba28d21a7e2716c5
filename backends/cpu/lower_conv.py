"""Put the generated convolution in the place of the reference's operators.

conv( fakequant(x), dequantize(q, s), b )   →   qc_cpu::conv(x, pack(q, s), b)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from qcompiler.backends.cpu.choose_conv import CLAIMS, NAME, prepare, refuses
from qcompiler.backends.cpu.lower import put_in, static_of
from qcompiler.backends.cpu.race_conv import seconds
from qcompiler.backends.cpu.window import Window
from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.formats import Scheme
from qcompiler.history import Effect
from qcompiler.lowering import stored
from qcompiler.passbase import Pass
from qcompiler.sites import Site, sites
from qcompiler.vectors import window_of


@dataclass(frozen=True, kw_only=True)
class LowerConv(Pass):
    """Serve the convolutions on which the generated kernel is the faster one."""

    name: ClassVar[str] = "cpu_conv"
    effect: ClassVar[Effect] = Effect.LOWER

    exclude: tuple[str, ...] = ()
    forced: bool = False
    """Wherever it fits, not only where it pays."""

    def tolerance(self, facts: Facts) -> float:
        return CLAIMS[0].tolerance

    def run(self, edit: Edit, facts: Facts) -> None:
        for site in sites(edit.nodes):
            scheme = edit.plan.get(site.id)
            if scheme is None or site.id in self.exclude or not self._fits(site, scheme):
                continue
            weight, static = stored(edit, site.weight), static_of(edit, site, scheme)
            if weight is None or static is None or scheme.activation is None:
                continue
            at = window_of(site)
            if weight.zero is not None and weight.zero.is_floating_point() and at.groups > 1:
                edit.skip(site.node, "zero points between codes, for each channel by itself")
                continue
            if not self._pays(site, scheme):
                continue
            edit.spend(self._reason(site, scheme), site.node)
            channels = at.groups * int(site.weight.meta["val"].shape[1])
            window = Window.of(*at[:4])
            bias = None if site.bias is None else facts.value(site.bias)
            make = partial(prepare, weight, channels, bias, scheme.activation, static, window)
            put_in(edit, site, weight, make)

    def _fits(self, site: Site, scheme: Scheme) -> bool:
        return any(c.fits(site, scheme) for c in CLAIMS) and refuses(site, scheme) is None

    def _pays(self, site: Site, scheme: Scheme) -> bool:
        times = {} if self.forced else seconds(site, scheme)
        return self.forced or times[NAME] < times["float"]

    def _reason(self, site: Site, scheme: Scheme) -> str:
        if self.forced:
            return NAME
        times = seconds(site, scheme)
        return f"{NAME}, {times['float'] / times[NAME]:.1f} x float"
