"""Formats inside programs: operators, bytes in parameters, ONNX, and the CPU backend."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from all_formats import ALONE, ELEMENTS, formats
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompiler
from qcompiler import BackendError, Grid, Program, QFormat
from qcompiler.backends.onnxruntime.session import OnnxArtifact
from qcompiler.edit import Edit
from qcompiler.formats import element
from qcompiler.passes.assign import Assign
from qcompiler.passes.quantize import Quantize
from qcompiler.run import evaluate, evaluate_wide
from qcompiler.sites import sites
from qcompiler.stored import read, write

qc = torch.ops.qc
WEIGHTS = (
    *(f"{name}:channel" for name in ELEMENTS if not element(name).one_sided),
    "int1:channel:asym", "uint1:channel:asym", "uint4:group16:asym", "uint8:tensor:asym",
    "int4:group16", "int4:group20:full", "int4:group16:asym:scale(int8:channel)", "int3:tensor",
    "int4:group16:mirrored:scale(fp16)", "int8:channel:mirrored",
    "int3:channel:planes", "ternary:group16", "nf4:group16:scale(fp8_e4m3:tensor)",
    "int4:group16:scale(uint8:group2:scale(fp16))", "fp4_e2m1:group16:planes",
    "codebook3:channel", "codebook4:tensor", "mxfp4", "mxfp6_e2m3", "mxfp8_e5m2", "mxint8", "nvfp4",
    "dyadic", "fp16", "bf16", "fp8_e4m3:unscaled",
)  # fmt: skip
"""In groups of 16, the last one of 40 or 20 columns is short."""
EXPORTED = (
    "int1:channel:asym", "int16:channel", "uint4:group16:asym", "int4:group20:full", "int3:tensor",
    "int4:group16:mirrored",
    "int4:group16:asym:scale(int8:channel)", "ternary:group16", "codebook3:channel", "nvfp4",
    "fp8_e4m3:channel", "fp6_e2m3:channel", "nf4:group16:scale(fp8_e4m3:tensor)", "dyadic", "fp16",
)  # fmt: skip


class Linears(torch.nn.Module):
    """Linears of one input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.ModuleList(torch.nn.Linear(40, 20) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.all]


@cache
def compiled(backend: str, weights: tuple[str, ...] = WEIGHTS) -> qcompiler.Compiled:
    """A linear for each format, rounded to nearest."""
    exceptions = tuple(f"all.{i}/*={weight}" for i, weight in enumerate(weights))
    passes = [Assign(head="same", exceptions=exceptions), Quantize(budget=5)]
    module, x = Linears(len(weights)), torch.randn(4, 40)
    return qcompiler.compile(module, x, passes=passes, backend=backend)


def with_weight(program: Program, x: Tensor, fmt: QFormat) -> tuple[Program, Grid]:
    """A linear with `x`, rounded to `fmt`, for its weight."""
    edit = Edit(program, "test")
    edit.spend("a weight")
    (site,) = sites(edit.nodes)
    q = Grid.fit(x, fmt).quantize(x)
    new = write(edit, q, "w", torch.float32, of=site.weight, like=site.node)
    kept = read(edit, new)
    assert kept is not None and torch.equal(kept.data, q.data)
    assert torch.equal(kept.dequantize(), q.dequantize())
    edit.rewire(site.node, site.kind.weight, new)
    return edit.seal()[0], q.grid


@pytest.fixture(scope="module")
def linears() -> dict[int, Program]:
    """Width → a linear with three outputs."""
    sizes = (1, 7, 20)
    return {n: qcompiler.capture(torch.nn.Linear(n, 3), torch.randn(2, n)) for n in sizes}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(formats(dynamic=False), st.sampled_from(WEIGHTS)), st.sampled_from([1, 7, 20]))
def test_what_is_stored(linears: dict[int, Program], fmt: QFormat | str, width: int) -> None:
    """`bytes` is what lies in the parameters, and they decode to the very numbers; in float64, to
    numbers nearby."""
    fmt = QFormat.parse(fmt) if isinstance(fmt, str) else fmt
    assume(not (fmt.kind.one_sided and fmt.symmetric))
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    program, grid = with_weight(linears[width], x, fmt)
    stored = [v for name, v in program.params.items() if name.startswith("w.")]
    assert sum(v.nbytes for v in stored) == fmt.bytes((3, width))
    a, bias = torch.randn(2, width), program.params["bias"]
    expected = torch.nn.functional.linear(a, grid.round(x), bias)
    assert torch.equal(evaluate(program, (a,))[0], expected)
    wide = evaluate_wide(program, (a,))[0]
    assert isinstance(wide, Tensor) and wide.dtype == torch.float64
    torch.testing.assert_close(wide, expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ELEMENTS, *ALONE])
