"""A program as JSON text, and back. No pickle anywhere: a file can name operators, not run code.

Operators are `namespace::name.overload` of torch's registry, or functions of `operator`, `math` and
torch's `sym_…` helpers; nothing else is looked up.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qcompiler.diff import NodeText, ParamText, Snapshot, diff
from qcompiler.errors import BadInput
from qcompiler.formats import QFormat, Scheme
from qcompiler.history import Effect, Reason, Step
from qcompiler.io import Port, Signature
from qcompiler.program import Program, Tag
from qcompiler.shapes import propagate

Json = Any  # what the json module reads and writes

MODULES = {"operator": operator, "math": math, "torch": torch}


# --- programs ----------------------------------------------------------------------------------


def encode_program(program: Program) -> Json:
    """Everything but the tensors and the history."""
    return {
        "graph": [_encode_node(n) for n in program.graph.nodes],
        "slots": dict(program.slots),
        "plan": {id: _encode_scheme(s) for id, s in program.plan.items()},
        "counters": dict(program.counters),
        "maps": dict(program.maps),
        "metadata": dict(program.metadata),
        "io": _encode_io(program.io),
    }


def decode_program(raw: Json, params: Mapping[str, Tensor]) -> Program:
    """The inverse of `encode_program`; shapes of all values are computed anew."""
    io = _decode_io(raw["io"])
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in raw["graph"]:
        args = _decode(entry["args"], nodes)
        kwargs = {name: _decode(value, nodes) for name, value in entry["kwargs"].items()}
        target = entry["target"]
        if entry["op"] == "call_function":
            target = _decode_target(target)
        node = graph.create_node(entry["op"], target, tuple(args), kwargs, name=entry["name"])
        tag = entry["tag"]
        Tag(tag["id"], tag["scope"], tag["by"], tuple(tag["origin"])).put(node)
        nodes[entry["name"]] = node
    program = Program(
        graph=graph,
        params={name: params[name] for name in raw["slots"].values()},
        slots=raw["slots"],
        io=io,
        plan={id: _decode_scheme(s) for id, s in raw["plan"].items()},
        counters=raw["counters"],
        maps=raw.get("maps", {}),
        metadata=raw.get("metadata", {}),
    )
    propagate(program)
    return program


def _encode_node(node: fx.Node) -> Json:
    tag = Tag.of(node)
    call = node.op == "call_function"
    return {
        "name": node.name,
        "op": node.op,
        "target": _encode_target(node.target) if call else str(node.target),
        "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "tag": {"id": tag.id, "scope": tag.scope, "by": tag.by, "origin": list(tag.origin)},
    }


def _encode(value: object) -> Json:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    for kind, what in (
        (torch.dtype, "dtype"),
        (torch.layout, "layout"),
        (torch.memory_format, "memory_format"),
    ):
        if isinstance(value, kind):
            return {what: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise BadInput(f"a graph holds {value!r} ({type(value).__name__}), which cannot be saved")


def _decode(value: Json, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((key, inner),) = value.items()
    if key == "node":
        return nodes[inner]
    if key == "float":
        return float(inner)
    if key == "device":
        return torch.device(inner)
    if key in ("dtype", "layout", "memory_format"):
        return getattr(torch, inner)
    raise KeyError(key)


def _encode_target(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._schema.name}.{target._overloadname}"
    module = getattr(target, "__module__", "").removeprefix("_")
    name = getattr(target, "__name__", "")
    if getattr(MODULES.get(module), name, None) is target:
        return f"{module}.{name}"
    raise BadInput(f"operator {target!r} cannot be saved: it is in no registry")


def _decode_target(text: str) -> object:
    if "::" in text:
        namespace, _, rest = text.partition("::")
        name, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        found = getattr(packet, overload, None)
    else:
        module, _, name = text.partition(".")
        allowed = module in ("operator", "math") or name.startswith("sym_")
        found = getattr(MODULES.get(module), name, None) if allowed else None
    if found is None:
        raise BadInput(f"the artifact uses operator {text!r}, which this installation lacks")
    return found


def _encode_scheme(scheme: Scheme) -> Json:
    parts = {"weight": scheme.weight, "activation": scheme.activation, **scheme.attention}
    return {name: str(fmt) if fmt else None for name, fmt in parts.items()}


def _decode_scheme(raw: Json) -> Scheme:
    return Scheme(**{name: QFormat.parse(text) if text else None for name, text in raw.items()})


def _dumped(spec: pytree.TreeSpec, what: str) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        found = re.search(r"<class '([^']+)'>", str(error))
        raise BadInput(
            f"the model {what} {found[1] if found else 'a class of its own'}, which an artifact "
            "cannot be written with; let it be a tuple or a dict, or name the class for torch "
            "(torch.utils._pytree._register_namedtuple)"
        ) from error


def _encode_io(io: Signature) -> Json:
    specs = [io.in_spec, io.out_spec]
    return {
        "ports": [
            {
                "name": p.name,
                "dtype": str(p.dtype).removeprefix("torch.") if p.dtype else None,
                "shape": list(p.shape),
                "low": p.low,
                "high": p.high,
                "constant": p.constant,
            }
            for p in io.ports
        ],
        "in_spec": _dumped(io.in_spec, "takes"),
        "out_spec": _dumped(io.out_spec, "returns"),
        "modules": sorted({m for s in specs for m in _modules(s)}),
        "names": list(io.names),
        "dims": {k: list(v) for k, v in io.dims.items()},
        "steps": dict(io.steps),
        "fills": dict(io.fills),
        "counts": {k: list(v) for k, v in io.counts.items()},
        "required": sorted(io.required),
    }


def _decode_io(raw: Json) -> Signature:
    if any(m.split(".")[0] == "transformers" for m in raw["modules"]):
        try:
            import transformers.modeling_outputs  # noqa: F401 (registers the output types)
        except ImportError as error:
            raise BadInput(
                "the artifact returns transformers output objects; pip install 'qcompiler[hf]'"
            ) from error
    ports = tuple(
        Port(
            p["name"],
            getattr(torch, p["dtype"]) if p["dtype"] else None,
            tuple(p["shape"]),
            p["low"],
            p["high"],
            p["constant"],
        )
        for p in raw["ports"]
    )
    return Signature(
        ports,
        pytree.treespec_loads(raw["in_spec"]),
        pytree.treespec_loads(raw["out_spec"]),
        tuple(raw["names"]),
        {k: (v[0], v[1]) for k, v in raw["dims"].items()},
        raw.get("steps", {}),
        raw.get("fills", {}),
        {k: tuple(v) for k, v in raw.get("counts", {}).items()},
        frozenset(raw.get("required", ())),
    )


def _modules(spec: pytree.TreeSpec) -> set[str]:
    """Python modules of the container types in a structure."""
    if spec.is_leaf():
        return set()
    inner = {m for child in spec.children() for m in _modules(child)}
    return inner | {getattr(spec.type, "__module__", "builtins")}


# --- histories ---------------------------------------------------------------------------------


def encode_history(history: tuple[Step, ...]) -> Json:
    """Steps with their snapshots; diffs are left out, since they are computed from those."""
    return [
        {
            "name": s.name,
            "spec": s.spec,
            "effect": s.effect.value if s.effect else None,
            "edits": [[e.why, list(e.nodes)] for e in s.edits],
            "skipped": [[e.why, list(e.nodes)] for e in s.skipped],
            "metrics": {k: _encode(v) for k, v in s.metrics.items()},
            "nodes": {k: _encode(v) for k, v in s.nodes.items()},
            "notes": list(s.notes),
            "seconds": s.seconds,
            "after": {
                "nodes": {
                    id: [n.op, n.inputs, n.call, n.shape, n.scope, n.origin, n.by]
                    for id, n in s.after.nodes.items()
                },
                "params": {
                    name: [p.dtype, p.shape, p.digest, p.low, p.high, p.bytes]
                    for name, p in s.after.params.items()
                },
                "plan": dict(s.after.plan),
            },
        }
        for s in history
    ]


def decode_history(raw: Json) -> tuple[Step, ...]:
    """The inverse of `encode_history`."""
    steps: list[Step] = []
    for entry in raw:
        after = Snapshot(
            nodes={
                id: NodeText(op, tuple(inputs), call, shape, scope, tuple(origin), by)
                for id, (op, inputs, call, shape, scope, origin, by) in entry["after"][
                    "nodes"
                ].items()
            },
            params={
                name: ParamText(dtype, tuple(shape), digest, low, high, size)
                for name, (dtype, shape, digest, low, high, size) in entry["after"][
                    "params"
                ].items()
            },
            plan=entry["after"]["plan"],
        )
        before = steps[-1].after if steps else after
        steps.append(
            Step(
                name=entry["name"],
                spec=entry["spec"],
                effect=Effect(entry["effect"]) if entry["effect"] else None,
                diff=diff(before, after),
                after=after,
                edits=tuple(Reason(why, tuple(ids)) for why, ids in entry["edits"]),
                skipped=tuple(Reason(why, tuple(ids)) for why, ids in entry["skipped"]),
                metrics={k: _decode(v, {}) for k, v in entry["metrics"].items()},
                nodes={k: _decode(v, {}) for k, v in entry["nodes"].items()},
                notes=tuple(entry["notes"]),
                seconds=entry["seconds"],
            )
        )
    return tuple(steps)
