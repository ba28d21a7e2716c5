"""Give each site what a plan says (see `qcompiler plan`), site by site, with its reason.

Sites that the plan does not name stay in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qcompiler.edit import Edit
from qcompiler.errors import BadInput, unknown
from qcompiler.facts import Facts
from qcompiler.formats import Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.planning.file import read_plan
from qcompiler.registry import get_backend
from qcompiler.schemes import fit, why_not
from qcompiler.sites import sites


@dataclass(frozen=True, kw_only=True)
class UsePlan(Pass):
    """Assign the schemes of a plan file."""

    name: ClassVar[str] = "use_plan"
    effect: ClassVar[Effect] = Effect.PLAN
    makes: ClassVar[tuple[str, ...]] = ("plan",)

    file: str = "plan.toml"
    backend: str = ""
    """Refuse formats that this backend has no kernels for."""

    def run(self, edit: Edit, facts: Facts) -> None:
        found = {s.id: s for s in sites(edit.nodes)}
        backend = get_backend(self.backend) if self.backend else None
        for number, choice in enumerate(read_plan(Path(self.file)).choices, 1):
            where = f"{self.file}, choice {number}"
            if choice.site not in found:
                raise unknown(f"site of the plan ({where})", choice.site, found)
            site = found[choice.site]
            if (why := why_not(site, edit.is_weight)) is not None:
                raise BadInput(f"{where}: {site.id} can have no format: {why}")
            try:
                scheme = fit(site, choice.weight, choice.activation)
            except BadInput as error:
                raise BadInput(f"{where}, {site.id}: {error}") from error
            if scheme == Scheme():
                edit.skip(site.node, choice.why or "stays in floating point, as the plan says")
                continue
            if backend is not None and (why := backend.refuses(site, scheme)) is not None:
                served = {f"{c.weight} × {c.activation}" for c in backend.capabilities}
                raise BadInput(f"{where}, {site.id}: {why}; it has {', '.join(sorted(served))}")
            edit.spend(choice.why or f"{scheme}", site.node)
            edit.assign(site.node, scheme)
