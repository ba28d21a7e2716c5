"""Generated convolutions: against float64, in programs, and how codes are handed on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import zoo
from torch import Tensor, nn

import qcompiler
from qcompiler.backends.cpu.kernels import GENERATED, Static, point_of
from qcompiler.check import relative_error
from qcompiler.errors import BadInput
from qcompiler.formats import Grid, QFormat, QTensor, Scheme
from qcompiler.registry import get_backend
from qcompiler.rounding import nearest
from qcompiler.samples import random_inputs
from qcompiler.sites import sites

pytestmark = pytest.mark.skipif(not GENERATED, reason="llvmlite is not installed")
if GENERATED:
    from qcompiler.backends.cpu import choose_conv, race_conv, winograd
    from qcompiler.backends.cpu.codegen import isa as isas
    from qcompiler.backends.cpu.codegen.functions import FUNCTIONS
    from qcompiler.backends.cpu.codegen.winograd import CHANNELS
    from qcompiler.backends.cpu.conv_calls import ConvCall
    from qcompiler.backends.cpu.executor import Settled
    from qcompiler.backends.cpu.fixed import REPEATED, fixed
    from qcompiler.backends.cpu.images import RoundCall
    from qcompiler.backends.cpu.window import Window

WEIGHTS = ("int8:channel", "int8:channel:asym", "int4:channel", "int3:tensor", "uint4:channel:asym")
ACTIVATIONS = (
    "int8:sample:dynamic",
    "int8:tensor:dynamic:clip0.9",
    "int8:tensor",
    "int8:tensor:asym",
    "uint8:tensor",
    "uint8:tensor:asym",
)
SHAPES = (
    # batch, channels, height, width, outputs, kernel, stride, padding, dilation
    (2, 3, 9, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1)),  # patches are copied
    (1, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 40, 5, 6, 37, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 33, 12, 5, 17, (3, 2), (2, 1), (1, 1), (1, 2)),
    (1, 20, 11, 11, 16, (3, 3), (2, 2), (2, 0), (2, 2)),
    (1, 16, 6, 6, 24, (1, 1), (1, 1), (0, 0), (1, 1)),  # half of a chunk is channels
)
DEPTHWISE = (
    # the same, each channel by itself
    (2, 32, 9, 7, 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 40, 12, 5, 40, (5, 5), (2, 2), (2, 2), (1, 1)),
    (3, 7, 6, 6, 7, (2, 2), (1, 1), (0, 0), (1, 1)),
    (1, 17, 9, 9, 17, (3, 3), (1, 1), (2, 2), (2, 2)),
    (1, 16, 5, 5, 16, (1, 1), (1, 1), (0, 0), (1, 1)),
)
STATIC = "assign{weight=int8:channel activation=uint8:tensor:asym head=same},quantize"


@pytest.fixture(params=isas._available() if GENERATED else ())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(isas.VARIABLE, request.param)
    yield request.param


def static_of(x: Tensor, fmt: QFormat) -> tuple[Static, Grid]:
    """What a site knows of its activation, and the grid that x is rounded to, in part beyond it."""
    if fmt.dynamic:
        return Static(), Grid.fit(x, fmt)
    grid = Grid.cover(*(end.reshape(1, 1, 1, 1) * 0.6 for end in (x.min(), x.max())), fmt)
    return Static(grid.scale, grid.zero), grid


def product(q: QTensor, x: Tensor, activation: str, window: Window, bias: Tensor | None = None):
    """What the kernel gives, and what float64 does."""
    fmt = QFormat.parse(activation)
    static, grid = static_of(x, fmt)
    got = choose_conv.prepare(q, x.shape[1], bias, fmt, static, window)(x)
    weight = q.dequantize(torch.float64).reshape(q.data.shape[0], -1, *window.kernel)
    bias = None if bias is None else bias.double()
    groups = x.shape[1] // weight.shape[1]
    want = torch.conv2d(grid.round(x.double()), weight, bias, *window[1:], groups)
    return got, want


@pytest.mark.parametrize("shape", SHAPES + DEPTHWISE, ids=str)
def test_every_format(shape: tuple, isa: str) -> None:
    batch, channels, height, width, out, *window = shape
    generator = torch.Generator().manual_seed(0)
    inputs = (1 if shape in DEPTHWISE else channels) * window[0][0] * window[0][1]
    x = torch.randn(batch, channels, height, width, generator=generator) + 0.3
    pairs = zip(WEIGHTS * 2, itertools.chain(ACTIVATIONS, ACTIVATIONS[::-1]), strict=False)
    for weight, activation in pairs:
        q = nearest(torch.randn(out, inputs, generator=generator), QFormat.parse(weight))
        got, want = product(q, x, activation, Window(*window), torch.arange(out) / out)
        assert got.shape == want.shape and got.is_contiguous()
        assert relative_error(want, got) < 3e-6, (weight, activation)
        again, _ = product(q, x.contiguous(memory_format=torch.channels_last), activation,
                           Window(*window), torch.arange(out) / out)  # fmt: skip
        assert torch.equal(got, again)


def test_a_dynamic_scale_is_not_written_into_one_that_is_handed_over() -> None:
    generator = torch.Generator().manual_seed(0)
    q = nearest(torch.randn(8, 36, generator=generator), QFormat.parse("int8:channel"))
    x = torch.randn(3, 4, 6, 5, generator=generator)
    window, fmt = Window((3, 3), (1, 1), (1, 1), (1, 1)), QFormat.parse("int8:sample:dynamic")
    memory = torch.full((3,), 0.03)
    got = choose_conv.prepare(q, 4, None, fmt, Static(memory[:1]), window)(x)
    assert torch.equal(memory, torch.full((3,), 0.03))
    assert torch.equal(got, choose_conv.prepare(q, 4, None, fmt, Static(), window)(x))


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in isas._available():
        pytest.skip("this CPU has no AVX2: kernels of another instruction set serve it")
    monkeypatch.setenv(isas.VARIABLE, "avx2")


TILED = (
    (1, 64, 8, 8, 64),
    (2, 60, 7, 9, 17),
    (3, 55, 5, 4, 32),
    (1, 128, 1, 16, 16),
)
"""Batch, channels, height, width, outputs of what is computed in tiles of 2 × 2."""


@pytest.mark.parametrize("shape", TILED, ids=str)
@pytest.mark.parametrize("weight", ["int8:channel:full", "int7:tensor", "int5:channel"])
def test_fewer_products_are_the_same_sums(
    shape: tuple[int, ...], weight: str, avx2: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whatever the number of threads."""
    batch, channels, height, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator) + 0.3
    q = nearest(torch.randn(out, channels * 9, generator=generator), QFormat.parse(weight))
    served: list[bool] = []
    chosen = winograd.serves
    monkeypatch.setattr(winograd, "serves", lambda *a: served.append(chosen(*a)) or served[-1])
    for activation in ACTIVATIONS:
        for padding in ((1, 1), (0, 2)):
            if height + 2 * padding[0] < 3:
                continue
            window = Window((3, 3), (1, 1), padding, (1, 1))
            found = []
            for threads, fewer in ((1, True), (2, True), (1, False)):
                torch.set_num_threads(threads)
                with monkeypatch.context() as patch:
                    if not fewer:
                        patch.setattr(winograd, "serves", lambda *a: False)
                    found.append(product(q, x, activation, window, torch.arange(out) / out)[0])
            torch.set_num_threads(1)
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert any(served)


