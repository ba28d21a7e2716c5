"""The cpu backend's executor: memory that is used again, and must not be seen to be."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from torch import Tensor, nn

import qcompiler
from qcompiler.backends.cpu.fixed import KEPT, REPEATED
from qcompiler.backends.cpu.kernels import GENERATED
from qcompiler.check import relative_error
from qcompiler.errors import BadInput
from qcompiler.registry import get_backend
from qcompiler.samples import random_inputs

pytestmark = pytest.mark.skipif(not GENERATED, reason="llvmlite is not installed")
W4A8 = "assign{weight=int4:group32 activation=int8:token:dynamic head=same},quantize"


def compiled(
    model: nn.Module, inputs: object, dynamic: object = None, formats: str = W4A8
) -> qcompiler.Compiled:
    backend = qcompiler.registry.get_backend("cpu").only("integer", "decoding")
    passes = f"canonicalize{{optional=true}},fold{{optional=true}},{formats}"
    return qcompiler.compile(model.eval(), inputs, passes=passes, backend=backend, dynamic=dynamic)


class Formula(nn.Module):
    """Two linears with a function in between."""

    def __init__(self, function: Callable[[Tensor, nn.Linear, nn.Linear], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x, self.one, self.two)


FORMULAS: dict[str, Callable[[Tensor, nn.Linear, nn.Linear], object]] = {
    "a chain": lambda x, f, g: f(g(f(g(f(x))))),
    "a view that is an output": lambda x, f, g: (f(x).view(2, 2, 64)[1], g(g(f(x)))),
    "parts of a value, read late": lambda x, f, g: _late(f(x).chunk(2, -1), x, g),
    "a contiguous copy that is none": lambda x, f, g: (f(x).contiguous(), g(f(x)) + 1),
    "a value read early and late": lambda x, f, g: _twice(f(x), f, g),
    "an input that is an output": lambda x, f, g: (x, f(x), x.t()),
    "constants": lambda x, f, g: f(x) + torch.arange(64).float().cos(),
    "a reshape that copies": lambda x, f, g: g(f(x).t().reshape(4, 64)),
    "random numbers": lambda x, f, g: g(f(x) + 0 * torch.rand(4, 64)),
    "two views of one value": lambda x, f, g: _views(f(x)),
    "two views of an input": lambda x, f, g: (x.t(), x.diagonal(), f(x)),
    "nothing": lambda x, f, g: f(x[:0]),
}


def _late(parts: tuple[Tensor, ...], x: Tensor, g: nn.Linear) -> Tensor:
    y = g(g(g(x)))
    return torch.cat([parts[1], parts[0]], -1) + y


def _views(y: Tensor) -> tuple[Tensor, ...]:
    return y.t(), y.diagonal(), y.movedim(0, 1), y.unfold(1, 2, 2)


def _twice(a: Tensor, f: nn.Linear, g: nn.Linear) -> Tensor:
    return g(torch.relu(a)) + f(g(f(g(a)))) + a


def tensors(outputs: object) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(outputs))


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    """The reference's numbers, and no call changes what another gave."""
    made = compiled(Formula(FORMULAS[name]), torch.randn(4, 64), dynamic=False)
    given = [torch.randn(4, 64) for _ in range(3)]
    kept = [x.clone() for x in given]
    found = [tensors(made(x)) for x in given]
    before = [[t.clone() for t in outputs] for outputs in found]
    for x in reversed(given):
        made(x)
    for x, original, outputs, copies in zip(given, kept, found, before, strict=True):
        assert torch.equal(x, original)
        assert all(map(torch.equal, outputs, copies))
        for mine, wanted in zip(outputs, tensors(made.program(x)), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=2e-2)


def test_outputs_are_the_caller_s() -> None:
    """What a caller does to outputs, and to inputs afterwards, reaches no other call."""
    made = compiled(Formula(FORMULAS["a chain"]), torch.randn(4, 64), dynamic=False)
    x = torch.randn(4, 64)
    want = made(x).clone()
    made(x).zero_()
    assert torch.equal(made(x), want)
    weights = compiled(Formula(lambda x, f, g: (f(x), g.bias)), torch.randn(4, 64), dynamic=False)
    weights(x)[1].zero_()
    assert weights(x)[1].abs().sum() > 0


def test_memory_is_used_again() -> None:
    """A chain of 20 needs three places, not 20."""

    def chain(x: Tensor, f: nn.Linear, g: nn.Linear) -> Tensor:
        for _ in range(20):
            x = f(torch.relu(x))
        return x

    from qcompiler.backends.cpu.executor import Settled

    made = compiled(Formula(chain), torch.randn(4, 64), dynamic=False)
    assert made.lowered is not None
    settled = Settled(made.lowered.program, 1)
    assert 0 < len(settled.pool.held) <= 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
