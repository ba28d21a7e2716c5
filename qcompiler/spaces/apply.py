"""Putting a map on a space: one parameter, read by every edge that it changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.program import node_id
from qcompiler.sites import Site
from qcompiler.spaces.maps import Map, Matrix
from qcompiler.spaces.system import Member, Space

aten = torch.ops.aten


def demand_free(space: Space) -> None:
    """Refuse a space that is blocked, with the node and the reason."""
    if space.blocked_by:
        blocker = space.blocked_by[0]
        more = len(space.blocked_by) - 1
        raise BadInput(
            f"space {space.id} ({space.kind}, {space.size} channels) is blocked at "
            f"{blocker.node}: {blocker.reason}" + (f" (and at {more} other nodes)" if more else "")
        )


def demand_kind(space: Space, kind: str) -> None:
    """Refuse a map of another kind than the space's; a rotation is an invertible matrix too."""
    if kind != space.kind and (kind, space.kind) != ("orthogonal", "invertible"):
        raise BadInput(f"space {space.id} takes no {kind} map; it is {space.kind}")


# --- factors -----------------------------------------------------------------------------------


def apply_scale(edit: Edit, space: Space, scale: Tensor, name: str) -> None:
    """Multiply each parameter of `space` by scale ** exponent, on the parameter's edge.

    `scale` is (space.size,), positive and finite. It becomes the parameter `name`; nothing is
    computed now, so the edit is exact by construction and `fold` rounds once.
    """
    demand_free(space)
    demand_kind(space, "diagonal")
    scale = scale.to(torch.float32)
    if tuple(scale.shape) != (space.size,):
        raise BadInput(f"space {space.id} takes {space.size} scales; found {list(scale.shape)}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise BadInput(f"scales of space {space.id} must be positive and finite")
    source = edit.new_param(name, scale, like=space.home)
    edit.free(source, "diagonal")
    spread(edit, source, space, space.params, 1)


def spread(
    edit: Edit, source: fx.Node, space: Space, members: Sequence[Member], power: int
) -> dict[fx.Node, fx.Node]:
    """Multiply `members` by source ** (power · exponent), `source` being (space.size,).

    Returns the multiplied nodes, each with what it was before.
    """
    before: dict[fx.Node, fx.Node] = {}
    for number, member in enumerate(members):
        node = edit.own(member.node)
        factor = _laid_out(edit, source, member, f"{node_id(source)}.index{number}", 1.0)
        scaled = _scaled(edit, node, factor, power * member.exponent)
        before[scaled] = before.get(node, node)
    return before


def _laid_out(edit: Edit, source: fx.Node, member: Member, name: str, neutral: float) -> fx.Node:
    """The vector `source` along the member's axes; `neutral` where the space has no say."""
    size = int(source.meta["val"].shape[0])
    index = member.index
    flat = index.reshape(-1)
    if torch.equal(flat, torch.arange(size)):
        picked = source
    else:
        padded = source
        if bool((flat == size).any()):
            padded = edit.call(aten.constant_pad_nd.default, source, [0, 1], neutral, like=source)
        where = edit.new_param(name, flat, like=source)
        picked = edit.call(aten.index_select.default, padded, 0, where, like=source)
    if index.ndim == 1:
        return picked
    return edit.call(aten.reshape.default, picked, list(index.shape), like=source)


def _scaled(edit: Edit, node: fx.Node, factor: fx.Node, exponent: int) -> fx.Node:
    target = aten.mul.Tensor if exponent > 0 else aten.div.Tensor
    scaled = node
    for _ in range(abs(exponent)):
        scaled = edit.call(target, scaled, factor, like=node)
    scaled = _as(edit, scaled, node.meta["val"].dtype)
    edit.extend(node, scaled)
    return scaled


def _as(edit: Edit, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return edit.call(aten.to.dtype, node, dtype, like=node)


def gather(values: Tensor, member: Member, size: int, how: str = "amax") -> Tensor:
    """Largest (or "amin", "mean") value of each factor's channels. Shape (size,), float32.

    `values` has the shape of `member.index`, or broadcasts to it: the inverse of laying out.
    """
    index = member.index.reshape(-1)
    flat = values.expand(member.index.shape).reshape(-1).float()
    out = torch.zeros(size + 1)
    return out.scatter_reduce(0, index, flat, how, include_self=False)[:size]


# --- shifts ------------------------------------------------------------------------------------


def apply_shift(edit: Edit, space: Space, shift: Tensor, name: str) -> None:
    """Add `shift` (space.size,) to the channels of `space`, and take it off at its readers.

    Whoever makes the channels adds it to its bias; a layer that reads them subtracts s Wᵀ from its
    own. A layer without a bias gets one.
    """
    demand_free(space)
    demand_kind(space, "shift")
    shift = shift.to(torch.float32)
    if tuple(shift.shape) != (space.size,):
        raise BadInput(f"space {space.id} takes {space.size} shifts; found {list(shift.shape)}")
    if not bool(shift.isfinite().all()):
        raise BadInput(f"shifts of space {space.id} must be finite")
    source = edit.new_param(name, shift, like=space.home)
    edit.free(source, "shift")
    for number, member in enumerate(space.params):
        node = edit.own(member.node)
        vector = _laid_out(edit, source, member, f"{name}.index{number}", 0.0)
        if abs(member.exponent) != 1:
            vector = edit.call(aten.mul.Tensor, vector, abs(member.exponent), like=node)
        if edit.is_weight(node):
            moved = _as(edit, _plus(edit, node, vector, member.exponent), node.meta["val"].dtype)
            edit.extend(node, moved)
        else:
            _into_bias(edit, node, vector, member)


def _plus(edit: Edit, node: fx.Node, vector: fx.Node, sign: int) -> fx.Node:
    target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
    return edit.call(target, node, vector, like=node)


def _into_bias(edit: Edit, node: fx.Node, vector: fx.Node, member: Member) -> None:
    """Bias + s where the layer makes the channels, bias - s Wᵀ where it reads them."""
    at = 3 if node.target is aten.layer_norm.default else 2
    bias = node.args[at] if len(node.args) > at else None
    flat = edit.call(aten.reshape.default, vector, [-1], like=node)
    sign = member.exponent
    if not member.makes:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if weight.meta["val"].ndim > 2:  # every tap of a kernel reads the same shift
            taps = list(range(2, weight.meta["val"].ndim))
            weight = edit.call(aten.sum.dim_IntList, weight, taps, like=node)
        flat = edit.call(
            aten.mv.default, weight, _as(edit, flat, weight.meta["val"].dtype), like=node
        )
    if isinstance(bias, fx.Node):
        new = _plus(edit, bias, flat, sign)
    else:
        new = flat if sign > 0 else edit.call(aten.neg.default, flat, like=node)
    edit.rewire(node, at, _as(edit, new, node.meta["val"].dtype))


# --- matrices and orders -----------------------------------------------------------------------


def apply_matrix(edit: Edit, space: Space, matrix: Tensor, name: str) -> Matrix:
    """Mix the channels of each parameter of `space` by T or its inverse, on the parameter's edge.

    `matrix` is T, (size, size), or one for each index of `space.maps`. It becomes the parameter
    `name`.
    """
    if space.kind not in ("orthogonal", "invertible"):
        raise BadInput(f"space {space.id} takes no matrix map; it is {space.kind}")
    made = Matrix(edit, space.home, matrix, name, space.kind)
    apply_map(edit, space, made)
    return made


def apply_map(edit: Edit, space: Space, made: Map, places: Sequence[fx.Node] = ()) -> None:
    """Let each parameter of `space` take `made`, or its inverse, along the space's axis.

    A blocked space takes it only with an operator behind each of its `online_places`, for all
    readers of the values there.
    """
    if not places:
        demand_free(space)
    demand_kind(space, made.kind)
    if made.size != space.size or made.maps not in ((), space.maps):
        each = f", or one for each of {list(space.maps)}" if space.maps else ""
        raise BadInput(
            f"space {space.id} takes a {space.size} × {space.size} matrix{each}; "
            f"found {[*made.maps, made.size, made.size]}"
        )
    for member in space.params:
        _mixed(edit, edit.own(member.node), made, member, space.size)
    for place in places:
        node = edit.own(place)
        member = next(m for m in space.activations if m.node is place)
        users = list(node.users)
        mapped = made.forward(node) if member.exponent > 0 else made.backward(node)
        edit.replace(node, mapped, only=users)  # the map's own operators go on reading the value


def online_places(space: Space) -> tuple[fx.Node, ...]:
    """The values behind which one operator each frees a blocked space; none if that is not enough.

    Every mark must be on a value that its node makes, with the channels as its whole last axis, and
    no parameter may stand before it.
    """
    found = []
    for blocker in space.blocked_by:
        member = next((m for m in space.activations if node_id(m.node) == blocker.node), None)
        if not blocker.produces or member is None or (space.producers and space.params):
            return ()
        whole = torch.equal(member.index, torch.arange(space.size))
        if not whole or member.axis != member.node.meta["val"].ndim - 1:
            return ()
        found.append(member.node)
    return tuple(dict.fromkeys(found))


def map_input(edit: Edit, sites: Sequence[Site], made: Map) -> None:
    """Map the common input of some linears at run time, and undo it in their weights."""
    x = sites[0].x
    assert x is not None
    width = x.meta["val"].shape[-1]
    if made.size != width:
        raise BadInput(f"{sites[0].id} reads {width} channels; found a map of {made.size}")
    mapped = made.forward(edit.own(x))
    for site in sites:
        node = edit.own(site.node)
        weight = node.args[site.kind.weight]
        assert isinstance(weight, fx.Node)
        undone = made.backward(_as(edit, weight, torch.float64))
        edit.rewire(node, site.kind.weight, _as(edit, undone, weight.meta["val"].dtype))
        assert site.kind.x is not None
        edit.rewire(node, site.kind.x, mapped)


def _mixed(edit: Edit, node: fx.Node, made: Map, member: Member, size: int) -> None:
    """Map the channels along the member's axis of a weight."""
    dtype, rank = node.meta["val"].dtype, node.meta["val"].ndim
    # Bring the axis to the end, behind the whole axes that the map depends on.
    own, others = _dependencies(member, made)
    beside = [axis for _, axis in others]
    moved = [i for i in range(rank) if i not in (*beside, member.axis)] + [*beside, member.axis]
    x = _as(edit, node, torch.float64) if made.wide else node
    x = _permuted(edit, x, moved)
    shape = [int(n) for n in x.meta["val"].shape]
    last = rank - 1
    # Sort it into (index of the map, copy, channel), and what is no channel behind.
    order, count = _copies(member.index, own, size)
    sorted_already = torch.equal(order, torch.arange(len(order)))
    if not sorted_already:
        where = edit.new_param(f"{node_id(node)}.order", order, like=node)
        x = edit.call(aten.index_select.default, x, last, where, like=node)
    mixed = x
    if count < shape[last]:
        mixed = edit.call(aten.slice.Tensor, x, last, 0, count, like=node)
    sizes = [made.maps[number] for number, _ in own]
    copies = count // size
    for n in sizes:
        copies //= n
    wide = [*shape[:last], *sizes, copies, size]
    mixed = edit.call(aten.reshape.default, mixed, wide, like=node)
    apply = made.forward if member.exponent > 0 else made.backward
    mixed = apply(mixed, [number for number, _ in (*others, *own)])
    mixed = edit.call(aten.reshape.default, mixed, [*shape[:last], count], like=node)
    if count < shape[last]:
        rest = edit.call(aten.slice.Tensor, x, last, count, shape[last], like=node)
        mixed = edit.call(aten.cat.default, [mixed, rest], last, like=node)
    if not sorted_already:
        back = edit.new_param(f"{node_id(node)}.order", torch.argsort(order), like=node)
        mixed = edit.call(aten.index_select.default, mixed, last, back, like=node)
    mixed = _permuted(edit, mixed, [moved.index(i) for i in range(rank)])
    edit.extend(node, _as(edit, mixed, dtype))


def reordered(member: Member, order: Tensor) -> Tensor:
    """Where each index along the member's axis comes from under an order of the channels."""
    listed, count = _copies(member.index, [], len(order))
    places = listed[:count].reshape(-1, len(order))
    where = torch.arange(len(member.index))
    where[places] = places[:, order]
    return where


def _dependencies(
    member: Member, made: Map
) -> tuple[list[tuple[int, Tensor]], list[tuple[int, int]]]:
    """What the map depends on: (number, index along the member's own axis), (number, other axis).

    Nothing, if one map serves all indices.
    """
    own: list[tuple[int, Tensor]] = []
    others: list[tuple[int, int]] = []
    for number in range(len(made.maps)):
        axis, row = member.which[number]
        if axis == member.axis:
            own.append((number, row))
        else:
            others.append((number, axis))
    return own, others


def _permuted(edit: Edit, x: fx.Node, order: list[int]) -> fx.Node:
    if order == sorted(order):
        return x
    return edit.call(aten.permute.default, x, order, like=x)


def _copies(channel: Tensor, own: list[tuple[int, Tensor]], size: int) -> tuple[Tensor, int]:
    """(order of the axis: by index of the map, copy, channel; how many indices have a channel).

    The c-th occurrences of all channels under one index of the map make up copy c, since an axis
    term is a product.
    """
    inside = torch.nonzero(channel >= 0).flatten()
    outside = torch.nonzero(channel < 0).flatten()
    which = torch.zeros(len(inside), dtype=torch.long)
    groups = 1
    for _, row in own:
        found = row[inside]
        number = int(found.max()) + 1
        which, groups = which * number + found, groups * number
    by_channel = inside[torch.argsort(which * size + channel[inside], stable=True)]
    by_channel = by_channel.reshape(groups, size, -1).transpose(1, 2).reshape(-1)
    return torch.cat([by_channel, outside]), len(inside)
