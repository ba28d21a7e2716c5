"""The program: one frozen value that holds graph, parameters, plan and history.

The graph is a `torch.fx.Graph` of aten and `qc::` operators in which every parameter is an ordinary
input (a *lifted placeholder*), so a weight is an edge like any other and the graph is a pure
function of (parameters, inputs). Nobody changes a sealed program; passes get a copy (`edit.py`).

Every node has a `Tag`: an id that is given once, at capture or by the edit that makes the node, and
never reused, plus the ids that it replaces, who made it, and the module path that it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from qcompiler.errors import BadInput
from qcompiler.formats import Scheme
from qcompiler.io import Port, Signature

if TYPE_CHECKING:
    from qcompiler.history import Step

__all__ = ["Plan", "Port", "Program", "Signature", "Tag", "op_name"]

ID_KEY = "qcompiler.id"
"""Key under which a file that we write keeps the id of the node that its own came from."""
Plan = Mapping[str, Scheme]
"""Node id of a site (linear, convolution, embedding) → its scheme."""


@dataclass(frozen=True)
class Tag:
    """A node's identity, as plain strings in `node.meta["custom"]`, which survives a copy."""

    id: str
    """`module.path/op#n`; never reused, also not after the node is gone."""
    scope: str = ""
    """Path of the module whose forward made the node."""
    by: str = "capture"
    """The pass that made the node."""
    origin: tuple[str, ...] = ()
    """Ids of the nodes that it replaces."""

    @classmethod
    def of(cls, node: fx.Node) -> Tag:
        raw = node.meta["custom"]
        return cls(raw["id"], raw["scope"], raw["by"], tuple(raw["origin"].split()))

    def put(self, node: fx.Node) -> None:
        # A new dictionary each time: graph copies share the nested ones.
        node.meta["custom"] = {
            "id": self.id,
            "scope": self.scope,
            "by": self.by,
            "origin": " ".join(self.origin),
        }


def node_id(node: fx.Node) -> str:
    """The id of a tagged node."""
    return str(node.meta["custom"]["id"])


def op_name(target: object) -> str:
    """`linear` for `torch.ops.aten.linear.default`, `qc.rope` for ours, `add` for operator.add."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
        return name if target.namespace == "aten" else f"{target.namespace}.{name}"
    return getattr(target, "__name__", str(target))


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of the tensor that `node` yields; dimensions may be symbolic."""
    return tuple(node.meta["val"].shape)


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


@dataclass(frozen=True, eq=False)
class Program:
    """A captured network. See the module docstring; every field is read-only by contract."""

    graph: fx.Graph
    params: Mapping[str, Tensor]
    """Parameter name (as in the source model) → tensor."""
    slots: Mapping[str, str]
    """Name of a placeholder node → parameter name."""
    io: Signature
    plan: Plan = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    """Next number for each `module.path/op`; ids are never reused."""
    maps: Mapping[str, str] = field(default_factory=dict)
    """Parameter → kind of map: any other map of that kind there gives the same function, because
    its inverse stands wherever it is undone. What a later pass may train."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the source file says about itself (author, licence, …); written into exported files."""

    # --- reading -------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)

    @cached_property
    def by_id(self) -> Mapping[str, fx.Node]:
        return {node_id(n): n for n in self.graph.nodes}

    def node(self, id: str) -> fx.Node:
        """The node called `id`, or a `BadInput` that offers the nearest id."""
        from qcompiler.errors import unknown

        if id not in self.by_id:
            raise unknown("node", id, self.by_id)
        return self.by_id[id]

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders of what a caller hands over, in order."""
        return [n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.slots]

    @cached_property
    def activations(self) -> frozenset[fx.Node]:
        """Inputs and calls that depend on one; the rest are parameters and their expressions."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            given = node.op == "placeholder" and node.name not in self.slots
            if given or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    @cached_property
    def weights(self) -> frozenset[fx.Node]:
        """Parameters, and calls on them alone."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            inputs = node.all_input_nodes
            call = node.op == "call_function" and inputs and found.issuperset(inputs)
            if call or node.name in self.slots:
                found.add(node)
        return frozenset(found)

    def param_of(self, node: object) -> str | None:
        """Name of the parameter that `node` is, or None."""
        return self.slots.get(node.name) if isinstance(node, fx.Node) else None

    def tensor(self, node: fx.Node) -> Tensor:
        """The value of a parameter node."""
        return self.params[self.slots[node.name]]

    @cached_property
    def bytes(self) -> int:
        """Bytes of all parameters as they are stored now."""
        return sum(t.numel() * t.element_size() for t in self.params.values())

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type in which most parameters are held, but maps that passes made:
        these are wider than what they will be folded into."""
        count: dict[torch.dtype, int] = {}
        for name, t in self.params.items():
            if t.is_floating_point() and name not in self.maps:
                count[t.dtype] = count.get(t.dtype, 0) + t.numel()
        return max(count, key=lambda d: count[d]) if count else torch.float32

    # --- running -------------------------------------------------------------------------------

    @cached_property
    def function(self) -> Callable[..., tuple[object, ...]]:
        """The graph as a function of (parameters in slot order, flat inputs)."""
        return fx.GraphModule(torch.nn.Module(), self.graph, "Program")

    def flat(self, inputs: tuple[object, ...]) -> tuple[object, ...]:
        """Run on flat inputs, return flat outputs. No gradients are recorded."""
        params = [self.params[name] for name in self.slots.values()]
        with torch.no_grad():
            return tuple(self.function(*params, *inputs))

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call with the source model's own signature; returns its own output structure."""
        return self.io.restore(self.flat(self.io.flatten(args, kwargs)))

    # --- printing ------------------------------------------------------------------------------

    def __str__(self) -> str:
        """One line per node: id, operator, inputs, shape. Weights as name, type and shape."""
        lines = []
        for node in self.graph.nodes:
            if node.op == "output":
                lines.append(f"return {', '.join(node_id(a) for a in node.all_input_nodes)}")
                continue
            val = node.meta.get("val")
            kind = (
                f"{str(val.dtype).removeprefix('torch.')}{[str(s) for s in val.shape]}"
                if isinstance(val, Tensor)
                else type(val).__name__
            ).replace("'", "")
            if name := self.slots.get(node.name):
                lines.append(f"param {name}: {kind}")
            elif node.op == "placeholder":
                lines.append(f"input {node_id(node)}: {kind}")
            else:
                arguments = ", ".join(node_id(a) for a in node.all_input_nodes)
                lines.append(f"{node_id(node)}: {kind} = {op_name(node.target)}({arguments})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        count = sum(n.op == "call_function" for n in self.graph.nodes)
        return f"<Program: {count} nodes, {len(self.params)} parameters, {self.bytes:,} bytes>"

    def with_history(self, step: Step) -> Program:
        return replace(self, history=(*self.history, step))


def digest(tensor: Tensor) -> str:
    """Twelve hex digits that name a tensor's content (type and shape included)."""
    hasher = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    raw = tensor.detach().contiguous().reshape(-1).cpu()
    hasher.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return hasher.hexdigest()[:12]


def check_finite(params: Mapping[str, Tensor]) -> None:
    """Refuse parameters with NaN or Inf: everything that follows would be silent garbage."""
    for name, tensor in params.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadInput(
                f"parameter {name!r} has {bad} NaN or infinite values of {tensor.numel()}; "
                "expected finite weights. Repair or retrain the model before compiling it"
            )
