"""Programs that are nothing but copies of one site, to be timed as a backend really runs it.

One layer in a loop would find its weight in the nearest cache each time. In the whole program the
others' weights pass through in between, so there are as many copies as fill the program's own
bytes. They are nodes of one graph: a call costs once, not for each of them. And as many of them
read one value as do in the program, for which a backend may round it only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompiler.backend import Artifact, Backend
from qcompiler.capture import capture
from qcompiler.compiled import build as build_program
from qcompiler.costs.size import weight_bytes
from qcompiler.errors import BackendError, BadInput
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.rounded import rounded_program
from qcompiler.sites import Site, site_of, sites

MOST = 16
"""Copies of a site."""
CACHED = 64 * 2**20
"""Bytes beyond which no cache holds the weights."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """What the time of a site depends on, its scheme and the number of tokens aside."""

    target: Callable[..., object]
    x: int
    """Which argument is the input."""
    parameters: tuple[tuple[int, Shape], ...]
    """Which arguments are parameters: the weight, then the bias; with their shapes."""
    rest: str
    """The other arguments, as text."""
    dtype: torch.dtype
    readers: int
    """Sites that read the value that this one reads."""

    @classmethod
    def of(cls, site: Site) -> Layer:
        """The layer that `site` is."""
        kind = site.kind
        places = [kind.weight] + ([kind.bias] if kind.bias is not None and site.bias else [])
        x = _place(site)
        rest = [a for i, a in enumerate(site.node.args) if i not in (x, *places)]
        return cls(
            target=site.node.target,  # type: ignore[arg-type]
            x=x,
            parameters=tuple(
                (place, tuple(int(n) for n in _argument(site, place).meta["val"].shape))
                for place in places
            ),
            rest=repr((rest, dict(site.node.kwargs))),
            dtype=site.weight.meta["val"].dtype,
            readers=sum(
                (other := site_of(user)) is not None and other.kind is kind
                for user in input_of(site).users
            ),
        )

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for _, shape in self.parameters)
        return f"{self.target} {shapes} {self.rest} {self.dtype} readers={self.readers}"


class Copies(torch.nn.Module):
    """`count` copies of a site with random parameters; each input is read by `readers` of them."""

    def __init__(self, site: Site, layer: Layer, count: int) -> None:
        super().__init__()
        self._target, self._arguments = layer.target, list(site.node.args)
        self._named = dict(site.node.kwargs)
        self._layer = layer
        self.parameters_of = torch.nn.ModuleList(
            torch.nn.ParameterList(
                torch.empty(shape, dtype=layer.dtype).uniform_(-1, 1)
                for _, shape in layer.parameters
            )
            for _ in range(count)
        )

    def forward(self, inputs: list[Tensor]) -> tuple[object, ...]:
        outputs = []
        for number, parameters in enumerate(self.parameters_of):
            arguments = list(self._arguments)
            arguments[self._layer.x] = inputs[number // self._layer.readers]
            for (place, _), value in zip(self._layer.parameters, parameters, strict=True):  # type: ignore[call-overload]
                arguments[place] = value
            outputs.append(self._target(*arguments, **self._named))
        return tuple(outputs)


@dataclass(frozen=True, eq=False)
class Bench:
    """Copies of a site, built by a backend."""

    artifact: Artifact
    inputs: int
    copies: int

    def run(self, x: Tensor) -> None:
        """One run of all copies. All inputs are one tensor, in cache as what was just made is."""
        self.artifact.run((x,) * self.inputs)


def copies_of(site: Site, layer: Layer, scheme: Scheme, program: Program, outputs: int) -> int:
    """How many copies there are for `scheme`, where one yields `outputs` bytes at most."""
    own, plain = weight_bytes(site, scheme), weight_bytes(site, Scheme())
    wanted = min(program.bytes / plain, CACHED / own, CACHED / max(outputs, 1), MOST)
    return layer.readers * max(1, round(wanted / layer.readers))


def random_input(site: Site, layer: Layer, shape: Sequence[int]) -> Tensor:
    """An input of a site."""
    if site.x is None:
        rows = layer.parameters[0][1][0]
        return torch.randint(0, rows, tuple(shape))
    return torch.randn(tuple(shape)).to(layer.dtype)


def copies(site: Site, layer: Layer, count: int, x: Tensor) -> Program:
    """The program of `count` copies, in floating point; `x` is an example."""
    module = Copies(site, layer, count)
    return capture(module, ([x.clone() for _ in range(count // layer.readers)],))


def build(program: Program, scheme: Scheme, backend: Backend, x: Tensor) -> Bench | None:
    """`copies` with `scheme` as `backend` runs them; None if it has no way to."""
    inputs, chosen = len(program.io.ports), {s.id: scheme for s in sites(program.nodes)}
    try:
        if scheme != Scheme():
            program = rounded_program(program, chosen, [(x,) * inputs])
        return Bench(build_program(program, backend), inputs, len(chosen))
    except (BackendError, BadInput):
        return None


def input_of(site: Site) -> fx.Node:
    """What the site reads: an activation, or indices."""
    return _argument(site, _place(site))


def _place(site: Site) -> int:
    return 1 - site.kind.weight if site.kind.x is None else site.kind.x


def _argument(site: Site, place: int) -> fx.Node:
    value = site.node.args[place]
    assert isinstance(value, fx.Node)
    return value
