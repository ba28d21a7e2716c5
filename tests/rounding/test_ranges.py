"""What finds a grid and then rounds to nearest: range search, clipping, HQQ, k-means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import CODEBOOKS, FORMATS, layer, sample
from torch import Tensor

from qcompiler import BadInput, Grid, QFormat
from qcompiler.registry import get_rounding
from qcompiler.rounding import Clip, Hqq, Inputs, KMeans, Layer, Search, nearest
from qcompiler.rounding.kmeans import codebook
from qcompiler.rounding.search import SHARES, fit


def square(of: Layer) -> Tensor:
    assert of.inputs.range is not None
    return of.inputs.range.square


def losses(method: str, of: Layer, value: Tensor) -> Tensor:
    """What a method makes small, of each row."""
    error = (value - of.weight).double()
    if method == "clip":
        wide = of.format.blocks(tuple(of.weight.shape))[1]
        wide = of.weight.shape[1] if wide == -1 else wide
        parts = zip(error.split(wide, 1), sample(of).double().split(wide, 1), strict=True)
        return torch.stack([(e @ x.t()).square().sum(1) for e, x in parts]).sum(0)
    if method == "hqq":
        return error.abs().pow(0.7).sum(1)
    if method == "search{by=output}":
        return (error.square() * square(of)).sum(1)
    return error.abs().pow(2.4 if method == "search" else 1.0).sum(1)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(
    "method", ["search", "search{by=output}", "search{power=1}", "clip", "hqq"]
)
def test_any_format(text: str, method: str) -> None:
    """What the method makes small is at most nearest's, and what comes out lies on the grid."""
    of = layer(text)
    found = get_rounding(method).layer(of)
    value = found.dequantize()
    assert found.data.dtype == torch.int16 and found.format == of.format
    assert torch.equal(found.grid.round(value), value)
    after = losses(method, of, value)
    before = losses(method, of, nearest(of.weight, of.format).dequantize())
    assert after.sum() <= before.sum() * (1 + 1e-6)


@pytest.mark.parametrize("text", ["int4:channel", "fp4_e2m1:group32", "mid2:channel"])
def test_search_is_the_best_share_of_each_block(text: str) -> None:
    of = layer(text, out=5, width=70)
    value = fit(of.weight, of.format, "mse").round(of.weight)
    wide = 32 if "group" in text else 70
    for row in range(5):
        for start in range(0, 70, wide):
            part = of.weight[row : row + 1, start : start + wide]
            tried = [power_loss(part, of.format, c, c) for c in (1.0, *SHARES)]
            found = (value[row : row + 1, start : start + wide] - part).abs().pow(2.4).sum()
            torch.testing.assert_close(found, min(tried), rtol=1e-4, atol=0)


def test_search_draws_in_each_end() -> None:
    of = layer("int3:channel:asym", out=5, width=70)
    value = fit(of.weight, of.format, "mse").round(of.weight)
    found = (value - of.weight).abs().pow(2.4).sum(1)
    shares = (1.0, *SHARES)
    for row in range(5):
        part = of.weight[row : row + 1]
        together = min(power_loss(part, of.format, c, c) for c in shares)
        apart = min(power_loss(part, of.format, a, b) for a in shares[::4] for b in shares[::4])
        assert found[row] <= together * (1 + 1e-4) and found[row] <= 1.1 * apart


def power_loss(part: Tensor, fmt: QFormat, down: float, up: float) -> Tensor:
    low, high = part.amin(1, keepdim=True) * down, part.amax(1, keepdim=True) * up
    return (Grid.cover(low, high, fmt).round(part) - part).abs().pow(2.4).sum()


def test_clip_is_the_best_share_of_each_group() -> None:
    of = layer("int3:group32", out=4, width=70)
    value = Clip().layer(of).dequantize()
    for row in range(4):
        for start in range(0, 70, 32):
            part = of.weight[row : row + 1, start : start + 32]
            x, top = sample(of)[:, start : start + 32], part.abs().max().reshape(1, 1)
            tried = [
                ((Grid.cover(-top * c, top * c, of.format).round(part) - part) @ x.t())
                .square()
                .sum()
                for c in [1 - i / 20 for i in range(10)]
            ]
            found = ((value[row : row + 1, start : start + 32] - part) @ x.t()).square().sum()
            torch.testing.assert_close(found, min(tried), rtol=1e-4, atol=0)


def test_percentile_leaves_the_largest_out() -> None:
    weight = torch.arange(1.0, 101).reshape(1, 100) / 10
    grid = fit(weight, QFormat.parse("int8:channel"), "percentile", share=0.95)
    torch.testing.assert_close(grid.scale, torch.full((1, 1), 9.5 / 127))
    grid = fit(weight - 5, QFormat.parse("uint8:channel:asym"), "percentile", share=0.9)
    torch.testing.assert_close(grid.scale, torch.full((1, 1), (4.5 + 4.4) / 255))
    whole = fit(weight, QFormat.parse("int8:channel"), "percentile", share=1.0)
    assert torch.equal(whole.scale, Grid.fit(weight, QFormat.parse("int8:channel")).scale)


