"""Products as ONNX Runtime's optimizer joins them with what is around (`com.microsoft`)."""

from __future__ import annotations

from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import MICROSOFT, op


@op("FusedMatMul", domain=MICROSOFT)
def fused_matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """alpha · A' B', where a prime may swap the last two axes."""
    if call.int("transBatchA", 0) or call.int("transBatchB", 0):
        raise call.refusal("transBatchA or transBatchB is set; expected batch axes in front")
    alpha = call.float("alpha", 1.0)
    a = a.transpose(-1, -2) if call.int("transA", 0) and a.ndim > 1 else a
    b = b.transpose(-1, -2) if call.int("transB", 0) and b.ndim > 1 else b
    y = a @ b
    return y if alpha == 1.0 else y * alpha
