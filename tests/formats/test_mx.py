"""The MX formats against the text of the standard (OCP MX v1.0), in a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import Grid, QFormat

ELEMENTS = {
    "mxfp4": (2, 1, 6.0),
    "mxfp6_e2m3": (2, 3, 7.5),
    "mxfp6_e3m2": (3, 2, 28.0),
    "mxfp8_e4m3": (4, 3, 448.0),
    "mxfp8_e5m2": (5, 2, 57344.0),
}
"""Format → exponent bits, mantissa bits and largest number (section 5.3)."""


def mx(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Exponents and numbers of blocks (n, 32), float64. Section 6.3: the shared exponent is
    floor(log2(max)) - emax, elements go to the nearest or even one, what is too large saturates."""
    exponent_bits, mantissa, largest = ELEMENTS[name]
    emax, emin = np.floor(np.log2(largest)), 2 - 2 ** (exponent_bits - 1)
    size = np.abs(x).max(-1, keepdims=True)
    shared = np.clip(np.floor(np.log2(size)) - emax, -127, 127)
    u = x / 2.0**shared
    with np.errstate(divide="ignore"):
        step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(u))), emin) - mantissa)
    rounded = np.round(u / step) * step  # numpy rounds half to even
    return shared, np.clip(rounded, -largest, largest) * 2.0**shared


@pytest.mark.parametrize("name", ELEMENTS)
@settings(deadline=None)
@given(seed=st.integers(0, 999), spread=st.sampled_from([0, 1, 10]), power=st.integers(-60, 60))
def test_mx(name: str, seed: int, spread: int, power: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 64, generator=draw) * torch.exp2(spread * torch.randn(64, generator=draw))
    x = (x * 2.0**power)[:, :50]  # the second block of a row is short
    grid = Grid.fit(x, QFormat.parse(name))
    assert grid.stored is not None
    blocks = torch.nn.functional.pad(x, (0, 14)).reshape(6, 32)
    shared, expected = mx(blocks.double().numpy(), name)
    np.testing.assert_array_equal(grid.stored.data.numpy().reshape(6, 1), shared + 127)
    found = grid.round(x).double().numpy()
    np.testing.assert_array_equal(found, expected.reshape(3, 64)[:, :50])


def test_mxint8_is_int8_with_a_shift() -> None:
    """The standard reads a code as q / 64, we as q: our exponent is six lower for the same."""
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid.fit(x, QFormat.parse("mxint8"))
    assert grid.stored is not None
    size = x.reshape(2, 2, 32).abs().amax(-1)
    assert torch.equal(grid.stored.data - 127, (size.log2().floor() - 6).to(torch.int16))
    step = torch.exp2(size.log2().floor() - 6).repeat_interleave(32, 1)
    assert torch.equal(grid.round(x), (x / step).round().clamp(-128, 127) * step)
