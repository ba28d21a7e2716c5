"""Every Triton kernel against float64, on odd shapes and in every format that it claims.

On a GPU these run there. Without one they need Triton's interpreter, which is chosen before triton
is first imported: `test_triton.py` runs this file so, in a process of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor

import qcompiler
from qcompiler.backends.triton import TritonBackend, layout, load_operators
from qcompiler.backends.triton.kernels import KERNELS
from qcompiler.backends.triton.runtime import device, processors, unavailable
from qcompiler.backends.triton.weights import Weight
from qcompiler.check import relative_error
from qcompiler.coded import Coded, numbers
from qcompiler.formats import Grid, QFormat
from qcompiler.hadamard import hadamard
from qcompiler.ops import rope
from qcompiler.rounding import nearest
from qcompiler.samples import random_inputs

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

load_operators()

from qcompiler.backends.triton import attention, cache, decoded, scaled  # noqa: E402
from qcompiler.backends.triton.hadamard import factor  # noqa: E402
from qcompiler.backends.triton.tune import AT_ONCE, Config, agree  # noqa: E402

OPS = torch.ops.qc_triton
CLOSE = 1e-4
IN_FLIGHT = 2e-3
"""Of sums of e4m3 products on Hopper, whose tensor cores keep some 14 bits."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def short(*shape: int) -> Tensor:
    """Numbers that bfloat16 holds, as float32: what a kernel rounds to 16 bits is exact then."""
    return torch.randn(*shape).bfloat16().float()


def error(found: Tensor, wanted: Tensor) -> float:
    return relative_error(wanted.double(), found.cpu().double())


def serve(
    name: str, weight: Weight, x: Tensor, bias: Tensor | None, given: Tensor | None = None
) -> Tensor:
    """What the kernel `name` computes, activations rounded by it if it does."""
    there = {k: v.to(device()) for k, v in weight.tensors.items()}
    x = x.to(device())
    bias, given = (None if t is None else t.to(device()) for t in (bias, given))
    y: Tensor = KERNELS[name].compute(
        lambda target, *args: target(*args),
        x,
        lambda fp8: OPS.round_rows(x, given, fp8),
        there,
        weight,
        bias,
        x.dtype,
    )
    return y


WEIGHTS = {
    "w4a16": [
        "int4:group32",
        "int4:group128",
        "int4:group48:full",
        "int4:channel",
        "int4:group32:asym",
        "int4:tensor",
        "int3:group64:asym",
        "int2:group16:mirrored",
        "uint4:group32:asym",
        "mxfp4",
        "nvfp4",
        "fp4_e2m1:channel",
    ],
    "w8a16": [
        "int8:channel",
        "int8:group32",
        "int8:group48:asym",
        "int8:channel:asym",
        "uint8:channel:asym",
        "int8:tensor",
        "fp8_e4m3:channel",
        "fp8_e4m3:group32",
    ],
    "w4a8": [
        "int4:group32",
        "int4:group128:asym",
        "int4:channel",
        "int3:group64",
        "uint4:channel:asym",
    ],
    "w8a8": ["int8:channel", "int8:channel:full", "int8:tensor"],
    "fp8": ["fp8_e4m3:channel", "fp8_e4m3:tensor"],
}
CASES = [(k, f) for k, formats in WEIGHTS.items() for f in formats]
SHAPES = [(1, 288, 33), (3, 100, 20), (17, 130, 131)]


