"""`Clock`: seconds of each site of a program under each scheme, measured on a backend.

seconds(site, scheme) = seconds(site, float) · time(copies, scheme) / time(copies, float)
seconds(program)      = rest + Σ seconds(site, scheme)
rest                  = seconds(program, float) - Σ seconds(site, float)

Rounding an activation, unpacking a weight and changes of layout are part of a site's time, as they
are part of its program (`layers.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from qcompiler.backend import Backend
from qcompiler.costs.benches import FLOAT, Benches
from qcompiler.costs.cache import Cache, cache_folder, environment
from qcompiler.costs.layers import Layer
from qcompiler.costs.workload import Phase, Workload
from qcompiler.diff import fingerprint
from qcompiler.errors import BackendError
from qcompiler.facts import Tick
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.sites import Site


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
        self._tick = tick
        folder = cache_folder("costs") if keep is None else keep
        self._cache = Cache(folder, environment(backend.name), fresh)
        self._benches = Benches(backend, program, self.workload)
        self._refused: set[tuple[Layer, Scheme]] = set()
        self._fingerprint = fingerprint(program)

    def prepare(self, choices: Mapping[str, Iterable[Scheme | None]]) -> None:
        """Measure all that `seconds` will be asked for: site id → its candidates."""
        wanted = {
            (self._benches.layers[id], scheme or FLOAT): id
            for id, schemes in choices.items()
            for scheme in schemes
        }
        for done, ((_, scheme), id) in enumerate(wanted.items()):
            self._tick(done, len(wanted))
            self.seconds(self._benches.sites[id], scheme, "prefill")
        self._tick(len(wanted), len(wanted))

    def seconds(self, site: Site, scheme: Scheme | None, phase: Phase) -> float | None:
        """Seconds of the site in one run of the program; None if the backend refuses the scheme."""
        scheme = scheme or FLOAT
        known = self._backend.cost(site, scheme, self.tokens(site, phase))
        if known is not None:
            return known
        ratio = 1.0 if scheme == FLOAT else self._ratio(site, scheme, phase)
        return None if ratio is None else ratio * self._float(phase)[self._benches.key(site, phase)]

    def rest(self, phase: Phase, among: Collection[Site] | None = None) -> float:
        """Seconds of a run in floating point that go by outside `among` (all sites)."""
        chosen = self._benches.sites.values() if among is None else among
        spent = sum(self.seconds(s, None, phase) or 0.0 for s in chosen)
        return max(0.0, self._float(phase)["program"] - spent)

    def total(self, choice: Mapping[str, Scheme | None], phase: Phase) -> float:
        """Predicted seconds of one run; sites that `choice` does not name are in floating point."""
        total = self.rest(phase)
        for id, site in self._benches.sites.items():
            seconds = self.seconds(site, choice.get(id), phase)
            if seconds is None:
                raise BackendError(
                    f"{self._backend.name} cannot run {id} with {choice[id]}, so that it has no "
                    "time; choose another scheme for it"
                )
            total += seconds
        return total

    def overhead(self, phase: Phase) -> float:
        """Seconds of a call of an artifact that does next to nothing: in `rest`, and in no site."""
        return self._float(phase)["call"]

    def tokens(self, site: Site, phase: Phase) -> int:
        """Rows of the site's input; samples of a convolution's."""
        return self._benches.tokens(site, phase)

    def _float(self, phase: Phase) -> Mapping[str, float]:
        """What `Benches.race` measures."""
        key = f"{self._fingerprint} {phase} {self.workload}"
        found = self._cache.get(key)
        if not isinstance(found, dict):
            found = self._benches.race(phase)
            self._cache.put(key, found)
        return found

    def _ratio(self, site: Site, scheme: Scheme, phase: Phase) -> float | None:
        """What `Benches.compare` measures, once for all sites that are equal."""
        unit = (self._benches.layers[site.id], scheme)
        if self._backend.refuses(site, scheme) is not None or unit in self._refused:
            return None
        about = f"{scheme} copies={self._benches.count(site, scheme)}"
        keys = {p: f"{self._benches.key(site, p)} {about}" for p in self.workload.phases}
        if not all(isinstance(self._cache.get(key), float) for key in keys.values()):
            measured = self._benches.compare(site, scheme)
            if measured is None:
                self._refused.add(unit)
                return None
            for p, key in keys.items():
                self._cache.put(key, measured[p])
        found = self._cache.get(keys[phase])
        assert isinstance(found, float)
        return found