def test_the_most_channels_of_fewer_products_do_not_overflow(avx2: None) -> None:
    fmt, channels = QFormat.parse("int8:channel:full"), CHANNELS
    q = QTensor(
        torch.full((16, 9 * channels), -128, dtype=torch.int16),
        Grid(fmt, torch.ones(16, 1)),
    )
    for x in (torch.ones(1, channels, 4, 4), -torch.ones(1, channels, 4, 4)):
        for zero in (0, 255):
            static = Static(torch.tensor([1 / 255]), torch.tensor([zero], dtype=torch.int16))
            window = Window((3, 3), (1, 1), (1, 1), (1, 1))
            call = choose_conv.prepare(
                q, channels, None, QFormat.parse("uint8:tensor:asym"), static, window
            )
            grid = Grid(QFormat.parse("uint8:tensor:asym"), static.scale, static.zero)
            weight = torch.full((16, channels, 3, 3), -128.0, dtype=torch.float64)
            want = torch.conv2d(grid.round(x.double()), weight, padding=1)
            assert relative_error(want, call(x)) < 1e-6


def test_nothing_saturates(isa: str) -> None:
    assert choose_conv.self_test() is None


def test_the_proof_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choose_conv.prepare

    def wrong(*arguments: object) -> Callable[[Tensor], Tensor]:
        call = right(*arguments)
        return lambda x: call(x).clamp(-1000, 1000)

    monkeypatch.setattr(choose_conv, "prepare", wrong)
    fmt, activation = map(QFormat.parse, choose_conv.PROOFS[0])
    assert "on this CPU its sums are off" in str(choose_conv._proof(fmt, activation))