@pytest.mark.parametrize(("name", "text"), CASES, ids=lambda v: str(v).replace(":", "-"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(name: str, text: str, shape: tuple[int, int, int]) -> None:
    if reason := KERNELS[name].missing():
        pytest.skip(reason)
    (tokens, width, out), fmt = shape, QFormat.parse(text)
    q = nearest(torch.randn(out, width), fmt)
    assert KERNELS[name].unfit(q) is None
    x, bias = short(tokens, width), torch.randn(out)
    rounded = x
    if KERNELS[name].rounds:
        kind = "fp8_e4m3" if name == "fp8" else "int8"
        rounded = Grid.fit(x, QFormat.parse(f"{kind}:token:dynamic")).round(x)
    wanted = rounded.double() @ q.dequantize(torch.float64).t() + bias
    found = serve(name, KERNELS[name].prepare(q), x, bias)
    assert found.shape == (tokens, out) and found.dtype == x.dtype
    assert error(found, wanted) < (IN_FLIGHT if name == "fp8" else CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "text"), [(k, f[0]) for k, f in WEIGHTS.items()])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_sixteen_bit_programs(name: str, text: str, tokens: int, dtype: torch.dtype) -> None:
    if reason := KERNELS[name].missing():
        pytest.skip(reason)
    q = nearest(torch.randn(40, 96), QFormat.parse(text))
    x = torch.randn(2, tokens, 96).to(dtype)
    found = serve(name, KERNELS[name].prepare(q), x, None)
    assert found.shape == (2, tokens, 40) and found.dtype == dtype
    if tokens:
        wanted = x.double() @ q.dequantize(torch.float64).t()
        assert error(found, wanted) < (6e-2 if name == "fp8" else 2e-2)  # the activations' rounding


def test_zero_points_between_two_numbers() -> None:
    """HQQ's: 4-bit weights with 16-bit activations take them; integer products refuse them."""
    fmt = QFormat.parse("int4:group32:asym")
    grid = Grid.fit(torch.randn(24, 96), fmt)
    grid = Grid(fmt, grid.scale, grid.zero.float() + 0.37)
    q = grid.quantize(torch.randn(24, 96))
    wanted = (x := short(3, 96)).double() @ q.dequantize(torch.float64).t()
    found = serve("w4a16", KERNELS["w4a16"].prepare(q), x, None)
    assert error(found, wanted) < 5e-3
    assert "takes whole zero points" in KERNELS["w4a8"].unfit(q)


@pytest.mark.parametrize(("name", "text"), CASES, ids=lambda v: str(v).replace(":", "-"))
def test_weights_of_zero_give_zero(name: str, text: str) -> None:
    """Exactly, also where codes are numbers with something added that is taken off behind."""
    weight = torch.randn(20, 256)
    weight[3] = 0
    q = nearest(weight, QFormat.parse(text))
    for tokens in (1, 3):
        found = serve(name, KERNELS[name].prepare(q), short(tokens, 256) * 100, None)
        assert not found[:, 3].any() or q.dequantize()[3].any()


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_a_static_scale(name: str) -> None:
    if reason := KERNELS[name].missing():
        pytest.skip(reason)
    kind = "fp8_e4m3" if name == "fp8" else "int8"
    q = nearest(torch.randn(20, 100), QFormat.parse(f"{kind}:channel"))
    x, s = short(4, 100), torch.tensor(0.02)
    wanted = (
        Grid(QFormat.parse(f"{kind}:tensor"), s).round(x).double() @ q.dequantize().double().t()
    )
    found = serve(name, KERNELS[name].prepare(q), x, None, s)
    assert error(found, wanted) < (IN_FLIGHT if name == "fp8" else CLOSE)


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_integer_sums_are_exact(name: str) -> None:
    """All weights and activations at the end of their range: nothing saturates or overflows."""
    fmt = QFormat.parse("int8:channel" if name == "w8a8" else "int4:group128")
    q = nearest(torch.full((16, 4096), 0.5), fmt)
    x = torch.full((2, 4096), 127.0)
    found = serve(name, KERNELS[name].prepare(q), x, None)
    torch.testing.assert_close(found.cpu(), x @ q.dequantize().t(), rtol=1e-6, atol=0)


def config_cases() -> list[tuple[str, Config]]:
    """Every way of dividing the work that the tuner may choose."""
    made = [
        (name, replace(c, stages=c.stages if c.apart else 1, warps=min(c.warps, 4)))
        for name in ("w4a16", "w8a16", "w4a8")
        for tokens in (1, 9, 50, 300)
        for c in decoded.candidates(tokens, lifts=name == "w4a16", blocks=16)
    ]
    return list(dict.fromkeys(made))


def formats(name: str, config: Config) -> list[str]:
    if name == "w8a16":
        return ["int8:channel"]
    return (
        ["int4:group64", "uint4:group64:asym", "int4:channel"] if config.late else ["int4:group64"]
    )


@pytest.mark.parametrize(
    ("name", "config", "fmt"),
    [(name, config, fmt) for name, config in config_cases() for fmt in formats(name, config)],
    ids=str,
)
def test_every_tile_size(name: str, config: Config, fmt: str) -> None:
    """Sums in parts, tiles larger than the matrix, rows that end inside a tile."""
    q = nearest(torch.randn(150, 700), QFormat.parse(fmt))
    weight = KERNELS[name].prepare(q)
    t = {k: v.to(device()) for k, v in weight.tensors.items()}
    x, bias = short(1 if config.tokens == 8 else 3, 700), torch.randn(150)
    wanted = x.double() @ q.dequantize(torch.float64).t() + bias
    given, scales = x.to(device(), torch.bfloat16), None
    if name == "w4a8":
        given, scales = OPS.round_rows(x.to(device()), None, False)
        wanted = (given.cpu()[:, :700] * scales.cpu()).double() @ q.dequantize(torch.float64).t()
        wanted += bias
    sides = (t["scale"], t.get("zero"), bias.to(device()), weight.group, 150, weight.kind)
    y = decoded.launch(config, t["units"], given, scales, *sides, x.dtype)
    assert error(y, wanted) < CLOSE


FEW = [
    (name, config)
    for name in ("w4a16", "w8a16", "w4a8")
    for tokens in (1, 16)
    for config in decoded.candidates(tokens, lifts=name == "w4a16", blocks=16)
    if config.apart
]


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("name", "config"), list(dict.fromkeys(FEW)), ids=str)
def test_rows_of_many_blocks(name: str, config: Config, tokens: int) -> None:
    """As a layer has them: blocks for all warps twice over, groups of two planes."""
    fmt = QFormat.parse("int8:channel" if name == "w8a16" else "int4:group128")
    q = nearest(torch.randn(33, 4096), fmt)
    weight = KERNELS[name].prepare(q)
    t = {k: v.to(device()) for k, v in weight.tensors.items()}
    x = short(tokens, 4096).bfloat16()
    given, scales, wanted = x.to(device()), None, x.double()
    if name == "w4a8":
        given, scales = OPS.round_rows(given, None, False)
        wanted = given.cpu().double() * scales.cpu()
    sides = (t["scale"], None, None, weight.group, 33, weight.kind)
    y = decoded.launch(config, t["units"], given, scales, *sides, torch.float32)
    assert error(y, wanted @ q.dequantize(torch.float64).t()) < CLOSE


