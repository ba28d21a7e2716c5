"""Blocks, and rounding that goes from block to block: against whole runs of the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from qcompiler import BadInput, Program, QFormat, QTensor, Rounding, Scheme, capture, compile
from qcompiler.blocks import Runner, blocks
from qcompiler.keep import Keep, pack_tensor, unpack_tensor
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.rounding import Block, Layer, nearest
from qcompiler.run import evaluate
from qcompiler.samples import Flat, random_inputs
from qcompiler.sites import sites
from qcompiler.state import Solved
from qcompiler.vectors import vectors
from qcompiler.walk import Walk

from .zoo import MODELS, build


class Residual(nn.Module):
    """A residual block of two linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A stem, residual blocks in a numbered list, a head."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def planned(program: Program, weight: str = "int4:channel") -> Program:
    scheme = Scheme(QFormat.parse(weight))
    return replace(program, plan={s.id: scheme for s in sites(program.graph.nodes)})


@pytest.fixture
def stack() -> Program:
    return planned(capture(Stack(), (torch.randn(7, 5),)))


@pytest.fixture
def batches() -> list[Flat]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 5, generator=generator),) for _ in range(4)]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_what_the_program_computes(name: str) -> None:
    """Up to the last digit: a block computes expressions of weights in float64."""
    model, example = build(name)
    program = run_pipeline(capture(model, example), make_passes("canonicalize{optional=true}"))
    inputs = random_inputs(program.io, 3)
    values = dict(zip(program.inputs, inputs, strict=True))
    found = blocks(program)
    assert len(found) >= 3
    assert [s.id for b in found for s in b.sites] == [s.id for s in sites(program.graph.nodes)]
    for block in found:
        values = Runner(program, block).run(values)
        assert block.alive <= set(values)
    outputs = program.graph.output_node().all_input_nodes
    for node, wanted in zip(outputs, evaluate(program, inputs), strict=True):
        torch.testing.assert_close(values[node], wanted)


def test_blocks_are_the_numbered_modules_of_the_source(stack: Program) -> None:
    found = blocks(stack)
    assert [b.name for b in found] == [
        "stem/linear#0",
        *(f"layers.{i}" for i in range(3)),
        "head/linear#0",
    ]
    assert [len(b.outputs) for b in found] == [1] * 5
    assert [[s.id for s in stage] for stage in found[1].stages()] == [
        ["layers.0.up/linear#0"],
        ["layers.0.down/linear#0"],
    ]


@dataclass(frozen=True, kw_only=True)
class Spy(Rounding):
    """Rounds to nearest and writes down what it was given."""

    name: ClassVar[str] = "spy"
    needs = ("gram", "range", "sample")
    seen: ClassVar[list[Layer]] = []

    def layer(self, layer: Layer) -> QTensor:
        self.seen.append(layer)
        return nearest(layer.weight, layer.format)


def test_a_layer_sees_what_the_rounded_layers_before_it_make(
    stack: Program, batches: list[Flat]
) -> None:
    """The Gram matrix of `layers.1.down` is that of a run with all before it rounded."""
    Spy.seen.clear()
    solved = Walk(stack, batches, Spy()).run()
    assert list(solved) == [s.id for s in sites(stack.graph.nodes)]
    params = dict(stack.params)
    target = "layers.1.down/linear#0"
    for site in sites(stack.graph.nodes):
        if site.id == target:
            break
        params[str(stack.param_of(site.weight))] = solved[site.id].weight.dequantize()
    rounded = replace(stack, params=params)
    rows: list[Tensor] = []

    def watch(node: torch.fx.Node, value: object) -> None:
        if node is rounded.by_id[target].args[0]:
            rows.append(value)  # type: ignore[arg-type]

    for inputs in batches:
        evaluate(rounded, inputs, watch)
    x = torch.cat(rows)
    layer = next(la for la in Spy.seen if la.id == target)
    assert layer.inputs.gram is not None and layer.inputs.gram.count == 28
    torch.testing.assert_close(layer.inputs.gram.matrix, x.t() @ x / 28)
    torch.testing.assert_close(layer.inputs.sample, x)
    assert layer.inputs.range is not None
    torch.testing.assert_close(layer.inputs.range.mean, x.mean(0))
    error = layer.weight - nearest(layer.weight, layer.format).dequantize()
    wanted = (x @ error.t()).pow(2).sum() / (x @ layer.weight.t()).pow(2).sum()
    assert solved[target].error == pytest.approx(float(wanted), rel=1e-4)


@dataclass(frozen=True, kw_only=True)
class SpyOnBlocks(Rounding):
    """Rounds to nearest; compares what a block says of itself with whole runs."""

    name: ClassVar[str] = "spy_on_blocks"
    needs = ("block",)
    seen: ClassVar[dict[str, list[float]]] = {}

    def layer(self, layer: Layer) -> QTensor:
        return nearest(layer.weight, layer.format)

    def block(self, block: Block) -> dict[str, QTensor]:
        weights = {id: la.weight.clone().requires_grad_() for id, la in block.layers.items()}
        outputs = block.found(0, weights)
        exact = block.wanted(0)
        last = block.predictions(0, outputs)[0]
        grads = torch.autograd.grad(last.sum(), list(weights.values()), allow_unused=True)
        name = next(iter(block.layers))
        self.seen[name] = [
            float((outputs[0] - exact[0]).detach().norm()),
            float(last.detach().sum()),
            sum(float(g.abs().sum()) for g in grads if g is not None),
        ]
        return super().block(block)


