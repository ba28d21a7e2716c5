"""A program as a torch module, for what takes one: Inductor, `torch.export`, a larger model."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from qcompiler.edit import copy_graph
from qcompiler.errors import BadInput
from qcompiler.io import Port, Signature
from qcompiler.program import Program


def as_module(program: Program) -> fx.GraphModule:
    """The program's operators under its own signature; parameters are buffers, not copied."""
    graph, copies = copy_graph(program.graph)
    holder = nn.Module()
    for node, copy in copies.items():
        if node.name not in program.slots:
            continue
        name = f"param_{len(holder._buffers)}"  # an own name may be no attribute's: `a.b/codes`
        holder.register_buffer(name, program.tensor(node))
        with graph.inserting_before(copy):
            value = graph.get_attr(name)
        value.meta.update(copy.meta)
        copy.replace_all_uses_with(value)
        graph.erase_node(copy)
    for port, node in zip(program.io.ports, program.inputs, strict=True):
        if not port.is_tensor:  # a constant that was baked in: nobody reads it
            graph.erase_node(copies[node])
        elif copies[node].users:
            _expect(graph, copies[node], port)
    names, spec = _called(program.io)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, spec, program.io.out_spec)))
    return fx.GraphModule(holder, graph, "Compiled")


def _expect(graph: fx.Graph, x: fx.Node, port: Port) -> None:
    """Put a check of its sizes behind an input."""
    sizes = tuple(size if isinstance(size, int) else None for size in port.shape)
    users = list(x.users)
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        seen = graph.call_function(_of_sizes, (x, str(port), sizes))
    seen.meta.update(x.meta)
    seen.meta["is_wrapped"] = True  # fx calls it, also where it traces a module that was saved
    for user in users:
        user.replace_input_with(x, seen)


def _of_sizes(x: Tensor, port: str, sizes: tuple[int | None, ...]) -> Tensor:
    """`x` as it is, if its sizes are those of the capture where these are fixed: what was lowered
    for them may not notice others."""
    if not isinstance(x, Tensor):
        raise BadInput(f"input {port} is a tensor; found {type(x).__name__}")
    if x.ndim != len(sizes) or any(
        want is not None and want != have for want, have in zip(sizes, x.shape, strict=True)
    ):
        raise BadInput(f"input {port} does not take shape {list(x.shape)}")
    return x


def _called(io: Signature) -> tuple[list[str], pytree.TreeSpec]:
    """Names of the arguments, and their structure, without constants that were baked in."""
    args, kwargs = pytree.tree_unflatten(list(io.ports), io.in_spec)
    args = {name: value for name, value in zip(io.names, args, strict=False) if _has_tensor(value)}
    kwargs = {name: value for name, value in kwargs.items() if _has_tensor(value)}
    return [*args, *kwargs], pytree.tree_structure((tuple(args.values()), kwargs))


def _has_tensor(value: object) -> bool:
    return any(isinstance(p, Port) and p.is_tensor for p in pytree.tree_leaves(value))
