"""Blocks of llama.cpp's files, read by us: the same numbers, to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from torch import Tensor

from qcompiler import Grid, QFormat
from qcompiler.formats import QTensor

Parts = tuple[Tensor, Tensor]
"""Codes (blocks, numbers of a block), and what is stored of the scales (blocks, 1)."""


def halves(block: np.ndarray) -> np.ndarray:
    """Nibbles of a block: the low ones are its first half, the high ones its second."""
    return np.concatenate([block & 15, block >> 4], -1)


def scale(block: np.ndarray) -> Tensor:
    """A float16 as the code of `fp16`."""
    return torch.from_numpy(np.ascontiguousarray(block).view(np.int16))


def q4_0(block: np.ndarray) -> Parts:
    return torch.from_numpy(halves(block[:, 2:]).astype(np.int16) - 8), scale(block[:, :2])


def q5_0(block: np.ndarray) -> Parts:
    high = np.unpackbits(block[:, 2:6], axis=-1, bitorder="little")
    codes = (halves(block[:, 6:]) | high << 4).astype(np.int16) - 16
    return torch.from_numpy(codes), scale(block[:, :2])


def q8_0(block: np.ndarray) -> Parts:
    codes = np.ascontiguousarray(block[:, 2:]).view(np.int8).astype(np.int16)
    return torch.from_numpy(codes), scale(block[:, :2])


def tq2_0(block: np.ndarray) -> Parts:
    """Two bits each; the four of a byte are 32 numbers apart."""
    bits = block[:, :64].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return torch.from_numpy(bits.reshape(-1, 256).astype(np.int16) - 1), scale(block[:, 64:])


def tq1_0(block: np.ndarray) -> Parts:
    """Five trits in a byte are the digits of a fraction of 256: ×3 shifts one out."""

    def digits(part: np.ndarray, count: int, run: int) -> np.ndarray:
        powers = np.array([3**i for i in range(count)], np.uint8)[:, None]
        shifted = part.reshape(len(part), -1, 1, run) * powers
        return (shifted.astype(np.uint16) * 3 >> 8).reshape(len(part), -1)

    runs = ((block[:, :32], 5, 32), (block[:, 32:48], 5, 16), (block[:, 48:52], 4, 4))
    codes = np.concatenate([digits(*run) for run in runs], -1).astype(np.int16) - 1
    return torch.from_numpy(codes), scale(block[:, 52:])


def mxfp4(block: np.ndarray) -> Parts:
    codes = torch.from_numpy(halves(block[:, 1:]).astype(np.int16))
    return codes, torch.from_numpy(block[:, :1].astype(np.int16))


KINDS: dict[Type, tuple[str, Callable[[np.ndarray], Parts]]] = {
    Type.Q4_0: ("int4:channel:mirrored:scale(fp16)", q4_0),
    Type.Q5_0: ("int5:channel:mirrored:scale(fp16)", q5_0),
    Type.Q8_0: ("int8:channel:full:scale(fp16)", q8_0),
    Type.TQ1_0: ("ternary:channel:scale(fp16)", tq1_0),
    Type.TQ2_0: ("ternary:channel:scale(fp16)", tq2_0),
    Type.MXFP4: ("fp4_e2m1:channel:scale(e8m0)", mxfp4),
}
"""Kind → our format of a matrix with one block in each row, and how the parts are read."""


def matrix() -> np.ndarray:
    """Random, of all sizes, with a block of zeros."""
    x = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    x = x * torch.exp2(torch.arange(24.0)[:, None] - 14)
    x[3] = 0.0
    return x.numpy()


def ours(text: str, codes: Tensor, scales: Tensor) -> Tensor:
    fmt = QFormat.parse(text)
    assert fmt.scale is not None
    stored = QTensor(scales, Grid(fmt.scale, torch.ones(1)))
    return Grid(fmt, stored.dequantize(), None, None, stored).decode(codes)


@pytest.mark.parametrize("kind", KINDS)
def test_decode(kind: Type) -> None:
    packed = quants.quantize(matrix(), kind)
    size = {Type.TQ1_0: 54, Type.TQ2_0: 66, Type.MXFP4: 17, Type.Q4_0: 18, Type.Q5_0: 22}
    text, read = KINDS[kind]
    found = ours(text, *read(packed.reshape(-1, size.get(kind, 34))))
    expected = torch.from_numpy(quants.dequantize(packed, kind).copy())
    assert torch.equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_0])
def test_scales_of_either_sign(kind: Type) -> None:
    """Made by us: scales bit for bit. gguf divides by the scale before it is rounded to float16, so
    that what lies half between two codes may go to the other one."""
    text, read = KINDS[kind]
    x = torch.from_numpy(matrix()).reshape(-1, 32)
    codes, scales = read(quants.quantize(matrix(), kind).reshape(len(x), -1))
    found = Grid.fit(x, QFormat.parse(text)).quantize(x)
    some = (x != 0).any(-1)  # of a block of zeros the scale is 0 there, and 1 here
    assert found.grid.stored is not None
    assert torch.equal(found.grid.stored.data[some], scales[some])
    assert (found.data - codes)[some].abs().max() <= 1
    assert (found.data == codes)[some].float().mean() > 0.99
    assert (found.dequantize() - x).norm() <= (ours(text, codes, scales) - x).norm() * 1.0001


def test_bytes() -> None:
    """What a number costs, of the same formats in our layout."""
    for kind, text in (
        (Type.Q4_0, "int4:group32:mirrored:scale(fp16)"),
        (Type.Q5_0, "int5:group32:mirrored:scale(fp16)"),
        (Type.Q8_0, "int8:group32:full:scale(fp16)"),
        (Type.MXFP4, "mxfp4"),
    ):
        assert QFormat.parse(text).bytes((24, 512)) == quants.quantize(matrix(), kind).size


def test_nvfp4_decode() -> None:
    """Blocks of 64: four scales in unsigned fp8 e4m3, then the nibbles of four times 16 numbers."""
    draw = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (50, 36), generator=draw, dtype=torch.uint8)
    block[:, :4] = block[:, :4] % 127
    codes = np.concatenate([halves(block[:, i : i + 8].numpy()) for i in (4, 12, 20, 28)], -1)
    fmt = QFormat.parse("fp4_e2m1:group16:scale(fp8_e4m3:unscaled)")
    found = ours(str(fmt), torch.from_numpy(codes.astype(np.int16)), block[:, :4].to(torch.int16))
    expected = torch.from_numpy(quants.dequantize(block.numpy(), Type.NVFP4).copy())
    assert torch.equal(found, expected)


def test_offsets_become_zero_points() -> None:
    """Q4_1 adds a minimum, d q + m. With the zero point -m / d it is ours, but for the rounding of
    that quotient to float32."""
    packed = quants.quantize(matrix() + 1.0, Type.Q4_1)
    blocks = packed.reshape(-1, 20)
    scales, least = (
        torch.from_numpy(np.ascontiguousarray(blocks[:, i : i + 2]).view(np.float16)).float()
        for i in (0, 2)
    )
    scales = torch.where(scales == 0, 1.0, scales)
    codes = torch.from_numpy(halves(blocks[:, 4:]).astype(np.int16))
    grid = Grid(QFormat.parse("uint4:channel:asym"), scales, -least / scales)
    expected = torch.from_numpy(quants.dequantize(packed, Type.Q4_1).copy()).reshape(-1, 32)
    error = (grid.decode(codes) - expected).abs()
    assert bool((error <= 1e-6 * expected.abs().amax(-1, keepdim=True)).all())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Type.Q8_0, "int8:group32:scale(fp16)"),
        (Type.MXFP4, "mxfp4"),
        (Type.TQ2_0, "ternary:group256:scale(fp16)"),
    ],
)
def test_rules_that_agree(kind: Type, text: str) -> None:
    """Same scales, and same codes but where a number lies (almost) in the middle: gguf divides by
    the scale before it rounds that to float16, takes the lower number of two equally near for
    MXFP4, and the one away from zero for integers."""
    x = torch.from_numpy(matrix()[10:])  # rows whose scales are normal numbers in float16
    found = Grid.fit(x, QFormat.parse(text)).round(x)
    expected = torch.from_numpy(quants.dequantize(quants.quantize(x.numpy(), kind), kind).copy())
    assert float((found != expected).float().mean()) < 0.01
    assert float((found - x).norm()) <= float((expected - x).norm()) * (1 + 1e-4)
