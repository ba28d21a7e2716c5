"""Costs that need no clock.

bytes   = codes + scales + zero points + tables of the weight as it is stored
BitOps  = MACs · bits of the weight · bits of the activation           (HAWQ-V3, Yao et al. 2021)
"""

from __future__ import annotations

import math

from qcompiler.formats import QFormat, Scheme
from qcompiler.program import shape_of
from qcompiler.sites import Site


def weight_bytes(site: Site, scheme: Scheme) -> float:
    """Bytes of the site's weight, side data included; without a format those of its own type."""
    value = site.weight.meta["val"]
    if scheme.weight is None:
        return float(value.numel() * value.dtype.itemsize)
    rows = (int(value.shape[0]), math.prod(value.shape[1:]))
    return float(scheme.weight.by_rows.bytes(rows))  # kernels are packed by rows too


def bitops(site: Site, scheme: Scheme, tokens: int) -> float:
    """Bit operations of one run on `tokens` tokens; a float counts as its width.

    What is dynamic in the site's output is taken for the tokens, what is fixed (positions of an
    image, channels) multiplies them. An embedding computes nothing.
    """
    if site.x is None:
        return 0.0
    weight, sizes = site.weight.meta["val"], shape_of(site.node)
    outputs = math.prod(s for s in sizes if isinstance(s, int))
    if any(not isinstance(s, int) for s in sizes):
        outputs *= tokens
    macs = outputs * math.prod(weight.shape[1:])
    width = 8 * weight.dtype.itemsize
    return float(macs * _bits(scheme.weight, width) * _bits(scheme.activation, width))


def _bits(fmt: QFormat | None, width: int) -> int:
    return width if fmt is None else fmt.bits
