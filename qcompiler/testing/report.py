"""What conformance found: numbers of cases, what failed and was refused, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qcompiler.backend import Capability
from qcompiler.testing.catalogue import misspelt

SHOWN = 5
"""Failures that a text lists of each claim."""


@dataclass(frozen=True)
class Case:
    """One weight in one format on one shape: what came of it on all inputs."""

    name: str
    error: float = 0.0
    """Largest relative error."""
    failure: str = ""
    """What is wrong; empty if nothing is."""
    refusal: str = ""
    """Why the kernel does not serve it; empty if it does."""


@dataclass(frozen=True)
class ClaimReport:
    """One claim of a backend, tried."""

    claim: Capability
    cases: tuple[Case, ...] = ()
    lacks: str = ""
    """What this machine lacks that it needs, so that it was not tried."""
    speed: Mapping[int, float] = field(default_factory=dict)
    """Tokens → times as fast as float; empty where it was not measured."""

    @property
    def failures(self) -> list[Case]:
        """What failed; a claim that was never served is one failure in itself."""
        failed = [c for c in self.cases if c.failure]
        if failed or self.served or self.lacks:
            return failed
        why = self.cases[0].refusal if self.cases else misspelt(self.claim)
        return [Case(str(self.claim), failure=f"claims what it never serves: {why}")]

    @property
    def served(self) -> list[Case]:
        """Cases in which the kernel ran and was right."""
        return [c for c in self.cases if not c.failure and not c.refusal]

    @property
    def refusals(self) -> Counter[str]:
        """Sentence → how many cases were refused with it."""
        return Counter(c.refusal for c in self.cases if c.refusal)

    @property
    def worst(self) -> Case | None:
        """The case of the largest error among those that passed."""
        return max(self.served, key=lambda c: c.error, default=None)

    @property
    def ok(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, object]:
        """For programs to read."""
        worst = self.worst
        return {
            "claim": str(self.claim),
            "kernel": self.claim.kernel,
            "conditions": self.claim.conditions,
            "ok": self.ok,
            "lacks": self.lacks or None,
            "claimed": len(self.cases),
            "passed": len(self.served),
            "failed": len(self.failures),
            "refused": sum(self.refusals.values()),
            "worst_error": worst.error if worst else None,
            "worst_case": worst.name if worst else None,
            "tolerance": self.claim.tolerance,
            "speed": {str(n): s for n, s in self.speed.items()},
            "failures": [{"case": c.name, "what": c.failure} for c in self.failures],
            "refusals": dict(self.refusals),
        }

    def __str__(self) -> str:
        if self.lacks:
            return f"     {self.claim}: not tried, {self.lacks}"
        failures, worst, refused = self.failures, self.worst, sum(self.refusals.values())
        words = [f"{'ok  ' if self.ok else 'FAIL'} {self.claim}: {len(self.cases)} claimed, "]
        words += [f"{len(self.served)} passed, {len(failures)} failed, {refused} refused"]
        if worst is not None:
            words += [f"; worst error {worst.error:.1e} of {self.claim.tolerance:.0e}"]
            words += [f" ({worst.name})"] if worst.error else []
        if self.speed:
            each = " and ".join(f"{s:.2f} × at {n}" for n, s in self.speed.items())
            words += [f"; speed of float: {each} tokens"]
        lines = ["".join(words)]
        lines += [f"     failed: {c.name}: {c.failure}" for c in failures[:SHOWN]]
        if len(failures) > SHOWN:
            lines += [f"     … and {len(failures) - SHOWN} more failed"]
        lines += [f"     refused {n} ×: {why}" for why, n in self.refusals.most_common(SHOWN)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All claims of a backend, tried."""

    backend: str
    claims: tuple[ClaimReport, ...]

    @property
    def ok(self) -> bool:
        """Whether no claim failed."""
        return all(claim.ok for claim in self.claims)

    def as_dict(self) -> dict[str, object]:
        """For programs to read."""
        claims = [claim.as_dict() for claim in self.claims]
        return {"backend": self.backend, "ok": self.ok, "claims": claims}

    def __str__(self) -> str:
        if not self.claims:
            return f"{self.backend} has no table of capabilities: there is nothing to hold it to"
        failed = sum(not claim.ok for claim in self.claims)
        result = f"{failed} of {len(self.claims)} claims fail" if failed else "conforms"
        return "\n".join([f"{self.backend}: {result}", *map(str, self.claims)])
