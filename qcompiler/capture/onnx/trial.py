"""What tracing does not see: an index that is out of range, a type that no kernel takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, fx

from qcompiler.errors import BadInput, first_line
from qcompiler.program import Program, node_id
from qcompiler.run import evaluate


def run_once(program: Program, example: tuple[Tensor, ...]) -> None:
    """Run `program` on its example; refuse it where that fails."""
    last: list[fx.Node] = []

    def watch(node: fx.Node, value: object) -> None:
        last[:] = [node]

    try:
        evaluate(program, example, watch)
    except Exception as error:  # whatever torch says to the numbers in a stranger's file
        where = f" at node {node_id(last[0].next)}" if last else ""
        raise BadInput(
            f"the model fails on its example inputs{where}: {first_line(error)}. If it "
            "should not, hand over other example_inputs"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """torch logs a traceback for an operator that refuses its inputs; our error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
