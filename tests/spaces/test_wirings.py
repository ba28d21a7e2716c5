"""Random graphs: a free space takes any map, a blocked one refuses it, and rightly so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wirings import PIECES, Block

import qcompiler
from qcompiler import BadInput, Program
from qcompiler.check import relative_error
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.run import evaluate_wide
from qcompiler.samples import random_inputs
from qcompiler.spaces import Space, find
from qcompiler.spaces.verify import MAPS, changed

Captured = Callable[..., tuple[torch.nn.Module, object, Program]]
plans = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)


def built(plan: list[str]) -> Program:
    torch.manual_seed(len(plan))
    x = torch.randn(3, Block.TOKENS, Block.WIDTH)
    program = qcompiler.capture(Block(plan), x)
    return run_pipeline(program, make_passes("canonicalize{optional=true}"))


def blocked(program: Program, kind: str) -> list[Space]:
    return [s for s in find(program, kind) if s.blocked_by and len(s.params) > 1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(plans)
def test_a_free_space_takes_any_map(plan: list[str]) -> None:
    for verified in qcompiler.verify(built(plan)):
        where = (plan, verified.space.kind, [m.name for m in verified.space.params])
        assert verified.error <= 1e-9, where
        assert verified.one_sided > 1e-7, where


@settings(max_examples=15, deadline=None, derandomize=True)
@given(plans)
def test_an_illegal_map_is_refused_and_would_be_seen(plan: list[str]) -> None:
    program = built(plan)
    inputs = random_inputs(program.io, 0)
    wanted = evaluate_wide(program, inputs)
    for kind in MAPS:
        for space in blocked(program, kind):
            blocker = space.blocked_by[0]
            with pytest.raises(BadInput, match=f"is blocked at {blocker.node}: "):
                changed(program, space, 0)
            forced = changed(program, replace(space, blocked_by=()), 0)
            error = relative_error(wanted, evaluate_wide(forced, inputs))
            assert error > 1e-9, (plan, kind, [m.name for m in space.params], space.blocked_by)


LEAST = {  # what each piece alone must offer: nobody passes the tests above by finding nothing
    "relu": "diagonal permutation",
    "norm": "diagonal shift",
    "rms": "diagonal permutation",
    "gate": "diagonal permutation",
    "bilinear": "diagonal permutation",
    "residual": "diagonal permutation",
    "linears": "diagonal shift permutation orthogonal invertible",
    "split": "diagonal shift permutation orthogonal invertible",
    "cat": "diagonal shift permutation orthogonal invertible",
    "gain": "diagonal permutation",
    "shared": "",
    "tied": "shift permutation orthogonal",
    "attention": "diagonal shift permutation orthogonal invertible",
    "grouped": "diagonal shift permutation orthogonal invertible",
    "conv": "diagonal permutation",
    "depthwise": "diagonal permutation",
    "positions": "diagonal shift permutation orthogonal invertible",
    "masked": "diagonal",
    "einsum": "diagonal permutation",
    "rolled": "diagonal permutation",
    "repeated": "diagonal shift permutation",
    "filled": "diagonal permutation orthogonal invertible",
    "doubled": "diagonal permutation orthogonal invertible",
    "reordered": "",
    "mixed": "permutation",
    "softmax": "permutation",
    "pooled": "diagonal shift permutation",
}


@pytest.mark.parametrize("piece", PIECES)
def test_what_each_piece_offers(piece: str) -> None:
    found = {v.space.kind for v in qcompiler.verify(built([piece]))}
    assert found == set(LEAST[piece].split())


def test_an_operator_without_a_rule_stops_everything_by_name() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.cumsum(self.a(x), -1))

    program = qcompiler.capture(Odd(), torch.randn(3, 5, 12))
    for kind in MAPS:
        reasons = {b.reason for s in find(program, kind) for b in s.blocked_by}
        assert "no rule for operator cumsum" in reasons, kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "cnn"])
def test_maps_compose(name: str, captured: Captured) -> None:
    """Every space of every kind in turn, each found on what the ones before have left."""
    program = run_pipeline(captured(name)[2], make_passes("canonicalize"))
    inputs = random_inputs(program.io, 0)
    wanted, count = evaluate_wide(program, inputs), 0
    for kind in ("orthogonal", "shift", "diagonal", "permutation", "invertible", "diagonal"):
        for number in range(len(find(program, kind))):
            space = find(program, kind)[number]
            if not space.blocked_by and len(space.params) > 1:
                program, count = changed(program, space, count), count + 1
    assert count >= 12
    assert relative_error(wanted, evaluate_wide(program, inputs)) <= 1e-9
