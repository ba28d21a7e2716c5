"""What is compared: the sites of a program, each with the schemes that it might be given.

A column is a site with one of its schemes; every metric yields a loss for each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.formats import QFormat, Scheme
from qcompiler.objective import OBJECTIVES, Objective, fitting
from qcompiler.ops import fake_quantize
from qcompiler.padding import Padding
from qcompiler.program import Program
from qcompiler.run import param_value
from qcompiler.samples import Flat
from qcompiler.sites import Site, site_of
from qcompiler.trial import rounded

Column = tuple[str, str]
"""(site id, text of a scheme)"""
HELD = 2**30
"""Bytes of rounded weights that are held from batch to batch."""


@dataclass(frozen=True, eq=False)
class Study:
    """Sites of `program` and their candidates."""

    program: Program
    candidates: Mapping[str, tuple[Scheme, ...]]
    """Site id → what it might be given. Schemes of neither a weight nor an activation are float."""
    loss: str = ""
    """`kl_top` or `mse`; empty: what fits the program (see `objective.py`)."""
    _held: dict[tuple[str, QFormat], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for id in self.candidates:
            if self.program.param_of(self.sites[id].weight) is None and (
                param_value(self.program, self.sites[id].weight) is None
            ):
                raise BadInput(f"the weight of {id} is computed from the input; it has no format")

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The sites that have candidates, in the graph's order."""
        found = {}
        for node in self.program.graph.nodes:
            site = site_of(node)
            if site is not None and site.id in self.candidates:
                found[site.id] = site
        for id in self.candidates:
            if id not in found:
                self.program.node(id)  # the nearest id, where there is no such node
                raise BadInput(f"{id} has no weight that could be rounded; see `inspect`")
        return found

    @cached_property
    def nodes(self) -> Mapping[fx.Node, Site]:
        return {s.node: s for s in self.sites.values()}

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return tuple((id, str(s)) for id in self.sites for s in self.candidates[id])

    @cached_property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss or fitting(self.program)]

    @cached_property
    def padding(self) -> Padding:
        return Padding(self.program)

    def compare(self, batch: Flat, wanted: tuple[object, ...], found: tuple[object, ...]) -> Tensor:
        """The loss of what is no padding of outputs for `batch`."""
        return self.objective(*(self.padding.data(batch, y) for y in (wanted, found)))

    @property
    def is_words(self) -> bool:
        """Whether the loss is that of a distribution over words."""
        return (self.loss or fitting(self.program)) == "kl_top"

    def weight(self, site: Site) -> Tensor:
        """The weight of a site as the program has it, float32."""
        name = self.program.param_of(site.weight)
        if name is not None:
            return self.program.params[name].float()
        value = param_value(self.program, site.weight)
        assert value is not None
        return value.float()

    def rounded(self, site: Site, fmt: QFormat | None) -> Tensor:
        """Its weight as `fmt` stores it, rounded to nearest, float32."""
        if fmt is None:
            return self.weight(site)
        key = (site.id, fmt)
        if key in self._held:
            return self._held[key]
        found = rounded(self.weight(site), fmt)
        if sum(t.numel() * 4 for t in self._held.values()) + found.numel() * 4 < HELD:
            self._held[key] = found
        return found

    def change(self, site: Site, fmt: QFormat | None) -> Tensor:
        """What rounding adds to its weight, float32."""
        return self.rounded(site, fmt) - self.weight(site)


def rounded_input(x: Tensor, fmt: QFormat | None) -> Tensor:
    """An activation as `fmt` computes with it; static formats with this batch's own range."""
    return x if fmt is None else fake_quantize(x, str(fmt))
