"""What `canonicalize` raises, spelled in the ways that exporters of ONNX write it, and near misses.

The pipeline holds each result against its source in float64, so that a test need only look at the
operators that are left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import Program
from qcompiler.pipeline import run_pipeline
from qcompiler.program import op_name
from qcompiler.registry import make_passes

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
HEADS = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(4))
ROOT = math.sqrt(2)
BETA = math.sqrt(2 / math.pi)


class Formula(nn.Module):
    """A function as a module, with a weight of its own for those that want one."""

    def __init__(self, function: Callable[..., object], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.names = list(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> object:
        inputs = [t for t in (x, y, z) if t is not None]
        return self.function(*inputs, *(getattr(self, name) for name in self.names))


def canonical(function: Callable[..., object], *inputs: Tensor, **tensors: Tensor) -> Program:
    passes = make_passes("canonicalize{optional=true}")
    program = run_pipeline(qcompiler.capture(Formula(function, **tensors), inputs), passes)
    again = run_pipeline(program, passes).history[-1].edits
    assert not again, f"the canonical form is no fixed point: {again}"
    return program


def operators(program: Program) -> Counter[str]:
    return Counter(op_name(n.target) for n in program.nodes if n.op == "call_function")


def call(program: Program, name: str) -> torch.fx.Node:
    return next(n for n in program.nodes if n.op == "call_function" and op_name(n.target) == name)


GELU = {
    "x * (0.5 * (1 + erf))": lambda x: x * (0.5 * (torch.erf(x / ROOT) + 1.0)),
    "(x * (1 + erf)) * 0.5": lambda x: (x * (1.0 + torch.erf(x / ROOT))) * 0.5,
    "(0.5 * x) * (1 + erf)": lambda x: (0.5 * x) * (1.0 + torch.erf(x * math.sqrt(0.5))),
    "(x / 2) * (1 + erf)": lambda x: (1.0 + torch.erf(x * (1 / ROOT))) * (x / 2),
    "x * (1 + erf) / 2": lambda x: x * (1.0 + torch.erf(x / ROOT)) / 2.0,
    "tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(BETA * (x + 0.044715 * torch.pow(x, 3.0)))),
    "tanh, cube as product": lambda x: (
        x * (torch.tanh((x + x * x * x * 0.044715) * BETA) + 1) * 0.5
    ),
    "tanh, x taken out": lambda x: (
        x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    ),
}


@pytest.mark.parametrize("name", GELU)
def test_gelu(name: str) -> None:
    program = canonical(lambda x: GELU[name](x * 3.0), X)
    assert operators(program) == {"mul": 1, "gelu": 1}
    kind = "tanh" if "tanh" in name else "none"
    assert call(program, "gelu").kwargs.get("approximate", "none") == kind


@pytest.mark.parametrize(
    "near",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142135)),  # root 2 as float32 has it
        lambda x: 0.25 * x * (1 + torch.erf(x / ROOT)),
        lambda x: 0.5 * (x + 1) * (1 + torch.erf(x / ROOT)),
        lambda x: 0.5 * x * (1 + torch.tanh(BETA * (x + 0.045 * x**3))),
    ],
)
def test_near_misses_of_gelu_stay(near: Callable[..., Tensor]) -> None:
    assert not operators(canonical(near, X)) & Counter({"gelu": 1, "silu": 1})


def test_gated_gelu_and_other_readers() -> None:
    """What a formula shares with others stays for them."""

    def gated(x: Tensor) -> tuple[Tensor, Tensor]:
        curve = torch.erf(x / ROOT)
        return 0.5 * x * (1 + curve) * X[0], curve

    assert operators(canonical(gated, X)) >= Counter({"gelu": 1, "erf": 1})


SIGMOIDS = {
    "silu": (lambda x: torch.sigmoid(x) * x, "silu"),
    "hardswish": (lambda x: x * nn.functional.hardsigmoid(x), "hardswish"),
    "clamp to 6": (lambda x: x * torch.clamp(x + 3.0, 0.0, 6.0) / 6.0, "hardswish"),
    "clamp to 1": (lambda x: x * torch.clamp(x / 6 + 0.5, 0.0, 1.0), "hardswish"),
    "relu6": (lambda x: x * (nn.functional.relu6(x + 3.0) * (1 / 6)), "hardswish"),
}


@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoid_products(name: str) -> None:
    function, expected = SIGMOIDS[name]
    assert operators(canonical(function, X)) == {expected: 1}


EPS = torch.tensor(1e-6)
RMS = {
    "reciprocal": lambda x, e: x * torch.reciprocal(torch.sqrt((x**2).mean(-1, True) + e)),
    "one over": lambda x, e: x * (1.0 / torch.sqrt(torch.mul(x, x).mean(2, True) + e)),
    "quotient": lambda x, e: x / torch.sqrt(e + x.pow(2.0).mean([-1], True)),
    "power": lambda x, e: torch.pow((x * x).mean(-1, True) + e, -0.5) * x,
}


@pytest.mark.parametrize("name", RMS)
@pytest.mark.parametrize("eps", ["number", "parameter"])
def test_rms_norm(name: str, eps: str) -> None:
    gain = torch.rand(8) + 0.5
    if eps == "number":
        program = canonical(lambda x, g: g * RMS[name](x, 1e-6), X, gain=gain)
    else:
        program = canonical(lambda x, g, e: g * RMS[name](x, e), X, gain=gain, eps=EPS)
    assert operators(program) == {"rms_norm": 1}


@pytest.mark.parametrize("square", [lambda d: d**2.0, lambda d: d * d])
def test_layer_norm(square: Callable[[Tensor], Tensor]) -> None:
    def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(square(centred).mean(-1, keepdim=True) + 1e-5) * gain + bias

    program = canonical(norm, X, gain=torch.rand(8) + 0.5, bias=torch.rand(8))
    assert operators(program) == {"layer_norm": 1}


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def stacked(k: Tensor) -> Tensor:
    """kᵀ as torch's exporter writes it."""
    b, h, s, d = k.shape
    return k.reshape(-1, s, d).permute(0, 2, 1).reshape(b, h, d, s)


