"""The only way to change a program: an `Edit`, made and sealed by the pipeline.

A pass gets an `Edit` on a private copy of the graph. Before each change it calls `spend(why)`; what
follows, up to the next `spend`, is one edit that keeps the pass's promise by itself. That lets the
pipeline stop a pass after n edits (fuel) and bisect a broken one down to the first bad edit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument

from qcompiler.errors import PassError
from qcompiler.formats import Scheme
from qcompiler.history import Reason
from qcompiler.layout import in_place, layouts
from qcompiler.program import Program, Tag, node_id, op_name
from qcompiler.recurrent import SHAPES

Target = Callable[..., object]

_log = logging.getLogger("torch._subclasses.fake_tensor")


class OutOfFuel(Exception):
    """Raised by `spend` when the pipeline allows no further edit; the pipeline catches it."""


@dataclass
class _Open:
    """The edit under way."""

    why: str
    nodes: dict[str, None] = field(default_factory=dict)


class Edit:
    """A private, editable copy of `program` for the pass called `by`."""

    def __init__(self, program: Program, by: str, fuel: int | None = None) -> None:
        self.graph, self._own = copy_graph(program.graph)
        self.io = program.io
        self._source = program
        self._by = by
        self._fuel = fuel
        self._params = dict(program.params)
        self._slots = dict(program.slots)
        self._plan = dict(program.plan)
        self._counters = dict(program.counters)
        self._maps = dict(program.maps)
        self._edits: list[_Open] = []
        self._extended: dict[fx.Node, fx.Node] = {}
        self._weights = {self._own[n] for n in program.weights}
        self._inputs = [
            n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self._slots
        ]
        self._start: fx.Node = next(n for n in self.graph.nodes if n.op != "placeholder")
        self._layouts = layouts(n for n in self.graph.nodes if n in self._weights)
        self._mode = detect_fake_mode([n.meta.get("val") for n in self.graph.nodes])
        self._skipped: list[Reason] = []
        self._notes: list[str] = []

    # --- reading -------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The nodes in order. A pass may edit while it walks: nodes that go are left out."""
        return (n for n in list(self.graph.nodes) if not n._erased)

    def calls(self, *targets: Target) -> Iterator[fx.Node]:
        """The nodes that call one of `targets` (all calls if none are given), in order."""
        return (
            n
            for n in self.nodes
            if n.op == "call_function" and (not targets or n.target in targets)
        )

    def is_weight(self, node: object) -> bool:
        """Whether `node` is a parameter or an expression of parameters alone."""
        return node in self._weights

    def own(self, node: fx.Node) -> fx.Node:
        """The node of this edit that `node` of the program was copied to.

        For a weight, where its edge ends by now (see `extend`).
        """
        node = self._own[node]
        while node in self._extended:
            node = self._extended[node]
        return node

    def param_of(self, node: object) -> str | None:
        """Name of the parameter that `node` is, or None."""
        return self._slots.get(node.name) if isinstance(node, fx.Node) else None

    def tensor(self, node: fx.Node) -> Tensor:
        """Value of a parameter node. Never change it in place."""
        return self._params[self._slots[node.name]]

    @property
    def plan(self) -> dict[str, Scheme]:
        return dict(self._plan)

    # --- accounting ----------------------------------------------------------------------------

    def spend(self, why: str, *nodes: fx.Node) -> None:
        """Open the next edit, with its reason in words; `nodes` are the ones it is about."""
        if self._fuel is not None and len(self._edits) >= self._fuel:
            raise OutOfFuel
        self._edits.append(_Open(why, {node_id(n): None for n in nodes}))

    def skip(self, node: fx.Node | str, why: str) -> None:
        """Record that the pass leaves `node` alone, and why."""
        self._skipped.append(Reason(why, (node if isinstance(node, str) else node_id(node),)))

    def note(self, text: str) -> None:
        """Something a reader of the step should know that is about no single node."""
        self._notes.append(text)

    def _touch(self, *nodes: fx.Node) -> None:
        if not self._edits:
            raise PassError(f"pass {self._by!r} changes the program before it called spend(why)")
        for node in nodes:
            self._edits[-1].nodes[node_id(node)] = None

    def place(self) -> str:
        """` in edit 3 ("why")`, for error messages; empty before the first edit."""
        if not self._edits:
            return ""
        return f" in edit {len(self._edits)} ({self._edits[-1].why!r})"

    # --- changing ------------------------------------------------------------------------------

    def call(
        self,
        target: Target,
        *args: Argument,
        like: fx.Node,
        replaces: Sequence[fx.Node] = (),
        **kwargs: Argument,
    ) -> fx.Node:
        """Insert a call right behind the last of its inputs.

        `like` lends its module path; `replaces` are the nodes that the new one stands for. Shape
        and type are computed at once, so a wrong call fails here, at the pass's own line.
        """
        inputs = [n for n in _inputs(args, kwargs) if n.op != "placeholder"]
        place = max(inputs).next if inputs else self._first_call()
        with self.graph.inserting_before(place):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake_call(node, self._mode)
        origin = tuple(node_id(n) for n in replaces)
        self._tag(node, Tag.of(like).scope, op_name(target), origin)
        self._judge(node)
        self._touch(node, *replaces)
        return node

    def replace(self, old: fx.Node, new: fx.Node, only: Iterable[fx.Node] | None = None) -> None:
        """Let the users of `old` (all but `new`, or `only` some) read `new` instead."""
        wanted = None if only is None else set(only)
        users = [u for u in old.users if u is not new and (wanted is None or u in wanted)]
        self._touch(old, new, *users)
        for user in users:
            user.replace_input_with(old, new)
            self._judge(user)
        self._erase_dead(old)

    def extend(self, weight: fx.Node, end: fx.Node) -> None:
        """Let the layers that read `weight` read the expression `end` of it instead.

        What computes another weight from it (a bias, say) goes on reading what it did, also through
        a layout that layers read too.
        """
        readers = self._in_place(weight)
        self._keep_layouts(weight, weight)
        self._extended[weight] = end
        self.replace(weight, end, only=readers)

    def _in_place(self, node: fx.Node) -> list[fx.Node]:
        return in_place(node, self._weights, self._layouts)

    def _keep_layouts(self, node: fx.Node, same: fx.Node) -> None:
        """Copy the layouts of `node` onto `same` for whoever reads them and is no layer."""
        for layout in self._in_place(node):
            if layout not in self._weights:
                continue
            args, kwargs = fx.node.map_arg(
                (layout.args, layout.kwargs), lambda n: same if n is node else n
            )
            copy = self.call(layout.target, *args, like=layout, **kwargs)  # type: ignore[arg-type]
            self._keep_layouts(layout, copy)
            others = set(layout.users) - set(self._in_place(layout)) - {copy}
            self.replace(layout, copy, only=others)

    def new_param(self, name: str, value: Tensor, like: fx.Node | None = None) -> fx.Node:
        """Add a parameter; `name` gets a number if it is taken. Returns its placeholder."""
        name = self._free(name)
        with self.graph.inserting_before(self._inputs[0] if self._inputs else self._first_call()):
            node = self.graph.placeholder("p_" + "".join(c if c.isalnum() else "_" for c in name))
        node.meta["val"] = self._fake(value)
        Tag(name, Tag.of(like).scope if like else "", self._by).put(node)
        self._params[name] = value
        self._slots[node.name] = name
        self._weights.add(node)
        self._touch(node)
        return node

    def set_param(self, node: fx.Node, value: Tensor) -> None:
        """Give the parameter `node` a new value; its name stays, its shape may change."""
        self._touch(node)
        self._params[self._slots[node.name]] = value
        node.meta["val"] = self._fake(value)

    def free(self, node: fx.Node, kind: str) -> None:
        """Note that the parameter `node` is a map whose inverse is in the graph too."""
        self._touch(node)
        self._maps[self._slots[node.name]] = kind

    def settle(self, node: fx.Node) -> None:
        """Note that the parameter `node` is free no more: what undoes it has been computed."""
        self._maps.pop(self._slots[node.name], None)

    def untie(self, node: fx.Node, users: Iterable[fx.Node]) -> fx.Node:
        """Give `users` their own copy of the shared parameter `node`."""
        name = self._slots[node.name]
        copy = self.new_param(name, self._params[name], like=node)
        self.replace(node, copy, only=users)
        return copy

    def rewire(self, node: fx.Node, index: int, value: Argument) -> None:
        """Set argument `index` of `node`; the node keeps its id."""
        self._touch(node)
        old = node.args[index] if index < len(node.args) else None
        node.args = (*node.args, *[None] * (index + 1 - len(node.args)))
        node.update_arg(index, value)
        self._judge(node)
        node.meta["val"] = fake_call(node, self._mode)
        if isinstance(old, fx.Node):
            self._erase_dead(old)

    def assign(self, node: fx.Node, scheme: Scheme) -> None:
        """Set the scheme of a site in the plan."""
        if not isinstance(scheme, Scheme):
            raise PassError(
                f"pass {self._by!r} assigns {scheme!r} to {node_id(node)}; expected a Scheme, as "
                "in Scheme(weight=QFormat.parse('int8:channel'))"
            )
        self._touch(node)
        self._plan[node_id(node)] = scheme

    # --- sealing -------------------------------------------------------------------------------

    def seal(self) -> tuple[Program, tuple[Reason, ...], tuple[Reason, ...], tuple[str, ...]]:
        """Drop what nobody reads, check the graph, and freeze it."""
        for node in reversed(list(self.nodes)):
            self._erase_dead(node)
        self._sink_weights()
        for node in self.graph.nodes:
            if "custom" not in node.meta:
                raise PassError(
                    f"pass {self._by!r} made node {node.name!r} behind the editor's back; "
                    "use edit.call"
                )
        for node, copy in self._own.items():
            if not copy._erased and copy.target != node.target:
                raise PassError(
                    f"pass {self._by!r} made another operator of node {node_id(node)} behind the "
                    "editor's back; use edit.call and edit.replace"
                )
        self.graph.lint()
        slots = {n.name: self._slots[n.name] for n in self.graph.nodes if n.name in self._slots}
        alive = {node_id(n) for n in self.graph.nodes}
        program = replace(
            self._source,
            graph=self.graph,
            params={name: self._params[name] for name in slots.values()},
            slots=slots,
            plan={id: scheme for id, scheme in self._plan.items() if id in alive},
            maps={name: kind for name, kind in self._maps.items() if name in slots.values()},
            counters=self._counters,
        )
        edits = tuple(Reason(e.why, tuple(e.nodes)) for e in self._edits)
        return program, edits, tuple(self._skipped), tuple(self._notes)

    def _sink_weights(self) -> None:
        """Compute each weight's expression just before its reader: one is in memory at a time."""
        for node in reversed(list(self.nodes)):
            if node.op == "call_function" and self.is_weight(node):
                min(node.users).prepend(node)

    def _erase_dead(self, node: fx.Node) -> None:
        """Erase `node` if nobody reads it, and then its inputs likewise. User inputs stay."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            removable = node.op == "call_function" or node.name in self._slots
            if removable and not node.users and not node._erased:
                waiting.extend(node.all_input_nodes)
                self.graph.erase_node(node)

    # --- helpers -------------------------------------------------------------------------------

    def _judge(self, node: fx.Node) -> None:
        """Note whether a call is an expression of parameters alone."""
        if node.op != "call_function":
            return
        if node.all_input_nodes and self._weights.issuperset(node.all_input_nodes):
            self._weights.add(node)
        else:
            self._weights.discard(node)

    def _first_call(self) -> fx.Node:
        """The first node behind the placeholders."""
        if self._start._erased:
            self._start = next(n for n in self.graph.nodes if n.op != "placeholder")
        while self._start.prev.op not in ("placeholder", "root"):
            self._start = self._start.prev
        return self._start

    def _tag(self, node: fx.Node, scope: str, op: str, origin: tuple[str, ...]) -> None:
        node_tag(node, scope, op, self._counters, self._by, origin)

    def _free(self, name: str) -> str:
        base, n = name, self._counters.get(name, 1 if name in self._params else 0)
        while name in self._params or n:
            n += 1
            name = f"{base}.{n}"
            if name not in self._params:
                break
        self._counters[base] = max(n, 1)
        return name

    def _fake(self, value: Tensor) -> object:
        return self._mode.from_tensor(value, static_shapes=True) if self._mode else value.to("meta")


def node_tag(
    node: fx.Node,
    scope: str,
    op: str,
    counters: dict[str, int],
    by: str = "capture",
    origin: tuple[str, ...] = (),
) -> None:
    """Give `node` the next free id of `scope/op`."""
    stem = f"{scope}/{op}" if scope else op
    number = counters.get(stem, 0)
    counters[stem] = number + 1
    Tag(f"{stem}#{number}", scope, by, origin).put(node)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy whose nodes keep name, meta and order, and the copy of each node.

    Nested meta values are shared.
    """
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, lambda n: mapping[n])
    return copy, mapping


def fake_call(node: fx.Node, mode: FakeTensorMode | None) -> object:
    """Result of a call on the fake values of its inputs: shape and type without arithmetic."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # torch 2.11's composite operators take symbolic sizes only where Python decomposes them.
    with torch.no_grad(), enable_python_dispatcher(), mode or nullcontext(), _unlogged():
        return SHAPES.get(node.target, node.target)(*args, **kwargs)


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch prints the traceback of a call that fails besides raising it."""
    was, _log.disabled = _log.disabled, True
    try:
        yield
    finally:
        _log.disabled = was


def _inputs(args: object, kwargs: object) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg((args, kwargs), note)
    return found
