"""Rounding a program block by block: calibration data stream through it, as it is and rounded.

    x_k+1  = block_k(x_k)            as the float program computes
    x'_k+1 = block'_k(x'_k)          with the blocks before, and this one, rounded

A layer's statistics are those of x', so that it is rounded for the inputs that it will really get
(GPTQ, Frantar et al. 2023, section 4), stage by stage: what reads the same input together. In
memory are one block's activations, weights and Gram matrices, and what goes on to the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.blocks import Block, Runner, Values, blocks, compute
from qcompiler.errors import BadInput
from qcompiler.formats import QFormat, QTensor
from qcompiler.keep import Keep
from qcompiler.observers import Gram, Range, Sample, Statistic
from qcompiler.padding import Padding, rows
from qcompiler.program import Program, node_id
from qcompiler.rounding.base import Inputs, Layer, Rounding, output_error
from qcompiler.rounding.nearest import Nearest
from qcompiler.samples import Flat
from qcompiler.sites import Site
from qcompiler.state import Solved, State, read_state, write_state
from qcompiler.vectors import vectors

STATISTICS: Mapping[str, type[Statistic]] = {"gram": Gram, "range": Range, "sample": Sample}

Tick = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Walk:
    """One way through a program."""

    program: Program
    """With activations rounded as the plan says, and weights as they are."""
    batches: Sequence[Flat]
    rounding: Rounding
    added: frozenset[str] = frozenset()
    """Ids of the nodes that the float program does not have; it rounds nothing there."""
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """Site id → E (∂L/∂W)² of its weight, by rows."""
    keep: Keep | None = None
    """Where a run that is killed goes on from."""
    tick: Tick = lambda done, total: None
    padding: Padding | None = None
    """Of the float program, where rounding has spelled out attention."""

    def run(self) -> dict[str, Solved]:
        """Every site whose weight the plan rounds, by id."""
        todo = blocks(self.program)
        state = self._start(todo)
        for block in todo[state.done :]:
            _Step(self, todo, block, state).run()
            state.done += 1
            if self.keep is not None and state.done < len(todo):
                write_state(self.keep, state)
            self.tick(100 * state.done, 100 * len(todo))
        return state.solved

    def format(self, site: Site) -> QFormat | None:
        """The format that a site's weight is rounded to; None if it stays as it is."""
        scheme = self.program.plan.get(site.id)
        if scheme is None or scheme.weight is None or self.program.param_of(site.weight) is None:
            return None
        return scheme.weight.by_rows if site.kind.name == "conv" else scheme.weight

    def exactly(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
        """A node as the float program computes it."""
        if node.target is torch.ops.qc.fake_quantize.default and node_id(node) in self.added:
            return args[0]
        return compute(node, args, kwargs)

    @cached_property
    def counts(self) -> list[Tensor | None]:
        """Which tokens of each batch count; see `padding.py`."""
        padding = self.padding or Padding(self.program)
        return [padding.counts(batch) for batch in self.batches]

    @property
    def exact(self) -> bool:
        """Whether the float program's values are needed too."""
        return "block" in self.rounding.needed()

    def _start(self, todo: Sequence[Block]) -> State:
        ports = self.program.inputs
        given: list[Values] = [dict(zip(ports, b, strict=True)) for b in self.batches]
        if self.keep is not None:
            kept = read_state(self.keep, self.program, given)
            if kept is not None:
                return kept
        return State(0, {}, [dict(v) for v in given] if self.exact else [], given)


class _Step:
    """One block on its way: what `Rounding.block` sees as a `Block`."""

    def __init__(self, walk: Walk, todo: Sequence[Block], block: Block, state: State) -> None:
        self._walk, self._todo, self._block, self._state = walk, todo, block, state
        self._runner = Runner(walk.program, block)
        self._sites = {s.node: s for s in block.sites}
        self._kinds = {n: STATISTICS[n] for n in walk.rounding.needed() if n in STATISTICS}
        self.layers: dict[str, Layer] = {}

    def run(self) -> None:
        """Round the block's weights, and take the values of all batches behind it."""
        state = self._state
        for i, values in enumerate(state.exact):
            state.exact[i] = self._runner.run(values, self._walk.exactly)
        for stage in [self._block.sites] if self._walk.exact else self._block.stages():
            self._round(stage)
        if self._block is not self._todo[-1]:
            for i, values in enumerate(state.rounded):
                state.rounded[i] = self._run(values)

    # --- rounding ------------------------------------------------------------------------------

    def _round(self, stage: Sequence[Site]) -> None:
        """Round the weights of `stage`, for what the weights before make of the inputs."""
        solved, walk = self._state.solved, self._walk
        formats = {s: f for s in stage if (f := walk.format(s)) is not None}
        fresh = {s: f for s, f in formats.items() if self._same(s, f) is None}
        seen = self._observe(list(fresh)) if fresh else {}
        self.layers = {s.id: self._layer(s, f, seen.get(s.id, {})) for s, f in fresh.items()}
        for site in fresh:
            # An expert that no data reached, and an embedding, have nothing to be rounded for.
            if walk.rounding.needed() and not seen.get(site.id) and (self._kinds or site.x is None):
                solved[site.id] = Solved(Nearest().layer(self.layers.pop(site.id)))
        if self.layers:
            for id, q in walk.rounding.block(self).items():
                solved[id] = _account(self.layers[id], q)
        for site, fmt in formats.items():
            if site.id not in solved and (same := self._same(site, fmt)) is not None:
                solved[site.id] = same

    def _same(self, site: Site, fmt: QFormat) -> Solved | None:
        """What another site with the same weight and format came to."""
        for id, solved in self._state.solved.items():
            other = self._walk.program.by_id[id]
            if site.weight in other.all_input_nodes and solved.weight.format == fmt:
                return solved
        return None

    def _layer(self, site: Site, fmt: QFormat, seen: Mapping[str, Statistic]) -> Layer:
        weight = self._runner.weight(site).float()
        rows = weight.reshape(weight.shape[0], -1)
        range_, gram, sample = (seen.get(k) for k in ("range", "gram", "sample"))
        assert range_ is None or isinstance(range_, Range)
        assert gram is None or isinstance(gram, Gram)
        rows_seen = sample.rows if isinstance(sample, Sample) else None
        inputs = Inputs(range_, gram, rows_seen, self._walk.fisher.get(site.id))
        return Layer(site.id, rows, fmt, inputs)

    def _observe(self, stage: Sequence[Site]) -> dict[str, dict[str, Statistic]]:
        """Site id → statistics of its inputs, over all batches of the rounded program."""
        kinds = self._kinds
        wanted = {s.node: s for s in stage if s.x is not None}
        found: dict[str, dict[str, Statistic]] = {}
        if not kinds or not wanted:
            return found
        # Linears that read one value (q, k and v) have one Gram matrix.
        first: dict[tuple[fx.Node | None, str], Site] = {}
        shared = {
            s.id: first.setdefault((s.x, s.kind.name if s.kind.name == "linear" else s.id), s).id
            for s in wanted.values()
        }

        def look(site: Site, x: Tensor, counts: Tensor | None, number: int) -> None:
            if shared.get(site.id) != site.id or not x.numel():
                return
            seen = vectors(site, x if site.kind.name == "conv" else rows(x, counts))
            if not seen.numel():
                return
            if not bool(seen.isfinite().all()):
                raise BadInput(
                    f"calibration meets NaN or infinite values at the input of {site.id}, in data "
                    f"batch {number}"
                )
            mine = found.setdefault(site.id, {})
            for name, kind in kinds.items():
                new = kind.of(seen)
                mine[name] = mine[name].merge(new) if name in mine else new

        last = next(n for n in reversed(self._block.nodes) if n in wanted)
        pairs = zip(self._state.rounded, self._walk.counts, strict=True)
        for number, (values, counts) in enumerate(pairs):
            self._run(values, look=partial(look, counts=counts, number=number), until=last)
        return {id: found[same] for id, same in shared.items() if same in found}

    def _run(
        self,
        values: Values,
        weights: Mapping[str, Tensor] | None = None,
        look: Callable[[Site, Tensor], None] | None = None,
        until: fx.Node | None = None,
    ) -> Values:
        """The block with `weights` (by rows), and with those solved so far."""

        def call(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
            site = self._sites.get(node)
            if site is None:
                return compute(node, args, kwargs)
            if look is not None and site.kind.x is not None:
                look(site, args[site.kind.x])
            if node is until:
                return None  # nobody reads it
            weight = self._weight(site, weights)
            if weight is None:
                return compute(node, args, kwargs)
            new, old = list(args), args[site.kind.weight]
            new[site.kind.weight] = weight.reshape(old.shape).to(old.dtype)
            return compute(node, tuple(new), kwargs)

        with torch.set_grad_enabled(weights is not None):
            return self._runner.run(values, call, until)

    def _weight(self, site: Site, weights: Mapping[str, Tensor] | None) -> Tensor | None:
        if weights is not None and site.id in weights:
            return weights[site.id]
        solved = self._state.solved.get(site.id)
        return None if solved is None else solved.weight.dequantize()

    # --- what a rounding sees ------------------------------------------------------------------

    @property
    def batches(self) -> int:
        return len(self._state.rounded)

    def wanted(self, batch: int) -> tuple[Tensor, ...]:
        """What the float program computes for the block's outputs."""
        return self._outputs(self._state.exact[batch])

    def found(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the block computes with these `weights` on what the rounded program hands it."""
        return self._outputs(self._run(self._state.rounded[batch], weights))

    def counted(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is no padding of `outputs`."""
        return tuple(rows(y, self._walk.counts[batch]) for y in outputs)

    def predictions(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the rest of the float program makes of `outputs`."""
        values = self._state.exact[batch] | dict(zip(self._block.tensors, outputs, strict=True))
        with torch.enable_grad():
            for block in self._todo[self._block.number + 1 :]:
                values = Runner(self._walk.program, block).run(values, self._walk.exactly)
        named = self._walk.program.graph.output_node().all_input_nodes
        found = (values[n] for n in named if n in values)
        return tuple(v for v in found if isinstance(v, Tensor) and v.is_floating_point())

    def tick(self, done: int, total: int) -> None:
        """Say how far the optimization of this block is."""
        here = 100 * self._state.done + 100 * done // max(total, 1)
        self._walk.tick(here, 100 * len(self._todo))

    def _outputs(self, values: Values) -> tuple[Tensor, ...]:
        return tuple(values[n] for n in self._block.tensors)  # type: ignore[misc]


def _account(layer: Layer, q: QTensor) -> Solved:
    seen = layer.inputs.gram or layer.inputs.range
    error = None
    if layer.inputs.gram is not None:
        whole = output_error(layer, torch.zeros_like(layer.weight))
        error = float(output_error(layer, q.dequantize()) / whole) if whole > 0 else 0.0
    return Solved(q, 0 if seen is None else seen.count, error, tuple(layer.notes))