PRODUCTS = {
    "pointers": Config(64, 64, 64),
    "descriptors": Config(64, 64, 64, descriptors=True),
    "apart": Config(16, 8, 128, warps=4, stages=1, apart=True),
    "two ahead": Config(16, 8, 128, warps=2, stages=2, apart=True),
    "whole": Config(16, 8, 128, warps=2, stages=1, apart=True, whole=True),
}


FORMS = [("int8", form) for form in PRODUCTS]
FORMS += [("fp8_e4m3", form) for form, config in PRODUCTS.items() if not config.apart]


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_products_of_codes(kind: str, form: str, tokens: int) -> None:
    config = PRODUCTS[form]
    if reason := KERNELS["fp8" if kind != "int8" else "w8a8"].missing():
        pytest.skip(reason)
    if config.descriptors and device().type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need a GPU of compute capability 9.0")
    fp8 = kind != "int8"
    q = nearest(torch.randn(140, 300), QFormat.parse(f"{kind}:channel"))
    weight = KERNELS["fp8" if fp8 else "w8a8"].prepare(q).tensors
    codes, scales = OPS.round_rows((x := short(tokens, 300)).to(device()), None, fp8)
    wanted = Grid.fit(x, QFormat.parse(f"{kind}:token:dynamic")).round(x).double()
    wanted = wanted @ q.dequantize(torch.float64).t()
    view = torch.float8_e4m3fn if fp8 else torch.int8
    codes, w = codes.view(view), weight["weight"].to(device()).view(view)
    scale = weight["scale"].to(device())
    y = scaled.launch(config, w, codes, scales, scale, None, 140, torch.float32)
    assert error(y, wanted) < (IN_FLIGHT if fp8 else CLOSE)
    if not fp8:  # sums are exact, so that no form is off another, and each number is rounded once
        sums = (codes.cpu().double() @ w.cpu().double().t())[:, :140].float()
        exact = sums * scales.cpu() * weight["scale"][:140]
        assert torch.equal(y.cpu(), exact)