@pytest.mark.parametrize("dynamic", [None, False])
def test_models(name: str, dynamic: object) -> None:
    module, example = zoo.build(name)
    made = compiled(module, example, dynamic, "assign{weight=int8:channel},quantize")
    for seed in (3, 4, 5):
        inputs = random_inputs(made.program.io, seed)
        want, got = made.program.flat(inputs), made.artifact.run(inputs)
        assert relative_error(want, got) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_shapes_that_come_again_have_a_program_of_their_own(name: str) -> None:
    """It gives what the program for any shape gives, and so does the latter afterwards."""
    module, example = zoo.build(name)
    made = compiled(module, example, None, "assign{weight=int8:channel},quantize")
    for _ in range(2):
        for sizes in ({}, dict.fromkeys(made.program.io.dims, 9)):
            inputs = random_inputs(made.program.io, 3, sizes)
            want = made.program.flat(inputs)
            for _ in range(REPEATED + 1):
                assert relative_error(want, made.artifact.run(inputs)) < 2e-5
    assert len(made.artifact._own.fixed._made) == 2
    nodes = {key: len(settled.lines) for key, settled in made.artifact._own.fixed._made.items()}
    assert max(nodes.values()) < len(made.artifact._own.settled.lines)


def test_shapes_that_come_and_go_have_none() -> None:
    made = compiled(Formula(FORMULAS["a chain"]), torch.randn(4, 64))
    for _ in range(REPEATED):
        for size in (4, 5):
            made(torch.randn(size, 64))
    assert not made.artifact._own.fixed._made
    given = {size: torch.randn(size, 64) for size in range(2, 10)}
    want = {size: made.program(x) for size, x in given.items()}
    for size, x in given.items():
        for _ in range(REPEATED):
            torch.testing.assert_close(made(x), want[size], rtol=1e-4, atol=2e-2)
    assert len(made.artifact._own.fixed._made) == KEPT
    for size, x in given.items():
        torch.testing.assert_close(made(x), want[size], rtol=1e-4, atol=2e-2)


def test_threads_have_memory_of_their_own() -> None:
    made = compiled(Formula(FORMULAS["a chain"]), torch.randn(4, 64), dynamic=False)
    given = [torch.randn(4, 64) for _ in range(48)]
    want = [made(x) for x in given]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(made, given), want))


def test_a_copy_runs() -> None:
    made = compiled(Formula(FORMULAS["a chain"]), torch.randn(4, 64), dynamic=False)
    x = torch.randn(4, 64)
    want = made(x)
    assert torch.equal(copy.deepcopy(made.artifact).run((x,))[0], want)


@pytest.mark.parametrize("setting", ["OMP_DYNAMIC=true", "OMP_THREAD_LIMIT=1"])
def test_fewer_threads_than_asked_for(setting: str) -> None:
    """OpenMP may give fewer: each does what the missing ones would have."""
    code = (
        "import torch, qcompiler\n"
        "from qcompiler.registry import get_backend\n"
        "torch.set_num_threads(2)\n"
        "m = torch.nn.Sequential(torch.nn.Linear(1024, 1024))\n"
        "p = 'canonicalize{optional=true},assign{weight=int8:channel head=same},quantize'\n"
        "c = qcompiler.compile(m, torch.randn(4, 1024), passes=p,"
        " backend=get_backend('cpu').only('decoding'))\n"
        "x = torch.randn(4, 1024)\n"
        "torch.testing.assert_close(c(x), c.program(x), rtol=1e-4, atol=1e-4)\n"
        "print(*c.kernels.values())\n"
    )
    name, _, value = setting.partition("=")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, name: value},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "decoding"


def test_another_number_of_threads() -> None:
    made = compiled(Formula(FORMULAS["a chain"]), torch.randn(4, 64), dynamic=False)
    x, before = torch.randn(4, 64), torch.get_num_threads()
    want = made(x)
    try:
        torch.set_num_threads(before + 1)
        assert torch.equal(made(x), want)
    finally:
        torch.set_num_threads(before)


def test_an_input_of_another_size_is_refused() -> None:
    """Neither spread over the place of the one that was captured, nor read past its end."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    backend = get_backend("cpu").only("integer")
    made = qcompiler.compile(
        model, torch.randn(4, 64), recipe="w8a8-dynamic", backend=backend, dynamic=False
    )
    with pytest.raises(BadInput, match=r"of shape \(4, 64\).*found \(1, 64\)"):
        made.artifact.run((torch.randn(1, 64),))
    for width in (32, 63):  # 63 fill as many chunks of inputs as 64 do
        with pytest.raises(BadInput, match=rf"does not take shape \[4, {width}\]"):
            made.module()(torch.randn(4, width))
    assert made.lowered is not None
    with pytest.raises(BadInput, match="32 inputs make 1 chunks"):
        made.lowered.program.flat((torch.randn(4, 32),))
