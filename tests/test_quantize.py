"""What `quantize` rounds and how: attention, static ranges, channels, CrossQuant, biases, notes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompiler
from qcompiler import BadInput, Program, QFormat, capture
from qcompiler.attention import attentions, spell_out
from qcompiler.edit import Edit
from qcompiler.facts import measure
from qcompiler.fisher import fisher
from qcompiler.formats import Grid
from qcompiler.observers import Gram, Histogram, Range, Sample, Statistic
from qcompiler.pipeline import run_pipeline
from qcompiler.ranges import RANGES
from qcompiler.registry import make_passes
from qcompiler.run import evaluate
from qcompiler.samples import Flat
from qcompiler.stored import bits_per_weight

from .zoo import build


def run(program: Program, passes: str, data: list[Flat] | None = None) -> Program:
    feed = None if data is None else lambda: data
    return run_pipeline(program, make_passes(passes), data=feed)


@pytest.fixture(scope="module")
def llama() -> Program:
    model, example = build("llama")
    return run(capture(model, example), "canonicalize")


# --- attention -----------------------------------------------------------------------------------


def test_keys_are_rounded_before_their_rotary_embedding(llama: Program) -> None:
    """At the output of k_proj, one scale for each of its channels; values where they are read."""
    found = run(
        llama, "assign{weight=float key=int4:channel value=int4:token:asym:dynamic},quantize"
    )
    rounded = [n for n in found.nodes if "fake_quantize" in str(n.target)]
    assert len(rounded) == 4
    keys = [n for n in rounded if n.args[0].target is torch.ops.aten.linear.default]  # type: ignore[union-attr]
    assert [n.args[1] for n in keys] == ["int4:block*x*x1"] * 2
    assert found.params["model.layers.0.self_attn.key_scale"].shape == (1, 1, 24)
    assert {str(s) for s in found.plan.values()} == {
        "key=int4:block*x*x1 value=int4:token:asym:dynamic"
    }
    again = run(llama, "assign{weight=float key=int8:channel value=int8:token:dynamic},quantize")
    assert found.history[-1].metrics["error"] > 4 * again.history[-1].metrics["error"] > 0


def test_attention_needs_attention() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(BadInput, match="no attention whose key"):
        run(program, "assign{key=int4:channel}")


class Attend(nn.Module):
    """One attention with the mask of a case."""

    def __init__(
        self, mask: Tensor | None, causal: bool, grouped: bool, scale: float | None
    ) -> None:
        super().__init__()
        self.mask, self.causal, self.grouped, self.scale = mask, causal, grouped, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )


SEEN = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.3
BLIND = SEEN & (torch.arange(5) != 2)[:, None]


@pytest.mark.parametrize(
    ("mask", "causal", "grouped", "scale"),
    [
        (None, False, False, None),
        (None, True, False, 0.3),
        (SEEN, False, False, None),
        (BLIND, False, True, None),
        (torch.randn(5, 7), False, True, 0.5),
        (torch.where(SEEN, 0.0, -torch.inf), False, False, None),
    ],
)
def test_attention_spelled_out(
    mask: Tensor | None, causal: bool, grouped: bool, scale: float | None
) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2 if grouped else 4, 7, 8), None
    v = torch.randn_like(k)
    program = capture(Attend(mask, causal, grouped, scale), (q, k, v))
    edit = Edit(program, "test")
    edit.spend("spelled out")
    (found,) = attentions(edit.nodes)
    spell_out(edit, found)
    after = edit.seal()[0]
    assert not attentions(after.nodes)
    wanted, got = evaluate(program, (q, k, v))[0], evaluate(after, (q, k, v))[0]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_probabilities_are_rounded(llama: Program) -> None:
    found = run(llama, "assign{weight=float probabilities=log4:tensor:dynamic},quantize{budget=2}")
    fine = run(llama, "assign{weight=float probabilities=uint8:tensor:dynamic},quantize")
    assert not attentions(found.nodes)
    assert 0 < fine.history[-1].metrics["error"] < found.history[-1].metrics["error"]


@pytest.mark.parametrize("text", ["int4:group8:asym:scale(fp16)", "nvfp4", "codebook3:channel"])
def test_bits_per_weight_are_those_of_the_format(text: str) -> None:
    program = capture(nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40)), (torch.randn(2, 40),))
    found = run(program, f"assign{{weight={text} head=same}},quantize")
    fmt = QFormat.parse(text)
    wanted = (fmt.bytes((24, 40)) + fmt.bytes((40, 24))) * 8 / (2 * 24 * 40)
    assert bits_per_weight(found) == pytest.approx(wanted)
    assert bits_per_weight(program) is None


# --- static ranges -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outlier() -> Histogram:
    """A normal distribution with one number in 100,000 thirty times as large."""
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    x[5] = 100.0
    return Histogram.of(x)


def test_a_histogram_merges_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 3, generator=generator) * torch.logspace(-6, 6, 1000)[:, None]
    halves = Histogram.of(x[:300]).merge(Histogram.of(x[300:]))
    assert torch.equal(halves.bins, Histogram.of(x).bins) and halves.count == 1000
    values, counts = halves.values()
    assert int(counts.sum()) == 3000 and bool((values.diff() > 0).all())
    assert float(values.max()) == pytest.approx(float(x.max()), rel=0.02)
    assert float(values.min()) == pytest.approx(float(x.min()), rel=0.02)
    off = float((values * counts).sum()) - float(x.double().sum())
    assert abs(off) < 0.02 * float(x.double().abs().sum())


@pytest.mark.parametrize("name", RANGES)
def test_ranges_leave_a_lone_outlier_out(name: str, outlier: Histogram) -> None:
    _, high = RANGES[name](outlier, QFormat.parse("int4:tensor"))
    assert 1.5 < high < 20
    whole = Histogram.of(torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)))
    _, high = RANGES[name](whole, QFormat.parse("int8:tensor"))
    assert 0.95 < high < 1.02  # nothing is cut off where there is nothing to gain


def test_mse_is_the_best_of_all_ranges(outlier: Histogram) -> None:
    fmt = QFormat.parse("int4:tensor")
    values, counts = outlier.values()

    def loss(top: float) -> float:
        rounded = Grid.cover(torch.tensor(-top), torch.tensor(top), fmt).round(values)
        return float(((rounded - values).pow(2) * counts).sum())

    _, high = RANGES["mse"](outlier, fmt)
    assert loss(high) <= 1.05 * min(loss(top) for top in torch.linspace(1, 100, 400).tolist())


@pytest.mark.parametrize("kind", [Range, Gram, Sample, Histogram])
def test_statistics_merge_and_come_back(kind: type[Statistic]) -> None:
    x = torch.randn(90, 5)
    whole = kind.of(x)
    parts = kind.of(x[:20]).merge(kind.of(x[20:25])).merge(kind.of(x[25:]))
    back = kind.restore(parts.state())
    assert back.count == 90
    for name, value in whole.state().items():
        if kind is not Sample:
            torch.testing.assert_close(back.state()[name], value, atol=1e-5, rtol=1e-5)
        assert torch.equal(back.state()[name], parts.state()[name])


# --- activations ---------------------------------------------------------------------------------


class Uneven(nn.Module):
    """A linear whose inputs differ a thousandfold in size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("size", torch.logspace(-2, 1, 16))
        self.linear = nn.Linear(16, 8)
        self.linear.weight.data /= self.size

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.size)


