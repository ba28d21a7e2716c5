"""Resize and Upsample: each output pixel from the input pixels around the place it comes from.

Axis by axis: nearest picks rows, linear and cubic multiply by a matrix of weights. What torch's
`interpolate` computes exactly alike becomes that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call, Size
from qcompiler.capture.onnx.table import op

WHOLE = 1024
"""Largest denominator with which a stored scale is taken for a ratio, such as 0.7 for 7/10."""


@dataclass(frozen=True)
class Axis:
    """One axis that changes: out = place(index); a step of one out is `num` / `den` in."""

    axis: int
    size: Size
    out: Size
    num: Size
    den: Size
    start: float = 0.0
    end: float = 1.0
    """The region of interest, as shares of the axis."""
    by_size: bool = False
    """Whether the step is the ratio of the sizes, whatever they are."""

    @property
    def factor(self) -> int | None:
        """The whole number of copies of each pixel, if it is one."""
        if isinstance(self.num, int) and isinstance(self.den, int) and self.den % self.num == 0:
            return self.den // self.num
        return None


@op("Resize")
def resize(call: Call, x: Tensor) -> Tensor:
    if call.version < 11:
        return _resize(call, x, _by_scales(call, x, _scales(call, 1)), "asymmetric", "floor")
    axes = [a % x.ndim for a in call.ints("axes", list(range(x.ndim)))]
    mode = call.text("coordinate_transformation_mode", "half_pixel")
    roi = [float(v) for v in call.known(1).reshape(-1)] if mode == "tf_crop_and_resize" else []
    if call.given(2) and call.value(2).size != 0:
        found = _by_scales(call, x, _scales(call, 2), axes, roi)
    else:
        found = _by_sizes(call, x, call.sizes(3), axes, roi)
    return _resize(call, x, found, mode, call.text("nearest_mode", "round_prefer_floor"))


@op("Upsample")
def upsample(call: Call, x: Tensor) -> Tensor:
    scales = call.floats("scales") if call.has("scales") else _scales(call, 1)
    return _resize(call, x, _by_scales(call, x, scales), "asymmetric", "floor")


def _scales(call: Call, index: int) -> list[float]:
    found = call.known(index).reshape(-1)
    if found.dtype == object:
        raise call.refusal("its scales depend on a dynamic size; give sizes")
    return [float(v) for v in found]


def _by_scales(
    call: Call,
    x: Tensor,
    scales: Sequence[float],
    axes: Sequence[int] | None = None,
    roi: Sequence[float] = (),
) -> list[Axis]:
    axes = list(range(x.ndim)) if axes is None else axes
    if len(scales) != len(axes) or any(not s > 0 or math.isinf(s) for s in scales):
        raise call.refusal(f"scales are {list(scales)}; expected {len(axes)} positive numbers")
    found = []
    for place, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
        ratio = Fraction(scale).limit_denominator(WHOLE)
        if np.float32(ratio) != np.float32(scale):
            ratio = Fraction(scale)
        n, num, den = x.shape[axis], ratio.denominator, ratio.numerator
        found.append(Axis(axis, n, n * den // num, num, den, *_region(roi, place)))
    return found


def _by_sizes(
    call: Call, x: Tensor, sizes: Sequence[Size], axes: Sequence[int], roi: Sequence[float]
) -> list[Axis]:
    if len(sizes) != len(axes) or any(isinstance(n, int) and n < 0 for n in sizes):
        raise call.refusal(f"sizes are {list(map(str, sizes))}; expected {len(axes)} of them")
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    have = [x.shape[a] for a in axes]
    if policy == "stretch":
        return [
            Axis(a, n, out, n, out, *_region(roi, i), by_size=True)
            for i, (a, n, out) in enumerate(zip(axes, have, sizes, strict=True))
        ]
    if not all(isinstance(n, int) for n in (*sizes, *have)):
        raise call.refusal(f"keep_aspect_ratio_policy is {policy!r}, and the sizes are dynamic")
    pick = min if policy == "not_larger" else max
    ratio = pick(Fraction(out, n) for out, n in zip(sizes, have, strict=True))
    return [
        Axis(a, n, math.floor(ratio * n + Fraction(1, 2)), ratio.denominator, ratio.numerator)
        for a, n in zip(axes, have, strict=True)
    ]


def _region(roi: Sequence[float], place: int) -> tuple[float, float]:
    return (roi[place], roi[place + len(roi) // 2]) if roi else (0.0, 1.0)


def _resize(call: Call, x: Tensor, axes: list[Axis], where: str, rounding: str) -> Tensor:
    mode = call.text("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise call.refusal(f"mode is {mode!r}; expected nearest, linear or cubic")
    crops = where == "tf_crop_and_resize"
    axes = [a for a in axes if crops or not statically_known_true(a.out == a.size)]
    whole = None if crops else _interpolated(call, x, axes, mode, where, rounding)
    if whole is not None:
        return whole
    kind = x.dtype
    x = x if mode == "nearest" or x.is_floating_point() else x.float()
    for axis in axes:
        place = _places(call, axis, where)
        if mode == "nearest":
            y = torch.index_select(x, axis.axis, _rounded(call, place, axis.size, rounding))
        else:
            weights = _weights(call, axis, place, mode).to(x.dtype)
            y = torch.matmul(x.transpose(axis.axis, -1), weights.t()).transpose(axis.axis, -1)
        if crops:
            outside = (place < 0) | (place > axis.size - 1)
            outside = outside.reshape([-1] + [1] * (x.ndim - 1 - axis.axis))
            y = torch.where(outside, call.float("extrapolation_value", 0.0), y)
        x = y
    return x.to(kind)


def _interpolated(
    call: Call, x: Tensor, axes: list[Axis], mode: str, where: str, rounding: str
) -> Tensor | None:
    """By torch's own function, where it computes the same."""
    rank = x.ndim - 2
    spatial = 1 <= rank <= 3 and all(a.axis >= 2 for a in axes)
    if not axes:
        return x
    if not spatial or call.int("antialias", 0) or call.int("exclude_outside", 0):
        return None
    outs = {a.axis: a.out for a in axes}
    size = [outs.get(i + 2, x.shape[i + 2]) for i in range(rank)]
    copies = all(a.factor is not None for a in axes)
    if mode == "nearest":
        # Of whole copies the middle, the first and the rounded place are the same pixel.
        alike = (where, rounding) == ("asymmetric", "floor") or (
            where == "half_pixel" and rounding.startswith("round")
        )
        return F.interpolate(x, size=size) if copies and alike else None
    stretched = copies or all(a.by_size for a in axes)
    if not x.is_floating_point() or not stretched or where not in ("half_pixel", "align_corners"):
        return None
    corners = where == "align_corners"
    if mode == "linear":
        names = ("linear", "bilinear", "trilinear")
        return F.interpolate(x, size=size, mode=names[rank - 1], align_corners=corners)
    if rank != 2 or call.float("cubic_coeff_a", -0.75) != -0.75:
        return None
    return F.interpolate(x, size=size, mode="bicubic", align_corners=corners)


