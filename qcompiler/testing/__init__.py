"""Conformance: every claim of a backend, held against the reference.

::

    def test_it_conforms():
        qcompiler.testing.assert_conforms("my_backend")

A claim is a `Capability`. It is tried in all formats of the catalogue that it matches, on shapes
that its kernel likes and on odd ones, with ordinary and with extreme weights and inputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

import torch

from qcompiler.backend import Backend, Capability
from qcompiler.errors import BackendError, BadInput
from qcompiler.formats import Scheme
from qcompiler.registry import get_backend
from qcompiler.testing.catalogue import schemes
from qcompiler.testing.report import Case, ClaimReport, Report
from qcompiler.testing.speed import speeds
from qcompiler.testing.subjects import SHAPES, Shape, subject
from qcompiler.testing.trial import attempt

__all__ = ["Case", "ClaimReport", "Report", "assert_conforms", "conformance"]

Tick = Callable[[int, int], None]
WHOLE = 2
"""Schemes of a claim that are tried on every shape."""
Trial = tuple[Scheme, Shape, torch.dtype]


def conformance(
    backend: str | Backend,
    *,
    claims: str = "*",
    quick: bool = False,
    speed: bool = False,
    tick: Tick = lambda done, total: None,
) -> Report:
    """Try the claims of `backend` whose kernel matches `claims`; with `speed`, time them as well.

    `quick` takes a few formats and shapes of each. `tick` is told how far it is.
    """
    target = get_backend(backend) if isinstance(backend, str) else backend
    if reason := target.available():
        raise BackendError(f"backend {target.name!r} cannot be used here: {reason}")
    chosen = [c for c in target.capabilities if fnmatch.fnmatch(c.kernel, claims)]
    if target.capabilities and not chosen:
        listed = ", ".join(sorted({c.kernel for c in target.capabilities}))
        raise BadInput(f"no kernel of {target.name} is called {claims!r}; it claims {listed}")
    trials = {c: [] if target.lacks(c) else _trials(c, quick) for c in chosen}
    total, done, reports = sum(map(len, trials.values())), 0, []
    for claim, tries in trials.items():
        cases: list[Case] = []
        for scheme, shape, dtype in tries:
            tick(done, total)
            cases += attempt(subject(shape, dtype), scheme, target, claim)
            done += 1
        lacks = target.lacks(claim) or ""
        if all(c.refusal for c in cases) and not lacks:
            cases += _behind(claim, target)
        times = speeds(target, claim) if speed and not lacks else {}
        reports.append(ClaimReport(claim, tuple(cases), lacks, times))
    tick(total, total)
    return Report(target.name, tuple(reports))


def assert_conforms(backend: str | Backend, *, claims: str = "*", quick: bool = False) -> None:
    """Fail with the report unless every claim holds, and there is one."""
    report = conformance(backend, claims=claims, quick=quick)
    assert report.ok and report.claims, str(report)


def _trials(claim: Capability, quick: bool) -> list[Trial]:
    """A few schemes on every shape, each other one on one; bfloat16 on the shape it likes best."""
    trials: list[Trial] = []
    shapes = _shapes(claim)
    for at, shape in enumerate(shapes):
        for number, scheme in enumerate(schemes(claim, subject(shape).sites[0])):
            if number < WHOLE or number % len(shapes) == at:
                trials.append((scheme, shape, torch.float32))
            if number < WHOLE and at == 0:
                trials.append((scheme, shape, torch.bfloat16))
    return _few(trials, shapes) if quick else trials


def _few(trials: list[Trial], shapes: list[Shape]) -> list[Trial]:
    """The first of each type on the first shape, and the last on the second; one on another shape
    where the claim's formats are those of no other."""
    first = {t[2]: t for t in reversed(trials) if t[1] == shapes[0]}
    return [*first.values(), *[t for t in trials if t[1] == shapes[1]][-1:]] or trials[:1]


def _shapes(claim: Capability) -> list[Shape]:
    """Shapes of the claim's operator; first, one of the sizes that it asks for."""
    found = [shape for shape in SHAPES if shape.op == claim.op]
    if found and found[0].rounded(claim.multiple_of) != found[0]:
        found.insert(0, found[0].rounded(claim.multiple_of))
    return found


def _behind(claim: Capability, target: Backend) -> list[Case]:
    """The claim on sites whose output another site reads: some kernels need to know its format."""
    shapes = _shapes(claim)
    if not shapes or claim.op == "embedding":
        return []
    made = subject(shapes[0], behind=True)
    return [c for s in schemes(claim, made.sites[0]) for c in attempt(made, s, target, claim)]
