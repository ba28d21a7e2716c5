"""Roundings that are trained: AdaRound, FlexRound, SignRound, and what trains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from layers import CODEBOOKS, FORMATS, layer
from torch import Tensor

from qcompiler import BadInput
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.observers import Gram
from qcompiler.registry import get_rounding
from qcompiler.rounding import Inputs, Layer, Learned, nearest, output_error
from qcompiler.rounding.ladder import Ladder

METHODS = ("adaround", "flexround", "signround")
OBJECTIVES = ("layer", "block", "prediction", "prediction_mse", "kl_top")
EVERY = (*FORMATS, *CODEBOOKS, "uint4:group7:asym", "int4:tensor:asym", "fp8_e4m3:unscaled")


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that half as many directions explain for the most part."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=generator)
    few = torch.randn(rows, width // 2, generator=generator)
    return few @ mix + 0.3 * torch.randn(rows, width, generator=generator)


def weight(out: int, width: int, seed: int = 1) -> Tensor:
    return 0.1 * torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


class FakeBlock:
    """y = x + W₂ gelu(W₁ x), and predictions W₃ y; or y = W₁ x with one layer."""

    def __init__(self, fmt: str, batches: int = 4, both: bool = True, width: int = 16) -> None:
        self.batches = batches
        self.ticks: list[tuple[int, int]] = []
        self._x = [correlated(32, width, seed) for seed in range(batches)]
        weights = {"up": weight(2 * width, width)}
        if both:
            weights["down"] = weight(width, 2 * width, 2)
        self._head = weight(10, width if both else 2 * width, 3)
        parsed = QFormat.parse(fmt)
        gram = Gram.of(torch.cat(self._x))
        wide = Gram.of(correlated(512, 2 * width))
        seen = {"up": gram, "down": wide}
        self.layers = {k: Layer(k, w, parsed, Inputs(gram=seen[k])) for k, w in weights.items()}

    def wanted(self, batch: int) -> tuple[Tensor, ...]:
        return self.found(batch, {k: v.weight for k, v in self.layers.items()})

    def found(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        x = self._x[batch]
        inner = x @ weights["up"].t()
        if "down" not in weights:
            return (inner,)
        return (x + torch.nn.functional.gelu(inner) @ weights["down"].t(),)

    def counted(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return outputs

    def predictions(self, batch: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outputs[0] @ self._head.t(),)

    def tick(self, done: int, total: int) -> None:
        self.ticks.append((done, total))

    def loss(self, found: Mapping[str, QTensor]) -> float:
        """Relative error of the outputs of all batches."""
        weights = {k: q.dequantize() for k, q in found.items()}
        pairs = [(self.found(b, weights)[0], self.wanted(b)[0]) for b in range(self.batches)]
        return sum(float((a - b).pow(2).sum() / b.pow(2).sum()) for a, b in pairs)

    def nearest(self) -> dict[str, QTensor]:
        return {k: nearest(v.weight, v.format) for k, v in self.layers.items()}


def made(name: str, **options: object) -> Learned:
    found = replace(get_rounding(name), **options)
    assert isinstance(found, Learned)
    return found


def same(a: Mapping[str, QTensor], b: Mapping[str, QTensor]) -> bool:
    return all(torch.equal(a[k].data, b[k].data) and torch.equal(a[k].scale, b[k].scale) for k in a)


def well_formed(q: QTensor, fmt: QFormat) -> None:
    """Its codes pack, and its numbers are on its grid."""
    assert q.format == fmt
    assert torch.equal(fmt.unpack(fmt.pack(q.data), q.data.shape[1]), q.data)
    values = q.dequantize()
    assert values.isfinite().all()
    assert torch.equal(q.grid.round(values), values)


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("name", METHODS)
def test_never_worse_than_nearest_in_any_format(name: str, fmt: str) -> None:
    one = layer(fmt)
    found = made(name, steps=12).layer(one)
    well_formed(found, one.format)
    start = output_error(one, nearest(one.weight, one.format).dequantize())
    assert output_error(one, found.dequantize()) <= start


# The numbers of fp16 are more than a position in float32 tells apart.
@pytest.mark.parametrize("fmt", [f for f in EVERY if f != "fp16"])
def test_position_is_where_nearest_rounds(fmt: str) -> None:
    one = layer(fmt)
    w, grid = one.weight, Grid.fit(one.weight, one.format)
    ladder = Ladder(grid, tuple(w.shape))
    place = ladder.position(w)
    index = place.round().clamp(0, ladder.last)
    assert torch.allclose(ladder.number(index), grid.round(w), rtol=1e-6)
    assert torch.equal(ladder.hold(index).dequantize(), ladder.number(index))
    assert torch.equal(ladder.position(ladder.number(index)).round(), index)


@pytest.mark.parametrize("fmt", ["int3:group16:asym", "int2:group16:asym"])
@pytest.mark.parametrize(
    ("name", "share"), [("adaround", 0.7), ("flexround", 0.7), ("signround", 0.85)]
)
def test_clearly_better_where_inputs_are_correlated(name: str, share: float, fmt: str) -> None:
    one = layer(fmt, 32, 64)
    start = output_error(one, nearest(one.weight, one.format).dequantize())
    assert output_error(one, made(name).layer(one).dequantize()) < share * start


@pytest.mark.parametrize("fmt", ["int3:channel", "int2:group16:asym"])
@pytest.mark.parametrize("name", METHODS)
def test_a_block_is_better_than_nearest(name: str, fmt: str) -> None:
    block = FakeBlock(fmt)
    found = made(name, objective="block", steps=100).block(block)
    assert set(found) == {"up", "down"}
    assert block.loss(found) < 0.8 * block.loss(block.nearest())
    assert block.ticks[-1] == (100, 100)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", METHODS)
def test_every_objective_trains(name: str, objective: str) -> None:
    block = FakeBlock("int2:group16:asym")
    found = made(name, objective=objective, steps=40).block(block)
    assert not same(found, block.nearest())
    if objective == "block":
        assert block.loss(found) < block.loss(block.nearest())


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides(name: str) -> None:
    def run(seed: int) -> dict[str, QTensor]:
        method = made(name, objective="block", steps=60, seed=seed)
        return method.block(FakeBlock("int2:channel:asym", 8))

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


@pytest.mark.parametrize("name", METHODS)
def test_weights_on_the_grid_stay(name: str) -> None:
    first = layer("int4:group16:asym")
    rounded = nearest(first.weight, first.format).dequantize()
    one = replace(first, weight=rounded)
    found = made(name, steps=20).layer(one)
    assert torch.equal(found.dequantize(), nearest(rounded, one.format).dequantize())


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_zeros_stay_zero(name: str) -> None:
    one = layer("int3:channel:asym")
    one.weight[3] = 0
    found = made(name, steps=20).layer(one)
    assert not found.dequantize()[3].any()


@pytest.mark.parametrize("name", METHODS)
def test_one_batch_and_one_layer(name: str) -> None:
    block = FakeBlock("int2:channel:asym", 1, both=False)
    found = made(name, objective="block", steps=60, batch=2).block(block)
    assert block.loss(found) < block.loss(block.nearest())


@pytest.mark.parametrize("fmt", ["int3:group16:asym", "fp4_e2m1:group16"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_is_trained(name: str, fmt: str) -> None:
    one = layer(fmt)
    student = made(name).student(one.weight, Grid.fit(one.weight, one.format))
    student.weight().pow(2).sum().backward()
    for leaf in student.leaves[: 2 if fmt.startswith("fp4") else 3]:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


@pytest.mark.parametrize("fmt", ["int3:group16:asym", "int4:channel", "fp4_e2m1:group16", "nvfp4"])
@pytest.mark.parametrize("name", ["flexround", "signround"])
def test_what_is_trained_is_what_is_judged(name: str, fmt: str) -> None:
    one = layer(fmt)
    student = made(name).student(one.weight, Grid.fit(one.weight, one.format))
    with torch.no_grad():
        for leaf in student.leaves:
            leaf -= 0.1 * torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(student.weight(), student.rounded().dequantize(), rtol=1e-5)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    class Broken(FakeBlock):
        def found(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            (y,) = super().found(batch, weights)
            return (y / 0,) if weights["up"].requires_grad else (y,)

    block = Broken("int3:channel")
    assert same(made("signround", steps=20).block(block), block.nearest())


def test_a_layer_that_nothing_reaches_stays_nearest() -> None:
    class Unreached(FakeBlock):
        def found(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            return super().found(batch, {"up": weights["up"]})

    block = Unreached("int2:channel:asym")
    for name in METHODS:
        found = made(name, objective="block", steps=20, search="none").block(block)
        assert torch.equal(found["down"].data, block.nearest()["down"].data), name


def test_options_are_text() -> None:
    text = "adaround{steps=9 rate=0.2 objective=block}"
    assert str(get_rounding(text)) == text
    assert get_rounding("adaround").needed() == ("gram",)
    assert get_rounding("signround").needed() == ("block",)
    with pytest.raises(BadInput, match="kl_top"):
        get_rounding("signround{objective=layers}")
