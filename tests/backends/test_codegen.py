"""Generated kernels against float64, on each instruction set that this CPU has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompiler
from qcompiler.errors import BackendError
from qcompiler.formats import QFormat, QTensor
from qcompiler.formats.grid import Grid
from qcompiler.rounding import nearest

pytest.importorskip("llvmlite")

from qcompiler.backends.cpu import generated
from qcompiler.backends.cpu.codegen import depthwise, jit, layout, rows
from qcompiler.backends.cpu.codegen import isa as isas
from qcompiler.backends.cpu.codegen.before import Before
from qcompiler.backends.cpu.codegen.linear import module
from qcompiler.backends.cpu.codegen.tile import Spec
from qcompiler.backends.cpu.kernels import KERNELS, Static

WEIGHTS = (
    "int4:group32:mirrored",
    "int8:channel",
    "int8:channel:full",
    "int8:group64:asym",
    "int3:group32:scale(fp16)",
    "int5:group128:asym",
    "int6:tensor",
    "int7:group32",
    "uint4:group32:asym",
    "uint2:channel",
    "int2:channel:asym",
    "ternary:group64",
)
ACTIVATIONS = (
    "float",
    "int8:token:dynamic",
    "int8:token:dynamic:full",
    "int4:token:dynamic:clip0.9",
    "int8:tensor",
    "uint8:tensor:asym",
)


@pytest.fixture(params=isas._available())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(isas.VARIABLE, request.param)
    yield request.param


def product(q: QTensor, x: torch.Tensor, activation: str, bias: torch.Tensor | None = None):
    """What the kernel gives, and what float64 does."""
    static, rounded = Static(), x.double()
    fmt = None if activation == "float" else QFormat.parse(activation)
    if fmt is not None and fmt.dynamic:
        rounded = Grid.fit(x, fmt).round(x).double()
    elif fmt is not None:
        zero = None if fmt.symmetric else torch.tensor([[131]], dtype=torch.int16)
        static = Static(torch.tensor([[0.04]]), zero)
        rounded = Grid(fmt, torch.tensor([[0.04]]), zero).round(x).double()
    name = "decoding" if fmt is None else "integer"
    got = KERNELS[name].prepare(q, bias, fmt, static)(x)
    want = rounded @ q.dequantize(torch.float64).t() + (0 if bias is None else bias.double())
    return got, want


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_format(weight: str, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for out, width, tokens in ((100, 256, 1), (37, 200, 7)):
        q = nearest(torch.randn(out, width, generator=generator), QFormat.parse(weight))
        x, bias = (torch.randn(*s, generator=generator) for s in ((tokens, width), (out,)))
        for activation in ACTIVATIONS:
            got, want = product(q, x, activation, bias)
            assert (got - want).norm() / want.norm() < 3e-6, (activation, tokens)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 140), st.integers(0, 13), st.integers(0, 1), st.data())
def test_every_size(out: int, width: int, tokens: int, kind: int, data: st.DataObject) -> None:
    """Nothing is read or written where it should not be: neighbours hold NaN."""
    fmt = QFormat.parse(("int4:group32", "int8:channel")[kind])
    seed = data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(seed)
    q = nearest(torch.randn(out, width, generator=generator), fmt)
    wide = torch.full((tokens + 2, width), torch.nan)
    x = wide[1:-1].copy_(torch.randn(tokens, width, generator=generator))
    for activation in ("float", "int8:token:dynamic"):
        got, want = product(q, x, activation)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_extremes(isa: str) -> None:
    """Sums of codes at both ends of their range, and activations at both of theirs."""
    for weight in ("int8:channel:full", "int4:group32:mirrored", "uint8:group32:asym"):
        fmt = QFormat.parse(weight)
        for low, high in ((fmt.qmin, fmt.qmin), (fmt.qmax, fmt.qmax), (fmt.qmin, fmt.qmax)):
            codes = torch.full((32, 4096), low, dtype=torch.int16)
            codes[:, ::3] = high
            scale = torch.full(fmt.scale_shape((32, 4096)), 0.5)
            zero = None if fmt.symmetric else torch.zeros_like(scale, dtype=torch.int16)
            q = QTensor(codes, Grid(fmt, scale, zero))
            for x in (torch.ones(2, 4096), -torch.ones(2, 4096)):
                got, want = product(q, x, "int8:token:dynamic:full")
                assert (got - want).norm() <= 1e-6 * want.norm()


def test_tokens_of_zeros_infinities_and_tiny_numbers() -> None:
    q = nearest(torch.randn(16, 64), QFormat.parse("int8:channel"))
    x = torch.zeros(4, 64)
    x[1] = 1e-41  # below float32's normal numbers
    x[2, 3], x[3, 5] = torch.inf, torch.nan
    static, _ = product(q, x, "int8:tensor")
    assert static[:3].isfinite().all() and static[3].isnan().all()
    got, _ = product(q, x, "int8:token:dynamic")
    assert torch.equal(got[0], torch.zeros(16))
    assert got[:2].isfinite().all() and not got[2:].isfinite().any()


def test_no_result_depends_on_threads() -> None:
    q = nearest(torch.randn(200, 1024), QFormat.parse("int4:group32"))
    x, before = torch.randn(9, 1024), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [product(q, x, a)[0] for a in ("float", "int8:token:dynamic")]
    finally:
        torch.set_num_threads(before)
    for result in results[2:4], results[4:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[:2], strict=True))


@pytest.mark.parametrize("bits", layout.PLANES)
def test_packing_is_undone(bits: int) -> None:
    for out, width in ((1, 1), (16, 32), (37, 70)):
        codes = torch.randint(0, 1 << bits, (out, width), dtype=torch.int16)
        packed = layout.pack(codes, bits, 0)
        assert packed.numel() * 8 == bits * layout.padded(out, 16) * layout.padded(width, 32)
        assert torch.equal(layout.unpack(packed, bits, out, width).short(), codes)


@pytest.mark.parametrize(
    ("isa", "triple", "bits", "instruction"),
    [
        ("vnni", "x86_64-linux-gnu", 4, "vpdpbusd"),
        ("avx2", "x86_64-linux-gnu", 4, "vpmaddubsw"),
        ("avx2", "x86_64-linux-gnu", 8, "vpmaddwd"),
        ("neon", "aarch64-linux-gnu", 4, "sdot"),
        ("plain", "aarch64-linux-gnu", 3, "mla"),
    ],
)
def test_instructions(isa: str, triple: str, bits: int, instruction: str) -> None:
    """Each instruction set gets its own, also those of other CPUs."""
    chosen = isas.ISAS[isa]
    assert instruction in jit.assembly(module(chosen, Spec(bits, 32)), chosen, triple)


@pytest.mark.parametrize(
    ("isa", "triple", "instruction"),
    [
        ("vnni", "x86_64-linux-gnu", "vpdpwssd"),  # LLVM makes one of product and sum
        ("avx2", "x86_64-linux-gnu", "vpmaddwd"),
        ("neon", "aarch64-linux-gnu", "smull"),
    ],
)
def test_instructions_of_depthwise_convolutions(isa: str, triple: str, instruction: str) -> None:
    chosen = isas.ISAS[isa]
    made = depthwise.module(chosen, Spec(depthwise.BITS, 0, shifted=True, behind="relu6"))
    assert instruction in jit.assembly(made, chosen, triple)


@pytest.mark.parametrize(
    ("isa", "triple", "instruction"),
    [
        ("vnni", "x86_64-linux-gnu", "zmm"),
        ("avx2", "x86_64-linux-gnu", "vfmadd"),
        ("neon", "aarch64-linux-gnu", "fmla"),
    ],
)
def test_instructions_of_transforms(isa: str, triple: str, instruction: str) -> None:
    """Also where runs are shorter than a vector is wide."""
    chosen = isas.ISAS[isa]
    for before in ("hadamard:2816:11", "hadamard:44:11", "silu_mul|hadamard:5:5"):
        made = rows.module(chosen, rows.Rounding(32, before=Before.parse(before)))
        assert instruction in jit.assembly(made, chosen, triple)


def test_an_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isas.VARIABLE, "sse9")
    with pytest.raises(BackendError, match=r"QCOMPILER_CPU_ISA=sse9: this CPU runs .*plain"):
        isas.host()


def test_code_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled once, and again where a file was damaged or cannot be written."""
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    chosen = isas.ISAS["plain"]

    def compile_() -> None:
        assert all(jit.compiled(module(chosen, Spec(1, 32)), chosen, ("run",)))

    compile_()
    (file,) = (tmp_path / "kernels").iterdir()
    good = file.read_bytes()
    monkeypatch.setattr(jit, "_compile", lambda *a: pytest.fail("compiled again"))
    compile_()
    file.write_bytes(good[:-7])
    with pytest.raises(pytest.fail.Exception):
        compile_()
    monkeypatch.undo()
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    compile_()


