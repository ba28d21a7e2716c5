"""A program rounded as somebody says, to be measured for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qcompiler.edit import Edit
from qcompiler.formats import Scheme
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program
from qcompiler.registry import make_passes
from qcompiler.samples import Flat
from qcompiler.sites import sites
from qcompiler.spec import PassSpec

LET = 1e9
"""The budget of `quantize`'s own check: what is too bad is for the caller to say."""


def rounded_program(
    program: Program,
    chosen: Mapping[str, Scheme],
    batches: Sequence[Flat],
    rounding: str = "nearest",
) -> Program:
    """`program` with the sites of `chosen` rounded, calibrated on `batches`."""
    edit = Edit(program, "plan")
    for site in sites(edit.nodes):
        scheme = chosen.get(site.id, Scheme())
        if scheme != Scheme():
            edit.spend("as planned", site.node)
            edit.assign(site.node, scheme)
    quantize = make_passes((PassSpec("quantize", {"rounding": rounding, "budget": LET}),))
    return run_pipeline(edit.seal()[0], quantize, data=lambda: list(batches))