@pytest.fixture(scope="module")
def uneven() -> tuple[Program, list[Flat]]:
    generator = torch.Generator().manual_seed(0)
    data: list[Flat] = [(torch.randn(3, 9, 16, generator=generator),) for _ in range(4)]
    return capture(Uneven(), data[0]), data


def test_channels_and_crosses_pay_where_channels_differ(
    uneven: tuple[Program, list[Flat]],
) -> None:
    program, data = uneven
    errors = {
        name: run(program, "assign{weight=float head=same " + passes, data)
        .history[-1]
        .metrics["error"]
        for name, passes in {
            "tensor": "activation=int8:tensor},quantize{budget=9}",
            "channel": "activation=int8:channel},quantize",
            "token": "activation=int8:token:dynamic},quantize{budget=9}",
            "cross": "activation=int8:token:dynamic},quantize{cross=0.15 budget=9}",
        }.items()
    }
    assert errors["channel"] < errors["tensor"] / 3
    assert errors["cross"] < errors["token"] / 4


def test_the_equation_of_crossquant(uneven: tuple[Program, list[Flat]]) -> None:
    """s_ij = max|x_i|^α max|X_j|^(1-α) / 127, with the channels' maxima over all data."""
    program, data = uneven
    text = "assign{weight=float head=same activation=int8:token:dynamic},quantize{cross=0.15}"
    found = run(program, text, data)
    size, x = program.params["size"], data[0][0]
    assert isinstance(x, Tensor)
    x = x * size
    columns = torch.cat([b[0] for b in data]).abs().flatten(0, 1).amax(0) * size  # type: ignore[arg-type]
    scale = x.abs().amax(-1, keepdim=True) ** 0.15 * columns**0.85 / 127
    rounded = (x / scale).round().clamp(-127, 127) * scale
    weight, bias = program.params["linear.weight"], program.params["linear.bias"]
    wanted = functional.linear(rounded, weight, bias)
    torch.testing.assert_close(found.flat(data[0])[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_token_format_is_dynamic(uneven: tuple[Program, list[Flat]]) -> None:
    with pytest.raises(BadInput, match="one scale per tensor or per channel"):
        run(uneven[0], "assign{weight=float head=same activation=int8:group4},quantize", uneven[1])


@pytest.mark.parametrize("option", ["ranges=mean", "cross=1.5"])
def test_bad_options(option: str, uneven: tuple[Program, list[Flat]]) -> None:
    with pytest.raises(BadInput, match=r"unknown range|exponent from 0 to 1"):
        run(uneven[0], f"assign{{head=same}},quantize{{{option}}}", uneven[1])


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_takes_the_mean_error_off(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1))
    data: list[Flat] = [(torch.rand(8, 4, 9, 9) + 1,) for _ in range(3)]
    program = capture(model, data[0])
    off = []
    for option in ("", "bias_correction=true "):
        found = run(
            program, f"assign{{weight=int2:channel head=same}},quantize{{{option}budget=9}}", data
        )
        error = torch.cat([found.flat(b)[0] - program.flat(b)[0] for b in data])  # type: ignore[operator]
        off.append(float(error.mean((0, 2, 3)).abs().max()))
    assert off[1] < off[0] / 5


def test_fisher_is_that_of_the_jacobian() -> None:
    """A linear map f = W x: E (∂/∂W Σ r f)² = Σ x², the same for each row."""
    program = capture(nn.Linear(6, 3, bias=False), (torch.randn(9, 6),))
    batches: list[Flat] = [(torch.randn(9, 6),) for _ in range(800)]
    found = fisher(program, batches)["linear#0" if "linear#0" in program.by_id else "/linear#0"]
    wanted = sum((b[0].pow(2).sum(0) for b in batches), torch.zeros(6)) / len(batches)  # type: ignore[union-attr]
    torch.testing.assert_close(found, wanted.expand(3, 6), rtol=0.25, atol=0)


def test_nan_in_calibration_names_the_site(uneven: tuple[Program, list[Flat]]) -> None:
    bad: list[Flat] = [(torch.full((2, 5, 16), torch.nan),)]
    with pytest.raises(BadInput, match="NaN or infinite values at the input of linear"):
        measure(uneven[0], bad)
    with pytest.raises(BadInput, match="NaN or infinite values at the input of linear"):
        run(uneven[0], "assign{head=same},quantize{rounding=gptq}", bad)


def test_data_of_zeros_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    made = qcompiler.compile(
        model, torch.randn(4, 8), recipe="w8a8-static", data=[torch.zeros(4, 8)]
    )
    notes = [n for s in made.history for n in s.notes]
    assert any(n.startswith("0/linear#0 read nothing but zeros in all data") for n in notes)


def test_too_little_data_is_told(uneven: tuple[Program, list[Flat]]) -> None:
    """5 vectors for 16 inputs: said with the number that is needed, and rounded all the same."""
    few: list[Flat] = [(torch.randn(1, 5, 16),)]
    found = run(uneven[0], "assign{head=same},quantize{rounding=gptq}", few)
    assert "(5 of 16)" in found.history[-1].notes[0] and "4 times" in found.history[-1].notes[0]
