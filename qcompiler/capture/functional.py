"""Functional form: no operator of a program writes into its input.

`torch.export` keeps `relu_`, `add_` and `copy_` as they were written, and sub-graphs under
`torch.no_grad()` or `autocast(enabled=False)` as calls. Both would be invisible to a data-flow
analysis, so they are removed here, or the model is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import OutputKind

from qcompiler.errors import BadInput, first_line

WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def functionalize(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An equal exported program without mutation and without sub-graphs.

    The common case, `relu_` on a value that nobody else reads, becomes `relu`. The rest is left to
    torch's own functionalization (`run_decompositions` with an empty table), which keeps `linear`,
    `layer_norm` and `scaled_dot_product_attention` whole.
    """
    for node in _all_nodes(exported.graph_module):
        if node.target is torch.ops.aten.batch_norm.default and node.args[5] is True:
            # By the batch's own statistics: it writes into the others, which it does not read, and
            # torch has no word of that.
            node.args = (*node.args[:3], None, None, *node.args[5:])
    for node in exported.graph.nodes:
        if _mutates(node) and _overwrites_own_input(node):
            node.target = _functional_twin(node.target)
    if any(_mutates(n) for n in _all_nodes(exported.graph_module)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own use of it
            try:
                exported = exported.run_decompositions({})
            except Exception as error:  # AssertionError for buffers that share memory, and others
                raise BadInput(
                    "the model writes into a buffer or an input, and torch cannot take that apart "
                    f"({type(error).__name__}: {first_line(error)}); make a new tensor instead"
                ) from error
        _forget_scratch(exported)
        _refuse_state(exported)
    if any(_is_wrapper(n) for n in exported.graph.nodes):
        for node in [n for n in exported.graph.nodes if _is_wrapper(n)]:
            _inline(exported.graph_module, node)
        exported.graph.lint()
    return exported


def _all_nodes(module: fx.GraphModule) -> list[fx.Node]:
    inner = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [n for m in inner for n in m.graph.nodes]


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _overwrites_own_input(node: fx.Node) -> bool:
    """Whether `node` is `op_(x, …)` with a functional twin, on a fresh x that only it reads."""
    x = node.args[0] if node.args else None
    if _functional_twin(node.target) is None or not isinstance(x, fx.Node):
        return False
    fresh = isinstance(x.target, torch._ops.OpOverload) and all(
        r.alias_info is None for r in x.target._schema.returns
    )
    return fresh and set(x.users) == {node}


def _functional_twin(target: object) -> torch._ops.OpOverload | None:
    if not isinstance(target, torch._ops.OpOverload) or not target._opname.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, target._opname.rstrip("_"), None)
    return getattr(packet, target._overloadname, None)


def _forget_scratch(exported: torch.export.ExportedProgram) -> None:
    """A buffer that is written whole before anyone reads it, as rotary frequencies that are chosen
    by the length, is no state: what a call leaves in it makes no difference to the next."""
    signature, output = exported.graph_signature, exported.graph.output_node()
    nodes = {n.name: n for n in exported.graph.nodes}
    buffers = {s.target: nodes[s.arg.name] for s in signature.input_specs if s.arg.name in nodes}
    values: Any = output.args[0]
    kept = [
        (spec, value)
        for spec, value in zip(signature.output_specs, values, strict=True)
        if spec.kind is not OutputKind.BUFFER_MUTATION or buffers[spec.target].users
    ]
    signature.output_specs[:] = [spec for spec, _ in kept]
    output.args = (tuple(value for _, value in kept),)


def _refuse_state(exported: torch.export.ExportedProgram) -> None:
    kinds = (
        OutputKind.BUFFER_MUTATION,
        OutputKind.PARAMETER_MUTATION,
        OutputKind.USER_INPUT_MUTATION,
    )
    for spec in exported.graph_signature.output_specs:
        if spec.kind in kinds:
            raise BadInput(
                f"the model writes into {spec.target!r} while it runs; expected a function without "
                "state. Return the new value as an output instead"
            )


def _is_wrapper(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in WRAPPERS


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    """Put the nodes of a wrapped sub-graph in place of the call."""
    where = next(
        i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
    )
    options, body, inputs = node.args[:where], node.args[where], node.args[where + 1 :]
    if "autocast" in node.target.__name__ and options[2] is not False:  # type: ignore[union-attr]
        raise BadInput(
            "the model runs under autocast; capture it with the types that it shall have"
        )
    assert isinstance(body, fx.Node)
    inner: fx.Graph = getattr(module, str(body.target)).graph
    graph = node.graph
    mapping: dict[fx.Node, object] = {}
    feed = iter(inputs)
    with graph.inserting_before(node):
        for child in inner.nodes:
            if child.op == "placeholder":
                mapping[child] = next(feed)
            elif child.op == "output":
                results = fx.node.map_arg(child.args[0], lambda n: mapping[n])
            else:
                mapping[child] = graph.node_copy(child, lambda n: mapping[n])  # type: ignore
    for user in list(node.users):
        if user.target.__name__ == "getitem":  # type: ignore[union-attr]
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)  # type: ignore[arg-type]
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)
