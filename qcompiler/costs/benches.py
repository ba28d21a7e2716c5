"""The measuring itself: benches of each site's copies, and races between them.

Copies of a site are timed in turn with the float ones, and the float ones of all sites in turn with
the whole program, so that what the machine does besides cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, fx

from qcompiler.backend import Artifact, Backend
from qcompiler.capture import capture
from qcompiler.compiled import build as build_program
from qcompiler.costs.layers import Bench, Layer, build, copies, copies_of, input_of, random_input
from qcompiler.costs.workload import Phase, Workload
from qcompiler.errors import BackendError, BadInput
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.rounded import rounded_program
from qcompiler.run import evaluate
from qcompiler.sites import Site, sites
from qcompiler.timing import floors

FLOAT = Scheme()
NOTHING = 1e-9
"""Seconds that are left at least when the call is taken off."""
Run = Callable[[], object]
Shape = tuple[int, ...]


class Benches:
    """Sites of `program` as `backend` runs them under `workload`."""

    def __init__(self, backend: Backend, program: Program, workload: Workload) -> None:
        self._backend = backend
        self._program = program
        self._workload = workload
        self.sites = {s.id: s for s in sites(program.nodes)}
        self.layers = {id: Layer.of(s) for id, s in self.sites.items()}
        self._copies: dict[tuple[Layer, int], Program] = {}
        self._plain: dict[Layer, Bench] = {}

    def key(self, site: Site, phase: Phase) -> str:
        """What is equal for sites that are measured once for all."""
        shape = "x".join(map(str, self._shapes[phase][site.id]))
        return f"{self.layers[site.id]} on {shape}"

    def tokens(self, site: Site, phase: Phase) -> int:
        """Rows of the site's input; samples of a convolution's."""
        shape = self._shapes[phase][site.id]
        if site.kind.name == "conv":
            return shape[0]
        return torch.Size(shape if site.x is None else shape[:-1]).numel()

    def count(self, site: Site, scheme: Scheme) -> int:
        """Copies of a site with `scheme`."""
        out = int(site.weight.meta["val"].shape[0])
        outputs = self.tokens(site, "prefill") * out * 4
        return copies_of(site, self.layers[site.id], scheme, self._program, outputs)

    def race(self, phase: Phase) -> dict[str, float]:
        """Seconds in floating point: of the `program`, an empty `call`, each layer by its key."""
        inputs = self._workload.inputs(self._program, phase)
        runs: dict[str, Run] = {"program": partial(self._whole.run, inputs), "call": self._empty}
        layers = {self.key(s, phase): s for s in self.sites.values()}
        benches = {key: self._bench(site) for key, site in layers.items()}
        for key, bench in benches.items():
            runs[key] = partial(bench.run, self._input(layers[key], phase))
        found = floors(runs)
        for key, bench in benches.items():
            found[key] = max(0.0, found[key] - found["call"]) / bench.copies
        return found

    def compare(self, site: Site, scheme: Scheme) -> dict[Phase, float] | None:
        """Time of the site with `scheme` in units of that in floating point; None if the backend
        cannot build it."""
        bench = self._build(site, scheme)
        if bench is None:
            return None
        return {phase: self._compare(site, bench, phase) for phase in self._workload.phases}

    def together(self, chosen: Mapping[str, Scheme]) -> dict[Phase, float] | None:
        """Time of the program with `chosen` in units of that in floating point; None if the backend
        cannot build it."""
        data = [self._workload.inputs(self._program, "prefill")]
        try:
            rounded = build_program(rounded_program(self._program, chosen, data), self._backend)
        except (BackendError, BadInput):
            return None
        return {phase: self._race(rounded, phase) for phase in self._workload.phases}

    def _race(self, artifact: Artifact, phase: Phase) -> float:
        x = self._workload.inputs(self._program, phase)
        found = floors({"float": partial(self._whole.run, x), "own": partial(artifact.run, x)})
        return found["own"] / found["float"]

    def _compare(self, site: Site, bench: Bench, phase: Phase) -> float:
        plain, x = self._bench(site), self._input(site, phase)
        found = floors(
            {"float": partial(plain.run, x), "site": partial(bench.run, x), "call": self._empty}
        )
        site_time, float_time = (
            max(NOTHING, found[name] - found["call"]) / count
            for name, count in (("site", bench.copies), ("float", plain.copies))
        )
        return site_time / float_time

    def _bench(self, site: Site) -> Bench:
        """Copies of the site in floating point."""
        layer = self.layers[site.id]
        if layer not in self._plain:
            found = self._build(site, FLOAT)
            assert found is not None
            self._plain[layer] = found
        return self._plain[layer]

    def _build(self, site: Site, scheme: Scheme) -> Bench | None:
        layer, count = self.layers[site.id], self.count(site, scheme)
        x = self._input(site, "prefill")
        if (layer, count) not in self._copies:
            self._copies[layer, count] = copies(site, layer, count, x)
        return build(self._copies[layer, count], scheme, self._backend, x)

    def _input(self, site: Site, phase: Phase) -> Tensor:
        return random_input(site, self.layers[site.id], self._shapes[phase][site.id])

    @cached_property
    def _shapes(self) -> dict[Phase, dict[str, Shape]]:
        """Shape of each site's input, as a run has it."""
        return {phase: self._seen(phase) for phase in self._workload.phases}

    def _seen(self, phase: Phase) -> dict[str, Shape]:
        values: dict[fx.Node, Shape] = {}

        def look(node: fx.Node, value: object) -> None:
            if isinstance(value, Tensor):
                values[node] = tuple(value.shape)

        evaluate(self._program, self._workload.inputs(self._program, phase), look)
        return {id: values[input_of(site)] for id, site in self.sites.items()}

    @cached_property
    def _whole(self) -> Artifact:
        return build_program(self._program, self._backend)

    @cached_property
    def _empty(self) -> Run:
        """A call that does next to nothing."""
        x = torch.zeros(2, 1)
        return partial(build_program(capture(torch.nn.ReLU(), x), self._backend).run, (x,))
