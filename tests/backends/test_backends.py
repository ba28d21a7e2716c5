"""Each backend against the reference, at other sizes too, and kernels that must not saturate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import zoo

import qcompiler
from qcompiler.backends.cpu.kernels import KERNELS, Call, Static, self_test
from qcompiler.check import relative_error
from qcompiler.formats import QFormat
from qcompiler.rounding import nearest
from qcompiler.samples import random_inputs

Captured = Callable[..., tuple[torch.nn.Module, object, qcompiler.Program]]


@pytest.mark.parametrize(
    ("model", "recipe", "allowed"),
    [
        ("llama", "w8a8-dynamic", 1e-5),
        ("llama", "w4a16", 1e-5),
        ("vit", "w8a8-static", 1e-5),
        ("gpt2", "w8a16", 1e-5),
        ("cnn", "w8a8-static", 2e-3),  # requantized integers between layers may round either way
    ],
)
def test_onnxruntime(model: str, recipe: str, allowed: float) -> None:
    module, example = zoo.build(model)
    compiled = qcompiler.compile(module, example, recipe=recipe, backend="onnxruntime")
    for seed in (3, 4):
        inputs = random_inputs(compiled.program.io, seed)
        want, got = compiled.program.flat(inputs), compiled.artifact.run(inputs)
        assert relative_error(want, got) < allowed


@pytest.mark.parametrize("backend", ["cpu", "onnxruntime"])
@pytest.mark.parametrize("activation", ["int8:token:dynamic", "int8:tensor"])
@pytest.mark.parametrize("weight", ["int8:channel", "int7:channel", "int4:channel"])
def test_nothing_saturates(backend: str, activation: str, weight: str) -> None:
    """Weights and activations at their largest: 16-bit pair sums of 8 bits would overflow."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 32, bias=False), torch.nn.ReLU())
    model[0].weight.data.fill_(0.5)
    x = torch.full((4, 256), 3.0)
    formats = f"weight={weight} activation={activation} head=same"
    passes = f"canonicalize{{optional=true}},assign{{{formats}}},quantize"
    compiled = qcompiler.compile(model, x, passes=passes, backend=backend, data=[x])
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_cpu_kernels(name: str, tokens: int) -> None:
    """A kernel that this CPU gets right agrees with float64; one that it does not says so."""
    if reason := self_test(name):
        assert "on this CPU" in reason or "cannot run it here" in reason
        return
    fmt = QFormat.parse("int4:group32" if name == "packed4" else "int8:channel")
    q = nearest(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)), fmt)
    x = torch.randint(-127, 128, (tokens, 96)).float()
    x[:, 0] = 127.0  # so that the dynamic scale is exactly one
    rounds = name in ("int8", "integer")
    activation = QFormat.parse("int8:token:dynamic") if rounds else None
    kernel = KERNELS[name]
    got = kernel.prepare(q, None, activation, Static())(x).double()
    want = x.double() @ q.dequantize(torch.float64).t()
    assert got.shape == want.shape
    if tokens:
        assert (got - want).norm() / want.norm() < kernel.tolerance


def test_a_saturating_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = KERNELS["int8"].prepare

    def saturating(*arguments: object) -> Call:
        call = exact(*arguments)  # type: ignore[arg-type]
        return replace(call, operator=lambda *a: call.operator(*a).clamp(-1e3, 1e3))

    monkeypatch.setitem(KERNELS, "int8", replace(KERNELS["int8"], prepare=saturating))
    self_test.cache_clear()
    reason = self_test("int8")
    self_test.cache_clear()
    assert reason is not None and "16 bits saturate" in reason


@pytest.mark.parametrize("backend", ["cpu", "onnxruntime"])
@pytest.mark.parametrize("activation", ["float", "int8:token:dynamic:full", "int8:tensor:full"])
def test_the_full_range_is_no_kernel_s_narrow_one(
    backend: str, activation: str, captured: Captured
) -> None:
    """s = max|x| / 127.5 and not / 127: a kernel with scales of its own must not take it.

    The largest number of a token lies half way between two steps, so that it may round either way;
    a scale for ±127 would be off by 1e-2.
    """
    module, example, _ = captured("llama")
    passes = f"canonicalize,assign{{weight=int8:channel:full activation={activation}}},quantize"
    compiled = qcompiler.compile(module, example, passes=passes, backend=backend)
    inputs = compiled.program.io.flatten((), example)
    wanted, found = compiled.program.flat(inputs)[0], compiled.artifact.run(inputs)[0]
    assert relative_error(wanted, found) < 3e-3


def test_a_kernel_that_reads_16_inputs_at_a_time_takes_no_odd_width() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 20)).eval()
    passes = "canonicalize{optional=true},assign{weight=int8:channel head=same},quantize"
    compiled = qcompiler.compile(model, torch.randn(4, 33), passes=passes, backend="cpu")
    assert "takes inputs in 16s; found 33" in compiled.kernels["0/linear#0"]
