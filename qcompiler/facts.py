"""Facts about one program: what passes read, computed by the pipeline, never by a pass.

A table belongs to the program it was computed from; a changed program gets a new one, so that a
stale fact cannot exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.observers import Histogram, Range, Sample, Statistic
from qcompiler.program import Program, node_id
from qcompiler.run import evaluate, param_value
from qcompiler.samples import Flat
from qcompiler.sites import sites

NEEDS = ("activations", "samples", "histograms", "batches")
"""Facts that a pass may ask for and that take data: ranges, vectors, how often each number came,
whole inputs."""
STATISTICS: Mapping[str, type[Statistic]] = {
    "activations": Range,
    "samples": Sample,
    "histograms": Histogram,
}

Tick = Callable[[int, int], None]
"""(done, of how many)"""


@dataclass(frozen=True)
class Facts:
    """Facts about `program`."""

    program: Program
    activations: Mapping[str, Range] = field(default_factory=dict)
    """Site id → range of the site's input. Empty unless the pass needs `activations`."""
    samples: Mapping[str, Sample] = field(default_factory=dict)
    """Site id → some of its input vectors."""
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    """Site id → how often each number came."""
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
        return self.samples[site_id].rows


def measure(
    program: Program,
    data: Iterable[Flat],
    needs: Collection[str] = ("activations",),
    progress: Callable[[int], None] | None = None,
) -> Facts:
    """One pass over `data` for all facts that are needed. One batch is alive at a time."""
    kinds = {need: kind for need, kind in STATISTICS.items() if need in needs}
    readers: dict[fx.Node, list[tuple[str, int]]] = {}
    for site in sites(program.graph.nodes):
        if site.x is not None:
            readers.setdefault(site.x, []).append((site.id, site.kind.channel))
    found: dict[str, dict[str, Statistic]] = {need: {} for need in kinds}
    batches: list[Flat] = []

    def watch(node: fx.Node, value: object) -> None:
        if node not in readers or not isinstance(value, Tensor):
            return
        for id, axis in readers[node]:
            rows = value.detach().float().movedim(axis, -1).flatten(0, -2)
            if not rows.numel():
                continue
            if not bool(rows.isfinite().all()):
                raise BadInput(f"calibration meets NaN or infinite values at the input of {id}")
            for need, kind in kinds.items():
                new, old = kind.of(rows), found[need].get(id)
                found[need][id] = new if old is None else old.merge(new)

    count = 0
    for count, inputs in enumerate(data, 1):
        if "batches" in needs:
            batches.append(inputs)
        if kinds:
            evaluate(program, inputs, watch)
        if progress is not None:
            progress(count)
    if count == 0:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    return Facts(program, **found, batches=tuple(batches))  # type: ignore[arg-type]
