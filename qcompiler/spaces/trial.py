"""What calibration and weights say of a space's channels, and what a map on it would cost.

Passes choose a map by the noise that the plan's formats then add to the outputs of all layers that
read the space, on sampled inputs; nothing of the program changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qcompiler.facts import Facts
from qcompiler.formats import Scheme
from qcompiler.sites import Site
from qcompiler.spaces.apply import gather
from qcompiler.spaces.inputs import Group
from qcompiler.spaces.system import Member, Space
from qcompiler.trial import layer_noise, matrix

Statistic = Literal["absmax", "absmean", "minimum", "maximum"]
Change = Callable[[Site, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, inputs (vectors, channels), weight) → both as a map would leave them."""
REDUCE = {"absmax": "amax", "absmean": "mean", "minimum": "amin", "maximum": "amax"}


def of_inputs(facts: Facts, group: Group, what: Statistic) -> Tensor:
    """A statistic of each free channel over all layers of the group, float32 (space.size,)."""
    found: list[Tensor] = []
    for site in group.sites:
        member = group.member(site)
        seen: Tensor = getattr(facts.activation(site.id), what)
        found.append(gather(_along(seen, member), member, group.space.size, REDUCE[what]))
    stacked = torch.stack(found)
    if what == "minimum":
        return stacked.amin(0)
    return stacked.mean(0) if what == "absmean" else stacked.amax(0)


def of_consumers(facts: Facts, space: Space) -> Tensor:
    """Largest weight that reads each free channel, float32 (space.size,)."""
    largest = torch.zeros(space.size)
    for member in space.consumers:
        largest = torch.maximum(largest, of_param(facts, member, space.size))
    return largest


def of_param(facts: Facts, member: Member, size: int) -> Tensor:
    """Largest magnitude of each free channel in one parameter, float32 (size,)."""
    value = facts.value(member.node)
    assert value is not None
    value = value.abs()
    reduced = [a for a in range(value.ndim) if member.index.shape[a] == 1]
    return gather(value.amax(reduced, keepdim=True) if reduced else value, member, size)


def spread_over(vector: Tensor, member: Member, neutral: float) -> Tensor:
    """One number per free channel as one per channel of a layer's input, (channels,)."""
    index = member.index.movedim(member.axis, -1).reshape(-1, member.index.shape[member.axis])[0]
    return torch.cat([vector, torch.tensor([neutral])])[index]


def spread_tensor(vector: Tensor, member: Member, neutral: float) -> Tensor:
    """One number per free channel laid out along the member's axes, as `member.index` is."""
    return torch.cat([vector, torch.tensor([neutral])])[member.index]


def channels_of(values: Tensor, group: Group, site: Site) -> Tensor:
    """Largest of one number per input channel over each channel of a map, (space.size,)."""
    index, size = group.member(site).index, group.space.size
    out = torch.zeros(size + 1)
    return out.scatter_reduce(0, torch.where(index < 0, size, index), values, "amax")[:size]


def noise(
    facts: Facts, group: Group, scale: Tensor | None = None, shift: Tensor | None = None
) -> float:
    """Σ over the group's layers of the noise of their outputs, relative to the outputs' size.

    Inputs are x' = x ∘ scale + shift and weights W' = W / scale; both per free channel.
    """

    def change(site: Site, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        member = group.member(site)
        if scale is not None:
            factor = spread_over(scale, member, 1.0)
            x, weight = x * factor, weight / _input_axis(factor, weight)
        if shift is not None:
            x = x + spread_over(shift, member, 0.0)
        return x, weight

    return noise_under(facts, group, change)


def noise_under(facts: Facts, group: Group, change: Change) -> float:
    """The same for any change."""
    total = 0.0
    for site in group.sites:
        scheme = facts.program.plan.get(site.id)
        if scheme is None or scheme == Scheme():
            continue
        x, value = facts.sample(site.id), facts.value(site.weight)
        assert value is not None
        weight = value.float()
        size = float((x @ matrix(weight).t()).pow(2).mean())
        total += layer_noise(*change(site, x, weight), scheme) / (size or 1.0)
    return total


def _along(values: Tensor, member: Member) -> Tensor:
    """Values per channel laid along the member's axis."""
    shape = [1] * member.index.ndim
    shape[member.axis] = -1
    return values.reshape(shape)


def _input_axis(factor: Tensor, weight: Tensor) -> Tensor:
    """(channels,) along the weight's axis 1."""
    return factor.reshape(1, -1, *[1] * (weight.ndim - 2))
