"""Formats: text, packing, rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import BadInput, Grid, QFormat
from qcompiler.formats import dequantize, pack, unpack

blocks = st.one_of(
    st.none(),
    st.just((-1,)),
    st.just((-1, -1, -1)),
    st.tuples(st.integers(1, 256)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
)


@st.composite
def formats(draw: st.DrawFn) -> QFormat:
    bits = draw(st.integers(2, 8))
    symmetric = draw(st.booleans())
    unsigned = not symmetric and draw(st.booleans())
    element = f"{'u' if unsigned else ''}int{bits}"
    full = symmetric and draw(st.booleans())
    return QFormat(element, draw(blocks), symmetric, draw(st.booleans()), full)


@given(formats())
def test_text_parses_back(fmt: QFormat) -> None:
    assert QFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int9:channel", "int8"),
        ("int8:chanel", "channel"),
        ("int8:dynamic", "names no block"),
        ("int4:group0", "positive"),
        ("int4:channel:asym:full", "full range already"),
    ],
)
def test_bad_text_says_what_is_right(text: str, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        QFormat.parse(text)


@settings(deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(1, 4), st.integers(1, 67), st.integers(0, 99))
def test_pack_and_unpack(bits: int, signed: bool, rows: int, width: int, seed: int) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(low, low + (1 << bits), (rows, width), generator=generator)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-width * bits // 8))
    assert torch.equal(unpack(packed, bits, width, signed).long(), q)


def test_four_bits_are_low_nibble_first() -> None:
    assert pack(torch.tensor([[1, -2, 3]]), 4).tolist() == [[0xE1, 0x03]]


@settings(deadline=None)
@given(formats(), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_rounding(fmt: QFormat, rows: int, width: int, seed: int) -> None:
    """The error is at most half a step, a second rounding changes nothing, and zero stays zero."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 0.0
    grid = Grid.fit(x, fmt)
    assert tuple(grid.scale.shape) == fmt.scale_shape((rows, width))
    q = grid.codes(x)
    assert float(q.min()) >= fmt.qmin and float(q.max()) <= fmt.qmax
    back = grid.decode(q)
    step = dequantize(torch.ones_like(q), grid.scale, None, fmt, torch.float32)
    half = 0.5 if fmt.symmetric else 1.0  # a rounded zero point may shift the range by half a step
    assert bool(((back - x).abs() <= half * step * (1 + 1e-5) + 1e-7).all())
    assert torch.equal(grid.codes(back), q)
    assert float(back[0, 0]) == 0.0


def test_a_block_of_zeros_stays_zero() -> None:
    for text in ("int8:channel", "int4:group32", "uint8:channel:asym"):
        fmt = QFormat.parse(text)
        x = torch.zeros(3, 40)
        assert torch.equal(Grid.fit(x, fmt).round(x), x)


def test_bytes_count_everything() -> None:
    """64 rows of 256 int4 in groups of 32: data, and a float32 scale for each group."""
    assert QFormat.parse("int4:group32").bytes((64, 256)) == 64 * 128 + 64 * 8 * 4
    assert QFormat.parse("uint8:channel:asym").bytes((64, 256)) == 64 * 256 + 64 * 6