def _places(call: Call, a: Axis, where: str) -> Tensor:
    """For each output index the place in the input that it comes from."""
    out = torch.arange(a.out, dtype=torch.float64)
    one = isinstance(a.out, int) and a.out == 1
    if where == "asymmetric":
        return out * a.num / a.den
    if where == "align_corners":
        return out * ((a.size - 1) / _above(a.size * a.den / a.num - 1))
    if where == "tf_half_pixel_for_nn":
        return (out + 0.5) * a.num / a.den
    if where == "pytorch_half_pixel" and one:
        return out * 0.0
    if where == "tf_crop_and_resize":
        if one:
            return out + 0.5 * (a.start + a.end) * (a.size - 1)
        return a.start * (a.size - 1) + out * ((a.end - a.start) * (a.size - 1) / (a.out - 1))
    middle = (out + 0.5) * a.num / a.den - 0.5
    if where == "half_pixel_symmetric":
        return middle + (a.size / 2) * (1 - a.out / (a.size * a.den / a.num))
    if where in ("half_pixel", "pytorch_half_pixel"):
        return middle
    raise call.refusal(f"coordinate_transformation_mode is {where!r}, which is not in the standard")


def _above(length: float) -> float:
    """A single output pixel, of a length up to 1, comes from the first one: by no place divided."""
    above: float = torch.sym_max(length, 1.0)
    return above


def _rounded(call: Call, place: Tensor, size: Size, how: str) -> Tensor:
    if how == "round_prefer_floor":
        place = torch.ceil(place - 0.5)
    elif how == "round_prefer_ceil":
        place = torch.floor(place + 0.5)
    elif how in ("floor", "ceil"):
        place = torch.floor(place) if how == "floor" else torch.ceil(place)
    else:
        raise call.refusal(f"nearest_mode is {how!r}, which is not in the standard")
    return place.long().clamp(0, size - 1)


def _weights(call: Call, a: Axis, place: Tensor, mode: str) -> Tensor:
    """The matrix (out, in); pixels past the ends are the last ones, or are left out."""
    reach: Size = 1 if mode == "linear" else 2
    shrink: float = 1.0
    if call.int("antialias", 0):
        shrink = torch.sym_min(1.0, a.den / a.num)
        reach = torch.sym_max(reach, -(-reach * a.num // a.den))
    taps = torch.floor(place).unsqueeze(-1) + torch.arange(1 - reach, reach + 1)
    far = ((taps - place.unsqueeze(-1)) * shrink).abs()
    weight = (1 - far).clamp(min=0) if mode == "linear" else _cubic(
        far, call.float("cubic_coeff_a", -0.75)
    )  # fmt: skip
    if call.int("exclude_outside", 0):
        weight = torch.where((taps >= 0) & (taps < a.size), weight, 0.0)
    weight = weight / weight.sum(-1, keepdim=True)
    matrix = torch.zeros([a.out, a.size], dtype=weight.dtype)
    return matrix.scatter_add(1, taps.long().clamp(0, a.size - 1), weight)


def _cubic(far: Tensor, a: float) -> Tensor:
    near = ((a + 2) * far - (a + 3)) * far * far + 1
    next_ = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
    return torch.where(far <= 1, near, torch.where(far < 2, next_, 0.0))