ATTENTION = {
    "scaled scores": lambda q, k, v: attend(q @ k.transpose(-1, -2) * 0.5, v),
    "divided scores": lambda q, k, v: attend(q @ k.permute(0, 1, 3, 2) / 2.0, v),
    "root on both": lambda q, k, v: attend((q * 0.7) @ (k.transpose(2, 3) * 0.7), v),
    "root on k": lambda q, k, v: attend((q * 0.7) @ (k * 0.7).transpose(2, 3), v),
    "no scale": lambda q, k, v: attend(q @ k.transpose(-1, -2), v),
    "as a stack": lambda q, k, v: attend((q * 0.7) @ (stacked(k) * 0.7), v),
    "in float32": lambda q, k, v: attend((q @ k.transpose(2, 3)).float() * 0.5, v),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    program = canonical(ATTENTION[name], HEADS, HEADS + 1, HEADS - 1)
    assert operators(program) == {"scaled_dot_product_attention": 1}
    scale = {"no scale": 1.0, "scaled scores": 0.5, "divided scores": 0.5, "in float32": 0.5}
    node = call(program, "scaled_dot_product_attention")
    assert node.kwargs["scale"] == pytest.approx(scale.get(name, 0.49), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_heads_has_one(masked: bool) -> None:
    def run(q: Tensor) -> Tensor:
        mask = torch.cat([q > 0] * 2, 1)[:, : q.shape[1], :1].expand(-1, -1, q.shape[1])
        return nn.functional.scaled_dot_product_attention(
            q, q, q, mask if masked else None, is_causal=not masked
        )

    program = canonical(run, torch.randn(2, 5, 8))
    assert operators(program)["scaled_dot_product_attention"] == 1
    node = call(program, "scaled_dot_product_attention")
    assert node.meta["val"].ndim == 4


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_that_may_have_other_axes_stays(grouped: bool) -> None:
    def run(q: Tensor) -> Tensor:
        kv = q[:2] if grouped else q
        mask = None if grouped else q[0, :, 0] > -9
        attend = nn.functional.scaled_dot_product_attention
        return attend(q, kv, kv, mask, enable_gqa=grouped)

    program = canonical(run, torch.randn(4, 5, 8))
    assert call(program, "scaled_dot_product_attention").meta["val"].ndim == 3


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32 inside"])
def test_attention_in_other_types(wide: bool) -> None:
    """softmax in float32 over scores in bfloat16; or all of it in float32."""

    def run(q: Tensor) -> Tensor:
        if wide:
            q = q.float()
            return attend(q @ q.transpose(2, 3) * 0.5, q).bfloat16()
        p = torch.softmax(q @ q.transpose(2, 3) * 0.5, -1, dtype=torch.float32)
        return p.to(torch.bfloat16) @ q

    found = operators(canonical(run, HEADS.bfloat16()))
    assert found["scaled_dot_product_attention"] == 1 and "softmax" not in found


def test_attention_of_merged_permutations_and_groups() -> None:
    """The heads' permutation and kᵀ in one; each key/value head for two query heads."""

    def grouped(x: Tensor) -> Tensor:
        q = x.view(3, 5, 4, 2).permute(0, 2, 1, 3)
        k, v = (x[..., i : i + 4].reshape(3, 5, 2, 2).permute(0, 2, 1, 3) for i in (0, 4))
        k, v = (t[:, :, None].expand(3, 2, 2, 5, 2).reshape(3, 4, 5, 2) for t in (k, v))
        return attend(q @ k.permute(0, 1, 3, 2), v)

    node = call(canonical(grouped, X), "scaled_dot_product_attention")
    assert node.kwargs["enable_gqa"] is True
    merged = canonical(
        lambda x: attend(
            x.view(3, 5, 4, 2).transpose(1, 2) @ x.view(3, 5, 4, 2).permute(0, 2, 3, 1),
            x.view(3, 5, 4, 2).permute(0, 2, 1, 3),
        ),
        X,
    )
    assert operators(merged) == {"reshape": 1, "transpose": 1, "scaled_dot_product_attention": 1}


KEEP = torch.tensor([[1, 1, 1, 0, 0]] * 3).bool()[:, None, None]
NOBODY = torch.zeros(5, 5, dtype=torch.bool)
CAUSAL = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()


def guarded(scores: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(scores, -1)
    return torch.where(torch.isnan(p), 0.0, p) @ v


MASKED = {
    "where, guarded": lambda s, v, m: guarded(s + torch.where(m, 0.0, -math.inf), v),
    "inverted, guarded": lambda s, v, m: guarded(s.masked_fill(~m, -math.inf), v),
    "finite summand": lambda s, v, m: attend(s + torch.where(m, 0.0, -3.4e38), v),
    "finite, computed": lambda s, v, m: attend(s + (1.0 - m.float()) * -1e9, v),
    "finite fill": lambda s, v, m: attend(torch.where(m, s, -3.4e38), v),
}


@pytest.mark.parametrize("hidden", [False, True], ids=["some rows", "whole rows hidden"])
@pytest.mark.parametrize("name", MASKED)
def test_masks_become_operands(name: str, hidden: bool) -> None:
    mask = NOBODY if hidden else KEEP

    def masked(q: Tensor, m: Tensor) -> Tensor:
        return MASKED[name](q @ q.transpose(2, 3) * 0.5, q, m)

    assert operators(canonical(masked, HEADS, mask))["scaled_dot_product_attention"] == 1


def test_masks_that_may_hide_a_row_stay() -> None:
    """softmax of nothing is NaN, which the source has and attention has not."""

    def filled(q: Tensor, m: Tensor) -> Tensor:
        return attend((q @ q.transpose(2, 3)).masked_fill(~m, -math.inf), q)

    def added(q: Tensor, m: Tensor) -> Tensor:
        return attend(q @ q.transpose(2, 3) + torch.where(m, 0.5, -math.inf), q)

    for function in (filled, added):
        program = canonical(function, HEADS, NOBODY)
        assert "scaled_dot_product_attention" not in operators(program)
        assert "hides entirely" in program.history[-1].skipped[-1].why


def test_stored_causal_mask() -> None:
    """A stored triangle hides no row, nor does a part of it that begins in its first column."""

    def causal(q: Tensor, m: Tensor, first: int = 0) -> Tensor:
        s = q.shape[2]
        scores = q @ q.transpose(2, 3)
        return attend(torch.where(m[:, :, :s, first : first + s], scores, -math.inf), q)

    found = operators(canonical(causal, HEADS, mask=CAUSAL))
    assert found["scaled_dot_product_attention"] == 1
    shifted = operators(canonical(lambda q, m: causal(q, m, 2), HEADS, mask=CAUSAL))
    assert shifted["scaled_dot_product_attention"] == 0


LAYOUT = {
    "permutations": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0) + 1, {"add": 1}),
    "composed": (lambda x: x.transpose(0, 1).permute(1, 2, 0), {"transpose": 1}),
    "a swap": (lambda x: x.permute(0, 2, 1), {"transpose": 1}),
    "a cycle": (lambda x: x.transpose(0, 1).transpose(1, 2), {"permute": 1}),
    "views": (
        lambda x: x.unsqueeze(1).flatten(0, 1).unflatten(0, (3, 1)).squeeze(1) + 1,
        {"add": 1},
    ),
    "casts": (lambda x: (x > 0).long().int().float(), {"gt": 1, "to": 1}),
    "narrow cast": (lambda x: x.int().float(), {"to": 2}),
    "a part": (lambda x: torch.squeeze(x[:, 2:3], 1), {"select": 1}),
    "negative part": (lambda x: x[..., -1:].squeeze(-1), {"select": 1}),
    "endless slice": (lambda x: torch.ops.aten.slice(x, 1, 0, 2**63 - 1) + 1, {"add": 1}),
    "expand": (lambda x: x.expand(3, 5, 8) + 1, {"add": 1}),
}


@pytest.mark.parametrize("name", LAYOUT)
def test_layout(name: str) -> None:
    function, expected = LAYOUT[name]
    assert operators(canonical(function, X)) == expected


def test_constant_indices_are_slices() -> None:
    picked = canonical(
        lambda x, i: torch.squeeze(torch.index_select(x, 2, i), 2), X, index=torch.tensor([3])
    )
    assert operators(picked) == {"select": 1}
    several = canonical(lambda x, i: x.index_select(-1, i), X, index=torch.tensor([2, 3, 4]))
    assert operators(several) == {"slice": 1}


def test_rope_by_slices_to_the_end() -> None:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first = torch.ops.aten.slice(x, 3, 0, 2, 1)
        second = torch.ops.aten.slice(x, 3, 2, 2**63 - 1, 1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), 3) * sin.unsqueeze(1)

    angles = torch.rand(1, 5, 4)
    program = canonical(rope, HEADS, cos=angles.cos(), sin=angles.sin())
    assert operators(program) == {"unsqueeze": 2, "qc.rope": 1}


