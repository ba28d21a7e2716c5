"""Diagonal spaces: every free one takes any map, half a map is seen, and refusals have reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcompiler
from qcompiler import Edit, Effect, Facts, Pass, PassError, Program
from qcompiler.pipeline import run_pipeline
from qcompiler.program import node_id
from qcompiler.registry import make_passes
from qcompiler.spaces import Space, find
from qcompiler.spaces.apply import apply_scale

Captured = Callable[..., tuple[nn.Module, object, Program]]


@dataclass(frozen=True, kw_only=True)
class RandomMap(Pass):
    """A random positive scale on one space; on one side only when `half`."""

    name: ClassVar[str] = "random_map"
    effect: ClassVar[Effect] = Effect.EXACT
    space: int = 0
    half: bool = False

    def run(self, edit: Edit, facts: Facts) -> None:
        space = find(facts.program)[self.space]
        if self.half:
            space = Space(space.id, space.size, space.params[:1], ())
        scale = torch.rand(space.size, generator=torch.Generator().manual_seed(self.space)) + 0.5
        edit.spend("a random scale")
        apply_scale(edit, space, scale, "scale")


def canonical(program: Program) -> Program:
    return run_pipeline(program, make_passes("canonicalize{optional=true}"))


def names(space: Space) -> tuple[list[str], list[str]]:
    return (
        sorted({node_id(m.node) for m in space.producers}),
        sorted({node_id(m.node) for m in space.consumers}),
    )


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_free_space_takes_any_map(name: str, captured: Captured) -> None:
    program = canonical(captured(name)[2])
    free = [s for s in find(program) if not s.blocked_by]
    assert len(free) >= 4
    for space in free:
        after = run_pipeline(program, [RandomMap(space=space.id)])
        assert after.history[-1].metrics["error"] <= 1e-9, names(space)
        with pytest.raises(PassError, match="promises exact"):
            run_pipeline(program, [RandomMap(space=space.id, half=True)])


def test_llama_has_the_known_places(captured: Captured) -> None:
    program = canonical(captured("llama")[2])
    layer = "model.layers.0."
    found = {tuple(map(tuple, names(s))): s.size for s in find(program) if not s.blocked_by}
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    assert found[
        (f"{layer}input_layernorm.weight",),
        tuple(f"{attention}{n}_proj.weight" for n in "kqv"),
    ] == 48  # fmt: skip
    # One factor per key/value head and channel: both query heads of a group share it.
    value = ((f"{attention}v_proj.weight",), (f"{attention}o_proj.weight",))
    assert found[value] == 2 * 12
    assert found[(f"{mlp}up_proj.weight",), (f"{mlp}down_proj.weight",)] == 80


def test_a_blocked_space_says_where(captured: Captured) -> None:
    blocked = [s for s in find(canonical(captured("llama")[2])) if s.blocked_by]
    stream = next(s for s in blocked if "model.embed_tokens.weight" in names(s)[0] and s.size == 48)
    reasons = {b.reason for b in stream.blocked_by}
    assert reasons == {"rms_norm normalises it"} and len(stream.blocked_by) == 5
    with pytest.raises(qcompiler.BadInput, match="is blocked at"):
        edit = Edit(canonical(captured("llama")[2]), "test")
        edit.spend("forced")
        apply_scale(edit, stream, torch.ones(stream.size), "s")


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.ones(3), "takes 48 scales"),
        (torch.zeros(48), "positive and finite"),
        (torch.full((48,), float("inf")), "positive and finite"),
    ],
)
def test_bad_scales_are_refused(scale: torch.Tensor, words: str, captured: Captured) -> None:
    program = canonical(captured("llama")[2])
    space = next(s for s in find(program) if not s.blocked_by and s.size == 48)
    edit = Edit(program, "test")
    edit.spend("wrong")
    with pytest.raises(qcompiler.BadInput, match=words):
        apply_scale(edit, space, scale, "s")


class Block(nn.Module):
    """A random wiring of what networks are made of; `plan` picks one piece after another."""

    WIDTH = 12

    def __init__(self, plan: list[str]) -> None:
        super().__init__()
        self.plan = plan
        w = self.WIDTH
        self.linears = nn.ModuleList(nn.Linear(w, w, bias=i % 2 == 0) for i in range(3 * len(plan)))
        self.norms = nn.ModuleList(nn.LayerNorm(w) for _ in plan)
        self.wide = nn.ModuleList(nn.Linear(w, 2 * w) for _ in plan)
        self.gain = nn.ParameterList(nn.Parameter(torch.rand(w) + 0.5) for _ in plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, piece in enumerate(self.plan):
            a, b, c = self.linears[3 * i : 3 * i + 3]
            if piece == "relu":
                x = b(torch.relu(a(x)))
            elif piece == "norm":
                x = a(self.norms[i](x))
            elif piece == "gate":
                x = c(nn.functional.silu(a(x)) * b(x))
            elif piece == "bilinear":
                x = c(a(x) * b(x))
            elif piece == "residual":
                x = x + b(torch.relu(a(x)))
            elif piece == "split":
                left, right = self.wide[i](x).chunk(2, -1)
                x = a(left) + b(torch.relu(right))
            elif piece == "cat":
                both = torch.cat([a(x), torch.relu(b(x))], -1)
                x = nn.functional.linear(both, self.wide[i].weight.t())
            elif piece == "gain":
                x = b(torch.relu(a(x)) * self.gain[i])
            elif piece == "shared":
                x = a(torch.relu(a(x)))
            elif piece == "attention":
                q, k, v = (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (a, b, c))
                y = nn.functional.scaled_dot_product_attention(q, k, v)
                x = nn.functional.linear(y.transpose(1, 2).flatten(-2), a.weight)
        return x


PIECES = (
    "relu", "norm", "gate", "bilinear", "residual", "split", "cat", "gain", "shared", "attention",
)  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3))
def test_random_wirings(plan: list[str]) -> None:
    torch.manual_seed(len(plan))
    program = canonical(qcompiler.capture(Block(plan), torch.randn(3, 5, Block.WIDTH)))
    for space in find(program):
        if not space.blocked_by:
            after = run_pipeline(program, [RandomMap(space=space.id)])
            assert after.history[-1].metrics["error"] <= 1e-9, (plan, names(space))


def test_each_piece_has_its_space() -> None:
    """What the wirings above offer at least: nobody passes that test by finding nothing."""
    for piece, least in (("relu", 1), ("gate", 1), ("bilinear", 2), ("split", 1), ("gain", 2)):
        program = canonical(qcompiler.capture(Block([piece]), torch.randn(3, 5, Block.WIDTH)))
        free = [s for s in find(program) if not s.blocked_by and s.size == Block.WIDTH]
        assert len(free) >= least, piece
