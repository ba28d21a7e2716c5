"""A graph of Dynamo's, read: which inputs are parameters, which sizes are open, and its export."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from qcompiler.errors import BadInput, first_line

SCOPE = "qcompiler.scope"
"""Key under which an exported node says which module called it."""
KINDS = ("_modules", "_parameters", "_buffers")
Open = Mapping[int, Mapping[int, Any]]
"""Number of an input → axis → the `Dim` of torch.export that it has."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Dynamo's graph; inputs go by their number."""

    module: fx.GraphModule
    params: Mapping[int, str]
    """Parameters and buffers of modules, with their names there."""
    tensors: tuple[int, ...]
    """The other tensors: the program's inputs."""
    sizes: Mapping[int, tuple[int, int]]
    """Numbers that are a size of a tensor: which, and along which axis."""
    numbers: tuple[int, ...]
    """Other numbers. Dynamo hands a float over as a tensor and reads it by `item()`."""
    open: Open | None
    """Sizes that Dynamo left open; None if they cannot be told to torch.export one by one."""
    computed: tuple[int, ...]
    """Outputs that are tensors."""
    rest: fx.GraphModule
    """What computes the others: numbers, None."""
    has_weights: bool

    @classmethod
    def of(cls, module: fx.GraphModule, inputs: Sequence[object]) -> Graph:
        nodes = module.graph.find_nodes(op="placeholder")
        paths = [_path(node) for node in nodes]
        params = {
            i: path
            for i, (path, x) in enumerate(zip(paths, inputs, strict=True))
            if path and isinstance(x, Tensor)
        }
        others = [i for i in range(len(nodes)) if i not in params]
        tensors = [i for i in others if isinstance(inputs[i], Tensor) and not _is_float(nodes[i])]
        values = [node.meta["example_value"] for node in nodes]
        # A symbol is looked for by its text: a size of 2·s is not the size s.
        places = {str(s): (i, axis) for i in tensors for axis, s in enumerate(values[i].shape)}
        numbers = [i for i in others if i not in tensors]
        sizes = {i: places[str(values[i])] for i in numbers if str(values[i]) in places}
        outputs = module.graph.output_node().args[0]
        assert isinstance(outputs, tuple | list)
        computed = tuple(i for i, o in enumerate(outputs) if _is_tensor(o))
        return cls(
            module,
            params,
            tuple(tensors),
            sizes,
            tuple(i for i in numbers if i not in sizes),
            _open({i: values[i].shape for i in tensors}),
            computed,
            _returning(module, [o for o in outputs if not _is_tensor(o)]),
            any(isinstance(x := inputs[i], Tensor) and x.ndim > 1 for i in params),
        )

    def inputs(self, args: Sequence[object]) -> tuple[Tensor, ...]:
        """The program's inputs among those of a call."""
        return tuple(x for i in self.tensors if isinstance(x := args[i], Tensor))

    def outputs(self, found: Sequence[object], args: Sequence[object]) -> tuple[object, ...]:
        """All outputs, from the program's."""
        rest = iter(self.rest(*args))
        own = dict(zip(self.computed, found, strict=True))
        count = len(self.module.graph.output_node().args[0])  # type: ignore[arg-type]
        return tuple(own[i] if i in own else next(rest) for i in range(count))

    def export(self, args: Sequence[object], open: Open) -> torch.export.ExportedProgram:
        """The graph with the parameters of a call, exported; its nodes know their modules."""
        shapes = tuple(dict(open[i]) if open.get(i) else None for i in self.tensors)
        try:
            with torch.no_grad(), preserve_node_meta():
                exported = torch.export.export(
                    _Scoped(self, args),
                    self.inputs(args),
                    dynamic_shapes=(shapes,),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=True,
                )
        except Exception as error:  # torch.export raises dozens of types, most of them private
            raise BadInput(
                f"torch.export refuses a graph of Dynamo's: {first_line(error, 2)}"
            ) from error
        for node in exported.graph.nodes:
            scope = node.meta.get("custom", {}).get(SCOPE, "")
            node.meta["nn_module_stack"] = {"": (scope, "")}
        return exported


class _Scoped(nn.Module):
    """Dynamo's graph as a module that holds the parameters of a call, by their names."""

    def __init__(self, graph: Graph, args: Sequence[object]) -> None:
        super().__init__()
        self._graph = [graph]  # in a list: its modules are none of this one's
        self._args: list[object] = [None] * len(args)
        for i in graph.numbers:
            self._args[i] = number(args[i])
        for i, name in graph.params.items():
            holder: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            value = args[i]
            assert isinstance(value, Tensor)
            holder.register_buffer(last, value.detach())

    def forward(self, *inputs: Tensor) -> tuple[object, ...]:
        graph = self._graph[0]
        args = list(self._args)
        for i, name in graph.params.items():
            args[i] = self.get_buffer(name)
        given = dict(zip(graph.tensors, inputs, strict=True))
        for i, x in given.items():
            args[i] = x
        for i, (tensor, axis) in graph.sizes.items():
            args[i] = given[tensor].shape[axis]
        found = _Interpreter(graph.module).run(*args)
        return tuple(found[i] for i in graph.computed)


class _Interpreter(fx.Interpreter):
    """Runs Dynamo's graph under export, and says where each operator comes from."""

    def run_node(self, n: fx.Node) -> Any:
        stack = list((n.meta.get("nn_module_stack") or {}).values())
        n.meta["custom"] = {SCOPE: _names(str(stack[-1][0])) if stack else ""}
        return super().run_node(n)  # which hands a node's meta on to the operators it makes

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "item" and not isinstance(args[0], Tensor):
            return args[0]
        return super().call_method(target, args, kwargs)


def number(value: object) -> object:
    """A number as itself, also where it was handed over as a tensor."""
    return value.item() if isinstance(value, Tensor) else value


def _is_float(node: fx.Node) -> bool:
    """Whether a tensor is read as a number and nothing else."""
    return bool(node.users) and {n.target for n in node.users} == {"item"}


def _path(node: fx.Node) -> str:
    """Name of the parameter or buffer that an input is, from where Dynamo found it:
    `L['self']._modules['up']._parameters['weight']` is `up.weight`. Empty if it is none."""
    source = getattr(node, "_dynamo_source", None)
    text = source.name if source is not None else ""
    return _names(text) if "._parameters[" in text or "._buffers[" in text else ""


def _names(text: str) -> str:
    """`L['self'].layers.0` → `layers.0`: the path behind the variable that holds the model."""
    return ".".join(w for w in re.findall(r"\w+", text)[2:] if w not in KINDS)


def _is_tensor(output: object) -> bool:
    return isinstance(output, fx.Node) and isinstance(output.meta["example_value"], Tensor)


def _returning(module: fx.GraphModule, outputs: list[Any]) -> fx.GraphModule:
    """The graph that computes `outputs` alone, from all inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    graph.output(tuple(fx.node.map_arg(outputs, copies.__getitem__)))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _open(shapes: Mapping[int, Sequence[int | torch.SymInt]]) -> Open | None:
    """The open sizes, unless one is computed from others."""
    found = {
        i: {axis: text for axis, size in enumerate(shape) if not (text := str(size)).isdigit()}
        for i, shape in shapes.items()
    }
    symbols = {text for axes in found.values() for text in axes.values()}
    if not all(text.isidentifier() for text in symbols):
        return None
    dims = {text: torch.export.Dim(text) for text in symbols}
    return {i: {axis: dims[text] for axis, text in axes.items()} for i, axes in found.items()}