def test_entropy_cuts_a_long_tail_off() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 2000, generator=draw)
    weight[:, 0] = 40
    for text in ("int4:channel", "int4:channel:asym", "fp4_e2m1:channel:scale(fp16)"):
        fmt = QFormat.parse(text)
        share = fit(weight, fmt, "entropy").scale[:, 0] / Grid.fit(weight, fmt).scale[:, 0]
        assert (share < 0.5).all()


@pytest.mark.parametrize(
    "method", [Clip(), Hqq(), Search(), Search(by="entropy"), Search(by="percentile")]
)
@pytest.mark.parametrize("text", ["int4:group32", "int4:group32:asym", "nf4:group32", "nvfp4"])
def test_zeros_stay(method: Search | Clip | Hqq, text: str) -> None:
    of = layer(text)
    of.weight[3:] = 0
    assert not method.layer(of).dequantize()[3:].any()
    of.weight[:] = 0
    assert not method.layer(of).dequantize().any()


@pytest.mark.parametrize("method", [Search(), Search(by="output"), Clip(), Hqq()])
@pytest.mark.parametrize("text", ["int4:group32", "int4:group32:asym", "nf4:group32", "nvfp4"])
def test_weights_on_the_grid_stay(method: Search | Clip | Hqq, text: str) -> None:
    of = layer(text)
    of = replace(of, weight=nearest(of.weight, of.format).dequantize())
    torch.testing.assert_close(method.layer(of).dequantize(), of.weight, rtol=1e-5, atol=1e-6)


def test_hqq_moves_zero_points_and_scales() -> None:
    of = layer("int4:group32:asym")
    found = Hqq().layer(of)
    assert found.zero is not None and found.zero.dtype == torch.float32
    assert torch.equal(found.scale, nearest(of.weight, of.format).scale)
    of = layer("int4:group32")
    assert not torch.equal(Hqq().layer(of).scale, nearest(of.weight, of.format).scale)


def best_tables(x: Tensor, weights: Tensor, numbers: int) -> float:
    """The least weighted squared error of a codebook for one row, by dynamic programming."""
    x, order = x.double().sort()
    weights, n = weights.double()[order], len(x)
    cost = torch.full((n + 1, n + 1), torch.inf, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n + 1):
            w, v = weights[i:j], x[i:j]
            cost[i, j] = (w * (v - (w * v).sum() / w.sum()).square()).sum()
    best = cost[0]
    for _ in range(numbers - 1):
        best = torch.minimum(best, (best[:, None] + cost).amin(0))
    return float(best[n])


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_kmeans_is_the_best_table(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(3, 40, generator=draw) ** 3
    importance = torch.rand(3, 40, generator=draw) + 0.1
    value = codebook(weight, QFormat.parse(f"codebook{bits}:channel"), importance).round(weight)
    found = (importance * (value - weight).square()).sum(1)
    for row in range(3):
        assert found[row] <= 1.001 * best_tables(weight[row], importance[row], 2**bits)


@pytest.mark.parametrize("text", [*CODEBOOKS, "codebook6:channel", "codebook8:tensor"])
def test_kmeans_is_better_than_nearest(text: str) -> None:
    of = layer(text)
    found, plain = KMeans().layer(of), nearest(of.weight, of.format)
    before, after = (losses("search{by=output}", of, q.dequantize()).sum() for q in (plain, found))
    assert after < before
    assert found.grid.table is not None and (found.grid.table.diff(dim=1) >= 0).all()


def test_kmeans_by_fisher_information() -> None:
    of = layer("codebook2:channel")
    fisher = torch.zeros_like(of.weight)
    fisher[:, :4] = 1
    fisher[5] = 0  # a row without any counts evenly
    value = KMeans().layer(replace(of, inputs=Inputs(fisher=fisher))).dequantize()
    torch.testing.assert_close(value[:5, :4], of.weight[:5, :4])
    assert (value[5] - of.weight[5]).square().mean() < 0.2


def test_kmeans_of_few_numbers() -> None:
    """What a codebook decodes to is found again, and fewer columns than numbers will do."""
    of = layer("codebook3:channel")
    once = KMeans().layer(replace(of, inputs=Inputs())).dequantize()
    again = KMeans().layer(replace(of, weight=once, inputs=Inputs())).dequantize()
    torch.testing.assert_close(again, once)
    for width in (1, 5):
        few = layer("codebook3:channel", width=width)
        torch.testing.assert_close(KMeans().layer(few).dequantize(), few.weight)


def test_what_a_method_is_not_for() -> None:
    with pytest.raises(
        BadInput, match="int4:group32 of layer has its own; write codebook4:channel"
    ):
        KMeans().layer(layer("int4:group32"))
    for method in (Clip(), Hqq()):
        with pytest.raises(BadInput, match=r"codebook3:channel of layer .* use kmeans"):
            method.layer(layer("codebook3:channel"))
    of = layer("int4:channel")
    for method in (Clip(), Search(by="output")):
        with pytest.raises(BadInput, match="no calibration data reached layer"):
            method.layer(Layer(of.id, of.weight, of.format))
    for bad in ("search{share=0}", "search{power=0}", "search{by=x}", "hqq{steps=0}"):
        with pytest.raises(BadInput):
            get_rounding(bad)


def test_needs() -> None:
    assert get_rounding("search").needed() == ()
    assert get_rounding("search{by=output}").needed() == ("range",)
    assert get_rounding("kmeans").needed() == ("range", "fisher")
