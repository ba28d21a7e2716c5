"""`torch.compile(model, backend="qcompiler", options={"recipe": …})`, for inference.

Dynamo hands over graphs in which parameters are inputs. The parameters of a call become those of a
program, which is compiled at that call and serves as long as they stay what they are (`frozen.py`);
a graph without weights runs as it is. Sizes that Dynamo left open stay open where the program can
be captured so; elsewhere each size is a program of its own (`graph.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from qcompiler.dynamo.frozen import Frozen
from qcompiler.dynamo.graph import Graph
from qcompiler.dynamo.options import Options
from qcompiler.errors import BadInput

__all__ = ["backend"]


def backend(
    module: fx.GraphModule,
    inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Sequence[object]]:
    """What Dynamo calls with each graph; named in the entry points `torch_dynamo_backends`."""
    if mode is not None:
        raise BadInput(f"mode={mode!r} is Inductor's; qcompiler takes options, such as recipe")
    graph = Graph.of(module, inputs)
    chosen = Options.of(options or {})
    return Frozen(graph, chosen) if graph.has_weights else module
