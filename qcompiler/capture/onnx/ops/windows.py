"""Where the windows of convolutions and poolings lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call, Size


@dataclass(frozen=True)
class Windows:
    """For each spatial axis: size of the kernel, step, spread, and padding on both sides."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[Size]
    after: list[Size]

    @property
    def spans(self) -> list[int]:
        """How far each window reaches: (kernel - 1) · dilation + 1."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding says it: fixed, and the same on both sides."""
        both = zip(self.before, self.after, strict=True)
        return all(isinstance(a, int) and isinstance(b, int) and a == b >= 0 for a, b in both)

    @property
    def torch_limit(self) -> bool:
        """Whether torch's poolings take the padding: symmetric, at most half of the window."""
        return self.symmetric and all(
            2 * p <= k for p, k in zip(self.before, self.kernel, strict=True)
        )

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        return pad_axes(x, self.before, self.after, value)

    def cut(self, x: Tensor) -> Tensor:
        """All windows of a padded `x`: (N, C, windows…, kernel…), a view."""
        spatial = x.ndim - 2
        for axis, (span, step) in enumerate(zip(self.spans, self.strides, strict=True)):
            x = x.unfold(axis + 2, span, step)
        for axis, d in enumerate(self.dilations):
            x = x if d == 1 else torch.ops.aten.slice.Tensor(x, axis + 2 + spatial, None, None, d)
        return x

    def rounded_up(self, sizes: Sequence[Size]) -> Windows:
        """Padding after the end such that a window counts that is only begun (ceil_mode).

        One that would begin in the padding after the end does not count.
        """
        after = []
        for n, span, step, pad, end in zip(
            sizes, self.spans, self.strides, self.before, self.after, strict=True
        ):
            begun = -(-(n + pad + end - span) // step) + 1
            last = (n + pad - 1) // step + 1
            count = begun if step + end <= span else torch.sym_min(begun, last)
            after.append((count - 1) * step + span - n - pad)
        return Windows(self.kernel, self.strides, self.dilations, self.before, after)


def windows(call: Call, sizes: Sequence[Size], kernel: Sequence[int] | None = None) -> Windows:
    """The windows that the node's attributes describe on spatial axes of `sizes`."""
    rank = len(sizes)
    if not 1 <= rank <= 3:
        raise call.refusal(f"its input has {rank} spatial axes; expected 1 to 3")
    given = call.ints("kernel_shape", None if kernel is None else list(kernel))
    if kernel is not None and given != list(kernel):
        raise call.refusal(f"kernel_shape is {given}; its weight has {list(kernel)}")
    strides, dilations = call.ints("strides", [1] * rank), call.ints("dilations", [1] * rank)
    for name, values in (("kernel_shape", given), ("strides", strides), ("dilations", dilations)):
        if len(values) != rank or min(values) < 1:
            raise call.refusal(f"{name} is {values}; expected {rank} positive integers")
    spans = [(k - 1) * d + 1 for k, d in zip(given, dilations, strict=True)]
    before, after = _padding(call, sizes, spans, strides)
    return Windows(given, strides, dilations, before, after)


def _padding(
    call: Call, sizes: Sequence[Size], spans: Sequence[int], strides: Sequence[int]
) -> tuple[list[Size], list[Size]]:
    rank, how = len(sizes), call.text("auto_pad", "NOTSET")
    if how in ("NOTSET", ""):
        pads = call.ints("pads", [0] * 2 * rank)
        if len(pads) != 2 * rank:
            raise call.refusal(f"pads is {pads}; expected {2 * rank} integers")
        return pads[:rank], pads[rank:]
    if how == "VALID":
        return [0] * rank, [0] * rank
    totals = [_same(n, span, step) for n, span, step in zip(sizes, spans, strides, strict=True)]
    return halves(call, totals, how)


def _same(size: Size, span: int, step: int) -> Size:
    """Padding for ceil(size / step) windows; with steps of 1 the size does not matter."""
    if step == 1:
        return span - 1
    total: Size = torch.sym_max((-(-size // step) - 1) * step + span - size, 0)
    return total


def halves(call: Call, totals: Sequence[Size], how: str) -> tuple[list[Size], list[Size]]:
    """Padding before and after; the odd one is after with SAME_UPPER, before with SAME_LOWER."""
    small = [t // 2 for t in totals]
    large = [t - t // 2 for t in totals]
    if how not in ("SAME_UPPER", "SAME_LOWER"):
        raise call.refusal(f"auto_pad is {how!r}; expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    return (small, large) if how == "SAME_UPPER" else (large, small)


def pad_axes(
    x: Tensor, before: Sequence[Size], after: Sequence[Size], value: float = 0.0
) -> Tensor:
    """Pad the last axes; a negative width cuts."""
    widths = [w for pair in zip(before[::-1], after[::-1], strict=True) for w in pair]
    if all(isinstance(w, int) and w == 0 for w in widths):
        return x
    return F.pad(x, widths, value=value)
