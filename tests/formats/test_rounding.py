"""Every format rounds to its nearest number, and a second time to the same."""

from __future__ import annotations

import pytest
import torch
from all_formats import ALONE, ELEMENTS, MINIFLOATS, formats, numbers, tensors
from hypothesis import given, settings
from torch import Tensor

from qcompiler import Grid, QFormat
from qcompiler.formats import element, spread

fake_quantize = torch.ops.qc.fake_quantize


@settings(deadline=None, max_examples=400)
@given(formats(), tensors())
def test_rounding(fmt: QFormat, x: Tensor) -> None:
    """The nearest of the numbers that there are, the same again, and zero stays zero."""
    x = x.abs() if fmt.kind.one_sided and fmt.symmetric else x
    grid = Grid.fit(x, fmt)
    shape = tuple(x.shape)
    assert tuple(grid.scale.shape) == fmt.scale_shape(shape)
    size = grid.scale.abs() if fmt.mirrored else grid.scale  # a mirrored scale has either sign
    assert bool((size > 0).all()) and bool(size.isfinite().all())
    q, back = grid.quantize(x).data, grid.round(x)
    assert int(q.min()) >= fmt.qmin and int(q.max()) <= fmt.qmax
    assert back.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert torch.equal(grid.decode(q, back.dtype), back)
    assert torch.equal(grid.quantize(back).data, q)
    assert torch.equal(grid.round(back), back)
    if fmt.is_integer or 0 in numbers(fmt.element):
        assert not bool(back[x == 0].any())

    wide, scale = x.double(), spread(size, shape, fmt).double()
    if fmt.element.startswith("log"):  # rounds by ratio
        least = 2.0 ** (1 - 2**fmt.bits) * scale
        inside = (wide >= least) & (wide <= scale)
        ratio = (back.double() / wide)[inside]
        assert bool((ratio.log2().abs() <= 0.5 + 1e-5).all())
        return
    if fmt.element == "int16":
        low, high = (torch.full_like(q, c) for c in (fmt.qmin, fmt.qmax))
        low, high = (grid.decode(c, torch.float64) for c in (low, high))
        best = torch.maximum(torch.maximum(low - wide, wide - high), scale / 2)
    else:
        codes = range(fmt.qmin, fmt.qmax + 1)
        every = torch.stack([grid.decode(torch.full_like(q, c), torch.float64) for c in codes])
        distance = (every - wide).abs()
        best = distance.where(every.isfinite(), torch.inf).amin(0)
    slack = 2.0**-22 * (wide.abs() + 64 * scale * bool(grid.zero is not None))
    assert bool(((back.double() - wide).abs() <= best + slack).all())


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_number_is_its_own_nearest(name: str) -> None:
    kind, own = element(name), numbers(name)
    assert torch.equal(kind.decode(kind.encode(own).to(torch.int16)), own)
    assert len(own) <= 2**kind.bits
    if not name.startswith(("int", "uint")):
        assert float(own.abs().max()) == kind.top
        assert kind.one_sided == (float(own.min()) >= 0)
    beyond = torch.tensor([-torch.inf, torch.inf])
    ends = kind.decode(kind.encode(beyond).to(torch.int16))
    assert ends.tolist() == [float(own.min()), float(own.max())]


@pytest.mark.parametrize("name", MINIFLOATS)
def test_minifloats_keep_the_sign_of_zero(name: str) -> None:
    kind = element(name)
    codes = kind.encode(torch.tensor([0.0, -0.0]))
    assert codes.tolist() == [0, 2 ** (kind.bits - 1)]
    assert kind.decode(codes).signbit().tolist() == [False, True]


@pytest.mark.parametrize("name", [*ELEMENTS, *ALONE])
def test_nan_and_infinity(name: str) -> None:
    """Under a scale of its own infinity saturates and NaN stays NaN. A dynamic block that holds
    either has no scale: none of it comes out finite."""
    x = torch.tensor([[1.0, torch.nan, 0.5], [torch.inf, 0.25, 1.0], [0.5, 1.0, 0.25]])
    scale = None if name in ALONE else torch.full((3, 1), 0.5)
    y = fake_quantize(x, name if scale is None else f"{name}:channel", scale)
    assert torch.equal(y.isnan(), x.isnan()) and not bool(y.isinf().any())
    for stored in ("", ":scale(e8m0)") if scale is not None else ():
        y = fake_quantize(x, f"{name}:token:dynamic{stored}")
        assert not bool(y[:2].isfinite().any()) and bool(y[2].isfinite().all())


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("size", [1e-45, 3e-42, 1e-39, 1e-37, 1e37])
def test_the_ends_of_float32(name: str, size: float) -> None:
    """Subnormal numbers are rounded as coarsely as float32 must, never to NaN."""
    x = torch.tensor([[0.0, 0.3, 1.0, 0.7]], dtype=torch.float64).mul(size).float()
    for text in (f"{name}:token:dynamic", f"{name}:token:dynamic:scale(e8m0)"):
        y = fake_quantize(x, text)
        assert bool(y.isfinite().all())
        assert bool((y.abs() <= 2 * x.max() + 2.0**-126).all())


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_block_of_zeros_stays_zero(name: str) -> None:
    x = torch.zeros(3, 40)
    zero = name.startswith("int") or 0 in numbers(name)
    for rest in ("channel", "group16", "tensor:scale(e8m0)", "group16:scale(fp8_e4m3:tensor)"):
        y = Grid.fit(x, QFormat.parse(f"{name}:{rest}")).round(x)
        assert torch.equal(y, x) == zero


def test_a_small_scale_beside_a_large_one() -> None:
    """fp8 rounds the scale of the second block to zero; it becomes the smallest there is."""
    x = torch.cat([torch.full((1, 16), 1e4), torch.full((1, 16), 1e-4)], -1)
    grid = Grid.fit(x, QFormat.parse("nvfp4"))
    assert grid.stored is not None and grid.stored.data.flatten().tolist() == [126, 1]
    assert not bool(grid.round(x)[0, 16:].any())


@settings(deadline=None)
@given(formats(dynamic=True), tensors())
def test_dynamic_scales_are_those_of_the_tensor(fmt: QFormat, x: Tensor) -> None:
    wide = x if x.dtype == torch.float64 else x.float()
    wanted = Grid.fit(wide, fmt).round(wide).to(x.dtype)
    assert torch.equal(fake_quantize(x, str(fmt)), wanted)
