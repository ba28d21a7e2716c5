"""What each candidate of each site costs: bytes, operations, seconds of the backend's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompiler.costs import Clock, Workload, bitops, weight_bytes
from qcompiler.formats import Scheme
from qcompiler.planning.units import Units, nothing
from qcompiler.program import Program
from qcompiler.schemes import FLOAT
from qcompiler.sites import Site

Table = tuple[tuple[float, ...], ...]
"""By site and candidate."""


@dataclass(frozen=True)
class Costs:
    """By name: `weight_bytes` (of what may be rounded), `bytes` (of all parameters), `bitops` of a
    prefill and a token, `prefill`, `decode` and `latency` (both) in seconds."""

    tables: Mapping[str, Table]
    fixed: Mapping[str, float]
    """What is there whatever is chosen."""
    whole: Mapping[str, float]
    """What the float program costs."""


def costs(program: Program, units: Units, workload: Workload, clock: Clock | None) -> Costs:
    """All costs; seconds where there is a `clock`."""
    own = {s.id for s in first_of_each_weight(units.sites)}
    tokens = workload.batch * workload.prefill + (workload.batch if workload.decode else 0)

    def table(cost: Callable[[Site, Scheme], float | None]) -> tuple[Table, dict[str, float]]:
        """Of all candidates, and of each site in floating point."""
        known = {s.id: cost(s, Scheme()) or 0.0 for s in units.sites}
        rows = (
            tuple(cost(s, scheme) or 0.0 for scheme in c.values())
            for s, c in zip(units.sites, units.candidates, strict=True)
        )
        return tuple(rows), known

    def bytes_of(site: Site, scheme: Scheme) -> float:
        return weight_bytes(site, scheme) if site.id in own else 0.0

    sizes, plain = table(bytes_of)
    operations, exact = table(lambda s, scheme: bitops(s, scheme, tokens))
    tables = {"weight_bytes": sizes, "bytes": sizes, "bitops": operations}
    weights = sum(plain.values())
    fixed = {"bytes": program.bytes - weights}
    whole = {
        "weight_bytes": weights,
        "bytes": float(program.bytes),
        "bitops": sum(exact.values()),
    }
    for phase in () if clock is None else workload.phases:
        assert clock is not None
        tables[phase], alone = table(lambda s, scheme, p=phase: clock.seconds(s, scheme, p))  # type: ignore[misc]
        fixed[phase] = clock.rest(phase, units.sites)
        whole[phase] = fixed[phase] + sum(alone.values())
    timed = [p for p in workload.phases if p in tables]
    if timed:
        tables["latency"] = _sum([tables[p] for p in timed])
        fixed["latency"] = sum(fixed[p] for p in timed)
        whole["latency"] = sum(whole[p] for p in timed)
    return Costs(tables, fixed, whole)


def buildable(units: Units, clock: Clock) -> Units:
    """The candidates that the backend could build and time."""
    kept, refused = [], dict(units.refused)
    for site, candidates in zip(units.sites, units.candidates, strict=True):
        mine = {}
        for text, scheme in candidates.items():
            if all(clock.seconds(site, scheme, p) is not None for p in clock.workload.phases):
                mine[text] = scheme
            else:
                refused.setdefault(text, f"{site.id}: the backend could not build it")
        kept.append(mine or {FLOAT: Scheme()})
    if all([*candidates] == [FLOAT] for candidates in kept):
        raise nothing(refused.values())
    return replace(units, candidates=tuple(kept), refused=refused)


def first_of_each_weight(sites: Sequence[Site]) -> list[Site]:
    return list({s.weight: s for s in reversed(sites)}.values())


def _sum(tables: Sequence[Table]) -> Table:
    return tuple(
        tuple(sum(values) for values in zip(*rows, strict=True))
        for rows in zip(*tables, strict=True)
    )
