"""The outside of a program: what goes in, what comes out, and how Python calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.errors import BadInput


def zeros_at_left(mask: object, name: str) -> Tensor:
    """How many zeros each row of a mask (batch, tokens) has at its left, where they all are."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = [*mask.shape] if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"{name} is a tensor (batch, tokens) of ones and zeros; found {found}")
    seen = mask != 0
    count = (~seen).sum(1)
    if not torch.equal(seen, torch.arange(mask.shape[1], device=mask.device) >= count[:, None]):
        raise BadInput(
            f"{name} has zeros at the left of its rows alone; found others. Pad texts at the left "
            "(padding_side='left')"
        )
    return count


Dim = int | str
"""A fixed size, or the name of a dynamic dimension."""


@dataclass(frozen=True)
class Port:
    """One flat input: a tensor, or a constant that was baked in at capture."""

    name: str
    dtype: torch.dtype | None = None
    """None for a baked-in constant."""
    shape: tuple[Dim, ...] = ()
    low: float = 0.0
    high: float = 1.0
    """Range of the example's values: random inputs for checks are drawn from it."""
    constant: object = None

    @property
    def is_tensor(self) -> bool:
        return self.dtype is not None

    def __str__(self) -> str:
        if not self.is_tensor:
            return f"{self.name}={self.constant!r}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs, and the Python call that the source model had."""

    ports: tuple[Port, ...]
    in_spec: pytree.TreeSpec
    """Structure of `(args, kwargs)` at capture."""
    out_spec: pytree.TreeSpec
    names: tuple[str, ...] = ()
    """Names of the positional parameters of the model's forward, in order."""
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    """Dynamic dimension → (smallest, largest) size; None is unbounded."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Dynamic dimension → what its size is a multiple of, if not of 1."""
    fills: Mapping[str, float] = field(default_factory=dict)
    """Argument → the number that it may be filled with where it is left out: as measured at
    capture, the source then does the same (a mask of ones, token types of zeros)."""

    counts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Mask (batch, tokens) that may be given → the argument that has, in its place, how many zeros
    are at the left of each row, and the dimensions whose sizes together are its tokens."""

    required: frozenset[str] = frozenset()
    """Constants that a call names: without them the source would take its own default, another."""

    @property
    def tensors(self) -> tuple[Port, ...]:
        return tuple(p for p in self.ports if p.is_tensor)

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each flat output: its keys and fields joined by `.`, where it has any.

        Outputs of a tuple, and a single one, are `output`, `output_1`, …; none has an input's name.
        """
        names: list[str] = []
        taken = {port.name for port in self.ports}
        for number, path in enumerate(_paths(self.out_spec)):
            named = any(not isinstance(key, pytree.SequenceKey) for key in path)
            plain = f"output_{number}" if number else "output"
            name = ".".join(map(_key_text, path)) if named else plain
            while name in taken:
                name += ".out"
            taken.add(name)
            names.append(name)
        return tuple(names)

    def flatten(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[object, ...]:
        """Python arguments → flat inputs in port order, checked against the ports.

        Arguments may be given by position or by name, whichever way the model was captured;
        constants that were baked in may be left out, and what may be empty, which then is.
        """
        named = dict(kwargs)
        masks = self._count(named) if self.counts else {}
        flat = self._arrange(args, named)
        sizes: dict[str, int] = {}
        for port, value in zip(self.ports, flat, strict=True):
            if port.is_tensor:
                self._check_tensor(port, value, sizes)
            elif (value.tolist() if isinstance(value, Tensor) else value) != port.constant:
                raise BadInput(
                    f"input {port.name!r} was {port.constant!r} at capture and is baked in; "
                    f"found {value!r}. Capture again with that value"
                )
        for name, length in masks.items():
            _, *dims = self.counts[name]
            tokens = sum(sizes[d] for d in dims)
            if length != tokens:
                raise BadInput(
                    f"{name} is (batch, {' + '.join(dims)}), {tokens} tokens here; found {length}"
                )
        return tuple(flat)

    def _count(self, kwargs: dict[str, object]) -> dict[str, int]:
        """Puts counts in the place of masks; how many tokens each mask has."""
        lengths: dict[str, int] = {}
        for name, (argument, *_) in self.counts.items():
            mask = kwargs.pop(name, None)
            if mask is None:
                continue
            if kwargs.get(argument) is not None:
                raise BadInput(f"give {name} or {argument}, not both")
            kwargs[argument] = zeros_at_left(mask, name)
            assert isinstance(mask, Tensor)
            lengths[name] = mask.shape[1]
        return lengths

    def _arrange(self, args: tuple[object, ...], kwargs: dict[str, object]) -> list[object]:
        captured_args, captured_kwargs = self.in_spec.children()
        keys = list(captured_kwargs.context)
        count = captured_args.num_children
        kwargs = {k: v for k, v in kwargs.items() if v is not None or k not in self.optional}
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if len(args) > len(self.names):
            raise BadInput(
                f"the model takes {self._expects()}; found {len(args)} positional inputs"
            )
        wanted = [*self.names[:count], *keys]
        baked = {p.name: p.constant for p in self.ports if not p.is_tensor}
        left_out = [n for n in wanted if n not in given and n not in baked]
        if forgotten := [n for n in self.required if n not in given]:
            values = ", ".join(f"{n}={baked[n]!r}" for n in sorted(forgotten))
            raise BadInput(
                f"the program was captured with {values}, and the model's own default is another; "
                f"call it with {values}, or capture it again"
            )
        missing = [n for n in left_out if n not in self.optional]
        extra = [n for n in given if n not in wanted and given[n] is not None]
        if missing or extra:
            found = ", ".join(given) or "nothing"
            known = f"; {', '.join(extra)} was not in the example inputs that it was captured with"
            raise BadInput(
                f"the program takes {self._expects()}; found {found}{known if extra else ''}"
            )
        given = baked | given | {n: self._nothing(n, given) for n in left_out}
        tree = (
            tuple(given[n] for n in self.names[:count]),
            {k: given[k] for k in keys},
        )
        flat, spec = pytree.tree_flatten(tree)
        if spec != self.in_spec:
            raise BadInput(f"the program takes {self._expects()}; found another nesting of inputs")
        return flat

    @cached_property
    def _arguments(self) -> Mapping[str, tuple[pytree.TreeSpec, tuple[Port, ...]]]:
        """The structure of each argument, and its ports."""
        args, kwargs = self.in_spec.children()
        specs = [*zip(self.names, args.children(), strict=False)]
        specs += zip(kwargs.context, kwargs.children(), strict=True)
        ports = iter(self.ports)
        return {n: (spec, tuple(islice(ports, spec.num_leaves))) for n, spec in specs}

    @cached_property
    def optional(self) -> frozenset[str]:
        """Arguments that may be left out, since each of their tensors may be empty, or filled."""
        empty = {d for d, (low, _) in self.dims.items() if low == 0}
        found = self._arguments.items()
        return frozenset(self.fills) | {
            n for n, (_, ports) in found if ports and all(empty & {*p.shape} for p in ports)
        }

    def _nothing(self, name: str, given: Mapping[str, object]) -> object:
        """Empty or filled tensors for an argument; other sizes are those of what is given."""
        lowest = {d: low for d, (low, _) in self.dims.items()}
        sizes: dict[str, int] = {}
        for other in (n for n in self._arguments if n in given):  # the first says what it is
            leaves = pytree.tree_leaves(given[other])
            for port, leaf in zip(self._arguments[other][1], leaves, strict=False):
                shape = leaf.shape if isinstance(leaf, Tensor) else ()
                found = zip(port.shape, shape, strict=False)
                sizes = {d: n for d, n in found if isinstance(d, str) and lowest[d]} | sizes
        sizes = lowest | sizes
        spec, ports = self._arguments[name]
        shapes = ([sizes[d] if isinstance(d, str) else d for d in p.shape] for p in ports)
        fill = self.fills.get(name, 0)
        tensors = [torch.full(s, fill, dtype=p.dtype) for s, p in zip(shapes, ports, strict=True)]
        return pytree.tree_unflatten(tensors, spec)

    def _expects(self) -> str:
        return "(" + ", ".join(str(p) for p in self.tensors) + ")"

    def _check_tensor(self, port: Port, value: object, sizes: dict[str, int]) -> None:
        if not isinstance(value, Tensor):
            raise BadInput(f"input {port} is a tensor; found {type(value).__name__}")
        if value.dtype != port.dtype:
            raise BadInput(f"input {port}: found {value.dtype}. Convert it with .to({port.dtype})")
        meta = value.device.type == "meta"
        if meta or value.layout != torch.strided:
            found = "one without values, on the meta device" if meta else "a sparse one"
            raise BadInput(f"input {port} is a dense tensor; found {found}")
        fits = value.ndim == len(port.shape)
        for want, have in zip(port.shape, value.shape, strict=False):
            if isinstance(want, int):
                fits = fits and want == have
            else:
                fits = fits and sizes.setdefault(want, have) == have
                low, high = self.dims.get(want, (0, None))
                fits = fits and have >= low and (high is None or have <= high)
                fits = fits and have % self.steps.get(want, 1) == 0
        if not fits:
            bounds = "; ".join(
                f"{n} is {lo} to {hi if hi is not None else 'any'}{self._step(n)}"
                for n, (lo, hi) in self.dims.items()
                if n in port.shape
            )
            raise BadInput(
                f"input {port} does not take shape {list(value.shape)}"
                + (f" ({bounds})" if bounds else "")
                + (f"; {', '.join(f'{k} = {v}' for k, v in sizes.items())} here" if sizes else "")
            )

    def _step(self, dim: str) -> str:
        return f", a multiple of {self.steps[dim]}" if dim in self.steps else ""

    def restore(self, flat: tuple[object, ...]) -> object:
        """Flat outputs → the output structure of the source model."""
        return pytree.tree_unflatten(list(flat), self.out_spec)


def _paths(spec: pytree.TreeSpec) -> list[tuple[object, ...]]:
    """The keys that lead to each leaf of `spec`; none below a type that does not tell its keys."""
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    try:
        return [tuple(path) for path, _ in pytree.tree_leaves_with_path(tree)]
    except ValueError:
        return [()] * spec.num_leaves


def _key_text(key: object) -> str:
    """The key, field or index itself."""
    match key:
        case pytree.SequenceKey(idx=text) | pytree.MappingKey(key=text):
            return str(text)
        case pytree.GetAttrKey(name=name):
            return name
    return str(key)


def as_call(inputs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """What users hand over as inputs → (args, kwargs): a tensor, a tuple of them, or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    return (inputs,), {}
