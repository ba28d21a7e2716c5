"""How the numbers of a quantized weight are found: functions of tensors, which never see a graph.

A quantizer is `(weight, format, input range) -> QTensor`; the table below names them for recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qcompiler.facts import Range
from qcompiler.formats import QFormat, QTensor, block_range, quantize, range_to_scale

Quantizer = Callable[[Tensor, QFormat, Range | None], QTensor]


def nearest(weight: Tensor, fmt: QFormat, inputs: Range | None = None) -> QTensor:
    """Round to nearest with scales that cover each block's range: s = max|w| / qmax.

    `weight` is (out, …), any floating point type; arithmetic is in float32. Needs no data.
    """
    wide = weight.float()
    scale, zero = range_to_scale(*block_range(wide, fmt), fmt)
    return QTensor(quantize(wide, scale, zero, fmt).to(torch.int16), scale, zero, fmt)


QUANTIZERS: Mapping[str, Quantizer] = {"nearest": nearest}