def test_what_a_block_says_of_itself(stack: Program, batches: list[Flat]) -> None:
    """Behind the float weights of the first block is the float program; gradients reach all."""
    SpyOnBlocks.seen.clear()
    Walk(stack, batches, SpyOnBlocks()).run()
    output = evaluate(stack, batches[0])[0]
    first, *rest = SpyOnBlocks.seen.values()
    assert first[0] == 0.0
    assert first[1] == pytest.approx(float(output.sum()), rel=1e-5)  # type: ignore[attr-defined]
    assert all(off > 0 for off, _, _ in rest)  # blocks before them are rounded
    assert all(gradient > 0 for _, _, gradient in SpyOnBlocks.seen.values())


def test_tied_weights_are_rounded_once(batches: list[Flat]) -> None:
    model = Stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    program = planned(capture(model, (torch.randn(7, 5),)))
    Spy.seen.clear()
    solved = Walk(program, batches, Spy()).run()
    assert solved["layers.0.up/linear#0"] is solved["layers.1.up/linear#0"]
    assert "layers.1.up/linear#0" not in {la.id for la in Spy.seen}


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(6, 4, (1, 3), padding=(0, 2), dilation=(1, 2)),
        nn.Conv2d(6, 9, 3, groups=3),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Conv1d(6, 4, 5, stride=2, padding=2),
        nn.Conv1d(6, 4, 3, groups=2),
    ],
    ids=str,
)
def test_patches_are_what_a_convolution_multiplies(conv: nn.Conv1d | nn.Conv2d) -> None:
    x = torch.randn(2, 6, 8, 9) if isinstance(conv, nn.Conv2d) else torch.randn(2, 6, 17)
    program = capture(conv, (x,))
    site = sites(program.graph.nodes)[0]
    rows = vectors(site, x)
    weight, groups = conv.weight.detach().flatten(1), conv.groups
    assert rows.shape[1] == weight.shape[1]
    y = conv(x) - conv.bias.reshape(-1, *[1] * (x.ndim - 2))  # type: ignore[union-attr]
    each = rows.reshape(2, groups, -1, rows.shape[1])
    found = torch.einsum("bgpk,gok->bgop", each, weight.reshape(groups, -1, rows.shape[1]))
    torch.testing.assert_close(found.reshape(y.shape), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "text", ["int4:group32:asym", "nf4:channel", "nvfp4", "fp4_e2m1:group32:scale(e8m0)"]
)
def test_a_kept_tensor_comes_back(text: str, tmp_path: Path) -> None:
    q = nearest(torch.randn(6, 70), QFormat.parse(text))
    tensors, fmt = pack_tensor(q, "layer/linear#0")
    Keep(tmp_path).save("it", tensors, {"format": fmt})
    found, about = Keep(tmp_path).load("it")  # type: ignore[misc]
    back = unpack_tensor(found, "layer/linear#0", QFormat.parse(about["format"]))  # type: ignore[index]
    assert back.format == q.format
    assert torch.equal(back.dequantize(), q.dequantize())


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    keep = Keep(tmp_path)
    keep.save("it", {"x": torch.ones(3)}, 1)
    assert keep.load("it") is not None and keep.load("other") is None
    (tmp_path / "it.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    assert keep.load("it") is None


def test_a_folder_with_other_files_is_no_place_for_work(tmp_path: Path) -> None:
    """It would be removed at the end."""
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(BadInput, match="holds other files"):
        compile(Stack(), (torch.randn(7, 5),), passes="assign,quantize", work=tmp_path)
    assert (tmp_path / "thesis.tex").exists()


class Stop(Exception):
    """As if the run were killed."""


@pytest.mark.parametrize("rounding", [Spy(), SpyOnBlocks()], ids=lambda r: r.name)
@pytest.mark.parametrize("blocks_done", [1, 3])
def test_a_walk_goes_on_where_it_was_stopped(
    stack: Program, batches: list[Flat], rounding: Rounding, blocks_done: int, tmp_path: Path
) -> None:
    """Blocks that are done are not done again, and the result is the undisturbed one."""
    whole = Walk(stack, batches, rounding).run()

    def stop(done: int, total: int) -> None:
        if done >= 100 * blocks_done:
            raise Stop

    keep = Keep(tmp_path)
    with pytest.raises(Stop):
        Walk(stack, batches, rounding, keep=keep, tick=stop).run()
    Spy.seen.clear()
    again = Walk(stack, batches, rounding, keep=keep).run()
    assert {la.id for la in Spy.seen}.isdisjoint({"stem/linear#0"})
    _same(whole, again)


def _same(one: Mapping[str, Solved], other: Mapping[str, Solved]) -> None:
    assert list(one) == list(other)
    for id, solved in one.items():
        assert torch.equal(solved.weight.data, other[id].weight.data)
        assert torch.equal(solved.weight.scale, other[id].weight.scale)
        assert (solved.vectors, solved.error) == (other[id].vectors, other[id].error)
