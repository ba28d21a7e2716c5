"""Operators that move numbers without changing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Array, Call, Size
from qcompiler.capture.onnx.known import array
from qcompiler.capture.onnx.table import op

LAST = torch.iinfo(torch.int64).max


@op("Identity")
def identity(call: Call, x: Tensor) -> Tensor:
    return x


@op("Shape")
def shape(call: Call) -> Array:
    x = call.value(0)
    sizes = list(x.known.shape if x.known is not None else x.tensor.shape)
    end = call.int("end", len(sizes))
    return array(sizes[call.int("start", 0) : end])


@op("Size")
def size(call: Call, x: Tensor) -> Array:
    return array(x.numel())


@op("Reshape")
def reshape(call: Call, x: Tensor) -> Tensor:
    wanted = call.sizes(1) if call.given(1) else list(call.ints("shape"))
    if not call.int("allowzero", 0):
        wanted = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    return torch.reshape(x, wanted)


@op("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.int("axis", 1)
    axis = axis if axis >= 0 else axis + x.ndim
    if axis in (0, x.ndim):
        return torch.reshape(x, [1, -1] if axis == 0 else [-1, 1])
    if axis == x.ndim - 1 == 1:
        return x
    # One flattening each side, so that no product of sizes is needed.
    right = x if axis == x.ndim - 1 else torch.flatten(x, axis)
    return right if axis == 1 else torch.flatten(right, 0, axis - 1)


@op("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    return torch.permute(x, call.ints("perm", list(range(x.ndim))[::-1]))


@op("Unsqueeze")
def unsqueeze(call: Call, x: Tensor) -> Tensor:
    axes = call.whole(1) if call.given(1) else call.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = torch.unsqueeze(x, axis)
    return x


@op("Squeeze")
def squeeze(call: Call, x: Tensor) -> Tensor:
    if not call.given(1) and not call.has("axes"):
        return torch.squeeze(x)
    axes = call.whole(1) if call.given(1) else call.ints("axes")
    if any(isinstance(x.shape[a], int) and x.shape[a] != 1 for a in axes):
        raise call.refusal(f"cannot drop the axes {axes} of shape {list(x.shape)}")
    return torch.squeeze(x, tuple(axes))


@op("Expand")
def expand(call: Call, x: Tensor) -> Tensor:
    """Broadcast both ways: a size of 1 in the wanted shape takes that of x."""
    wanted = call.sizes(1)
    rank = max(len(wanted), x.ndim)
    have = [1] * (rank - x.ndim) + list(x.shape)
    want = [1] * (rank - len(wanted)) + wanted
    sizes = [h if isinstance(w, int) and w == 1 else w for h, w in zip(have, want, strict=True)]
    return x.expand(sizes)


@op("Tile")
def tile(call: Call, x: Tensor) -> Tensor:
    return x.repeat(call.sizes(1))


@op("Concat")
def concat(call: Call, *parts: Tensor) -> Tensor:
    return torch.cat(parts, call.int("axis", 1))


@op("Split")
def split(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    axis, count = call.int("axis", 0), len(call.node.outputs)
    if call.given(1) or call.has("split"):
        sizes = call.whole(1) if call.given(1) else call.ints("split")
        return torch.split(x, sizes, axis)
    step = -(-x.shape[axis] // call.int("num_outputs", count))
    parts = torch.split(x, step, axis)
    if len(parts) < count:  # ONNX lets the last parts be empty, torch leaves them out
        parts += (x.narrow(axis, 0, 0),) * (count - len(parts))
    return parts


@op("Slice")
def slice_(call: Call, x: Tensor) -> Tensor:
    if call.version < 10:
        starts: Sequence[Size] = call.ints("starts")
        ends: Sequence[Size] = call.ints("ends")
        axes, steps = call.ints("axes", list(range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = call.sizes(1), call.sizes(2)
        axes = call.whole(3) if call.given(3) else list(range(len(starts)))
        steps = call.whole(4) if call.given(4) else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _cut(x, axis % x.ndim, start, end, step)
    return x


def _cut(x: Tensor, axis: int, start: Size, end: Size, step: int) -> Tensor:
    slice_axis: Callable[..., Tensor] = torch.ops.aten.slice.Tensor
    if step > 0:
        return slice_axis(x, axis, start, _last(end), step)
    # torch has no negative steps: turned around, then cut. Bounds count from the other end.
    size = x.shape[axis]
    first = size - 1 - min(start if start >= 0 else max(start + size, -1), size - 1)
    stop = size if end < -size else size - 1 - (end if end >= 0 else end + size)
    return slice_axis(torch.flip(x, [axis]), axis, first, stop, -step)


def _last(end: Size) -> Size:
    """Some exporters write 2^31 - 1 or less than 2^63 - 1 for the end."""
    return LAST if isinstance(end, int) and end >= 2**31 - 1 else end


@op("Gather")
def gather(call: Call, data: Tensor) -> Tensor:
    axis = call.int("axis", 0) % data.ndim
    index = call.value(1)
    known = index.known
    if known is not None and known.dtype != object and known.size == 1:
        number = int(known.reshape(-1)[0])
        size = data.shape[axis]
        if isinstance(size, int) and not -size <= number < size:
            raise call.refusal(f"index {number} into an axis of {size}")
        picked = torch.select(data, axis, number)
        return picked.reshape(
            [*data.shape[:axis], *known.shape, *data.shape[axis + 1 :]]
        ) if known.ndim else picked  # fmt: skip
    places = index.tensor
    if _may_be_negative(call):
        places = torch.where(places < 0, places + data.shape[axis], places)
    if axis == 0 and data.ndim == 2 and data.is_floating_point() and places.dtype != torch.uint8:
        return torch.nn.functional.embedding(places, data)
    return _index(data, [None] * axis + [places.long()])


def _may_be_negative(call: Call) -> bool:
    """Whether an index may count from the end. Those into a stored table (tokens) never do: there
    one that does is an error when it runs, and not worth an operator in every embedding."""
    index = call.value(1)
    if (known := index.known) is not None:
        return known.dtype != object and bool((known < 0).any())
    return bool(index.sources) and call.value(0).known is None


def _index(data: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    found: Tensor = torch.ops.aten.index.Tensor(data, places)
    return found


@op("GatherElements")
def gather_elements(call: Call, data: Tensor, indices: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


@op("GatherND")
def gather_nd(call: Call, data: Tensor, indices: Tensor) -> Tensor:
    batch = call.int("batch_dims", 0)
    depth = int(indices.shape[-1])
    parts = [indices[..., i].long() for i in range(depth)]
    lead = []
    for axis in range(batch):
        view = [1] * (indices.ndim - 1)
        view[axis] = -1
        lead.append(torch.arange(data.shape[axis]).reshape(view))
    return _index(data, [*lead, *parts])


@op("ScatterElements", "Scatter")
def scatter_elements(call: Call, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    places = _wrapped(indices, data.shape[axis])
    how = call.text("reduction", "none")
    if how == "none":
        return torch.scatter(data, axis, places, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return torch.scatter_reduce(data, axis, places, updates, names[how], include_self=True)


@op("ScatterND")
def scatter_nd(call: Call, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Flat positions of the first axes, so that repeated ones add up as ONNX wants."""
    depth = int(indices.shape[-1])
    lead, rest = list(data.shape[:depth]), list(data.shape[depth:])
    flat = torch.zeros_like(indices[..., 0], dtype=torch.int64)
    for axis, n in enumerate(lead):
        flat = flat * n + _wrapped(indices[..., axis], n)
    width = math.prod(rest)
    table = data.reshape(-1, width) if rest else data.reshape(-1, 1)
    places = flat.reshape(-1, 1).expand(-1, table.shape[1])
    values = updates.reshape(places.shape)
    how = call.text("reduction", "none")
    if how == "none":
        result = torch.scatter(table, 0, places, values)
    else:
        names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
        result = torch.scatter_reduce(table, 0, places, values, names[how], include_self=True)
    return result.reshape(data.shape)


