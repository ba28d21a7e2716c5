"""Bytes as they are stored, operations by hand, and workloads of programs without a sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qcompiler
from qcompiler import Scheme
from qcompiler.costs import Workload, bitops, weight_bytes
from qcompiler.schemes import fit
from qcompiler.sites import sites

Captured = Callable[..., tuple[torch.nn.Module, object, qcompiler.Program]]
FORMATS = ("int8:channel", "int4:group32", "int3:group16:asym:scale(fp16)", "nf4:channel")


@pytest.mark.parametrize(
    ("model", "text"), [("llama", FORMATS[2]), *(("cnn", text) for text in FORMATS)]
)
def test_bytes_are_those_of_the_program(model: str, text: str, captured: Captured) -> None:
    module, example, program = captured(model)
    passes = f"canonicalize{{optional=true}},assign{{weight={text} head=same}},quantize"
    compiled = qcompiler.compile(module, example, passes=passes, backend="reference")
    found = sites(compiled.program.nodes)
    plan = compiled.program.plan
    weights = {program.param_of(s.weight): s for s in sites(program.nodes) if s.id in plan}
    left = program.bytes - sum(weight_bytes(s, Scheme()) for s in weights.values())
    assert found and compiled.bytes == left + sum(
        weight_bytes(s, plan[s.id]) for s in weights.values()
    )


def test_operations_of_a_linear_and_a_convolution() -> None:
    linear = qcompiler.capture(torch.nn.Linear(48, 20), torch.randn(2, 5, 48))
    site = sites(linear.nodes)[0]
    assert bitops(site, Scheme(), 7) == 7 * 48 * 20 * 32 * 32
    assert bitops(site, fit(site, "int4:channel", "int8:token:dynamic"), 7) == 7 * 48 * 20 * 4 * 8
    assert bitops(site, fit(site, "int4:channel"), 7) == 7 * 48 * 20 * 4 * 32

    grouped = torch.nn.Conv2d(8, 16, 3, groups=4, padding=1)
    site = sites(qcompiler.capture(grouped, torch.randn(2, 8, 6, 6)).nodes)[0]
    assert bitops(site, Scheme(), 3) == 3 * (16 * 6 * 6) * (8 // 4) * 9 * 32 * 32


def test_an_embedding_computes_nothing() -> None:
    program = qcompiler.capture(torch.nn.Embedding(10, 4), torch.zeros(2, 3, dtype=torch.long))
    assert bitops(sites(program.nodes)[0], Scheme(), 7) == 0


def test_a_program_without_a_sequence_is_only_run(captured: Captured) -> None:
    work = Workload(batch=4, prefill=64)
    assert work.fitting(captured("cnn")[2]) == Workload(4, 1, decode=False)
    assert work.fitting(captured("llama")[2]) == work
    with pytest.raises(qcompiler.BadInput, match="found batch 0"):
        Workload(batch=0)
