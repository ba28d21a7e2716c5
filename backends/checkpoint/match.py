"""Where a program's weights belong in the architecture that it was captured from.

Both graphs are walked together from their outputs: the same operators on the same constants, with
a parameter of the source wherever the program has a weight expression. What holds on every edge is
a proof: the source architecture with these weights, and inputs rounded where the program rounds
them, is the program. What has no counterpart is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import fx

from qcompiler.errors import BackendError
from qcompiler.program import Program, Tag, node_id, op_name
from qcompiler.run import param_value
from qcompiler.sites import site_of

aten = torch.ops.aten
qc = torch.ops.qc
ABSENT: dict[object, dict[int, float]] = {
    aten.rms_norm.default: {2: 1.0},
    aten.layer_norm.default: {2: 1.0, 3: 0.0},
    aten.linear.default: {2: 0.0},
    aten.conv1d.default: {2: 0.0},
    aten.conv2d.default: {2: 0.0},
}
"""Operator → argument → what it counts as where it is left out: gains one, biases zero."""


@dataclass(frozen=True)
class Reader:
    """A node of the source, and which of its arguments."""

    node: fx.Node
    index: int

    @property
    def scope(self) -> str:
        """Path of the module that it is."""
        return Tag.of(self.node).scope


@dataclass(frozen=True)
class Matched:
    """What each edge of the source with a parameter carries in the program."""

    weights: dict[Reader, fx.Node] = field(default_factory=dict)
    absent: dict[Reader, float] = field(default_factory=dict)
    """The program has no such argument: all of its numbers are this one."""
    biases: dict[Reader, fx.Node] = field(default_factory=dict)
    """The source has no such argument."""
    inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Layer of the source → the `qc::fake_quantize` node in front of its input."""


def match(program: Program, source: Program, architecture: str) -> Matched:
    """Walk both; a `BackendError` names the first node of `program` that the source lacks."""
    return _Walk(program, source, architecture).run()


class _Walk:
    def __init__(self, program: Program, source: Program, architecture: str) -> None:
        self._program, self._source, self._architecture = program, source, architecture
        self._found = Matched()
        self._todo: list[tuple[fx.Node, fx.Node]] = []
        self._seen: set[tuple[fx.Node, fx.Node]] = set()

    def run(self) -> Matched:
        ends = [next(n for n in p.nodes if n.op == "output") for p in (self._program, self._source)]
        self._todo.append((ends[0], ends[1]))
        while self._todo:
            pair = self._todo.pop()
            if pair not in self._seen:
                self._seen.add(pair)
                self._node(*pair)
        return self._found

    def _node(self, ours: fx.Node, theirs: fx.Node) -> None:
        """Two activations: the same operator, or the same input."""
        if ours.op != theirs.op or (ours.op == "call_function" and ours.target != theirs.target):
            raise self._misfit(ours, f"where the architecture has {_word(theirs)}")
        if ours.op == "placeholder":
            inputs = self._program.inputs, self._source.inputs
            if inputs[0].index(ours) != inputs[1].index(theirs):
                raise self._misfit(ours, f"where the architecture reads {_word(theirs)}")
            return
        if ours.kwargs.keys() != theirs.kwargs.keys():
            raise self._misfit(ours, "with other arguments than the architecture's")
        for index, (a, b) in enumerate(zip_longest(ours.args, theirs.args)):
            self._argument(ours, Reader(theirs, index), a, b)
        for key, a in ours.kwargs.items():
            self._argument(ours, Reader(theirs, -1), a, theirs.kwargs[key])

    def _argument(self, node: fx.Node, reader: Reader, ours: object, theirs: object) -> None:
        """What the program's `node` and the `reader` of the source read at one place."""
        if isinstance(theirs, fx.Node) and theirs in self._source.weights:
            self._weight(node, reader, ours, theirs)
        elif theirs is None and isinstance(ours, fx.Node) and ours in self._program.weights:
            if reader.index not in ABSENT.get(node.target, {}):
                raise self._misfit(node, "with a parameter that the architecture lacks")
            self._found.biases[reader] = ours
        elif isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
            self._todo.append((self._unrounded(node, reader, ours), theirs))
        elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
            for a, b in zip_longest(ours, theirs):
                self._argument(node, Reader(reader.node, -1), a, b)
        elif ours != theirs:
            raise self._misfit(node, f"with {ours} where the architecture has {theirs}")

    def _unrounded(self, node: fx.Node, reader: Reader, ours: fx.Node) -> fx.Node:
        """`ours`, or behind a rounding what is rounded; that of a layer's input is noted down."""
        if ours.target is not qc.fake_quantize.default:
            return ours
        site = site_of(node)
        if site is None or site.kind.x != reader.index:
            raise BackendError(
                f"node {node_id(ours)} rounds what {node_id(node)} reads to {ours.args[1]}; these "
                "files say only how inputs of layers with a weight are rounded. Leave out `key`, "
                "`value` and `probabilities` of assign"
            )
        self._found.inputs[reader.node] = ours
        assert isinstance(ours.args[0], fx.Node)
        return ours.args[0]

    def _weight(self, node: fx.Node, reader: Reader, ours: object, theirs: fx.Node) -> None:
        """A weight expression of the source, and what the program has instead."""
        if ours is None and reader.index in ABSENT.get(node.target, {}):
            self._found.absent[reader] = ABSENT[node.target][reader.index]
        elif not isinstance(ours, fx.Node) or ours not in self._program.weights:
            raise self._misfit(node, f"without the architecture's {_word(theirs)}")
        elif theirs.op == "placeholder":
            self._found.weights[reader] = ours
        elif ours.op == "call_function" and ours.target == theirs.target:
            self._todo.append((ours, theirs))
        elif not _equal(self._program, ours, self._source, theirs):
            raise self._misfit(node, f"with another value for {_word(theirs)}")

    def _misfit(self, node: fx.Node, what: str) -> BackendError:
        by = Tag.of(node).by if node.op == "call_function" else "capture"
        made = "" if by in ("capture", "canonicalize") else f", which `{by}` put in,"
        return BackendError(
            f"node {_word(node)}{made} stands {what}: {self._architecture} has no place for it, so "
            f"files of that architecture cannot hold this program. {_cure(node, by)}"
        )


def _word(node: fx.Node) -> str:
    return f"{node_id(node)} ({op_name(node.target)})" if node.op != "output" else "the output"


def _cure(node: fx.Node, by: str) -> str:
    if node.target is qc.hadamard.default:
        return "Compile without what runs online: `rotate{online=false heads=false}`"
    if by not in ("capture", "canonicalize"):
        return f"Compile without `{by}`, or with options of it that change weights only"
    return "Compile the folder itself, with the inputs it brings, or name its folder by --source"


def _equal(program: Program, ours: fx.Node, source: Program, theirs: fx.Node) -> bool:
    """Whether two weight expressions have one value, up to the rounding to its own type."""
    a, b = param_value(program, ours), param_value(source, theirs)
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.equal(a.to(ours.meta["val"].dtype), b.to(theirs.meta["val"].dtype))
