"""What differs between two programs: computed by id from the programs, never logged.

A program is first summed up as a `Snapshot` (text per node, digest and range per parameter), which
is small, can be saved, and is all that a diff needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qcompiler.program import Program, digest, node_id, op_name


@dataclass(frozen=True)
class NodeText:
    """One node as text."""

    op: str
    inputs: tuple[str, ...]
    """Ids of the nodes that it reads."""
    call: str
    """The whole call with constants, `linear(x, w, None)`."""
    shape: str
    scope: str
    origin: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class ParamText:
    """One parameter, summed up."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    low: float
    high: float
    bytes: int

    def __str__(self) -> str:
        size = "×".join(map(str, self.shape)) or "scalar"
        return f"{self.dtype} {size} in [{self.low:.4g}, {self.high:.4g}] #{self.digest}"


@dataclass(frozen=True)
class Snapshot:
    """A program at one moment, without its tensors."""

    nodes: Mapping[str, NodeText]
    params: Mapping[str, ParamText]
    plan: Mapping[str, str]


def fingerprint(program: Program) -> str:
    """A name for the whole content of a sealed program: graph, parameters, plan."""
    return hashlib.sha256(repr(program.history[-1].after).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Diff:
    """Changes from one snapshot to another, all by node id or parameter name."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rewired: tuple[str, ...] = ()
    """Nodes that stayed but read other inputs or constants."""
    params: tuple[str, ...] = ()
    """Parameters whose value or shape changed."""
    params_added: tuple[str, ...] = ()
    params_removed: tuple[str, ...] = ()
    precision: Mapping[str, str] = field(default_factory=dict)
    """Site → `old → new` scheme."""

    @property
    def graph_changed(self) -> bool:
        return bool(
            self.added
            or self.removed
            or self.rewired
            or self.params
            or self.params_added
            or self.params_removed
        )

    def __bool__(self) -> bool:
        return self.graph_changed or bool(self.precision)

    def __str__(self) -> str:
        """`nodes +17 -123 ~37, params +11, schemes ~28`: added, removed, changed."""
        words = []
        for what, added, removed, changed in (
            ("nodes", self.added, self.removed, self.rewired),
            ("params", self.params_added, self.params_removed, self.params),
            ("schemes", (), (), self.precision),
        ):
            marks = (("+", added), ("-", removed), ("~", changed))
            counts = [f"{mark}{len(ids)}" for mark, ids in marks if ids]
            words += [f"{what} {' '.join(counts)}"] if counts else []
        return ", ".join(words) or "no change"


def snapshot(
    program: Program, known: Snapshot | None = None, old: Program | None = None
) -> Snapshot:
    """Sum up `program`. Parameters that are the same tensors as in `old` are taken from `known`."""
    params: dict[str, ParamText] = {}
    for name, tensor in program.params.items():
        if known and old and old.params.get(name) is tensor:
            params[name] = known.params[name]
        else:
            params[name] = _param_text(tensor)
    return Snapshot(
        nodes={node_id(n): _node_text(n) for n in program.graph.nodes},
        params=params,
        plan={id: str(scheme) for id, scheme in program.plan.items()},
    )


def diff(before: Snapshot, after: Snapshot) -> Diff:
    """What a reader of `before` must know to understand `after`."""
    shared = [id for id in after.nodes if id in before.nodes]
    common = [name for name in after.params if name in before.params]
    sites = {**before.plan, **after.plan}
    return Diff(
        added=tuple(id for id in after.nodes if id not in before.nodes),
        removed=tuple(id for id in before.nodes if id not in after.nodes),
        rewired=tuple(id for id in shared if after.nodes[id].call != before.nodes[id].call),
        params=tuple(n for n in common if after.params[n].digest != before.params[n].digest),
        params_added=tuple(n for n in after.params if n not in before.params),
        params_removed=tuple(n for n in before.params if n not in after.params),
        precision={
            id: f"{before.plan.get(id, 'float')} → {after.plan.get(id, 'float')}"
            for id in sites
            if before.plan.get(id) != after.plan.get(id)
        },
    )


def _node_text(node: fx.Node) -> NodeText:
    custom = node.meta["custom"]
    val = node.meta.get("val")
    shape = (
        f"{str(val.dtype).removeprefix('torch.')}[{', '.join(str(s) for s in val.shape)}]"
        if isinstance(val, Tensor)
        else type(val).__name__
    )
    op = op_name(node.target) if node.op == "call_function" else node.op
    return NodeText(
        op=op,
        inputs=tuple(node_id(n) for n in node.all_input_nodes),
        call=f"{op}({_arguments(node)})",
        shape=shape,
        scope=custom["scope"],
        origin=tuple(custom["origin"].split()),
        by=custom["by"],
    )


def _arguments(node: fx.Node) -> str:
    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return node_id(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(text(v) for v in value)}]"
        return str(value)

    words = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    return ", ".join(words)


def _ordered(tensor: Tensor) -> Tensor:
    """`tensor` in a type that torch can compare."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    unsigned = tensor.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return tensor.double() if narrow or unsigned else tensor


def _param_text(tensor: Tensor) -> ParamText:
    low, high = (float(v) for v in _ordered(tensor).aminmax()) if tensor.numel() else (0.0, 0.0)
    return ParamText(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        digest=digest(tensor),
        low=low,
        high=high,
        bytes=tensor.numel() * tensor.element_size(),
    )
