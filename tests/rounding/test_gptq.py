"""GPTQ beside a textbook implementation, and coordinate descent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import CODEBOOKS, FORMATS, gram, layer
from torch import Tensor

from qcompiler import BadInput, Grid, QFormat
from qcompiler.observers import Gram
from qcompiler.registry import get_rounding
from qcompiler.rounding import Gptq, Inputs, Layer, QuantEase, nearest, output_error
from qcompiler.rounding.descent import descend
from qcompiler.rounding.gptq import factor, gptq
from qcompiler.rounding.search import fit


def textbook(weight: Tensor, hessian: Tensor, fmt: QFormat, order: bool, static: bool) -> Tensor:
    """Frantar et al. 2023, algorithm 1, as it is written down there, a column at a time."""
    w, h = weight.clone(), hessian.clone()
    columns = h.shape[0]
    perm = h.diagonal().argsort(descending=True) if order else torch.arange(columns)
    grid = Grid.fit(w.float(), fmt)
    scale, zero = (None if s is None else s.double() for s in grid.columns(tuple(w.shape)))
    w, h, scale = w[:, perm], h[perm][:, perm], scale[:, perm].clone()
    zero = torch.zeros_like(scale) if zero is None else zero[:, perm].clone()
    h += 0.01 * h.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    group = fmt.block[0] if fmt.block and fmt.block[0] > 0 else columns
    rounded = torch.zeros_like(w)
    for i in range(columns):
        if not static and i % group == 0:
            own = Grid.fit(w[:, i : i + group].float(), fmt)
            wide = own.columns(tuple(w[:, i : i + group].shape))
            scale[:, i : i + group] = wide[0]
            if wide[1] is not None:
                zero[:, i : i + group] = wide[1]
        q = torch.round(w[:, i] / scale[:, i]) + zero[:, i]
        rounded[:, i] = (q.clamp(fmt.qmin, fmt.qmax) - zero[:, i]) * scale[:, i]
        error = (w[:, i] - rounded[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    back = torch.empty_like(rounded)
    back[:, perm] = rounded
    return back


@pytest.mark.parametrize(("order", "static"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    "text",
    ["int4:channel", "int4:group32", "int4:group32:asym", "int3:group20:full", "int2:tensor"],
)
def test_it_is_the_textbook_algorithm(text: str, order: bool, static: bool) -> None:
    of = layer(text, width=90)
    weight, hessian, fmt = of.weight.double(), gram(of).double(), of.format
    found = factor(hessian, order=order)
    assert found is not None
    grid = Grid.fit(of.weight, fmt)
    refit = None if static else lambda columns, first: Grid.fit(columns.float(), fmt)
    ours = gptq(weight, found, grid, refit).dequantize(torch.float64)
    # A scale is cast to float32 from what two ways of summing leave of a weight.
    expected = textbook(weight, hessian, fmt, order, static)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", [*FORMATS, *CODEBOOKS])
@pytest.mark.parametrize("method", ["gptq", "quantease", "quantease{start=nearest}"])
def test_any_format(text: str, method: str) -> None:
    """The error is below that of nearest on the same grid, and what comes out lies on it."""
    of = layer(text)
    found = get_rounding(method).layer(of)
    value = found.dequantize()
    assert found.data.dtype == torch.int16 and found.format == of.format
    assert torch.equal(found.grid.round(value), value)
    assert output_error(of, value) <= output_error(of, found.grid.round(of.weight))
    if found.format.bits < 8:
        plain = nearest(of.weight, of.format).dequantize()
        assert output_error(of, value) < 0.7 * output_error(of, plain)


@pytest.mark.parametrize("text", ["int4:group32", "int4:group32:asym", "nf4:group32", "nvfp4"])
def test_weights_on_the_grid_stay(text: str) -> None:
    of = layer(text)
    found = factor(gram(of))
    assert found is not None
    start = nearest(of.weight, of.format)
    weight = start.dequantize()
    assert torch.equal(gptq(weight, found, start.grid).dequantize(), weight)
    assert torch.equal(descend(weight, gram(of), start, 3).dequantize(), weight)


@pytest.mark.parametrize("method", [Gptq(search="none"), QuantEase(search="none")])
def test_dead_columns_are_rounded_to_nearest(method: Gptq | QuantEase) -> None:
    of = layer("int4:channel", dead=7)
    found, near = method.layer(of), nearest(of.weight, of.format)
    assert torch.equal(found.data[:, :7], near.data[:, :7])
    assert not torch.equal(found.data[:, 7:], near.data[:, 7:])


def test_fewer_vectors_than_columns() -> None:
    of = layer("int3:channel", vectors=9)
    value = Gptq().layer(of).dequantize()
    assert not of.notes
    assert output_error(of, value) < output_error(of, nearest(of.weight, of.format).dequantize())


def test_damping_grows_until_there_is_a_factor() -> None:
    of = layer("int3:channel", vectors=9, dead=3)
    value = Gptq(damping=0).layer(of).dequantize()
    assert "its Gram matrix is singular; damping" in of.notes[0]
    assert output_error(of, value) < output_error(of, nearest(of.weight, of.format).dequantize())


@pytest.mark.parametrize("entry", [0.0, float("nan")])
def test_no_factor_is_nearest(entry: float) -> None:
    of = layer("int4:channel")
    inputs = Inputs(gram=Gram(1, torch.full_like(gram(of), entry)))
    found = Gptq().layer(replace(of, inputs=inputs))
    assert "no damping makes" in of.notes[0]
    assert torch.equal(found.data, nearest(of.weight, of.format).data)


def test_rows_of_zeros_stay() -> None:
    for text in ("int4:group32", "int4:group32:asym", "nvfp4", "codebook3:channel"):
        of = layer(text)
        of.weight[3] = 0
        assert not Gptq().layer(of).dequantize()[3].any()


def test_a_kernel_by_rows() -> None:
    """(out, in · taps), 27 columns: fewer than what is rounded between two products, twice."""
    of = layer("int4:channel", out=6, width=27)
    value = Gptq().layer(of).dequantize()
    assert output_error(of, value) < output_error(of, nearest(of.weight, of.format).dequantize())


def test_one_column() -> None:
    of = layer("int4:group32:asym", width=1)
    assert torch.equal(Gptq(search="none").layer(of).data, nearest(of.weight, of.format).data)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("text", ["int3:group32", "int2:channel:asym", "fp4_e2m1:group32"])
def test_descent_ends_where_no_single_change_helps(text: str, damping: float) -> None:
    of = layer(text, out=5, width=20)
    h = gram(of).double() + damping * gram(of).double().diagonal().mean() * torch.eye(20)
    grid = fit(of.weight, of.format, "mse")
    start = grid.quantize(of.weight)
    weight = of.weight.double()
    found = descend(weight, h, start, 100).dequantize(torch.float64)

    def losses(value: Tensor) -> Tensor:
        return ((weight - value) @ h * (weight - value)).sum(-1)

    least = losses(found)
    assert (least <= losses(start.dequantize(torch.float64))).all()
    kind = of.format.kind
    units = torch.arange(-8, 9.0) if of.format.is_integer else kind.values().unique()
    scale, _ = grid.columns(tuple(weight.shape))
    for column in range(20):
        for unit in units:
            other = found.clone()
            other[:, column] = unit * scale[:, column]
            allowed = grid.round(other)[:, column] == other[:, column]
            assert (losses(other)[allowed] >= least[allowed] - 1e-9).all()


def test_options() -> None:
    text = "gptq{damping=0.05 order=false search=mse static=false}"
    assert get_rounding(text) == Gptq(damping=0.05, order=False, static=False, search="mse")
    assert get_rounding(str(get_rounding(text))) == get_rounding(text)
    for bad in ("gptq{static=false}", "gptq{damping=-1}", "quantease{passes=0}"):
        with pytest.raises(BadInput):
            get_rounding(bad)
    with pytest.raises(BadInput, match="scales that are rounded themselves"):
        Gptq(order=False, static=False).layer(layer("nvfp4"))
    of = layer("int4:channel")
    with pytest.raises(BadInput, match="no calibration data reached layer"):
        Gptq().layer(Layer(of.id, of.weight, of.format))
