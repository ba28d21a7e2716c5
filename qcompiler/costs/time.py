"""`Clock`: seconds of each site of a program under each scheme, measured on a backend.

alone(site, scheme)   = seconds(site, float) · time(copies, scheme) / time(copies, float)
seconds(site, scheme) = alone(site, scheme) + glue
seconds(program)      = rest + Σ seconds(site, scheme)
rest                  = seconds(program, float) - Σ seconds(site, float)
glue                  = (seconds(program, rounded) - rest - Σ alone(site, rounded)) / sites

Rounding an activation, unpacking a weight and changes of layout are part of a site's time, as they
are part of its program (`layers.py`). What is not is what a backend makes of several: it rounds an
activation in the norm or product before it, hands codes from one site to the next. So the whole
program is run rounded, once with activations and once without, and each site that is rounded so has
its share of the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
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


class Family(Enum):
    """Schemes that backends run alike."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"

    @classmethod
    def of(cls, scheme: Scheme) -> Family | None:
        """None: in floating point."""
        if scheme == FLOAT:
            return None
        return cls.WEIGHTS if scheme.activation is None else cls.ACTIVATIONS


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
        self._plain: dict[Phase, Mapping[str, float]] = {}
        self._glue: dict[Family, Mapping[Phase, float]] = {family: {} for family in Family}
        self._fingerprint = fingerprint(program)

    def prepare(self, choices: Mapping[str, Sequence[Scheme | None]]) -> None:
        """Measure all that `seconds` will be asked for: site id → its candidates."""
        wanted = {
            (self._benches.layers[id], scheme or FLOAT): id
            for id, schemes in choices.items()
            for scheme in schemes
        }
        for done, ((_, scheme), id) in enumerate(wanted.items()):
            self._tick(done, len(wanted))
            self._alone(self._benches.sites[id], scheme, "prefill")
        for family in Family:
            rounded = {}
            for id, schemes in choices.items():
                site = self._benches.sites[id]
                mine = [s for s in schemes if s and self._is_timed(site, s, family)]
                if mine:
                    rounded[id] = mine[len(mine) // 2]
            self._glue[family] = self._share_glue(rounded) if rounded else {}
        self._tick(len(wanted), len(wanted))

    def seconds(self, site: Site, scheme: Scheme | None, phase: Phase) -> float | None:
        """Seconds of the site in one run of the program; None if the backend refuses the scheme.

        A small site that saves others their work may come to less than nothing."""
        scheme = scheme or FLOAT
        alone, family = self._alone(site, scheme, phase), Family.of(scheme)
        if alone is None or family is None or self._told(site, scheme, phase) is not None:
            return alone
        return alone + self._glue[family].get(phase, 0.0)

    def _told(self, site: Site, scheme: Scheme, phase: Phase) -> float | None:
        """What the backend says by itself; None: it is to be measured."""
        return self._backend.cost(site, scheme, self.tokens(site, phase))

    def _is_timed(self, site: Site, scheme: Scheme, family: Family) -> bool:
        """Whether it is of the family, and measured."""
        if Family.of(scheme) is not family or self._told(site, scheme, "prefill") is not None:
            return False
        return self._alone(site, scheme, "prefill") is not None

    def _alone(self, site: Site, scheme: Scheme, phase: Phase) -> float | None:
        """The same of the site for itself."""
        known = self._told(site, scheme, phase)
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
        """What `Benches.race` measures; sites are scaled down where by themselves they took longer
        than the program that they are in."""
        if phase not in self._plain:
            key = f"{self._fingerprint} {phase} {self.workload}"
            found = self._cache.get(key)
            if not isinstance(found, dict):
                found = self._benches.race(phase)
                self._cache.put(key, found)
            keys = [self._benches.key(site, phase) for site in self._benches.sites.values()]
            spent = sum(found[key] for key in keys)
            share = min(1.0, found["program"] / spent) if spent else 1.0
            self._plain[phase] = found | {key: share * found[key] for key in keys}
        return self._plain[phase]

    def _share_glue(self, rounded: Mapping[str, Scheme]) -> dict[Phase, float]:
        """Seconds that a site of `rounded` takes beyond its own among the others."""
        about = "".join(f"{id} {scheme}\n" for id, scheme in rounded.items())
        key = f"{self._fingerprint} {self.workload} {hashlib.sha256(about.encode()).hexdigest()}"
        found = self._cache.get(key)
        if not isinstance(found, dict):
            found = self._benches.together(rounded)
            if found is None:
                return {}
            self._cache.put(key, found)
        glue: dict[Phase, float] = {}
        for phase in self.workload.phases:
            alone = self.rest(phase) + sum(
                self._alone(site, rounded.get(id, FLOAT), phase) or 0.0
                for id, site in self._benches.sites.items()
            )
            whole = found[phase] * self._float(phase)["program"]
            glue[phase] = (whole - alone) / len(rounded)
        return glue

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