def test_a_tile_that_is_wrong_is_not_used() -> None:
    right, wrong, half = torch.randn(40, 30), torch.randn(40, 30), torch.randn(40, 30)
    half[20:] = math.nan
    assert agree(right * 1.001, right)
    long = torch.ones(AT_ONCE + 5)
    assert agree(long, long.clone())
    assert not agree(torch.cat([long[:-1], torch.tensor([math.nan])]), long)
    assert not agree(wrong, right)
    assert not agree(half, right)
    assert agree(half * 1.001, half)  # where the first has none, nothing is known
    sums = torch.randn(40, 1)
    sums[3] = 1e-9  # of one column, one that cancels: another order of it leaves other digits
    assert agree(sums + 1e-7, sums)
    assert not agree(torch.where(torch.arange(40)[:, None] == 7, wrong, right), right)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("width", [1, 100, 256, 1000])
def test_codes_are_those_of_the_reference(kind: str, width: int) -> None:
    x = torch.randn(6, width) * torch.tensor([1e-30, 1.0, 0.0, 300.0, 1e30, -1.0])[:, None]
    x[1] = torch.arange(width) / 2 - 3  # halves: ties between two codes
    x[:, 1:2] = -0.0
    grid = Grid.fit(x, QFormat.parse(f"{kind}:token:dynamic"))
    codes, scales = OPS.round_rows(x.to(device()), None, kind != "int8")
    assert torch.equal(codes[:, :width].cpu().int(), grid.codes(x).int())
    assert torch.equal(scales.cpu(), grid.scale)
    assert codes.shape[1] % layout.INNER == 0 and not codes[:, width:].any()


def e4m3() -> Tensor:
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_quotients_beside_ties(kind: str, given: bool) -> None:
    """Ties of random scales and their neighbours, where the quotient's last bit decides."""
    numbers = torch.arange(128).float() if kind == "int8" else e4m3()
    exponents = torch.zeros(1, 1).int() if given else torch.randint(-116, 110, (400, 1))
    largest = torch.ldexp(torch.rand(exponents.shape).add(1), exponents)
    s = largest / numbers[-1]
    ties = (numbers[1:] + numbers[:-1]) / 2 * s
    near = [ties, ties.nextafter(0 * ties), ties.nextafter(2 * ties)]
    x = torch.cat([*near, -near[1], largest], 1)
    if given:
        x = torch.cat([x, 3 * x, 1e30 * x, -1e30 * x], 1)
    grid = Grid(QFormat.parse(f"{kind}:token:dynamic"), s)
    scale = s.reshape(1).to(device()) if given else None
    codes, _ = OPS.round_rows(x.to(device()), scale, kind != "int8")
    assert torch.equal(codes[:, : x.shape[1]].cpu().int(), grid.codes(x).int())


def test_e4m3_by_integers_is_torch_s() -> None:
    """Every number of e4m3, those half way between two, and their neighbours."""
    values = e4m3()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middle, middle.nextafter(values[1:]), middle.nextafter(values[:-1])])
    x = torch.cat([x, -x])[None]
    codes, _ = OPS.round_rows(x.to(device()), torch.ones(1, device=device()), True)
    assert torch.equal(codes[0, : x.shape[1]].cpu(), x[0].to(torch.float8_e4m3fn).view(torch.uint8))


TURNED = [12, 16, 40, 160, 256, 320, 512, 704, 1024, 2048, 3072, 9728, 14336]


@pytest.mark.parametrize("n", TURNED)
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard(n: int, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, n).to(dtype)
    right = factor(n)
    assert not isinstance(right, str)
    codes, scales = OPS.turn_rows(x.to(device()), right.to(device()), None, kind != "int8")
    y = x.double() @ hadamard(n).t() / math.sqrt(n)
    grid = Grid.fit(y, QFormat.parse(f"{kind}:token:dynamic"))
    numbers = grid.decode(
        codes[:, :n].cpu().int() if kind == "int8" else codes[:, :n].cpu(), torch.float64
    )
    assert relative_error(grid.scale, scales.cpu()) < 1e-4
    # A code may fall to the other side of a tie, a step away.
    assert error(numbers, grid.round(y)) < 5e-3
    assert not codes[:, n:].any()


