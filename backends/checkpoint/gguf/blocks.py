"""Codes in llama.cpp's blocks of 32 numbers, which are stored row by row.

::

    Q4_0   d  16 × (q_j | q_{j+16} << 4)             w = d (q - 8)       18 bytes
    Q4_1   d  m  16 × (q_j | q_{j+16} << 4)          w = d q + m         20
    Q5_0   d  32 high bits  16 × (low nibbles)       w = d (q - 16)      22
    Q5_1   d  m  32 high bits  16 × (low nibbles)    w = d q + m         24
    Q8_0   d  32 × int8                              w = d q             34

d and m are float16, m = -z d. Codes are those of the program, never rounded again: a group of a
multiple of 32, or a whole row, is blocks with one d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qcompiler.backends.checkpoint.gguf.formats import BLOCK, kind_of
from qcompiler.errors import BackendError
from qcompiler.formats import QTensor

MOST = 0.5
"""Steps by which the rounding of d and m to float16 may move a number: as far as rounding to codes
did. Normal numbers of float16 stay below 0.07."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix in blocks."""

    kind: GGMLQuantizationType
    data: np.ndarray
    """uint8 (rows, bytes of a row)."""
    moved: float
    """Steps by which the rounding of scales to float16 moves a number at most."""


def pack(name: str, stored: QTensor) -> Blocks:
    """The blocks of a stored matrix (rows, width)."""
    fmt = stored.format
    kind = kind_of(fmt)
    rows, width = stored.data.shape
    if kind is None or width % BLOCK:
        raise BackendError(
            f"{name}: rows of {width} in {fmt}; blocks of GGUF hold {BLOCK} numbers, so that a row "
            f"is a multiple of {BLOCK}. Leave this weight in floating point"
        )
    halves, moved = _head(name, stored)
    codes = stored.data.reshape(-1, BLOCK)
    if fmt.bits == 8:
        body = [codes.to(torch.int8).view(torch.uint8)]
    else:
        codes = codes + _offset(stored)
        body = [*([_high_bits(codes)] if fmt.bits == 5 else []), _fields(codes)]
    data = torch.cat([halves.view(torch.uint8), *body], 1).reshape(rows, -1)
    return Blocks(GGMLQuantizationType[kind], data.numpy(), moved)


def _offset(stored: QTensor) -> int:
    """What makes its codes unsigned."""
    return 1 << (stored.format.bits - 1) if stored.format.signed else 0


def _head(name: str, stored: QTensor) -> tuple[Tensor, float]:
    """d of each block, and m: float16 (blocks, 1 or 2), and by how many steps these may move a
    number."""
    fmt, shape = stored.format, (stored.data.shape[0], stored.data.shape[1])
    scale, zero = stored.grid.columns(shape)
    d = scale.reshape(-1, BLOCK)[:, :1]
    exact, top = d, 1 << (fmt.bits - 1)
    if zero is not None:
        z = (zero.float() + _offset(stored)).reshape(-1, BLOCK)[:, :1]
        exact, top = torch.cat([d, -z * d], 1), (1 << fmt.bits) - 1
    halves = exact.half()
    steps = ((halves.float() - exact) / d).abs()
    steps[:, 0] *= top
    moved = float(steps.sum(1).amax())
    if not moved <= MOST:
        raise BackendError(
            f"{name}: scales from {float(d.abs().amin()):.1e} to {float(d.abs().amax()):.1e} are "
            "out of float16's range, in which GGUF stores them; leave this weight in floating point"
        )
    return halves, moved


def _fields(codes: Tensor) -> Tensor:
    """Low nibbles of unsigned codes (blocks, 32): number j beside number j + 16."""
    low, half = (codes & 15).to(torch.uint8), BLOCK // 2
    return low[:, :half] | low[:, half:] << 4


def _high_bits(codes: Tensor) -> Tensor:
    """The fifth bit of each number, bit j of 32 for number j: uint8 (blocks, 4)."""
    bits = np.packbits((codes >> 4 & 1).to(torch.uint8).numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(bits)
