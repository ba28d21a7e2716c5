"""What splits of linears share: which layers they may take, whether one pays, and its place.

    x Wᵀ = x₁ W₁ᵀ + Σᵢ partᵢ        error = ‖ Q(x₁) Q(W₁)ᵀ + Σᵢ partᵢ - x Wᵀ ‖² / ‖ x Wᵀ ‖²

A split changes nothing in exact arithmetic. What it is for shows when W₁ is rounded: each layer is
tried with the plan's own formats, and one whose error does not fall enough is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, Scheme
from qcompiler.sites import Site, sites
from qcompiler.stored import DECODERS
from qcompiler.trial import layer_error, rounded, rounded_input

aten = torch.ops.aten

INDEX_BYTES = 4
"""Indices are int32."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear that may be split: its weight, its scheme, and inputs to try it on."""

    site: Site
    scheme: Scheme
    format: QFormat
    """The weight's format in `scheme`."""
    weight: Tensor
    """(out, in), float32, whatever expression computes it."""
    x: Tensor
    """Sampled inputs (vectors, in), float32."""

    @property
    def stem(self) -> str:
        """What its new parameters are named after."""
        return self.site.id.rpartition("/")[0] or self.site.id

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weight is held in."""
        dtype = self.site.weight.meta["val"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def wanted(self) -> Tensor:
        """The layer's output without rounding, bias left out."""
        return self.x @ self.weight.t()

    @cached_property
    def before(self) -> float:
        """Error of the layer unsplit."""
        return layer_error(self.x, self.weight, self.scheme, self.wanted)

    @property
    def bytes(self) -> int:
        """Bytes of the weight in its format."""
        return self.format.bytes(tuple(self.weight.shape))

    def error(self, *parts: Tensor) -> float:
        """Error of an output that is the sum of `parts`."""
        size = float(self.wanted.pow(2).sum())
        return float((sum(parts) - self.wanted).pow(2).sum()) / size if size else 0.0


@dataclass(frozen=True)
class Split:
    """What a split would do to a layer."""

    what: str
    """`split of 12 channels`."""
    error: float
    bytes: int
    """Bytes of all that takes the weight's place, side data counted."""
    macs: float = 0.0
    """Multiplications more, as a share of the layer's own."""


def computed(x: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Output of a layer that stores and computes as `scheme` says, bias left out."""
    return rounded_input(x, scheme.activation) @ rounded(weight, scheme.weight).t()


def layers(edit: Edit, facts: Facts, by: str) -> Iterator[Layer]:
    """The linears whose weights the plan rounds; the pass `by` says of the others why not."""
    plan = edit.plan
    if not plan:
        raise BadInput(f"{by}: the plan is empty; put `assign` before it")
    found = sites(edit.nodes)
    for number, site in enumerate(found):
        facts.tick(number, len(found))
        scheme = plan.get(site.id)
        if scheme is None or scheme.weight is None:
            continue
        value = None if (why := _why_not(site)) else facts.value(site.weight)
        if value is None:
            edit.skip(site.node, why or "its weight is computed from the input")
            continue
        yield Layer(site, scheme, scheme.weight, value.float(), facts.sample(site.id))


def _why_not(site: Site) -> str:
    if site.node.target is not aten.linear.default:
        return f"only linears are split, and this is of kind {site.kind.name}"
    if len(site.weight.users) > 1:
        others = len(site.weight.users) - 1
        return f"its weight is shared with {others} more reader{'s' * (others > 1)}"
    if site.weight.target in DECODERS:
        return "its weight is stored as integers already; split before quantize"
    return ""


def accept(edit: Edit, layer: Layer, split: Split, gain: float) -> bool:
    """Open the edit if the error falls by at least the share `gain`; if not, say so."""
    before, after = layer.before, split.error
    fall = 1 - after / before if before else -after
    if fall >= gain:
        edit.spend(
            f"{split.what}: error {before:.2g} → {after:.2g}, {layer.bytes:,} → {split.bytes:,} "
            f"bytes, {100 * split.macs:.2g} % more multiplications",
            layer.site.node,
        )
        return True
    more = 100 * (split.bytes / layer.bytes - 1)
    cost = f"{abs(more):.1f} % {'more' if more >= 0 else 'fewer'} bytes"
    effect = (
        f"lower its error only from {before:.2g} to {after:.2g} ({100 * fall:.2g} %)"
        if after < before
        else f"not lower its error ({before:.2g} → {after:.2g})"
    )
    edit.skip(layer.site.node, f"a {split.what} would {effect}, for {cost}")
    return False


def main(edit: Edit, layer: Layer, x: fx.Node, weight: fx.Node) -> fx.Node:
    """linear(x, weight, the layer's bias), in the layer's scheme."""
    old, bias = layer.site.node, layer.site.bias
    arguments = (x, weight) if bias is None else (x, weight, bias)
    new = edit.call(aten.linear.default, *arguments, like=old, replaces=[old])
    edit.assign(new, layer.scheme)
    return new


def join(edit: Edit, layer: Layer, first: fx.Node, *parts: fx.Node) -> None:
    """Replace the layer by the sum of its parts."""
    old = layer.site.node
    for part in parts:
        first = edit.call(aten.add.Tensor, first, part, like=old, replaces=[old])
    edit.replace(old, first)


class Columns:
    """Gathers of input channels; layers that read the same channels of one x share a gather."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._made: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = {}

    def bytes(self, layer: Layer, index: Tensor, share: Tensor | None = None) -> int:
        """Bytes that `of` would add."""
        if _key(layer, index, share) in self._made:
            return 0
        return index.numel() * (INDEX_BYTES + (0 if share is None else layer.dtype.itemsize))

    def of(
        self, layer: Layer, index: Tensor, name: str, share: Tensor | None = None
    ) -> tuple[fx.Node, fx.Node]:
        """(index parameter, x[…, index] · share), for a layer's x."""
        key = _key(layer, index, share)
        if key not in self._made:
            edit, node, x = self._edit, layer.site.node, layer.site.x
            at = edit.new_param(f"{layer.stem}.{name}", index.to(torch.int32), like=node)
            new = edit.call(aten.index_select.default, x, -1, at, like=node)
            if share is not None:
                factor = edit.new_param(
                    f"{layer.stem}.{name}_share", share.to(layer.dtype), like=node
                )
                new = edit.call(aten.mul.Tensor, new, factor, like=node)
            self._made[key] = at, new
        return self._made[key]


def _key(layer: Layer, index: Tensor, share: Tensor | None) -> tuple[object, ...]:
    factors = () if share is None else tuple(share.tolist())
    return layer.site.x, tuple(index.tolist()), factors


def require(by: str, option: str, value: float, holds: bool, wanted: str) -> None:
    """`BadInput` for an option out of its bounds."""
    if not holds:
        raise BadInput(f"{by}: {option} is {wanted}; found {value}")