@pytest.mark.parametrize("n", [320, 1024, 4096, 14336, 28672])
def test_hadamard_row_after_row(n: int) -> None:
    """More rows than programs that fit the device: each is what it is alone, but for ties."""
    right = factor(n).to(device())
    x = short(70 + 4 * processors(device()), n).to(device(), torch.bfloat16)
    together, scales = OPS.turn_rows(x, right, None, False)
    for i in (0, 1, len(x) - 2, len(x) - 1):
        alone, scale = OPS.turn_rows(x[i : i + 1], right, None, False)
        assert relative_error(scale[0], scales[i]) < 1e-4
        off = (alone[0].int() - together[i].int()).abs()
        assert off.max() <= 1
        assert off.float().mean() < 1e-2


@pytest.mark.parametrize("n", [40, 1024, 2048])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_hadamard_with_one_scale(n: int, kind: str) -> None:
    """Numbers beyond the largest code become it."""
    x, scale = torch.randn(3, n), torch.tensor([1e-2 if kind == "int8" else 3e-3])
    right = factor(n).to(device())
    codes, scales = OPS.turn_rows(x.to(device()), right, scale.to(device()), kind != "int8")
    codes = codes[:, :n].cpu()
    assert (codes == (127 if kind == "int8" else 126)).any()
    grid = Grid(QFormat.parse(f"{kind}:token:dynamic"), scale.expand(3, 1))
    numbers = grid.decode(codes.int() if kind == "int8" else codes, torch.float64)
    assert error(numbers, grid.round(x.double() @ hadamard(n).t() / math.sqrt(n))) < 5e-3
    assert torch.equal(scales.cpu(), scale.expand(3, 1))


def test_sizes_without_a_transform_say_so() -> None:
    assert "no Hadamard matrix" in str(factor(92))
    assert "factors" in str(factor(2**17))


# --- attention ------------------------------------------------------------------------------------

CACHES = list(
    product(["int8", "fp8_e4m3"], ["token", "channel"], ["token", "channel"], [False, True])
)


def attended(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Softmax in float64 on the numbers of a cache."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhd,bhtd->bht", q.double(), k) / math.sqrt(q.shape[-1])
    hidden = torch.arange(k.shape[2]) >= lengths[:, None, None]
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bht,bhtd->bhd", p, v)


