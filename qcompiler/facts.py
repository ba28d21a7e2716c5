"""Facts about one program: what passes read, computed by the pipeline, never by a pass.

A table belongs to the program it was computed from; a changed program gets a new one, so that a
stale fact cannot exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, fx

from qcompiler.attention import attentions
from qcompiler.errors import BadInput
from qcompiler.fisher import fisher
from qcompiler.formats import Scheme
from qcompiler.keep import Keep
from qcompiler.observers import Histogram, Range, Sample
from qcompiler.padding import Padding, rows
from qcompiler.program import Program, node_id
from qcompiler.rounding.base import Rounding
from qcompiler.run import evaluate, param_value
from qcompiler.samples import Flat
from qcompiler.seen import STATISTICS, Seen
from qcompiler.sites import Edge, sites
from qcompiler.state import Solved
from qcompiler.sums import sums
from qcompiler.tagged import Tagged, untag, with_tag
from qcompiler.walk import Walk

NEEDS = ("activations", "samples", "histograms", "batches", "fisher")
"""Facts that a pass may ask for and that take data: ranges, vectors, how often each number came,
whole inputs, how much the outputs feel a change of a weight."""
EVERY = 5.0
"""Seconds between two times at which what was seen so far is written down."""

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
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Site id → E (∂L/∂W)² of its weight by rows (see `fisher.py`)."""
    by_tag: Mapping[str, Mapping[str, Range]] = field(default_factory=dict)
    """Tag → site id → range of the site's input with that tag, the tag of untagged batches being
    empty. Empty unless batches are tagged and the pass needs `activations`."""
    synthetic: bool = False
    """Calibrated on random inputs, because the user gave no data."""
    tick: Tick = lambda done, total: None
    """Long work inside a pass tells here how far it is."""
    keep: Keep | None = None
    """Where long work leaves what it has come to, to go on from there after a kill."""
    _solved: dict[tuple[str, str], Mapping[str, Solved]] = field(default_factory=dict)

    def value(self, node: fx.Node) -> Tensor | None:
        """Value (float64) of an expression of parameters, or None if it depends on an input."""
        return param_value(self.program, self.program.by_id[node_id(node)])

    def activation(self, site_id: str) -> Range:
        """Range of the input of a site."""
        if site_id not in self.activations:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.activations[site_id]

    def histogram(self, site_id: str) -> Histogram:
        """How often each number came at the input of a site."""
        if site_id not in self.histograms:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.histograms[site_id]

    def sample(self, site_id: str) -> Tensor:
        """Input vectors of a site, float32 (vectors, channels)."""
        if site_id not in self.samples:
            raise BadInput(f"no calibration data reached {site_id}; is it computed at all?")
        return self.samples[site_id].rows

    def solve(self, rounding: Rounding, rounded: Program) -> Mapping[str, Solved]:
        """Site id → its weight rounded as the plan says, for every site with a weight format.

        `rounded` is the program with rounded activations: what reaches a weight in it is what the
        weight is rounded for. A pass that is run again, with less fuel, is told the same again.
        """
        key = (str(rounding), str(dict(rounded.plan)))
        if key not in self._solved:
            added = set(rounded.by_id) - set(self.program.by_id)
            self._solved[key] = Walk(
                rounded,
                self.batches if rounding.needed() else (),
                rounding,
                frozenset(added),
                self.fisher,
                None if self.keep is None else self.keep.under(*key),
                self.tick,
                Padding(self.program),
            ).run()
        return self._solved[key]


def measure(
    program: Program,
    data: Iterable[Flat | Tagged[Flat]],
    needs: Collection[str] = ("activations",),
    progress: Callable[[int], None] | None = None,
    keep: Keep | None = None,
) -> Facts:
    """One pass over `data` for all facts that are needed. One batch is alive at a time.

    With `keep` (a folder for this program and these data), a run that was killed goes on behind the
    last batch that was written down.
    """
    kinds = {need: kind for need, kind in STATISTICS.items() if need in needs}
    seen = Seen(kinds, keep)
    readers: dict[fx.Node, list[Edge]] = {}
    for edge in _edges(program):
        readers.setdefault(edge.x, []).append(edge)
    padding = Padding(program)
    batches: list[Flat] = []
    tags: set[str] = set()

    def look(node: fx.Node, value: object, tag: str, counts: Tensor | None) -> None:
        if node not in readers or not isinstance(value, Tensor):
            return
        for edge in readers[node]:
            last = edge.channel in (-1, value.ndim - 1)
            seen_of = rows(value, counts) if last else value
            vectors = seen_of.detach().float().movedim(edge.channel, -1).flatten(0, -2)
            if not vectors.numel():
                continue
            if not bool(vectors.isfinite().all()):
                raise BadInput(
                    f"calibration meets NaN or infinite values at the input of {edge.name}, in "
                    f"data batch {count - 1}" + (f" {with_tag(tag)}" if tag else "")
                )
            seen.add(edge.name, tag, vectors)

    count, written = 0, time.monotonic()
    for count, batch in enumerate(data, 1):
        tag, inputs = untag(batch)
        tags.add(tag)
        if {"batches", "fisher"} & set(needs):
            batches.append(inputs)
        if kinds and count > seen.batches:
            counts = padding.counts(inputs)
            evaluate(program, inputs, partial(look, tag=tag, counts=counts))
            seen.batches = count
            if time.monotonic() - written > EVERY:
                seen.write()
                written = time.monotonic()
        if progress is not None:
            progress(count)
    if count == 0:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    if kinds:
        seen.write()
    felt = fisher(program, batches, progress) if "fisher" in needs else {}
    by_tag = seen.ranges() if tags != {""} else {}
    return Facts(program, **seen.merged(), batches=tuple(batches), fisher=felt, by_tag=by_tag)  # type: ignore[arg-type]


def _edges(program: Program) -> list[Edge]:
    """What is measured: inputs of all sites, and of attention and sums what the plan rounds."""
    found = [e for s in sites(program.graph.nodes) if (e := s.input) is not None]
    for attention in attentions(program.graph.nodes):
        parts = program.plan.get(attention.id, Scheme()).attention
        found += [attention.edge(part) for part in parts if part != "probabilities"]
    for added in sums(program.graph.nodes):
        found += added.edges if added.id in program.plan else ()
    return found
