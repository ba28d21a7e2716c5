"""Blocks: a program cut where one value alone goes on, for work that goes block by block.

    inputs ─► [ block 0 ] ─x─► [ block 1 ] ─x─► … ─► outputs

A cut is a place in the graph's order where a single value that some weight had a part in is still
to be read (a residual stream, say); masks and rotary tables, which no weight had a part in, may go
on beside it. Where a stretch of many sites has no such place (a decoder, which reads the encoder's
output throughout), two values may go on, then three. Neighbours in one numbered module of the
source (`layers.3`) are one block.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompiler.program import Program, Tag, is_tensor
from qcompiler.run import last_readers, param_value
from qcompiler.sites import Site, site_of

MOST_SITES = 24
"""Sites of a stretch that is not searched for wider cuts."""
WIDEST = 6
"""Values that may go on at a cut, at most."""

Values = dict[fx.Node, object]
"""Values of one batch."""


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of a program."""

    number: int
    name: str
    """What its sites have in common of their module paths, or the first site's id."""
    nodes: tuple[fx.Node, ...]
    """Calls, in order; expressions of parameters are left out."""
    outputs: tuple[fx.Node, ...]
    """What later blocks and the program's output read of it."""
    alive: frozenset[fx.Node]
    """All that is still to be read behind it, the program's inputs left out."""
    sites: tuple[Site, ...]

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """The floating point tensors among the outputs."""
        return tuple(n for n in self.outputs if is_tensor(n) and n.meta["val"].is_floating_point())

    def stages(self) -> list[tuple[Site, ...]]:
        """Sites by depth: none of a stage depends on another one of it."""
        depth: dict[fx.Node, int] = {}
        mine = {s.node for s in self.sites}
        found: dict[int, list[Site]] = {}
        for node in self.nodes:
            depth[node] = max((depth.get(n, 0) for n in node.all_input_nodes), default=0)
            if node in mine:
                found.setdefault(depth[node], []).append(Site(node, site_of(node).kind))  # type: ignore[union-attr]
                depth[node] += 1
        return [tuple(found[d]) for d in sorted(found)]


def blocks(program: Program) -> tuple[Block, ...]:
    """The blocks of `program`, in order; every site that reads an input is in one."""
    order = [n for n in program.graph.nodes if n.op == "call_function" and n not in program.weights]
    cuts = _cuts(order)
    stretches = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    return tuple(_make(_join([s for s in stretches if s])))


def _cuts(order: list[fx.Node]) -> list[int]:
    """Places in `order` to cut at, of which each has a site before and behind it."""
    places = [i for i, n in enumerate(order) if site_of(n) is not None]
    if not places:
        return []
    carried = _carried(order)
    found: set[int] = set()
    for width in range(1, WIDEST + 1):
        ends = sorted({places[0], *found, len(order)})
        for start, end in itertools.pairwise(ends):
            inside = [p for p in places if start <= p < end]
            if width == 1 or len(inside) > MOST_SITES:
                for before, behind in itertools.pairwise(inside):
                    free = [i for i in range(before + 1, behind + 1) if carried[i] <= width]
                    found |= set(free[-1:])
    return sorted(found)


def _carried(order: list[fx.Node]) -> list[int]:
    """For each place, the values that a weight had a part in and that are read behind it."""
    place = {n: i for i, n in enumerate(order)}
    touched: set[fx.Node] = set()
    change = [0] * (len(order) + 2)
    for node in order:
        if site_of(node) is not None or not touched.isdisjoint(node.all_input_nodes):
            touched.add(node)
        last = max((place[u] for u in node.users if u in place), default=place[node])
        if node in touched and is_tensor(node) and last > place[node]:
            change[place[node] + 1] += 1
            change[last + 1] -= 1
    found, now = [], 0
    for i in range(len(order) + 1):
        now += change[i]
        found.append(now)
    return found


def _join(stretches: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Neighbouring stretches of one numbered module together, and those without a site."""
    found: list[list[fx.Node]] = []
    last: str | None = None
    for stretch in stretches:
        names = {_numbered(n) for n in stretch if site_of(n) is not None}
        name = names.pop() if len(names) == 1 else None
        if found and (not _has_site(stretch) or (name is not None and name == last)):
            found[-1] += stretch
            continue
        found.append(list(stretch))
        last = name
    return found


def _has_site(nodes: list[fx.Node]) -> bool:
    return any(site_of(n) is not None for n in nodes)


def _numbered(node: fx.Node) -> str | None:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`, or None."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", Tag.of(node).scope)
    return match[0] if match else None


def _make(stretches: list[list[fx.Node]]) -> Iterator[Block]:
    seen: set[fx.Node] = set()
    for number, nodes in enumerate(stretches):
        seen |= set(nodes)
        alive = frozenset(n for n in seen if not seen.issuperset(n.users))
        outputs = tuple(n for n in nodes if n in alive)
        found = tuple(s for s in map(site_of, nodes) if s is not None)
        yield Block(number, _name(found), tuple(nodes), outputs, alive, found)


def _name(sites: tuple[Site, ...]) -> str:
    names = {_numbered(s.node) for s in sites}
    first = next(iter(names), None)
    if len(names) == 1 and first is not None:
        return first
    return sites[0].id if sites else ""


Call = Callable[[fx.Node, tuple[Any, ...], Mapping[str, Any]], object]


class Runner:
    """Runs one block of a program on values of what comes before it."""

    def __init__(self, program: Program, block: Block) -> None:
        self._block = block
        self._slots = program.slots
        self._params = program.params
        needed = {n for node in block.nodes for n in node.all_input_nodes}
        self._weights: Mapping[fx.Node, Tensor] = {
            n: self._weight(program, n) for n in needed if n in program.weights
        }
        self._last = last_readers(block.nodes, block.alive)

    @staticmethod
    def _weight(program: Program, node: fx.Node) -> Tensor:
        if node.op == "placeholder":
            return program.params[program.slots[node.name]]
        value = param_value(program, node)
        assert value is not None
        return value.to(node.meta["val"].dtype)

    def weight(self, site: Site) -> Tensor:
        """The weight of a site, in its own type and shape."""
        return self._weights[site.weight]

    def run(self, before: Values, call: Call | None = None, until: fx.Node | None = None) -> Values:
        """Values of all that is alive behind the block; `before` is left as it is.

        `call` computes a node in place of its operator. With `until`, that is the last one.
        """
        values: Values = dict(before)

        def value(node: fx.Node) -> object:
            return self._weights[node] if node in self._weights else values[node]

        for node in self._block.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)  # type: ignore[arg-type]
            values[node] = (call or compute)(node, args, kwargs)
            if node is until:
                break
            for done in self._last.get(node, ()):
                values.pop(done, None)
        return values


def compute(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """What the operator of `node` makes of these arguments."""
    return node.target(*args, **kwargs)  # type: ignore[operator]