@pytest.mark.parametrize(("kind", "k_by", "v_by", "turned"), CACHES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 16), (3, 6, 1, 129, 40)], ids=str)
def test_attention(
    kind: str, k_by: str, v_by: str, turned: bool, shape: tuple[int, int, int, int, int]
) -> None:
    sequences, queries, heads, capacity, d = shape
    q = short(sequences, queries, d)
    lengths = torch.tensor([capacity, 3, 0][:sequences], dtype=torch.int32)
    codes, scales, numbers = [], [], []
    for by in (k_by, v_by):
        x = torch.randn(sequences, heads, capacity, d) * torch.rand(d) * 3
        fmt = QFormat.parse(f"{kind}:channel" if by == "token" else f"{kind}:block*x1")
        grid = Grid.fit(x, fmt)
        held = grid.codes(x)
        codes.append(held.to(torch.int8 if kind == "int8" else torch.uint8))
        scales.append(grid.scale)
        numbers.append(grid.decode(held, torch.float64))
    angles = torch.rand(capacity, d // 2).repeat(1, 2) * 6
    tables = (angles.cos(), angles.sin()) if turned else (None, None)
    k, v = numbers
    if turned:
        k = rope(k, tables[0].double(), tables[1].double())
    wanted = attended(q, k, v, lengths)
    given = (q, codes[0], codes[1], scales[0], scales[1], lengths, *tables)
    given = [None if t is None else t.to(device()) for t in given]
    found = OPS.decode_attention(*given)
    assert error(found, wanted) < (1e-2 if turned else 5e-3)  # p, and turned keys, in 16 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_attention_in_any_pieces(kind: str, dtype: torch.dtype) -> None:
    """Every way of dividing the work that the tuner may choose, and pieces without a token."""
    x, lengths = torch.randn(2, 1, 2, 300, 32), torch.tensor([300], dtype=torch.int32)
    grids = [Grid.fit(t, QFormat.parse(f"{kind}:channel")) for t in x]
    codes = [
        grid.codes(t).to(torch.int8 if kind == "int8" else torch.uint8)
        for grid, t in zip(grids, x, strict=True)
    ]
    q = torch.randn(1, 10, 32).to(dtype)
    numbers = (grid.decode(c, torch.float64) for grid, c in zip(grids, codes, strict=True))
    wanted = attended(q, *numbers, lengths)
    made = attention.candidates(codes[0])
    given = (q, *codes, *(grid.scale for grid in grids), lengths)
    given = [t.to(device()) for t in given]
    for config in [*made, *(replace(c, split=7) for c in made)]:
        assert error(attention.launch(config, *given, None, None), wanted) < 5e-3


@pytest.mark.parametrize("masked", ["bool", "float", "bfloat16", "nothing seen", "all lowest"])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_attention_behind_a_mask_and_over_room(kind: str, masked: str) -> None:
    """Keys that lie in memory with room behind them; a mask of each sequence and head, or one for
    all; whole pieces that are hidden."""
    sequences, queries, heads, capacity, d = 3, 6, 2, 200, 32
    numbers, codes, scales = [], [], []
    for _ in "kv":
        x = torch.randn(sequences, heads, 256, d)[:, :, :capacity]
        grid = Grid.fit(x, QFormat.parse(f"{kind}:channel"))
        held = torch.zeros(sequences, heads, 256, d, dtype=torch.int8)
        held = held if kind == "int8" else held.view(torch.uint8)
        held[:, :, :capacity] = grid.codes(x).to(held.dtype)
        side = torch.ones(sequences, heads, 300, 1)
        side[:, :, :capacity] = grid.scale
        numbers.append(grid.decode(grid.codes(x), torch.float64))
        codes.append(held.to(device())[:, :, :capacity])
        scales.append(side.to(device())[:, :, :capacity])
    q = short(sequences, queries, d)
    k, v = (t.repeat_interleave(queries // heads, 1) for t in numbers)
    scores = torch.einsum("bhd,bhtd->bht", q.double(), k) * 0.3
    own = masked in ("float", "bfloat16")
    seen = torch.rand(sequences, queries if own else 1, capacity) > 0.4
    seen[0, :, 64:] = False
    if masked == "nothing seen":
        seen[1] = False
    if own:
        mask = torch.randn(seen.shape).masked_fill(~seen, -torch.inf)
        dtype = torch.bfloat16 if masked == "bfloat16" else torch.float32
        mask = mask.to(dtype)
        mask[2] = mask[2].masked_fill(mask[2] > 2, torch.finfo(dtype).max)
        scores = (scores + mask).float().double()
    elif masked == "all lowest":  # as some models hide what is padded
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask[1] = torch.finfo(torch.float32).min
        scores = scores.float().add(mask).double()
    else:
        mask, scores = seen, scores.masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    wanted = torch.einsum("bht,bhtd->bhd", p, v)
    mask = mask.to(device()).expand(-1, queries, -1)
    given = (q.to(device()), *codes, *scales, None, None, None, mask, 0.3)
    assert error(OPS.decode_attention(*given), wanted) < 5e-3
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    for config in attention.candidates(codes[0]):
        parts = replace(config, split=7)
        assert error(attention.launch(parts, *given[:8], mask, 0.3), wanted) < 5e-3


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "unit"), [(4, 16), (8, 16), (4, 8)])
@pytest.mark.parametrize("shape", [(1, 1), (20, 100), (129, 257), (128, 256)], ids=str)
def test_units_come_back(bits: int, unit: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.int32)
    units = layout.pack_units(codes, 32, bits, unit)
    assert units.shape[1] % layout.ROWS == 0 and units.shape[2] == 32
    assert torch.equal(layout.unpack_units(units, *shape, bits), codes)


def test_the_picture_of_the_layout_is_right() -> None:
    codes = torch.arange(256)[None] // 64  # the plane of each input
    unit = layout.pack_units(codes, 64, 4, 16)[0, 0, 5].item()
    assert [(unit >> 4 * j) & 15 for j in range(4)] == [0, 1, 2, 3]


# --- whole programs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "kernel", "allowed"),
    [("w8a8-dynamic", "w8a8", 1e-5), ("w4a16", "w4a16", 2e-2), ("w4a8-rotated", "w4a8", 2e-2)],
)
def test_a_llama_is_the_reference(recipe: str, kernel: str, allowed: float) -> None:
    module, example = zoo.build("llama")
    compiled = qcompiler.compile(
        module, example, recipe=recipe, backend=TritonBackend().only(kernel)
    )
    assert not compiled.notes and compiled.kernels
    assert {why.split(",")[0] for why in compiled.kernels.values()} == {kernel}
    inputs = random_inputs(compiled.program.io, 3)
    wanted, found = compiled.program.flat(inputs), compiled.artifact.run(inputs)
    assert relative_error(wanted, found) < allowed
    if recipe == "w4a8-rotated":
        targets = [n.target for n in compiled.artifact.program.graph.nodes]
        assert OPS.turn_rows.default in targets, "the online Hadamard is not fused"