@pytest.mark.parametrize("channels", [3, 32])
def test_a_nan_is_where_it_is_read(channels: int) -> None:
    x = torch.randn(2, channels, 9, 8, generator=torch.Generator().manual_seed(0))
    x[1, 2, 4, 5] = torch.nan
    q = nearest(torch.randn(16, channels * 9), QFormat.parse("int8:channel"))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    call = choose_conv.prepare(
        q, channels, None, QFormat.parse("int8:tensor"), Static(torch.tensor([0.05])), window
    )
    wrong = call(x).isnan()
    assert wrong[1, :, 3:6, 4:7].all() and wrong.sum() == 16 * 9
    call = choose_conv.prepare(
        q, channels, None, QFormat.parse("int8:sample:dynamic"), Static(), window
    )
    wrong = call(x).isnan()
    assert wrong[1].all() and not wrong[0].any()


def test_a_nan_is_its_channels_and_its_pixels_neighbours() -> None:
    """A depthwise convolution tells of it where others would."""
    x = torch.randn(1, 32, 9, 8)
    x[0, 2, 4, 5] = torch.nan
    q = nearest(torch.randn(32, 9), QFormat.parse("int8:channel"))
    static = Static(torch.tensor([0.05]))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    wrong = choose_conv.prepare(q, 32, None, QFormat.parse("int8:tensor"), static, window)(x)
    assert wrong.isnan()[0, :, 3:6, 4:7].all() and wrong.isnan().sum() == 32 * 9


@pytest.mark.parametrize("name", FUNCTIONS if GENERATED else ())
def test_functions_behind(name: str, isa: str) -> None:
    q = nearest(torch.randn(20, 16 * 9), QFormat.parse("int8:channel"))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    call = choose_conv.prepare(q, 16, None, QFormat.parse("int8:sample:dynamic"), Static(), window)
    x = torch.randn(2, 16, 7, 6, generator=torch.Generator().manual_seed(0))
    x[1, 0, 0, 0] = torch.nan
    arguments = (x, *call.parameters.values(), *call.constants)
    plain = call.operator(*arguments)
    tanh = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    want = getattr(nn.functional, name.removesuffix("_tanh"))(plain, **tanh)
    got = call.operator(*arguments, behind=name)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    zero = call.operator(torch.zeros_like(x), *arguments[1:], behind=name)
    assert not zero.any()  # so that outputs that only fill a block stay zero, as readers expect