@pytest.mark.parametrize("turn", [lambda w: w.permute(1, 0), lambda w: w.transpose(0, 1)])
def test_product_with_a_turned_weight(turn: Callable[[Tensor], Tensor]) -> None:
    program = canonical(
        lambda x, w, b: b + torch.matmul(x, turn(w)),
        X,
        weight=torch.randn(6, 8),
        bias=torch.randn(6),
    )
    assert operators(program) == {"linear": 1}


def test_flattened_heads_go_through_a_linear() -> None:
    """(B, S, H, D) flattened to rows, multiplied, and given its tokens back."""

    def project(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        rows = x.view(3, 5, 2, 4).reshape(-1, 8)
        return torch.addmm(b, rows, w).reshape(-1, 5, 6)

    program = canonical(project, X, weight=torch.randn(8, 6), bias=torch.randn(6))
    assert operators(program) == {"linear": 1}
    assert program.params["weight"].shape == (6, 8)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1)])
def test_summand_of_a_convolution(shape: tuple[int, ...]) -> None:
    def biased(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return b.reshape(shape) + nn.functional.conv2d(x, w, None, 2)

    images = torch.randn(2, 3, 6, 6)
    program = canonical(biased, images, weight=torch.randn(4, 3, 2, 2), bias=torch.randn(4))
    assert operators(program) == {"conv2d": 1}


def test_summand_of_another_shape_is_no_bias() -> None:
    program = canonical(lambda x, w, b: x @ w + b, X, weight=torch.eye(8), bias=torch.randn(5, 1))
    assert operators(program) == {"linear": 1, "add": 1}


def test_a_weight_with_another_reader_is_not_turned() -> None:
    def tied(x: Tensor, w: Tensor) -> Tensor:
        return x @ w + w[0]

    program = canonical(tied, X, weight=torch.randn(8, 8))
    assert operators(program)["t"] == 1


def test_a_cache_begins_with_nothing() -> None:
    def appended(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([torch.cat([torch.tensor([]), x], -2), y], -2)

    assert operators(canonical(appended, HEADS, HEADS)) == {"cat": 1}