def _wrapped(indices: Tensor, size: Size) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@op("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    b = call.int("blocksize")
    n, c, h, w = x.shape
    depth_first = call.text("mode", "DCR") == "DCR"
    sizes, order = (
        ([n, b, b, c // (b * b), h, w], [0, 3, 4, 1, 5, 2])
        if depth_first
        else ([n, c // (b * b), b, b, h, w], [0, 1, 4, 2, 5, 3])
    )
    return x.reshape(sizes).permute(order).reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    b = call.int("blocksize")
    n, c, h, w = x.shape
    depth_first = call.text("mode", "DCR") == "DCR"
    order = (0, 3, 5, 1, 2, 4) if depth_first else (0, 1, 3, 5, 2, 4)
    parts = x.reshape(n, c, h // b, b, w // b, b).permute(order)
    return parts.reshape(n, c * b * b, h // b, w // b)


@op("Trilu")
def trilu(call: Call, x: Tensor) -> Tensor:
    k = int(call.number(1)) if call.given(1) else 0
    return torch.triu(x, k) if call.int("upper", 1) else torch.tril(x, k)


@op("Pad")
def pad(call: Call, x: Tensor) -> Tensor:
    value = call.operand(2) if call.given(2) else call.float("value", 0.0)
    if not isinstance(value, Tensor) or call.text("mode", "constant") != "constant":
        return _padded(call, x, 0.0 if isinstance(value, Tensor) else value)
    # A value that is not known before it runs is written where nothing of x is.
    inside = _padded(call, torch.ones_like(x, dtype=torch.bool), 0)
    return torch.where(inside, _padded(call, x, 0), value)


def _padded(call: Call, x: Tensor, value: float) -> Tensor:
    pads: Sequence[Size] = call.sizes(1) if call.given(1) else call.ints("pads")
    axes = call.whole(3) if call.given(3) else list(range(x.ndim))
    mode = call.text("mode", "constant")
    for place, axis in enumerate(axes):
        before, after = pads[place], pads[place + len(axes)]
        x = _pad_axis(call, x, axis % x.ndim, before, after, mode, value)
    return x


def _pad_axis(
    call: Call, x: Tensor, axis: int, before: Size, after: Size, mode: str, value: float
) -> Tensor:
    """One axis at a time: torch reflects and wraps the last axes only."""
    if isinstance(before, int) and isinstance(after, int) and (before, after) == (0, 0):
        return x
    if mode == "constant":
        widths = [0, 0] * (x.ndim - 1 - axis) + [before, after]
        return torch.nn.functional.pad(x, widths, value=value)
    size = x.shape[axis]
    places = torch.arange(size + before + after) - before
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    elif mode == "reflect":
        period = 2 * (size - 1)
        places = places % period
        places = torch.where(places >= size, period - places, places)
    else:
        raise call.refusal(f"mode {mode!r}; expected constant, reflect, edge or wrap")
    return torch.index_select(x, axis, places)