def test_operators_are_sound() -> None:
    q = nearest(torch.randn(20, 16 * 9), QFormat.parse("int8:channel"))
    fmt = QFormat.parse("uint8:tensor:asym")
    static = Static(torch.tensor([0.05]), torch.tensor([131], dtype=torch.int16))
    call = choose_conv.prepare(q, 16, None, fmt, static, Window((3, 3), (2, 2), (1, 1), (1, 1)))
    x = torch.randn(2, 16, 7, 6)
    for last in (False, True):
        more = {"residual": torch.randn(2, 20, 4, 3), "behind": "relu", "last": last}
        arguments = (x, *call.parameters.values(), *call.constants)
        torch.library.opcheck(call.operator, arguments, more)
        y = call.operator(*arguments, **more)
        order = torch.channels_last if last else torch.contiguous_format
        assert y.is_contiguous(memory_format=order)
        plain = call.operator(*arguments)
        torch.testing.assert_close(y, (plain + more["residual"]).relu())
    torch.library.opcheck(torch.ops.qc_cpu.mean.default, (x, True))
    torch.testing.assert_close(torch.ops.qc_cpu.mean(x, False), x.mean((2, 3)))
    assert call(x[:0]).shape == (0, 20, 4, 3)
    assert point_of(fmt, static) == 3


# -- programs ---------------------------------------------------------------------------------


def compiled(
    model: nn.Module, inputs: Tensor, dynamic: object = None, formats: str = STATIC
) -> qcompiler.Compiled:
    passes = f"canonicalize{{optional=true}},fold{{optional=true}},{formats}"
    backend = get_backend("cpu").only("conv", "integer")
    return qcompiler.compile(
        model.eval(), inputs, passes=passes, backend=backend, dynamic=dynamic, data=[inputs]
    )