def test_operators(name: str) -> None:
    """Shapes without numbers are those with numbers, also in torch's own check of operators."""
    alone = name in ALONE
    x, text = torch.rand(2, 3, 7), name if alone else f"{name}:channel"
    scale = None if alone else torch.full((2, 3, 1), 0.1)
    packed = QFormat.parse(text).pack(Grid(QFormat.parse(text), torch.tensor(0.1)).codes(x))
    calls = (
        (qc.fake_quantize.default, (x, text, scale)),
        (qc.dequantize.default, (packed, scale, None, text, 7, torch.bfloat16)),
    )
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            shape = operator(*fakes).shape
        assert shape == operator(*args).shape == x.shape


def test_what_the_numbers_are() -> None:
    """Of every format, the output is that of the linear with its weight rounded."""
    program, x = compiled("reference").program, torch.randn(4, 40)
    linears = Linears(len(WEIGHTS)).all
    for linear, text, y in zip(linears, WEIGHTS, compiled("reference")(x), strict=True):
        fmt, weight = QFormat.parse(text), linear.weight.detach()
        if fmt.is_codebook:
            continue  # its table is learned
        rounded = Grid.fit(weight, fmt).round(weight)
        assert torch.equal(y, torch.nn.functional.linear(x, rounded, linear.bias)), text
    assert [str(s.weight) for s in program.plan.values()] == [
        str(QFormat.parse(text)) for text in WEIGHTS
    ]


def test_onnx(tmp_path: Path) -> None:
    """Formats of every layout and kind come out in standard operators, and compute the same."""
    program, x = compiled("reference", EXPORTED).program, (torch.randn(4, 40),)
    file = qcompiler.export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    outputs = program.flat(x), OnnxArtifact(program, tmp_path).run(x)
    for text, expected, found in zip(EXPORTED, *outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=text)


ACTIVATIONS = (
    "pot4:tensor", "nf4:token:dynamic", "log4:tensor", "ternary:tensor", "binary:token:dynamic",
    "int16:tensor", "int8:token:dynamic:clip0.8", "uint8:tensor:asym:dynamic:clip0.8",
    "int4:token:dynamic:mirrored", "int4:group3:dynamic:full", "int8:tensor",
)  # fmt: skip


class Rounded(torch.nn.Module):
    """Its input, rounded to each format; static ones with the scale 0.3."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self.texts = texts
        self.register_buffer("scale", torch.tensor(0.3).reshape(1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            qc.fake_quantize(x, text, None if "dynamic" in text else self.scale)
            for text in self.texts
        ]


def test_onnx_activations(tmp_path: Path) -> None:
    program, x = qcompiler.capture(Rounded(ACTIVATIONS), torch.randn(4, 10)), (torch.randn(4, 10),)
    qcompiler.export_onnx(program, tmp_path / "model.onnx")
    outputs = program.flat(x), OnnxArtifact(program, tmp_path).run(x)
    for text, expected, found in zip(ACTIVATIONS, *outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=text)


@pytest.mark.parametrize(
    "text", ["fp8_e4m3:token:dynamic", "fp4_e2m1:tensor", "mxfp4:dynamic", "fp16"]
)
def test_activations_that_onnx_has_no_operators_for(text: str, tmp_path: Path) -> None:
    program = qcompiler.capture(Rounded((text,)), torch.randn(4, 10))
    found = str(QFormat.parse(text)).split(":")[0]
    with pytest.raises(BackendError, match=f"node qc.fake_quantize#0 rounds to {found}"):
        qcompiler.export_onnx(program, tmp_path / "model.onnx")


def test_cpu(tmp_path: Path) -> None:
    """The CPU backend computes what the reference does, also once it was saved."""
    x = torch.randn(4, 40)
    served = compiled("cpu")(x)
    for text, expected, found in zip(WEIGHTS, compiled("reference")(x), served, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, msg=text)
    compiled("cpu").save(tmp_path / "saved")
    for found, again in zip(served, qcompiler.load(tmp_path / "saved")(x), strict=True):
        assert torch.equal(found, again)
