"""decoupleQ and SpQR: roundings that find scales for the output's error."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from layers import CODEBOOKS, FORMATS, gram, layer

from qcompiler import BadInput
from qcompiler.formats import Grid, QFormat
from qcompiler.registry import get_rounding
from qcompiler.rounding import nearest, output_error
from qcompiler.rounding.decoupleq import refit
from qcompiler.rounding.spqr import leave_out

SCALED = [f for f in FORMATS if not QFormat.parse(f).unscaled]
METHODS = ("decoupleq{turns=2}", "spqr")


@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize("name", METHODS)
def test_never_worse_than_nearest_in_any_format(name: str, fmt: str) -> None:
    one = layer(fmt)
    found = get_rounding(name).layer(one)
    assert found.format == one.format
    packed = found.format.pack(found.data)
    assert torch.equal(found.format.unpack(packed, found.data.shape[1]), found.data)
    start = output_error(one, nearest(one.weight, one.format).dequantize())
    assert output_error(one, found.dequantize()) <= start


@pytest.mark.parametrize("fmt", ["int2:group32:asym", "int2:group32", "int3:channel:asym"])
def test_decoupleq_is_better_than_descent_on_a_fixed_grid(fmt: str) -> None:
    one = layer(fmt)
    fixed = output_error(one, get_rounding("quantease").layer(one).dequantize())
    assert output_error(one, get_rounding("decoupleq").layer(one).dequantize()) < fixed


@pytest.mark.parametrize("fmt", [f for f in SCALED if QFormat.parse(f).scale is None])
def test_refitted_scales_lower_the_loss(fmt: str) -> None:
    one = layer(fmt)
    rounded = nearest(one.weight, one.format)
    losses = [output_error(one, rounded.dequantize())]
    for _ in range(3):
        rounded = refit(one.weight, gram(one), rounded)
        losses.append(output_error(one, rounded.dequantize()))
    assert bool((rounded.scale > 0).all())
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))


def test_refitted_scales_are_least_squares() -> None:
    one = layer("int3:channel:asym", out=3, width=20)
    rounded = nearest(one.weight, one.format)
    found = refit(one.weight, gram(one), rounded)
    h = gram(one).double()
    for row in range(3):
        basis = torch.stack([rounded.data[row].double(), torch.ones(20, dtype=torch.float64)], 1)
        wanted = torch.linalg.solve(basis.t() @ h @ basis, basis.t() @ h @ one.weight[row].double())
        offset = -found.scale[row] * found.zero[row]
        assert torch.allclose(torch.cat([found.scale[row], offset]).double(), wanted, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_weights_on_the_grid_stay(name: str) -> None:
    first = layer("int4:group32:asym")
    rounded = nearest(first.weight, first.format).dequantize()
    found = get_rounding(name).layer(replace(first, weight=rounded))
    assert torch.allclose(found.dequantize(), rounded, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_dead_inputs_rows_of_zeros_and_few_vectors(name: str) -> None:
    one = layer("int3:group32:asym", vectors=20, dead=7)
    one.weight[2] = 0
    found = get_rounding(name).layer(one).dequantize()
    assert found.isfinite().all() and found[2].abs().max() < 1e-6
    start = output_error(one, nearest(one.weight, one.format).dequantize())
    assert output_error(one, found) <= start


@pytest.mark.parametrize("fmt", [*CODEBOOKS, "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_formats_without_scales_are_refused(name: str, fmt: str) -> None:
    with pytest.raises(BadInput, match="finds scales"):
        get_rounding(name).layer(layer(fmt))


@pytest.mark.parametrize("name", ["decoupleq", "spqr"])
def test_singular_gram_matrices_are_told(name: str) -> None:
    one = layer("int3:group32:asym", vectors=20)
    get_rounding(f"{name}{{damping=0}}").layer(one)
    assert one.notes and one.notes[0].startswith("its Gram matrix is singular; damping ")
    with pytest.raises(BadInput, match=f"{name}: damping is 0 or more"):
        get_rounding(f"{name}{{damping=-1}}")


@pytest.mark.parametrize("fmt", ["int3:group16", "int3:group16:asym", "fp4_e2m1:group16"])
def test_a_group_leaves_out_what_lowers_its_error(fmt: str) -> None:
    weight, parsed = layer(fmt).weight, QFormat.parse(fmt)
    importance = gram(layer(fmt)).diagonal()

    def error(grid: Grid) -> torch.Tensor:
        return ((weight - grid.round(weight)).square() * importance).sum()

    plain, fitted = Grid.fit(weight, parsed), leave_out(weight, parsed, importance, 3)
    assert error(fitted) < error(plain)
    assert bool((fitted.scale <= plain.scale).all())


def test_scales_are_stored_as_the_format_says() -> None:
    one = layer("int3:group16:asym:scale(uint3:group4)")
    found = get_rounding("spqr").layer(one)
    assert found.grid.stored is not None
    assert torch.equal(found.grid.stored.dequantize(), found.scale)
