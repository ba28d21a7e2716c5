"""How 4-bit weights lie in memory: eight codes in a word, from eight places of a row.

Inputs are taken in *blocks* of 8 · L (L lanes, 16 or 32). Word i of a block holds the codes of

    k = i,  L + i,  2 L + i,  …,  7 L + i          nibble j (bits 4j … 4j+3)  ↔  k = j L + i

so that `(word >> 4 j) & 15` are L neighbouring inputs (*plane* j), met by one contiguous load of
the activation, and no code ever has to move to another lane. Words of a block lie row by row:

    words[block, row, lane]      row 0             row 1             row 2
                        ┌─────────────────┬─────────────────┬─────────────────┬─ …
              block 0   │ w0 w1 … w(L-1)  │ w0 w1 … w(L-1)  │ …               │
                        ├─────────────────┼─────────────────┼─────────────────┼─ …
              block 1   │ …               │                 │                 │

A tile of R rows is one run of 4 R L bytes in each block: every byte that is fetched is used, in
loads of 16 bytes. Rows are padded to a multiple of 128 and inputs to a block, with zeros, so that
weights are read without masks. Integer codes are stored with 8 added (0 … 15).

Scales and zero points are (padded rows, groups), row by row like the weight itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES = 8
INNER = 128
"""What the number of inputs of 8-bit codes is padded to."""
ROWS = 128
"""What the number of rows is padded to."""


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pack_words(codes: Tensor, lanes: int) -> Tensor:
    """Codes 0 … 15 (rows, inputs) as words: int32 (blocks, padded rows, lanes)."""
    rows, width = codes.shape
    block = PLANES * lanes
    full = torch.nn.functional.pad(
        codes.to(torch.int32), (0, -width % block, 0, padded(rows, ROWS) - rows)
    )
    planes = full.reshape(full.shape[0], -1, PLANES, lanes).movedim(2, 0)
    words = torch.zeros_like(planes[0])
    for j in range(PLANES):
        words |= planes[j] << (4 * j)
    return words.movedim(1, 0).contiguous()


def unpack_words(words: Tensor, rows: int, width: int) -> Tensor:
    """The inverse of `pack_words`: int32 (rows, width)."""
    planes = torch.stack([(words >> (4 * j)) & 15 for j in range(PLANES)], 2)
    return planes.movedim(1, 0).flatten(1)[:rows, :width].contiguous()


def pack_scales(scale: Tensor, rows: int, groups: int) -> Tensor:
    """Scales (rows or 1, groups or 1) as (padded rows, groups), zeros behind the end; float16 where
    it holds them exactly."""
    pad = (0, groups - scale.shape[1], 0, padded(rows, ROWS) - rows)
    full = torch.nn.functional.pad(scale.float().expand(rows, -1), pad).contiguous()
    half = full.half()
    return half if torch.equal(half.float(), full) else full


def pack_rows(codes: Tensor) -> Tensor:
    """8-bit codes (rows, inputs) with zeros up to whole tiles."""
    rows, width = codes.shape
    pad = (0, -width % INNER, 0, padded(rows, ROWS) - rows)
    return torch.nn.functional.pad(codes, pad).contiguous()
