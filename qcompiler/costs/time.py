"""`Clock`: seconds of each site of a program under each scheme, measured on a backend.

seconds(site, scheme) = seconds(site, float) · time(copies, scheme) / time(copies, float)
seconds(program)      = rest + Σ seconds(site, scheme)
rest                  = seconds(program, float) - Σ seconds(site, float)

Copies of a site are timed in turn with the float ones (`timing.py`, `layers.py`), the float ones of
all sites in turn with the whole program, so that what the machine does besides cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, fx

from qcompiler.backend import Artifact, Backend
from qcompiler.capture import capture
from qcompiler.compiled import lower
from qcompiler.costs.cache import Cache, cache_folder, environment
from qcompiler.costs.layers import Bench, Layer, build, copies, copies_of, input_of, random_input
from qcompiler.costs.workload import Phase, Workload
from qcompiler.diff import fingerprint
from qcompiler.errors import BackendError
from qcompiler.facts import Tick
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.run import evaluate
from qcompiler.samples import Flat
from qcompiler.sites import Site, sites
from qcompiler.timing import floors

FLOAT = Scheme()
NOTHING = 1e-9
"""Seconds that are left at least when the call is taken off."""
Run = Callable[[], object]


class Clock:
    """Times the sites of `program` (in floating point) on `backend` for `workload`."""

    def __init__(
        self,
        backend: Backend,
        program: Program,
        workload: Workload,
        keep: Path | None = None,
        *,
        fresh: bool = False,
        tick: Tick = lambda done, total: None,
    ) -> None:
        """`keep` is the folder of what this machine measured before, the user's cache folder unless
        told otherwise; `fresh` measures again. `tick` is told how far `prepare` is."""
        self.workload = workload.fitting(program)
        self._backend = backend
        self._program = program
        self._tick = tick
        folder = cache_folder("costs") if keep is None else keep
        self._cache = Cache(folder, environment(backend.name), fresh)
        self._sites = {s.id: s for s in sites(program.nodes)}
        self._layers = {id: Layer.of(s) for id, s in self._sites.items()}
        self._copies: dict[tuple[Layer, int], Program] = {}
        self._plain: dict[Layer, Bench] = {}
        self._refused: set[tuple[Layer, Scheme]] = set()
        self._floats: dict[Phase, dict[str, float]] = {}

    def prepare(self, choices: Mapping[str, Iterable[Scheme | None]]) -> None:
        """Measure all that `seconds` will be asked for: site id → its candidates."""
        wanted = {
            (self._layers[id], scheme or FLOAT): id
            for id, schemes in choices.items()
            for scheme in schemes
        }
        for done, ((_, scheme), id) in enumerate(wanted.items()):
            self._tick(done, len(wanted))
            self.seconds(self._sites[id], scheme, "prefill")
        self._tick(len(wanted), len(wanted))

    def seconds(self, site: Site, scheme: Scheme | None, phase: Phase) -> float | None:
        """Seconds of the site in one run of the program; None if the backend refuses the scheme."""
        scheme = scheme or FLOAT
        known = self._backend.cost(site, scheme, self.tokens(site, phase))
        if known is not None:
            return known
        ratio = 1.0 if scheme == FLOAT else self._ratio(site, scheme, phase)
        return None if ratio is None else ratio * self._float(phase)[self._key(site, phase)]

    def rest(self, phase: Phase, among: Collection[Site] | None = None) -> float:
        """Seconds of a run in floating point that go by outside `among` (all sites)."""
        chosen = self._sites.values() if among is None else among
        spent = sum(self.seconds(s, None, phase) or 0.0 for s in chosen)
        return max(0.0, self._float(phase)["program"] - spent)

    def total(self, choice: Mapping[str, Scheme | None], phase: Phase) -> float:
        """Predicted seconds of one run; sites that `choice` does not name are in floating point."""
        total = self.rest(phase)
        for id, site in self._sites.items():
            seconds = self.seconds(site, choice.get(id), phase)
            if seconds is None:
                raise BackendError(
                    f"{self._backend.name} cannot run {id} with {choice[id]}, so that it has no "
                    "time; choose another scheme for it"
                )
            total += seconds
        return total

    def overhead(self, phase: Phase) -> float:
        """Seconds of a call of an artifact that does next to nothing."""
        return self._float(phase)["call"]

    def tokens(self, site: Site, phase: Phase) -> int:
        """Rows of the site's input; samples of a convolution's."""
        shape = self._shapes[phase][site.id]
        if site.kind.name == "conv":
            return shape[0]
        return torch.Size(shape if site.x is None else shape[:-1]).numel()

    @cached_property
    def _shapes(self) -> dict[Phase, dict[str, tuple[int, ...]]]:
        """Shape of each site's input, as a run has it."""
        return {phase: self._seen(phase) for phase in self.workload.phases}

    def _seen(self, phase: Phase) -> dict[str, tuple[int, ...]]:
        values: dict[fx.Node, tuple[int, ...]] = {}

        def look(node: fx.Node, value: object) -> None:
            if isinstance(value, Tensor):
                values[node] = tuple(value.shape)

        evaluate(self._program, self._inputs(phase), look)
        return {id: values[input_of(site)] for id, site in self._sites.items()}

    def _inputs(self, phase: Phase) -> Flat:
        return self.workload.inputs(self._program, phase)

    def _key(self, site: Site, phase: Phase) -> str:
        """What is equal for sites that are measured once for all."""
        shape = "x".join(map(str, self._shapes[phase][site.id]))
        return f"{self._layers[site.id]} on {shape}"

    def _float(self, phase: Phase) -> dict[str, float]:
        """Seconds in floating point: of the `program`, an empty `call`, each layer by its key."""
        if phase not in self._floats:
            key = f"{fingerprint(self._program)} {phase} {self.workload}"
            found = self._cache.get(key)
            if not isinstance(found, dict):
                found = self._race(phase)
                self._cache.put(key, found)
            self._floats[phase] = found
        return self._floats[phase]

    def _race(self, phase: Phase) -> dict[str, float]:
        layers = {self._key(s, phase): s for s in self._sites.values()}
        benches = {key: self._bench(site) for key, site in layers.items()}
        inputs = self._inputs(phase)
        runs: dict[str, Run] = {"program": partial(self._whole.run, inputs), "call": self._empty}
        for key, bench in benches.items():
            runs[key] = partial(bench.run, self._input(layers[key], phase))
        found = floors(runs)
        for key, bench in benches.items():
            found[key] = max(0.0, found[key] - found["call"]) / bench.copies
        return found

    def _ratio(self, site: Site, scheme: Scheme, phase: Phase) -> float | None:
        """Time of the site with `scheme` in units of that in floating point; None if refused."""
        layer = self._layers[site.id]
        if self._backend.refuses(site, scheme) is not None or (layer, scheme) in self._refused:
            return None
        count = self._count(site, scheme)
        keys = {p: f"{self._key(site, p)} {scheme} copies={count}" for p in self.workload.phases}
        if not all(isinstance(self._cache.get(key), float) for key in keys.values()):
            bench = self._build(site, scheme)
            if bench is None:
                self._refused.add((layer, scheme))
                return None
            for p, key in keys.items():
                self._cache.put(key, self._compare(site, bench, p))
        found = self._cache.get(keys[phase])
        assert isinstance(found, float)
        return found

    def _compare(self, site: Site, bench: Bench, phase: Phase) -> float:
        """Time of a copy in `bench` in units of that of a copy in floating point."""
        plain, x = self._bench(site), self._input(site, phase)
        found = floors(
            {"float": partial(plain.run, x), "site": partial(bench.run, x), "call": self._empty}
        )
        site_time, float_time = (
            max(NOTHING, found[name] - found["call"]) / copies
            for name, copies in (("site", bench.copies), ("float", plain.copies))
        )
        return site_time / float_time

    def _bench(self, site: Site) -> Bench:
        """Copies of the site in floating point."""
        layer = self._layers[site.id]
        if layer not in self._plain:
            found = self._build(site, FLOAT)
            assert found is not None
            self._plain[layer] = found
        return self._plain[layer]

    def _build(self, site: Site, scheme: Scheme) -> Bench | None:
        layer, count = self._layers[site.id], self._count(site, scheme)
        x = self._input(site, "prefill")
        if (layer, count) not in self._copies:
            self._copies[layer, count] = copies(site, layer, count, x)
        return build(self._copies[layer, count], scheme, self._backend, x)

    def _count(self, site: Site, scheme: Scheme) -> int:
        rows = self.tokens(site, "prefill")
        outputs = rows * site.weight.meta["val"].shape[0] * 4
        return copies_of(site, self._layers[site.id], scheme, self._program, outputs)

    def _input(self, site: Site, phase: Phase) -> Tensor:
        return random_input(site, self._layers[site.id], self._shapes[phase][site.id])

    @cached_property
    def _whole(self) -> Artifact:
        return self._backend.build(lower(self._program, self._backend, None, None)[0].program)

    @cached_property
    def _empty(self) -> Run:
        """A call that does next to nothing."""
        x = torch.zeros(2, 1)
        program = capture(Negative(), x)
        artifact = self._backend.build(lower(program, self._backend, None, None)[0].program)
        return partial(artifact.run, (x,))


class Negative(torch.nn.Module):
    """-x"""

    def forward(self, x: Tensor) -> Tensor:
        return -x
