"""Facts about one program: what passes read, computed by the pipeline, never by a pass.

A table belongs to the program it was computed from; a changed program gets a new one, so that a
stale fact cannot exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.program import Program, node_id
from qcompiler.run import evaluate, param_value
from qcompiler.samples import Flat
from qcompiler.sites import sites

NEEDS = ("activations",)
"""Facts that a pass may ask for and that take a run over data."""


@dataclass(frozen=True)
class Range:
    """What calibration saw of one activation."""

    absmax: Tensor
    """float32 (channels,): largest magnitude per channel of the contracted axis."""
    low: float
    high: float
    samples: int
    """Vectors seen per channel."""

    def merge(self, other: Range) -> Range:
        """The range over both; observers merge, so that data can be streamed."""
        return Range(
            torch.maximum(self.absmax, other.absmax),
            min(self.low, other.low),
            max(self.high, other.high),
            self.samples + other.samples,
        )


@dataclass(frozen=True)
class Facts:
    """Facts about `program`."""

    program: Program
    activations: Mapping[str, Range] = field(default_factory=dict)
    """Site id → range of the site's input. Empty unless the pass needs `activations`."""
    synthetic: bool = False
    """Calibrated on random inputs, because the user gave no data."""

    def value(self, node: fx.Node) -> Tensor | None:
        """Value (float64) of an expression of parameters, or None if it depends on an input."""
        return param_value(self.program, self.program.by_id[node_id(node)])

    def activation(self, site_id: str) -> Range:
        """Range of the input of a site."""
        if site_id not in self.activations:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.activations[site_id]


def measure(
    program: Program, data: Iterable[Flat], progress: Callable[[int], None] | None = None
) -> Mapping[str, Range]:
    """One pass over `data`: the range of every site's input. One batch is alive at a time."""
    readers: dict[fx.Node, list[tuple[str, int]]] = {}
    for site in sites(program.graph.nodes):
        if site.x is not None:
            readers.setdefault(site.x, []).append((site.id, site.kind.channel))
    found: dict[str, Range] = {}

    def watch(node: fx.Node, value: object) -> None:
        if node in readers and isinstance(value, Tensor):
            for id, axis in readers[node]:
                new = _range(value, axis, id)
                found[id] = found[id].merge(new) if id in found else new

    count = 0
    for count, inputs in enumerate(data, 1):
        evaluate(program, inputs, watch)
        if progress is not None:
            progress(count)
    if count == 0:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    return found


def _range(x: Tensor, axis: int, id: str) -> Range:
    x = x.detach().float()
    low, high = (float(v) for v in x.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise BadInput(f"calibration meets NaN or infinite values at the input of {id}")
    others = [a for a in range(x.ndim) if a != axis % x.ndim]
    return Range(x.abs().amax(others), low, high, x.numel() // x.shape[axis])
