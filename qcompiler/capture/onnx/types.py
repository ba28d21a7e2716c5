"""Element types and arrays of ONNX in torch's terms.

Types that torch has no arithmetic for are held in the next larger one: 2 and 4 bit integers in int8
and uint8, 4 bit floats in float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.errors import BadInput

D = ir.DataType
TORCH = {
    D.FLOAT: torch.float32,
    D.DOUBLE: torch.float64,
    D.FLOAT16: torch.float16,
    D.BFLOAT16: torch.bfloat16,
    D.INT8: torch.int8,
    D.INT16: torch.int16,
    D.INT32: torch.int32,
    D.INT64: torch.int64,
    D.UINT8: torch.uint8,
    D.UINT16: torch.uint16,
    D.UINT32: torch.uint32,
    D.UINT64: torch.uint64,
    D.BOOL: torch.bool,
    D.COMPLEX64: torch.complex64,
    D.COMPLEX128: torch.complex128,
    D.FLOAT8E4M3FN: torch.float8_e4m3fn,
    D.FLOAT8E5M2: torch.float8_e5m2,
    D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    D.FLOAT8E8M0: torch.float8_e8m0fnu,
    D.INT4: torch.int8,
    D.UINT4: torch.uint8,
    D.INT2: torch.int8,
    D.UINT2: torch.uint8,
    D.FLOAT4E2M1: torch.float32,
}
_BITS = {  # numpy types from ml_dtypes → the integers that have the same bits
    np.dtype(ml_dtypes.bfloat16): np.int16,
    np.dtype(ml_dtypes.float8_e4m3fn): np.uint8,
    np.dtype(ml_dtypes.float8_e5m2): np.uint8,
    np.dtype(ml_dtypes.float8_e4m3fnuz): np.uint8,
    np.dtype(ml_dtypes.float8_e5m2fnuz): np.uint8,
    np.dtype(ml_dtypes.float8_e8m0fnu): np.uint8,
}

_WIDER = {
    D.INT4: np.int8, D.INT2: np.int8, D.UINT4: np.uint8, D.UINT2: np.uint8,
    D.FLOAT4E2M1: np.float32,
}  # fmt: skip
"""Types that are held in a larger one."""


def torch_dtype(type: ir.DataType) -> torch.dtype:
    """The type in which tensors of ONNX type `type` are held."""
    if type not in TORCH:
        raise BadInput(f"tensors of {type.name} have no counterpart in torch")
    return TORCH[type]


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX type whose tensors are of type `dtype`; of several the first in the table."""
    return next(type for type, held in TORCH.items() if held == dtype)


def to_tensor(array: np.ndarray) -> Tensor:
    """`array` as a tensor; symbolic sizes become tensors of the graph."""
    if array.dtype == object:
        if array.size and all(isinstance(v, bool | torch.SymBool) for v in array.reshape(-1)):
            return torch.tensor([bool(v) for v in array.reshape(-1)]).reshape(array.shape)
        numbers = [torch.full((), v, dtype=torch.int64) for v in array.reshape(-1)]
        if not numbers:
            return torch.zeros(array.shape, dtype=torch.int64)
        return torch.stack(numbers).reshape(array.shape)
    type = D.from_numpy(array.dtype)
    dtype = torch_dtype(type)  # refuses what torch cannot hold
    if bits := _BITS.get(array.dtype):
        raw = torch.from_numpy(np.array(array).view(bits))
        return raw.view(dtype)
    return torch.from_numpy(np.array(array, dtype=_WIDER.get(type)))


def to_array(tensor: Tensor) -> np.ndarray:
    """`tensor` as a NumPy array; types that NumPy lacks as float32."""
    tensor = tensor.detach().cpu()
    narrow = tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
    return (tensor.float() if narrow else tensor).numpy()
