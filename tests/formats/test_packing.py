"""Codes in bytes and back, in each layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import QFormat
from qcompiler.formats import pack, unpack

LAYOUTS = (
    *(f"{sign}int{b}:unscaled" for sign in ("", "u") for b in range(1, 9)),
    *(f"{sign}int{b}:unscaled:planes" for sign in ("", "u") for b in range(1, 9)),
    "int16:unscaled", "int16:unscaled:planes", "fp16", "bf16", "ternary:unscaled",
    "fp4_e2m1:unscaled", "fp6_e2m3:unscaled:planes",
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(LAYOUTS),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(1, 67),
    st.integers(0, 99),
)
def test_pack_and_unpack(text: str, rows: list[int], width: int, seed: int) -> None:
    fmt, draw = QFormat.parse(text), torch.Generator().manual_seed(seed)
    q = torch.randint(fmt.qmin, fmt.qmax + 1, (*rows, width), generator=draw).to(torch.int16)
    packed = fmt.pack(q)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (*rows, fmt.row_bytes(width))
    assert packed.numel() == fmt.bytes((*rows, width))
    assert torch.equal(fmt.unpack(packed, width), q)
    assert torch.equal(fmt.unpack(packed.mT.contiguous().mT if rows else packed, width), q)


def test_four_bits_are_low_nibble_first() -> None:
    assert pack(torch.tensor([[1, -2, 3]]), 4).tolist() == [[0xE1, 0x03]]


def test_three_bits_run_through_bytes() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0xD1, 0x58, 0x1F]


def test_sixteen_bits_are_little_endian() -> None:
    assert pack(torch.tensor([0x1234, -2]), 16).tolist() == [0x34, 0x12, 0xFE, 0xFF]


def test_planes_are_one_bit_after_the_other() -> None:
    fmt = QFormat.parse("int2:unscaled:planes")
    assert fmt.pack(torch.tensor([[1, -1, -2, 0]])).tolist() == [[0b0011, 0b0110]]


def test_five_trits_in_a_byte() -> None:
    fmt = QFormat.parse("ternary:unscaled")
    assert fmt.pack(torch.tensor([[-1, 0, 1, 1, -1, 1]])).tolist() == [[0 + 3 + 18 + 54 + 0, 122]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_packed_for_themselves(bits: int) -> None:
    q = torch.randint(0, 2**bits, (3, 11), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(q, bits)[1], pack(q[1], bits))
    assert torch.equal(unpack(pack(q, bits)[1], bits, 11, False).long(), q[1])


def test_bytes_count_everything() -> None:
    """64 rows of 256 int4 in groups of 32: data, and a float32 scale for each group."""
    assert QFormat.parse("int4:group32").bytes((64, 256)) == 64 * 128 + 64 * 8 * 4
    assert QFormat.parse("uint8:channel:asym").bytes((64, 256)) == 64 * 256 + 64 * 5
    assert QFormat.parse("uint3:channel:asym").bytes((64, 256)) == 64 * 96 + 64 * 5
    assert QFormat.parse("nvfp4").bytes((64, 256)) == 64 * 128 + 64 * 16 + 4
    assert QFormat.parse("codebook3:channel").bytes((64, 256)) == 64 * 96 + 64 * 8 * 4
    assert QFormat.parse("ternary:group256:scale(fp16)").bits_per_weight((64, 256)) == 1.6875
