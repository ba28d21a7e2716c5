"""Facts about one program: what passes read, computed by the pipeline, never by a pass.

A table belongs to the program it was computed from; a changed program gets a new one, so that a
stale fact cannot exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.program import Program, node_id
from qcompiler.run import evaluate, param_value
from qcompiler.samples import Flat
from qcompiler.sites import sites

NEEDS = ("activations", "samples", "batches")
"""Facts that a pass may ask for and that take data: ranges, vectors, whole inputs."""
SAMPLES = 512
"""Vectors that are kept of each site's input."""

Tick = Callable[[int, int], None]
"""(done, of how many)"""


@dataclass(frozen=True)
class Range:
    """What calibration saw of one activation, float32 (channels,), along the contracted axis."""

    minimum: Tensor
    maximum: Tensor
    absmean: Tensor
    """Mean magnitude per channel."""
    count: int
    """Vectors seen."""

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def low(self) -> float:
        return float(self.minimum.min())

    @property
    def high(self) -> float:
        return float(self.maximum.max())

    def merge(self, other: Range) -> Range:
        """The range over both; observers merge, so that data can be streamed."""
        total = self.count + other.count
        return Range(
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            (self.absmean * self.count + other.absmean * other.count) / total,
            total,
        )


@dataclass(frozen=True)
class Facts:
    """Facts about `program`."""

    program: Program
    activations: Mapping[str, Range] = field(default_factory=dict)
    """Site id → range of the site's input. Empty unless the pass needs `activations`."""
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    """Site id → some of its input vectors, float32 (vectors, channels)."""
    batches: tuple[Flat, ...] = ()
    """The calibration inputs themselves."""
    synthetic: bool = False
    """Calibrated on random inputs, because the user gave no data."""
    tick: Tick = lambda done, total: None
    """Long work inside a pass tells here how far it is."""

    def value(self, node: fx.Node) -> Tensor | None:
        """Value (float64) of an expression of parameters, or None if it depends on an input."""
        return param_value(self.program, self.program.by_id[node_id(node)])

    def activation(self, site_id: str) -> Range:
        """Range of the input of a site."""
        if site_id not in self.activations:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.activations[site_id]

    def sample(self, site_id: str) -> Tensor:
        """Input vectors of a site, float32 (vectors, channels)."""
        if site_id not in self.samples:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.samples[site_id]


def measure(
    program: Program,
    data: Iterable[Flat],
    needs: Collection[str] = ("activations",),
    progress: Callable[[int], None] | None = None,
) -> Facts:
    """One pass over `data` for all facts that are needed. One batch is alive at a time."""
    readers: dict[fx.Node, list[tuple[str, int]]] = {}
    for site in sites(program.graph.nodes):
        if site.x is not None:
            readers.setdefault(site.x, []).append((site.id, site.kind.channel))
    found: dict[str, Range] = {}
    kept: dict[str, _Sample] = {}
    batches: list[Flat] = []

    def watch(node: fx.Node, value: object) -> None:
        if node in readers and isinstance(value, Tensor):
            for id, axis in readers[node]:
                rows = value.detach().float().movedim(axis, -1).flatten(0, -2)
                if "activations" in needs and rows.numel():
                    new = _range(rows, id)
                    found[id] = found[id].merge(new) if id in found else new
                if "samples" in needs:
                    kept[id] = kept[id].merge(rows) if id in kept else _Sample(rows, len(rows))

    count = 0
    for count, inputs in enumerate(data, 1):
        if "batches" in needs:
            batches.append(inputs)
        if {"activations", "samples"} & set(needs):
            evaluate(program, inputs, watch)
        if progress is not None:
            progress(count)
    if count == 0:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    samples = {id: _some(sample.rows, SAMPLES) for id, sample in kept.items()}
    return Facts(program, found, samples, tuple(batches))


@dataclass(frozen=True)
class _Sample:
    """Some of the vectors seen so far, each batch with its share."""

    rows: Tensor
    seen: int

    def merge(self, rows: Tensor) -> _Sample:
        seen = self.seen + len(rows)
        share = min(SAMPLES, seen) * self.seen // seen
        new = _some(rows, min(SAMPLES, seen) - share)
        return _Sample(torch.cat([_some(self.rows, share), new]), seen)


def _range(rows: Tensor, id: str) -> Range:
    minimum, maximum = rows.aminmax(dim=0)
    if not bool(minimum.isfinite().all() and maximum.isfinite().all()):
        raise BadInput(f"calibration meets NaN or infinite values at the input of {id}")
    return Range(minimum, maximum, rows.abs().mean(0), rows.shape[0])


def _some(rows: Tensor, count: int) -> Tensor:
    """`count` rows spread evenly over all of them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).long()]