class Net(nn.Module):
    """Three convolutions with a function in between."""

    def __init__(self, function: Callable[..., Tensor], width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.three = nn.Conv2d(width, width, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.one, self.two, self.three)


NETS: dict[str, Callable[..., object]] = {
    "a chain": lambda x, f, g, h: h(g(f(x).relu()).relu()),
    "a block": lambda x, f, g, h: h((g(y := f(x).relu()) + y).relu()),
    "two that read one": lambda x, f, g, h: g(y := f(x)) + h(y),
    "a sum on the right": lambda x, f, g, h: h((y := f(x)) + g(y)),
    "a sum of two sizes": lambda x, f, g, h: h(g(f(x)) + torch.ones(1, 32, 1, 1)),
    "a value that is read and returned": lambda x, f, g, h: (y := f(x), g(y)),
    "a view": lambda x, f, g, h: g(f(x)).relu().view(x.shape[0], -1),
    "a view of the input": lambda x, f, g, h: (x.view(x.shape[0], -1), f(x)),
    "pools": lambda x, f, g, h: h(nn.functional.max_pool2d(f(x).relu(), 2)).mean((2, 3)),
    "functions": lambda x, f, g, h: h(
        nn.functional.hardswish(g(nn.functional.relu6(f(x)) * 4).clamp(0, 6) * 3)
    ).mean((2, 3)),
    "a mean that keeps": lambda x, f, g, h: h(f(x)).mean((-1, -2), True).flatten(1),
    "a mean over lines": lambda x, f, g, h: h(f(x)).mean(-1),
    "a permutation": lambda x, f, g, h: h(f(x)).flatten(2).transpose(1, 2),
    "its own input as residual": lambda x, f, g, h: h(y := f(x)) + y + g(y),
    "an image that is read late": lambda x, f, g, h: g(g(g(y := f(x)))) + h(y),
    "an operator of torch": lambda x, f, g, h: nn.functional.conv2d(
        h(f(x)), torch.ones(32, 1, 1, 1), groups=32
    ).view(x.shape[0], -1),
    "constants": lambda x, f, g, h: h(torch.ones(1, 32, 4, 4)) + f(x).mean(),
}


@pytest.mark.parametrize("dynamic", [None, False])
@pytest.mark.parametrize(
    ("name", "width"),
    [*((name, 32) for name in NETS), ("a chain", 20), ("a block", 20), ("two that read one", 20)],
)
def test_programs(name: str, width: int, dynamic: object) -> None:
    """Kernels by themselves, and the reference with the same roundings, on two threads as well."""
    x = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    made = compiled(Net(NETS[name], width), x, dynamic)
    assert sum(k == "conv" for k in made.kernels.values()) >= 1
    for seed in (3, 4):
        inputs = random_inputs(made.program.io, seed)
        want = made.program.flat(inputs)
        # A last digit may turn a rounding the other way: by one step, in few places.
        got = made.artifact.run(inputs)
        assert relative_error(want, got) < 5e-3
        assert [y.stride() for y in got] == [y.stride() for y in want]
        plain = made.lowered.program.flat(inputs)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                got = made.artifact.run(inputs)
            finally:
                torch.set_num_threads(1)
            assert all(map(torch.equal, plain, got))


def settled(program: qcompiler.Program) -> tuple[int, list[ConvCall]]:
    """How often numbers are rounded in a run, and its convolutions."""
    calls = Settled(program, 1).names.values()
    return sum(isinstance(c, RoundCall) for c in calls), [
        c for c in calls if isinstance(c, ConvCall)
    ]


@pytest.mark.parametrize(
    ("name", "rounded", "written"),
    [
        ("a chain", 1, 1),  # nothing but the result is ever written as numbers
        ("a block", 1, 2),
        ("two that read one", 1, 2),
    ],
)
@pytest.mark.parametrize("dynamic", [None, False])
def test_codes_are_handed_on(name: str, rounded: int, written: int, dynamic: object) -> None:
    function = NETS[name]
    net = Net(lambda *given: function(*given).mean((2, 3)))
    x = torch.randn(1, 3, 16, 16)
    made = compiled(net, x, dynamic)
    assert made.lowered is not None
    rounds, calls = settled(fixed(made.lowered.program, (x,)))
    assert (rounds, sum(c.writes for c in calls), len(calls)) == (rounded, written, 3)


def test_a_nan_is_handed_on() -> None:
    x = torch.randn(1, 3, 24, 24)
    net = Net(lambda x, f, g, h: g(f(x)).mean((2, 3)))
    made = compiled(net, x, False)
    assert not made.artifact.run((x,))[0].isnan().any()
    x[0, 1, 5, 5] = torch.nan
    assert made.artifact.run((x,))[0].isnan().all()
    x[0, 1, 5, 5] = 0
    assert not made.artifact.run((x,))[0].isnan().any()


@pytest.mark.parametrize("recipe", ["w8a8-static", "w8a8-dynamic"])
@pytest.mark.parametrize("dynamic", [None, False])
def test_a_model(recipe: str, dynamic: object, isa: str) -> None:
    module, example = zoo.build("cnn")
    backend = get_backend("cpu").only("conv", "integer")
    made = qcompiler.compile(module, example, recipe=recipe, backend=backend, dynamic=dynamic)
    assert sum(k == "conv" for k in made.kernels.values()) == 7
    for seed in (3, 4):
        inputs = random_inputs(made.program.io, seed)
        want = made.program.flat(inputs)
        for _ in range(REPEATED + 1):
            assert relative_error(want, made.artifact.run(inputs)) < 5e-3


def test_lines() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 16, 5, 2, 2), nn.ReLU(), nn.Conv1d(16, 8, 3))
    made = compiled(model, torch.randn(3, 6, 21))
    assert list(made.kernels.values()) == ["conv", "conv"]
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 5e-3


@pytest.mark.parametrize(("count", "outputs"), [(2, 32), (32, 64)])
def test_groups_stay_in_floating_point(count: int, outputs: int) -> None:
    model = nn.Sequential(nn.Conv2d(32, outputs, 3, groups=count))
    passes = f"canonicalize{{optional=true}},{STATIC}"
    x = torch.randn(1, 32, 8, 8)
    made = qcompiler.compile(model.eval(), x, passes=passes, data=[x])
    assert [k.partition("; ")[2] for k in made.kernels.values()] == [
        f"conv: takes one group of channels, or one for each; found {count} with {outputs} outputs"
    ]


class Inverted(nn.Module):
    """Depthwise convolutions between pointwise ones, of widths that fill no block, with a sum."""

    def __init__(self, function: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), function())
        self.body = nn.Sequential(
            nn.Conv2d(24, 40, 1), function(),
            nn.Conv2d(40, 40, 3, 1, 1, groups=40), function(),
            nn.Conv2d(40, 24, 1),
        )  # fmt: skip
        self.last = nn.Conv2d(24, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.body(x) + x).mean((2, 3))