def test_llama_goes_on_from_its_cache() -> None:
    """Word for word it finds what it finds at once; what it carries stays on the device."""
    module, example = zoo.build("llama")
    compiled = qcompiler.compile(module, example, recipe="w4a16", backend="triton", cache=True)
    assert not compiled.notes
    ids = example[0] if isinstance(example, tuple) else example["input_ids"]
    ids = ids[:1, :6]
    whole, past = compiled(input_ids=ids).logits, None
    for i in range(6):
        found = compiled(input_ids=ids[:, i : i + 1], past_key_values=past)
        before, past = past, found.past_key_values
        assert error(found.logits[:, 0], whole[:, i].double()) < CLOSE
        assert before is None or past[0][0].data_ptr() == before[0][0].data_ptr()
    assert found.logits.device.type == "cpu" and past[0][0].device.type == device().type
    written = compiled.generate(ids, count=3)
    assert torch.equal(compiled.generate(ids.to(device()), count=3).cpu(), written)


def test_codes_of_another_artifact_are_numbers() -> None:
    x = torch.randn(1, 2, 6, 32, device=device())
    empty = x[:, :, :0]
    short_, long = (cache.append_rows(empty, x, 2, fp8) for fp8 in (False, True))
    past = cache.append_rows(short_, x[:, :, :1], 2, True)
    assert not isinstance(past, Coded) and past.shape[2] == 7
    assert torch.equal(past[:, :, :6], numbers(short_))
    q = torch.randn(1, 4, 1, 32, device=device())
    found = cache.attend(q, long, short_, None, 0.2, False)
    k, v = (numbers(t).repeat_interleave(2, 1) for t in (long, short_))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
    assert error(found, wanted.double()) < 1e-5


def test_heads_of_keys_may_lie_anyhow() -> None:
    """One head, whose step in memory may be any number."""
    x = torch.randn(2, 37, 1, 16, device=device()).transpose(1, 2)
    codes = (x * 30).round().clamp(-127, 127).to(torch.int8)
    codes = codes.transpose(1, 2).contiguous().transpose(1, 2)
    scales = torch.full((2, 1, 37, 1), 1 / 30, device=device())
    q = torch.randn(2, 4, 16, device=device())
    k = (codes.double() / 30).cpu()
    wanted = attended(q.cpu(), k, k, torch.tensor([37, 37]))
    found = OPS.decode_attention(q, codes, codes, scales, scales, None, None, None)
    assert error(found, wanted) < 5e-3


