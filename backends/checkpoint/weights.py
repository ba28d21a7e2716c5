"""The program's weights under the names that the source folder has for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from qcompiler.backends.checkpoint.match import Matched, Reader, match
from qcompiler.backends.checkpoint.source import Source
from qcompiler.edit import Edit
from qcompiler.errors import BackendError
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.program import Program, node_id
from qcompiler.run import param_value
from qcompiler.sites import KINDS
from qcompiler.stored import DECODERS, read


@dataclass(frozen=True)
class Weights:
    """What the files will hold. Names are those of the source; a layer is a module's path."""

    floats: dict[str, Tensor] = field(default_factory=dict)
    """Name → tensor, of everything that is not stored in codes."""
    codes: dict[str, QTensor] = field(default_factory=dict)
    """Layer → its stored weight, of which there is one in each layer."""
    inputs: dict[str, Grid] = field(default_factory=dict)
    """Layer → grid of its input; a dynamic one has scales that mean nothing."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Biases by name, where the source has none."""
    untied: bool = False
    """Tensors that were one in the source have become two."""


def collect(program: Program, source: Source) -> Weights:
    """Every tensor of `source`, as `program` has changed it."""
    return _Collector(program, source).run()


class _Collector:
    def __init__(self, program: Program, source: Source) -> None:
        self._program, self._source = program, source
        self._edit = Edit(program, "checkpoint")  # reads stored weights; never sealed
        self._matched: Matched = match(program, source.program, source.architecture)
        self._weights = Weights()
        self._held: dict[str, object] = {}

    def run(self) -> Weights:
        for reader, node in self._matched.weights.items():
            self._put(self._name(reader), reader, node)
        for reader, value in self._matched.absent.items():
            name = self._name(reader)
            self._weights.floats[name] = torch.full_like(self._source.tensors[name], value)
            self._held[name] = value
        for reader, node in self._matched.biases.items():
            self._weights.biases[f"{reader.scope}.bias"] = self._float(node)
        self._inputs()
        return self._completed()

    def _inputs(self) -> None:
        """Note down how inputs are rounded: each layer's in one way, and only where codes are."""
        rounded, how = dict(self._matched.inputs), dict[str, object]()
        for reader in self._matched.weights:
            layer, _, leaf = self._name(reader).rpartition(".")
            if leaf != "weight" or layer not in self._weights.codes:
                continue
            node = rounded.pop(reader.node, None)
            told = node and node.args[1:]
            if how.setdefault(layer, told) != told:
                raise BackendError(
                    f"{layer} is used several times with its input rounded in several ways, of "
                    "which a file says one; assign one format to all of them, a dynamic one"
                )
            if node is not None:
                self._weights.inputs[layer] = self._grid(node)
        if rounded:
            raise BackendError(
                f"{node_id(next(iter(rounded)))}: its input is rounded and its weight is not "
                "stored in codes; files of this kind say both of a layer or none"
            )

    def _name(self, reader: Reader) -> str:
        """What the source calls the parameter that `reader` reads; tied ones have several names."""
        node = reader.node.args[reader.index]
        name = self._source.program.slots[node.name] if isinstance(node, fx.Node) else ""
        own = f"{reader.scope}.{name.rpartition('.')[2]}"
        tensors = self._source.tensors
        return own if own in tensors and name in tensors and self._source.same(own, name) else name

    def _put(self, name: str, reader: Reader, node: fx.Node) -> None:
        """Note down what stands at `name`: codes, or numbers."""
        if self._held.setdefault(name, node) is not node:
            raise BackendError(
                f"parameter {name!r} of the source has become two ({node_id(node)} is one of "
                "them); files of its architecture hold one. Compile without what splits it"
            )
        layer, _, leaf = name.rpartition(".")
        stored = None
        if leaf == "weight" and reader.node.target in KINDS:
            stored = read(self._edit, self._edit.own(node))
        if not self._is_kept(name):
            if stored is not None or not self._is_as_it_was(name, node):
                raise BackendError(
                    f"{name!r} is computed with in another layout than the folder holds it in "
                    f"({self._source.architecture}), or not held at all; leave the weight "
                    f"of {node_id(reader.node)} as it is"
                )
        elif stored is not None:
            self._weights.codes[layer] = stored
        else:
            self._weights.floats[name] = self._float(node)

    def _is_kept(self, name: str) -> bool:
        """Whether the folder holds the parameter in the layout that it is computed with."""
        held, used = self._source.tensors.get(name), self._source.program.params.get(name)
        return held is not None and (used is None or torch.equal(held, used))

    def _is_as_it_was(self, name: str, node: fx.Node) -> bool:
        return torch.equal(self._float(node), self._source.program.params[name])

    def _float(self, node: fx.Node) -> Tensor:
        """The value of a weight in floating point, in its own type."""
        if (name := self._program.param_of(node)) is not None:
            return self._program.params[name]
        if any(n.target in DECODERS for n in _behind(node)):
            raise BackendError(
                f"{node_id(node)} is computed from stored codes, which no file says of a weight; "
                "compile without what splits weights (`split_*`)"
            )
        value = param_value(self._program, node)
        assert value is not None
        return value.to(node.meta["val"].dtype)

    def _grid(self, node: fx.Node) -> Grid:
        scale, zero = (*node.args[2:], None, None)[:2]
        fmt = QFormat.parse(str(node.args[1]))
        if scale is None:
            return Grid(fmt, torch.ones(1))
        if not isinstance(scale, fx.Node) or scale not in self._program.weights:
            raise BackendError(
                f"{node_id(node)} rounds with scales per token and channel, which no file says; "
                "compile with `quantize{cross=0}`"
            )
        return Grid(
            fmt, self._float(scale), self._float(zero) if isinstance(zero, fx.Node) else None
        )

    def _completed(self) -> Weights:
        """With what the program does not read, as it was. A tensor of several names is there once,
        unless such a one has become several: then nothing is tied any more."""
        found, groups = self._weights, self._groups()
        stored = {f"{layer}.weight" for layer in found.codes}
        untied = any(self._is_untied(names, stored) for names in groups)
        for names in groups:
            left = [n for n in names if n not in stored]
            known = [found.floats[n] for n in left if n in found.floats]
            for name in left:
                found.floats.setdefault(name, (known or [self._source.tensors[name]])[0])
            for name in () if untied else left[1:]:
                del found.floats[name]
        return replace(found, untied=untied)

    def _is_untied(self, names: list[str], stored: set[str]) -> bool:
        """Whether what the source has under several names is not one tensor of numbers now."""
        held = {self._held[n] for n in names if n in self._held}
        return len(names) > 1 and (len(held) > 1 or not stored.isdisjoint(names))

    def _groups(self) -> list[list[str]]:
        """Names of the source, those of one tensor together."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self._source.tensors.items():
            groups.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
        return list(groups.values())


def _behind(node: fx.Node) -> set[fx.Node]:
    """`node` and all that it is computed from."""
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found
