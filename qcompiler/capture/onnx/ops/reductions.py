"""Reductions, and what counts along an axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import Function, op

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _extreme(largest: bool) -> Reduction:
    """Of an empty axis the least number there is, or the largest."""

    def reduce(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return reduce(x.to(torch.uint8), axes, keep).to(torch.bool)
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
            info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
            fill = info.min if largest else info.max
            if x.is_floating_point():
                fill = -torch.inf if largest else torch.inf
            shape = _sum(x, axes, keep).shape
            return torch.full(shape, fill, dtype=x.dtype)
        return torch.amax(x, axes, keep) if largest else torch.amin(x, axes, keep)

    return reduce


REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": _sum,
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "ReduceMax": _extreme(largest=True),
    "ReduceMin": _extreme(largest=False),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(_sum(x * x, axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(_sum(x, axes, keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


def _reduction(function: Reduction) -> Function:
    def run(call: Call, x: Tensor) -> Tensor:
        axes = call.whole(1) if call.given(1) else call.ints("axes", [])
        if not axes and call.int("noop_with_empty_axes", 0):
            # Nothing is summed up, and the rest of the operator is done on each element.
            return x if call.node.op_type in PLAIN else function(x.unsqueeze(-1), [-1], False)
        if not axes and x.ndim == 0:
            return function(x.unsqueeze(0), [0], False)
        axes, keep = axes or list(range(x.ndim)), bool(call.int("keepdims", 1))
        if call.node.op_type in FRACTIONS and not x.is_floating_point():
            return function(x.to(torch.float64), axes, keep).to(x.dtype)
        return function(x, axes, keep)

    return run


FRACTIONS = ("ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp")
"""Of integers they are computed as real numbers, and cut off towards zero."""
PLAIN = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
for _name, _function in REDUCTIONS.items():
    op(_name)(_reduction(_function))


@op("ArgMax", "ArgMin")
def arg_extreme(call: Call, x: Tensor) -> Tensor:
    axis, keep = call.int("axis", 0), bool(call.int("keepdims", 1))
    function = torch.argmax if call.node.op_type == "ArgMax" else torch.argmin
    if not call.int("select_last_index", 0):
        return function(x, axis, keep)
    return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keep)


@op("CumSum", "CumProd")
def cumulate(call: Call, x: Tensor) -> Tensor:
    axis = int(call.number(1))
    total = call.node.op_type == "CumSum"
    function = torch.cumsum if total else torch.cumprod
    if call.int("reverse", 0):
        x = torch.flip(x, [axis])
    y = function(x, axis, dtype=x.dtype)
    if call.int("exclusive", 0):
        first = torch.full_like(x.narrow(axis, 0, 1), 0 if total else 1)
        y = torch.cat([first, y.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return torch.flip(y, [axis]) if call.int("reverse", 0) else y


@op("TopK")
def top_k(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    count = call.sizes(1)[0] if call.given(1) else call.int("k")
    axis, largest = call.int("axis", -1), bool(call.int("largest", 1))
    # Of equal numbers the first one counts, which a stable sort keeps in front.
    values, places = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


@op("OneHot")
def one_hot(call: Call, indices: Tensor) -> Tensor:
    depth, values = call.sizes(1)[0], call.tensor(2)
    axis = call.int("axis", -1)
    places = indices.to(torch.int64)
    places = torch.where(places < 0, places + depth, places).unsqueeze(axis)
    shape = [1] * places.ndim
    shape[axis] = depth
    hit = places == torch.arange(depth).reshape(shape)
    return torch.where(hit, values[1], values[0])


@op("NonZero")
def non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@op("Compress")
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    if not call.has("axis"):
        x = x.flatten()
    axis = call.int("axis", 0)
    places = torch.nonzero(condition).squeeze(-1)
    return torch.index_select(x, axis, places)


@op("Unique")
def unique(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted values, place of the first of each, for each element its value, and counts."""
    axis = call.int("axis") if call.has("axis") else None
    flat = x.flatten() if axis is None else x
    values, inverse, counts = torch.unique(
        flat, sorted=True, return_inverse=True, return_counts=True, dim=axis
    )
    inverse = inverse.flatten()
    order = torch.arange(inverse.shape[0] - 1, -1, -1)
    first = torch.zeros_like(counts).scatter(0, inverse.flip(0), order)
    if call.int("sorted", 1):
        return values, first, inverse, counts
    rank = torch.argsort(first)
    back = torch.argsort(rank)
    return torch.index_select(values, axis or 0, rank), first[rank], back[inverse], counts[rank]