@pytest.mark.parametrize("function", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU])
def test_inverted_bottlenecks(function: type[nn.Module], isa: str) -> None:
    """Codes from the first to the last: nothing is rounded from numbers but the picture."""
    x = torch.randn(2, 3, 18, 14, generator=torch.Generator().manual_seed(1))
    made = compiled(Inverted(function), x, False)
    assert set(made.kernels.values()) == {"conv"} and len(made.kernels) == 5
    rounds, calls = settled(made.lowered.program)
    assert (rounds, sum(c.writes for c in calls), len(calls)) == (1, 2, 5)
    for seed in (3, 4):
        inputs = random_inputs(made.program.io, seed)
        got = made.artifact.run(inputs)
        assert relative_error(made.program.flat(inputs), got) < 5e-3
        assert all(map(torch.equal, made.lowered.program.flat(inputs), got))


class TwoReaders(nn.Module):
    """One image that a depthwise and a dense convolution read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.each = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.all = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.each(x) + self.all(x)).mean((2, 3))


@pytest.mark.parametrize("activation", ["uint8:tensor:asym", "int8:sample:dynamic"])
@pytest.mark.parametrize("weight", ["int8:channel", "int8:channel:asym"])
def test_an_image_with_two_readers(weight: str, activation: str, isa: str) -> None:
    """Sums of pixels for the one, none for the other; NaN for both, on two threads as well."""
    x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    formats = f"assign{{weight={weight} activation={activation} head=same}},quantize"
    made = compiled(TwoReaders(), x, False, formats)
    assert set(made.kernels.values()) == {"conv"}
    inputs = random_inputs(made.program.io, 3)
    got = made.artifact.run(inputs)
    assert relative_error(made.program.flat(inputs), got) < 5e-3
    torch.set_num_threads(2)
    try:
        assert all(map(torch.equal, got, made.artifact.run(inputs)))
    finally:
        torch.set_num_threads(1)
    x[1, 0, 5, 5] = torch.nan
    assert made.artifact.run((x,))[0].isnan().all(1).tolist() == [False, True]


def test_depthwise_lines() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 5, 2, 2, groups=8), nn.SiLU(), nn.Conv1d(8, 12, 1))
    made = compiled(model, torch.randn(2, 8, 20))
    assert list(made.kernels.values()) == ["conv", "conv"]
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 5e-3


def test_programs_in_16_bits_are_not_fused() -> None:
    """What is rounded between two operators is part of both."""
    made = compiled(Inverted(nn.SiLU).bfloat16(), torch.randn(1, 3, 18, 14).bfloat16(), False)
    assert set(made.kernels.values()) == {"conv"} and made.lowered is not None
    convs = [n for n in made.lowered.program.nodes if "conv" in str(n.target)]
    assert len(convs) == 5 and not any(n.kwargs for n in convs)
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 2e-2


def test_zero_points_between_codes_of_single_channels_stay_in_floating_point() -> None:
    x = torch.randn(1, 16, 8, 8)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1))
    formats = "assign{weight=uint4:channel:asym activation=uint8:tensor:asym head=same}"
    made = compiled(model, x, formats=f"{formats},quantize{{rounding=hqq}}")
    assert made.kernels == {"0/conv2d#0": "float", "1/conv2d#0": "conv"}
    assert made.lowered is not None
    assert "zero points between codes" in made.lowered.refused["0/conv2d#0"]
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 5e-3


RACES: dict[str, tuple[Callable[[], list[nn.Module]], list[tuple[bool, bool]]]] = {
    "a chain": (
        lambda: [nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3)], [(False, True), (True, False)]
    ),
    "a clamp of other ends": (
        lambda: [nn.Conv2d(8, 8, 3), nn.Hardtanh(), nn.Conv2d(8, 8, 3)], [(False, False)] * 2
    ),
    "another function": (
        lambda: [nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3)], [(False, False)] * 2
    ),
    "one in floating point": (
        lambda: [nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3)], [(False, False)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_a_race_is_between_what_programs_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From codes only behind one that is served, to codes only if a convolution reads them."""
    make, wanted = RACES[name]
    raced: dict[object, tuple[bool, bool]] = {}

    def won(race: object, ends: tuple[bool, bool], threads: int) -> list[tuple[str, float]]:
        raced[race] = tuple(ends)
        return [("conv", 1.0), ("float", 2.0)]

    monkeypatch.setattr(race_conv, "_seconds", won)
    x = torch.randn(1, 8, 12, 12)
    passes = f"canonicalize{{optional=true}},{STATIC}"
    qcompiler.compile(
        nn.Sequential(*make()).eval(), x, passes=passes, data=[x], backend="cpu", dynamic=False
    )
    assert [raced[race] for race in sorted(raced, key=lambda r: -r.size[0])] == wanted


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("groups", [1, 24])
def test_both_of_a_race_compute_the_same(leaves: bool, groups: int) -> None:
    scheme = Scheme(QFormat.parse("int8:channel"), QFormat.parse("uint8:tensor:asym"))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    race = race_conv._Race((24, 24 // groups, 3, 3), groups, (9, 8), window, scheme, torch.float32)
    runs = race.runs(race_conv._Ends(False, leaves))
    *_, codes, y = runs["conv"]()
    mine = codes[: 72 * 32].clone().view(torch.int8).reshape(72, 32)[:, :24].int()
    want = runs["float"]()
    if leaves:
        theirs = codes[: 72 * 32].view(torch.int8).reshape(72, 32)[:, :24].int()
        assert mine.unique().numel() > 9
        assert (mine - theirs).abs().max() <= 1 and (mine != theirs).float().mean() < 0.01
    else:
        assert relative_error(want, y[..., :24].permute(0, 3, 1, 2)) < 1e-5


def test_one_image_without_a_batch_stays_in_floating_point() -> None:
    x = torch.randn(16, 8, 8)
    program = qcompiler.capture(nn.Conv2d(16, 16, 3).eval(), x, dynamic=False)
    scheme = Scheme(QFormat.parse("int8:sample"), QFormat.parse("int8:tensor"))
    reason = get_backend("cpu").refuses(sites(program.nodes)[0], scheme)
    assert reason == "conv: takes a batch of images; found one without a batch"


def test_an_image_that_is_not_the_weights_is_refused() -> None:
    """Kernels trust sizes, and would write past their memory."""
    window = Window((7, 7), (1, 1), (0, 0), (1, 1))
    q = nearest(torch.randn(20, 3 * 49), QFormat.parse("int8:channel"))
    call = choose_conv.prepare(q, 3, None, QFormat.parse("int8:tensor:dynamic"), Static(), window)
    for shape, words in (
        ((1, 8, 20, 20), "8 channels make"),
        ((3, 20, 20), "takes a batch of images"),
        ((1, 3, 2, 20), "smaller than its kernel"),
    ):
        with pytest.raises(BadInput, match=words):
            call(torch.randn(shape))
    q = nearest(torch.randn(20, 49), QFormat.parse("int8:channel"))
    call = choose_conv.prepare(q, 20, None, QFormat.parse("int8:tensor:dynamic"), Static(), window)
    with pytest.raises(BadInput, match="20 channels and 25 pairs of taps; found 33 and 25"):
        call(torch.randn(1, 33, 9, 9))
    out, _, *rest = call.constants[2:]
    with pytest.raises(BadInput, match="found 20 and 5"):
        call.operator(torch.randn(1, 20, 9, 9), *call.parameters.values(), *call.constants[:2],
                      out, [3, 3], *rest)  # fmt: skip


def test_the_mean_of_a_large_image() -> None:
    x = torch.full((1, 20, 1024, 1024), 0.1).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.ops.qc_cpu.mean(x, False), x.mean((2, 3)), rtol=1e-5, atol=0)
