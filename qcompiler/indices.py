"""Inputs that are indices into a table: which rows there are, before anything is looked up."""

from __future__ import annotations

from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.layout import PASS, RESHAPES
from qcompiler.program import Program
from qcompiler.samples import Flat
from qcompiler.sites import sites


def check_indices(program: Program, inputs: Flat, what: str) -> None:
    """Refuse flat `inputs` that look up a row which an embedding does not have.

    Only inputs that reach the embedding as they are can be told so early.
    """
    given = dict(zip(program.inputs, inputs, strict=True))
    ports = dict(zip(program.inputs, program.io.ports, strict=True))
    for site in sites(program.graph.nodes):
        source = site.node.args[1]
        while isinstance(source, fx.Node) and source.target in PASS | RESHAPES:
            source = source.args[0]
        value = given.get(source) if isinstance(source, fx.Node) else None
        if site.kind.name != "embedding" or not isinstance(value, Tensor) or not value.numel():
            continue
        rows = int(site.weight.meta["val"].shape[0])
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= rows:
            assert isinstance(source, fx.Node)
            raise BadInput(
                f"{what}: input {ports[source].name} holds {high if high >= rows else low}, and "
                f"the table at {site.id} has rows 0 to {rows - 1}; was it made by another "
                "tokenizer?"
            )


def explained(error: IndexError, program: Program, inputs: Flat) -> BadInput:
    """What a run on flat `inputs` that ended in `error` should have been told."""
    try:
        check_indices(program, inputs, "the call")
    except BadInput as found:
        return found
    tables = [
        f"{site.id} (rows 0 to {int(site.weight.meta['val'].shape[0]) - 1})"
        for site in sites(program.graph.nodes)
        if site.kind.name == "embedding"
    ]
    return BadInput(
        f"the call looks up a row that a table does not have: {', '.join(tables) or error}; where "
        "positions are looked up, the tokens and what the cache holds may be as many as there are "
        "rows, not more"
    )