@pytest.mark.parametrize("format", ["int8", "fp8_e4m3"])
def test_a_llama_keeps_its_cache_in_8_bits(format: str, tmp_path: Path) -> None:
    """Codes are carried, grow in place and are read by attention."""
    module, example = zoo.build("llama")
    passes = f"canonicalize,round_cache{{format={format}:token:dynamic}}"
    ids = (example[0] if isinstance(example, tuple) else example["input_ids"])[:2, :8]
    compiled = qcompiler.compile(module, example, passes=passes, backend="triton", cache=True)
    targets = [n.target for n in compiled.artifact.program.graph.nodes]
    assert targets.count(cache.APPEND_ROWS) == 2 * targets.count(cache.ATTEND) > 0
    past, own, places = None, None, set()
    for first, end in ((0, 3), (3, 4), (4, 5), (5, ids.shape[1])):
        found = compiled(ids[:, first:end], past_key_values=past)
        wanted = compiled.program(ids[:, first:end], past_key_values=own)
        past, own = found.past_key_values, wanted.past_key_values
        # Probabilities have 16 bits.
        assert error(found.logits, wanted.logits.double()) < 5e-3
        assert all(isinstance(t, Coded) and t.codes.device.type == device().type for t in past[0])
        assert error(numbers(past[0][0]), own[0][0].double()) < CLOSE
        places.add(past[0][0].codes.data_ptr())
    assert len(places) == 1
    again = qcompiler.load(compiled.save(tmp_path / "out"))
    assert torch.equal(again.generate(ids, count=3), compiled.generate(ids, count=3))


def test_caches_that_are_not_kept_as_codes_say_why() -> None:
    module, example = zoo.build("llama")
    for passes, reason in (
        ("canonicalize", "takes what is rounded by rows as it is appended"),
        ("canonicalize,round_cache{format=int4:token:dynamic}", "found int4:token:dynamic"),
    ):
        compiled = qcompiler.compile(module, example, passes=passes, backend="triton", cache=True)
        assert reason in " ".join(compiled.refused.values())
        found = compiled(*example) if isinstance(example, tuple) else compiled(**example)
        assert not isinstance(found.past_key_values[0][0], Coded)


def test_an_artifact_saves_and_loads(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
    passes = "canonicalize{optional=true},assign{weight=int4:group32 head=same},quantize"
    compiled = qcompiler.compile(model, x := torch.randn(3, 64), passes=passes, backend="triton")
    again = qcompiler.load(compiled.save(tmp_path / "out"))
    assert again.backend.name == "triton" and again.kernels == compiled.kernels
    torch.testing.assert_close(again(x), compiled(x), rtol=0, atol=0)


def test_scales_in_a_wrong_layout_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups in the wrong order: every site goes back to the reference, and says why."""
    right = layout.pack_scales
    monkeypatch.setattr(layout, "pack_scales", lambda *a: right(*a).flip(0).contiguous())
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU())
    passes = "canonicalize{optional=true},assign{weight=int4:group32 head=same},quantize"
    model[0].weight.data[:, :64] *= 5
    backend = TritonBackend().only("w4a16")
    compiled = qcompiler.compile(model, torch.randn(3, 128), passes=passes, backend=backend)
    assert not compiled.kernels
    assert "its kernel is off the reference here" in compiled.refused["0/linear#0"]


def test_a_refusal_says_what_is_taken() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    passes = "canonicalize{optional=true},assign{weight=int4:group24 head=same},quantize"
    compiled = qcompiler.compile(model, torch.randn(3, 64), passes=passes, backend="triton")
    assert "float; w4a16: takes rows, or groups in 16s" in compiled.kernels["0/linear#0"]


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(layout, "pack_units", full)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
    passes = "canonicalize{optional=true},assign{weight=int4:group32 head=same},quantize"
    with pytest.raises(
        qcompiler.BackendError, match=r"0/linear#0 for w4a16 wants some 49,152 bytes"
    ):
        qcompiler.compile(model, torch.randn(3, 64), passes=passes, backend="triton")


@pytest.mark.skipif(device().type != "cuda", reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays() -> None:
    # So wide that kernels start early, one of them right behind the copy of the input.
    model = torch.nn.Sequential(torch.nn.Linear(512, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
    passes = "canonicalize{optional=true},assign{weight=int4:group32 head=same},quantize"
    backend = TritonBackend().only("w4a16")
    compiled = qcompiler.compile(model, x := torch.randn(3, 512), passes=passes, backend=backend)
    replay = compiled.artifact.capture_graph((x,))
    for _ in range(2):
        x = torch.randn(3, 512)
        torch.testing.assert_close(replay((x,))[0].cpu(), compiled(x))
    with pytest.raises(qcompiler.BadInput, match="was captured with"):
        replay((torch.randn(4, 512),))
