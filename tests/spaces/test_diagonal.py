"""Diagonal spaces: every free one takes any map, half a map is seen, and refusals have reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
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
