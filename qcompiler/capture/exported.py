"""From an exported program to ours: lifted parameters, ids, functional form.

The raw exported graph is kept, not a decomposed one: it is the level of `linear`, `layer_norm` and
`scaled_dot_product_attention`, on which all later passes match.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from qcompiler import diff
from qcompiler.capture.dynamic import settled
from qcompiler.capture.functional import functionalize
from qcompiler.edit import copy_graph, node_tag
from qcompiler.errors import BadInput
from qcompiler.history import Step
from qcompiler.io import Port, Signature
from qcompiler.program import Program, Tag, op_name
from qcompiler.states import begin_empty

ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


def from_exported(
    exported: torch.export.ExportedProgram,
    names: tuple[str, ...] = (),
    note: str = "",
    params: Mapping[str, str] | None = None,
    scope_key: str = "",
    axes: Sequence[Mapping[int, str]] = (),
) -> Program:
    """Turn `exported` into a `Program`; its tensors are shared, its graph is copied.

    `names` are the positional parameters of the source's forward, `params` the source's own names
    of parameters. A node's scope is its module path, or what `meta["custom"][scope_key]` says.
    `axes` are the names that the source has for axes, of each flat input.
    """
    exported = functionalize(exported)
    graph, _ = copy_graph(exported.graph)
    # fx gives a copied node another name where the old one is a Python builtin, such as `input`.
    copies = {old.name: new for old, new in zip(exported.graph.nodes, graph.nodes, strict=True)}
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:  # our own signature checks the inputs at each call
            graph.erase_node(node)
    slots, tensors = _lift(copies, exported, params or {})
    _drop_dead(graph, {copies[s.arg.name] for s in _user_inputs(exported)})
    slots = {n.name: slots[n.name] for n in graph.nodes if n.name in slots}
    counters: dict[str, int] = {}
    for node in graph.nodes:
        _tag(node, slots, counters, scope_key)
    program = Program(
        graph=graph,
        params={name: tensors[name] for name in slots.values()},
        slots=slots,
        io=_signature(exported, copies, names, axes),
        counters=counters,
    )
    example = tuple(pytree.tree_leaves(exported.example_inputs or ()))
    program = settled(begin_empty(program), example)
    after = diff.snapshot(program)
    step = Step("capture", "capture", None, diff.Diff(), after, notes=(note,) if note else ())
    return replace(program, history=(step,))


def _user_inputs(exported: torch.export.ExportedProgram) -> list[InputSpec]:
    return [s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]


def _lift(
    copies: dict[str, fx.Node], exported: torch.export.ExportedProgram, names: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Slots and parameters. Names that share one tensor become one parameter: ties are a fact."""
    slots: dict[str, str] = {}
    params: dict[str, Tensor] = {}
    first: dict[tuple[object, ...], fx.Node] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise BadInput(
                f"the model lifts {spec.target!r} ({spec.kind.name}); only tensors can be"
            )
        value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        if not isinstance(value, Tensor):
            raise BadInput(f"the exported program has no tensor for {spec.target!r}")
        node = copies[spec.arg.name]
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in first:
            node.replace_all_uses_with(first[key])
            continue
        first[key] = node
        target = spec.target or spec.arg.name
        slots[node.name] = names.get(target, target)
        params[slots[node.name]] = value.detach()
    return slots, params


def _drop_dead(graph: fx.Graph, inputs: set[fx.Node]) -> None:
    """Erase what nobody reads; the user's inputs stay, used or not."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op != "output" and node not in inputs:
            graph.erase_node(node)


def _tag(node: fx.Node, slots: dict[str, str], counters: dict[str, int], scope_key: str) -> None:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    scope = str(stack[-1][0]) if stack else ""
    if scope_key:
        scope = str(node.meta.get("custom", {}).get(scope_key, ""))
    if scope.startswith("_empty_nn_module_stack"):  # torch's own mark for "made by the exporter"
        scope = ""
    if node.op == "placeholder":
        name = slots.get(node.name)
        Tag(name or str(node.target), name.rpartition(".")[0] if name else "").put(node)
    elif node.op == "output":
        Tag("output").put(node)
    elif node.op == "call_function":
        node_tag(node, scope, op_name(node.target), counters)
    else:
        raise BadInput(f"node {node.name!r} is a {node.op}; expected only calls of operators")


def _signature(
    exported: torch.export.ExportedProgram,
    copies: dict[str, fx.Node],
    names: tuple[str, ...],
    axes: Sequence[Mapping[int, str]],
) -> Signature:
    symbols: dict[str, str] = {}
    ranges = {str(s): r for s, r in exported.range_constraints.items()}
    flat = [s.arg for s in _user_inputs(exported)]
    example = pytree.tree_leaves(exported.example_inputs) if exported.example_inputs else []
    ports = []
    for index, argument in enumerate(flat):
        if isinstance(argument, ConstantArgument):
            ports.append(Port(argument.name, constant=argument.value))
            continue
        if isinstance(argument, SymIntArgument) or not isinstance(argument, TensorArgument):
            raise BadInput(f"input {argument.name!r} is no tensor; expected tensors or constants")
        value = copies[argument.name].meta["val"]
        # A size that the model's code fixed late is still a symbol, whose value is a number.
        sizes = [int(s) if is_concrete_int(s) else s for s in value.shape]
        named = axes[index] if axes else {}
        if not named and value.ndim == 3 and isinstance(sizes[1], int):
            named = {2: "sequence"}  # its channels come first
        shape = tuple(_dim(s, axis, symbols, named) for axis, s in enumerate(sizes))
        sample = example[index] if index < len(example) else None
        low, high = (0.0, 1.0)
        if isinstance(sample, Tensor) and sample.numel():
            low, high = (float(v) for v in sample.detach().float().aminmax())
        ports.append(Port(argument.name, value.dtype, shape, low, high))
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise BadInput("the exported program does not say how it is called")
    dims = {}
    for symbol, name in symbols.items():
        bound = ranges.get(symbol)
        upper = int(bound.upper) if bound and str(bound.upper).isdigit() else None
        # torch.export takes sizes for 2 or more where nothing was asked of them; beyond that, the
        # graph that was traced is right for no smaller size.
        lower = int(bound.lower) if bound and int(bound.lower) > 2 else 1
        dims[name] = (lower, upper)
    return Signature(tuple(ports), in_spec, out_spec, names or _names(in_spec, ports), dims)


def _names(in_spec: pytree.TreeSpec, ports: list[Port]) -> tuple[str, ...]:
    return tuple(p.name for p in ports[: in_spec.children()[0].num_leaves])


def _dim(
    size: int | torch.SymInt, axis: int, symbols: dict[str, str], named: Mapping[int, str]
) -> int | str:
    """A fixed size, or a readable name: the source's, or for the first dynamic axis 0 `batch`,
    for axis 1 `sequence`."""
    if isinstance(size, int):
        return size
    symbol = str(size)
    if symbol not in symbols:
        name = named.get(axis) or (("batch", "sequence")[axis] if axis < 2 else f"dim{axis}")
        numbered = (f"{name}{n}" if n > 1 else name for n in itertools.count(1))
        taken = set(symbols.values())
        symbols[symbol] = next(n for n in numbered if n not in taken)
    return symbols[symbol]
