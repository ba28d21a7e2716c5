"""How weights lie in memory: codes of several places of a row in one unit.

Inputs are taken in *blocks* of C · P (C codes in a unit, P lanes). Unit p of a block has the codes

    k = p,  P + p,  …,  (C - 1) P + p              plane j (its bits from B j on)  ↔  k = j P + p

so that plane j of P units is P neighbouring inputs, met by one contiguous load of the activation,
and no code ever has to move to another lane (`codes.py` decodes them). A block lies row by row:

    units[block, row, lane]      row 0             row 1             row 2
                        ┌─────────────────┬─────────────────┬─────────────────┬─ …
              block 0   │ u0 u1 … u(P-1)  │ u0 u1 … u(P-1)  │ …               │
                        ├─────────────────┼─────────────────┼─────────────────┼─ …
              block 1   │ …               │                 │                 │

A tile of R rows is one run of bytes in each block: every byte that is fetched is used, in loads of
16 bytes. Rows are padded to a multiple of 128 and inputs to a block, with zeros, so that weights
are read without masks. Codes of 4-bit integers are stored with 8 added (0 … 15).

Scales and zero points are (groups, padded rows). Of 16 rows, r and r + 8 are neighbours, since one
thread wants both (`fragments.py`): 0, 8, 1, 9, 2, …
"""

from __future__ import annotations

import torch
from torch import Tensor

INNER = 128
"""What the number of inputs of 8-bit codes in plain rows is padded to."""
ROWS = 128
"""What the number of rows is padded to."""


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack_units(codes: Tensor, lanes: int, bits: int, unit: int) -> Tensor:
    """Codes of `bits` bits (rows, inputs), not negative, in units of 8 or 16 bits: uint8 or int16
    (blocks, padded rows, lanes)."""
    rows, width = codes.shape
    planes = unit // bits
    full = torch.nn.functional.pad(
        codes.to(torch.int32), (0, -width % (planes * lanes), 0, padded(rows, ROWS) - rows)
    )
    split = full.reshape(full.shape[0], -1, planes, lanes).movedim(2, 0)
    units = torch.zeros_like(split[0])
    for j in range(planes):
        units |= split[j] << (bits * j)
    return units.to(torch.uint8 if unit == 8 else torch.int16).movedim(1, 0).contiguous()


def unpack_units(units: Tensor, rows: int, width: int, bits: int) -> Tensor:
    """The inverse of `pack_units`: int32 (rows, width)."""
    planes = 8 * units.element_size() // bits
    wide, mask = units.to(torch.int32), (1 << bits) - 1
    split = torch.stack([(wide >> (bits * j)) & mask for j in range(planes)], 2)
    return split.movedim(1, 0).flatten(1)[:rows, :width].contiguous()


def pack_scales(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales (rows or 1, groups or 1) as (groups, padded rows), zeros behind the end; float16 where
    it holds them exactly."""
    pad = (0, groups - scale.shape[1], 0, padded(rows, ROWS) - rows)
    full = torch.nn.functional.pad(scale.float().expand(rows, -1), pad).t()
    full = full.reshape(groups, -1, 2, 8).transpose(2, 3).flatten(1)
    half = full.half()
    return half if torch.equal(half.float(), full) else full


def unpack_scales(packed: Tensor, rows: int) -> Tensor:
    """The inverse of `pack_scales`: (rows, groups)."""
    return packed.reshape(len(packed), -1, 8, 2).transpose(2, 3).flatten(1)[:, :rows].t()


def pack_rows(codes: Tensor) -> Tensor:
    """8-bit codes (rows, inputs) with zeros up to whole tiles."""
    rows, width = codes.shape
    pad = (0, -width % INNER, 0, padded(rows, ROWS) - rows)
    return torch.nn.functional.pad(codes, pad).contiguous()