def test_threads_of_python_share_a_kernel() -> None:
    q = nearest(torch.randn(64, 256), QFormat.parse("int4:group32"))
    call = KERNELS["integer"].prepare(q, None, QFormat.parse("int8:token:dynamic"), Static())
    x = torch.randn(8, 256)
    want = call(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, want) for y in pool.map(lambda _: call(x), range(64)))


def test_where_llvm_is_not_installed(tmp_path: Path) -> None:
    """torch's kernels serve, and `backends` says why."""
    code = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "import torch, qcompiler\n"
        "m = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "p = 'canonicalize{optional=true},assign{weight=int8:channel"
        " activation=int8:token:dynamic head=same},quantize'\n"
        "c = qcompiler.compile(m, torch.randn(2, 64), passes=p)\n"
        "print(*c.kernels.values())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "integer" not in run.stdout


def test_export_and_save(tmp_path: Path) -> None:
    """The operator is one that a graph, and torch.export, can hold."""
    model = torch.nn.Sequential(torch.nn.Linear(96, 40), torch.nn.ReLU()).eval()
    x = torch.randn(5, 96)
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    passes = (
        "canonicalize{optional=true},assign{weight=int4:group32 activation=int8:token:dynamic"
        " head=same},quantize"
    )
    compiled = qcompiler.compile(model, x, passes=passes, backend=backend)
    assert compiled.kernels == {"0/linear#0": "integer"}
    compiled.save(tmp_path / "artifact")
    assert torch.equal(qcompiler.load(tmp_path / "artifact", backend)(x), compiled(x))
    torch.library.opcheck(
        torch.ops.qc_cpu.linear.default,
        (x, *_arguments()),
        test_utils=("test_schema", "test_faketensor"),
    )


def _arguments() -> tuple[object, ...]:
    q = nearest(torch.randn(40, 96), QFormat.parse("int4:group32"))
    call = KERNELS["integer"].prepare(q, None, QFormat.parse("int8:token:dynamic"), Static())
    return (*call.parameters.values(), *call.constants)


def test_too_many_inputs_for_32_bits() -> None:
    wide = generated.MOST_INPUTS + 1
    assert generated.fits(16, wide, QFormat.parse("int8:channel")) is not None
    assert generated.fits(16, wide, QFormat.parse("int8:group64")) is None
    assert generated.fits(16, 2 * wide, QFormat.parse("uint8:group65536:asym")) is not None


def test_nothing_is_read_behind_a_residual() -> None:
    q = nearest(torch.randn(9, 64), QFormat.parse("int8:channel"))
    call = KERNELS["decoding"].prepare(q, None, None, Static())
    x, wide = torch.randn(3, 64), torch.full((4, 9), torch.nan)
    residual = wide[:3].copy_(torch.randn(3, 9))
    got = call.operator(x, *call.parameters.values(), *call.constants, residual=residual)
    torch.testing.assert_close(got, call(x) + residual)
