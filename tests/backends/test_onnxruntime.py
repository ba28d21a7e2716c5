"""Which of ONNX Runtime's kernels serves a linear, and that it computes what the program says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.check import relative_error
from qcompiler.formats import QFormat, Scheme
from qcompiler.registry import get_backend

pytest.importorskip("onnxruntime")
from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime import choose
from qcompiler.backends.onnxruntime.probe import rounds_input

GROUPS = "assign{weight=int4:group32 activation=int8:group32:dynamic head=same},quantize"
WIDE = (512, 256)
"""A weight that is large enough for its kernels to be timed."""


def compiled(passes: str, width: int = 64, out: int = 32) -> qcompiler.Compiled:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.ReLU())
    x = torch.randn(5, width, generator=generator)
    passes = "canonicalize{optional=true}," + passes
    return qcompiler.compile(model, x, passes=passes, backend="onnxruntime", data=[x])


def scheme(weight: str, activation: str | None = None) -> Scheme:
    return Scheme(QFormat.parse(weight), QFormat.parse(activation) if activation else None)


def fix(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Let kernels take these times."""
    spelled = {name.replace("_", " "): value for name, value in seconds.items()}
    monkeypatch.setattr(choose, "_seconds", lambda *rest: spelled)


@pytest.mark.parametrize(
    "weight", ["int4:group32", "int2:group64:asym", "int8:channel", "int3:group32"]
)
def test_rounded_groups_are_multiplied_in_integers(weight: str) -> None:
    group = 64 if "64" in weight else 32
    if not rounds_input(choose.container(QFormat.parse(weight).bits), group):
        pytest.skip("this CPU's kernel rounds otherwise")
    passes = GROUPS.replace("int4:group32", weight).replace("int8:group32", f"int8:group{group}")
    made = compiled(passes)
    assert set(made.kernels.values()) == {names.NBITS_INT8}
    x = torch.randn(7, 64)
    assert relative_error(made.program.flat((x,)), made.artifact.run((x,))) < 1e-5


def test_other_groups_than_the_weights_are_refused_to_that_kernel() -> None:
    made = compiled(
        GROUPS.replace("int8:group32", "int8:group16").replace("int4:group32", "int4:group24")
    )
    assert set(made.artifact.kernels.values()) == {names.DEQUANTIZED}


def test_its_file_reads_back_as_the_program(tmp_path: Path) -> None:
    if not rounds_input(4, 32):
        pytest.skip("this CPU's kernel rounds otherwise")
    made = compiled(GROUPS)
    made.export(tmp_path / "model.onnx", target="onnxruntime")
    again = qcompiler.capture(tmp_path / "model.onnx")
    x = torch.randn(7, 64)
    assert relative_error(made.program.flat((x,)), again.flat((x,))) < 1e-6


def test_four_bits_are_stored_as_such_and_multiplied_as_eight() -> None:
    rows = "assign{weight=int%d:channel activation=int8:token:dynamic head=same},quantize"
    four, eight = (compiled(rows % bits, width=512, out=64) for bits in (4, 8))
    assert set(four.artifact.kernels.values()) == {names.INTEGER}
    assert four.artifact.bytes < 0.6 * eight.artifact.bytes
    x = torch.randn(7, 512)
    assert relative_error(four.program.flat((x,)), four.artifact.run((x,))) < 1e-5


def test_speed_pays_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the memory for √8 times the speed, no less."""
    kernels = [names.NBITS, names.DEQUANTIZED]
    fix(monkeypatch, MatMulNBits=2.7, float_MatMul=1.0)
    assert choose.best(kernels, WIDE, scheme("int4:group32"))[0] == names.NBITS
    fix(monkeypatch, MatMulNBits=2.9, float_MatMul=1.0)
    chosen, words = choose.best(kernels, WIDE, scheme("int4:group32"))
    assert chosen == names.DEQUANTIZED
    assert "2.9 × as fast here as MatMulNBits; 32 bits a weight" in words
    assert choose.best(kernels, (8, 8), scheme("int4:group32")) == (names.NBITS, names.NBITS)


def test_kernels_are_timed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    calls: list[tuple[str, ...]] = []
    measure = choose._measure

    def counted(kernels: tuple[str, ...], *rest: object) -> dict[str, float]:
        calls.append(kernels)
        return measure(kernels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "_measure", counted)
    every: Sequence[tuple[list[str], Scheme]] = [
        ([names.NBITS, names.DEQUANTIZED], scheme("int2:group32")),
        ([names.TWO_NBITS, names.DEQUANTIZED], scheme("int8:channel")),
        ([names.INTEGER, names.NBITS], scheme("int4:channel", "int8:token:dynamic")),
        ([names.QDQ, names.NBITS], scheme("int4:channel", "int8:tensor")),
        ([names.NBITS_INT8, names.NBITS], scheme("int4:group32", "int8:group32:dynamic")),
    ]
    for kernels, asked in every:
        choose._seconds.cache_clear()
        first = choose.best(kernels, WIDE, asked)
        choose._seconds.cache_clear()
        assert choose.best(kernels, WIDE, asked) == first
    assert len(calls) == len(every)


def test_a_program_runs_by_the_kernel_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    fix(monkeypatch, MatMulNBits=9.0, float_MatMul=1.0)
    made = compiled("assign{weight=int4:group32 head=same},quantize", *reversed(WIDE))
    (words,) = made.artifact.kernels.values()
    assert words.startswith(f"{names.DEQUANTIZED}, 9.0 × as fast here as {names.NBITS}")
    x = torch.randn(3, 256)
    assert relative_error(made.program.flat((x,)), made.artifact.run((x,))) < 1e-5


class Patches(torch.nn.Module):
    """Pieces of an image as tokens: what is rounded next comes behind a reshape and a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = torch.nn.Conv2d(3, 16, 4, 4)
        self.mix = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mix(self.cut(x).flatten(2).transpose(1, 2))
        return y


def test_a_weight_that_stays_float_is_not_rounded_by_the_runtime() -> None:
    """It would have one scale for all, where a product stands between roundings, also behind what
    only lays out."""
    torch.manual_seed(0)
    x, model = torch.randn(4, 3, 16, 16), Patches()
    with torch.no_grad():
        model.cut.weight[0] *= 20
    passes = (
        "canonicalize{optional=true},"
        "assign{weight=int8:channel activation=int8:tensor:asym head=same},quantize"
    )
    backend = get_backend("onnxruntime").only(names.CONV, names.DEQUANTIZED)
    made = qcompiler.compile(model, x, passes=passes, backend=backend, data=[x])
    assert made.kernels["cut/conv2d#0"] == names.CONV
    assert relative_error(made.program.flat((x,)), made.artifact.run((x,))) < 1e-5


class Twice(torch.nn.Module):
    """One layer applied twice, and two with equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + self.one(x).relu()
        y = y + self.one(y).relu()
        return self.two(y)


@pytest.mark.parametrize("activation", ["int8:token:dynamic", "int8:tensor"])
def test_weights_that_are_read_twice(activation: str) -> None:
    x = torch.randn(5, 32)
    passes = f"assign{{weight=int8:channel activation={activation} head=same}},quantize"
    made = qcompiler.compile(Twice(), x, passes=passes, backend="onnxruntime", data=[x])
    assert relative_error(made.program.flat((x,)), made.artifact.run((x,))) < 1e-5
