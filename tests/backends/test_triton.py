"""Triton's kernels without a GPU: in the interpreter, compiled for GPUs, and seen through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler.backends.triton import TritonBackend, load_operators
from qcompiler.backends.triton.runtime import interpreted

triton = pytest.importorskip("triton", reason="triton is not installed: qcompiler[triton]")
if interpreted():
    pytest.skip("run by itself, without TRITON_INTERPRET", allow_module_level=True)

load_operators()

import triton.language as tl  # noqa: E402
from torch._functorch.aot_autograd import aot_export_module  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qcompiler.backends.triton import (  # noqa: E402
    attention,
    few,
    hadamard,
    products,
    rows,
    scaled,
    split,
)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["llama", "not llama"])
def test_every_kernel_in_the_interpreter(part: str) -> None:
    """In a process of its own: the interpreter is for good."""
    file = Path(__file__).with_name("test_triton_kernels.py")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", part, str(file)]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


POINTERS = {"x": "*bf16", "y": "*bf16", "units": "*i16", "scale": "*fp16", "weight": "*i8"}
POINTERS |= dict.fromkeys(("parts", "x_scale", "scales", "k_scale", "v_scale"), "*fp32")
POINTERS |= dict.fromkeys(("out", "peak", "mass", "cos", "sin"), "*fp32")
POINTERS |= dict.fromkeys(("codes", "keys", "values", "left", "right"), "*i8")
POINTERS |= {"q": "*bf16", "lengths": "*i32", "norm": "fp32", "zero": "*u8", "bias": "*bf16"}
GROUPED = {"SPAN": 2, "SHARED": 2, "PLANES": 4, "LANES": 64, "ONE": False}
GROUPED |= {"EVEN": True, "EARLY": False}
SHORT = GROUPED | {"DTYPE": tl.bfloat16, "x_scale": None}
BYTES = GROUPED | {"PLANES": 2, "DTYPE": tl.int8, "x": "*i8", "units": "*u8", "KIND": 0}
FEW = {"ROWS": 32, "TOKENS": 8, "WARPS": 4, "LATE": False, "ORDERED": False}
FEW |= {"AHEAD": 1, "WHOLE": False, "ALONE": False}
MANY = {"ROWS": 64, "TOKENS": 64}
LATE = FEW | {"LATE": True, "ORDERED": True}
PLAIN = {"ZERO": 0, "zero": None}
PRODUCT = {"SUM": tl.int32, "TOKENS": 64, "ROWS": 64, "INNER": 64, "BAND": 8, "bias": None}
PRODUCT |= {"EARLY": False}
ROUND = {"BLOCK": 4096, "given": None, "EARLY": False}
HEAD = {"GROUP": 4, "QUERIES": 16, "D": 128, "WIDE": 128, "TILE": 64, "V_TOKEN": True}
HEAD |= {"DTYPE": tl.bfloat16}
ROTATED = {"FP8": False, "given": None}
LONG = ROTATED | {"A": 128, "SIZE": 32, "B": 32, "WIDE": 32, "M": 64, "BLOCKS": 2, "EACH": 1}
LONG |= {"PAD": 128, "STAGES": 3, "PREFETCH": False, "EARLY": True}
LONGEST = {"A": 512, "SIZE": 28, "B": 56, "WIDE": 64, "M": 128, "BLOCKS": 4, "PREFETCH": True}
STRAIGHT = {"cos": None, "sin": None, "mask": None}
KERNELS = {
    "int4, one token": (few.few, SHORT | FEW | PLAIN | {"KIND": 0, "ALONE": True}),
    "int4 with zero points": (few.few, SHORT | FEW | {"KIND": 0, "ZERO": 1}),
    "int4 with any zero points": (
        few.few,
        SHORT | FEW | {"KIND": 0, "ZERO": 2, "zero": "*fp16", "EVEN": False},
    ),
    "int4, all at once": (few.few, SHORT | FEW | PLAIN | {"KIND": 0, "AHEAD": 2, "WHOLE": True}),
    "int4, two blocks ahead": (few.few, SHORT | FEW | PLAIN | {"KIND": 0, "AHEAD": 2}),
    "int4, zero points late": (few.few, SHORT | LATE | {"KIND": 0, "ZERO": 1}),
    "int4, tiles": (products.many, SHORT | MANY | PLAIN | {"KIND": 0}),
    "fp4, one token": (few.few, SHORT | FEW | PLAIN | {"KIND": 1}),
    "fp4 with float16": (
        few.few,
        SHORT | FEW | PLAIN | {"KIND": 1, "DTYPE": tl.float16, "x": "*fp16"},
    ),
    "int8, one token": (few.few, SHORT | FEW | PLAIN | {"KIND": 2, "PLANES": 2}),
    "e4m3, one token": (few.few, SHORT | FEW | PLAIN | {"KIND": 3, "PLANES": 2}),
    "int4 and int8": (few.few, BYTES | FEW | PLAIN),
    "int4 and int8, one scale": (few.few, BYTES | FEW | PLAIN | {"ONE": True}),
    "int4 with zero points and int8": (products.many, BYTES | MANY | {"ZERO": 1}),
    "started early": (few.few, SHORT | FEW | PLAIN | {"KIND": 0, "EARLY": True}),
    "int8 pointers": (scaled._pointers, PRODUCT | {"x": "*i8", "scale": "*fp32"}),
    "int8 descriptors": (scaled._descriptors, PRODUCT | {"x": "*i8", "scale": "*fp32"}),
    "rounding to int8": (rows._round, ROUND | {"FP8": False}),
    "rounding to e4m3": (rows._round, ROUND | {"FP8": True, "codes": "*u8"}),
    "hadamard": (hadamard._long, LONG),
    "hadamard of several rows": (hadamard._long, LONG | {"A": 16, "BLOCKS": 1, "EACH": 4}),
    "hadamard of the longest rows": (hadamard._long, LONG | LONGEST | {"STAGES": 1}),
    "short hadamard": (
        hadamard._short,
        ROTATED | {"ROWS": 16, "B": 64, "WIDE": 64},
    ),
    "attention": (attention._parts, HEAD | STRAIGHT | {"K_TOKEN": True, "FP8": False}),
    "attention, e4m3": (attention._parts, HEAD | STRAIGHT | {"K_TOKEN": False, "FP8": True}),
    "attention, keys to turn": (
        attention._parts,
        HEAD | {"K_TOKEN": False, "FP8": False, "mask": None},
    ),
    "attention behind a mask": (
        attention._parts,
        HEAD | STRAIGHT | {"K_TOKEN": True, "FP8": False, "mask": "*u8", "lengths": None},
    ),
    "sums of attention": (attention._merge, {"D": 128, "PIECES": 16, "WIDE": 128}),
    "sums of parts": (split._add, {"PARTS": 4, "BLOCK": 1024, "EARLY": True}),
}


def compiled(
    kernel: object, given: dict[str, object], capability: int, aligned: bool = False, **options: int
) -> object:
    """The kernel for a GPU; arguments that `given` and the table do not name are integers, and if
    they are `aligned`, multiples of 16, as addresses are."""
    names = kernel.arg_names
    types = {n: t for n, t in given.items() if isinstance(t, str)}
    fixed = {(names.index(n),): v for n, v in given.items() if n not in types}
    signature = {
        n: "constexpr" if (i,) in fixed else types.get(n) or POINTERS.get(n, "i32")
        for i, n in enumerate(names)
    }
    even = [n for n in names if signature[n] != "constexpr" and n not in products.VARIED]
    sixteen = {(names.index(n),): [["tt.divisibility", 16]] for n in even if aligned}
    source = ASTSource(kernel, signature, fixed, sixteen)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


OLD = (
    "int4, one token",
    "int4, tiles",
    "int4 and int8",
    "int8 pointers",
    "attention",
    "attention, e4m3",
)
"""Kernels that are compiled for an A100 too."""


@pytest.mark.parametrize(
    ("name", "capability"), [*((k, 90) for k in KERNELS), *((k, 80) for k in OLD)], ids=str
)
def test_it_compiles_for_a_gpu(name: str, capability: int) -> None:
    assert compiled(*KERNELS[name], capability).asm["cubin"]


def test_products_use_the_tensor_cores() -> None:
    fp8 = PRODUCT | {"SUM": tl.float32, "x": "*fp8e4nv", "weight": "*fp8e4nv", "scale": "*fp32"}
    for kernel, given, instruction in (
        (*KERNELS["int4, tiles"], "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"),
        (*KERNELS["int8 descriptors"], "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
        (
            scaled._descriptors,
            fp8,
            "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
        ),
    ):
        assert instruction in compiled(kernel, given, 90).asm["ptx"]
    assert "e4m3" in compiled(scaled._pointers, fp8, 89).asm["ptx"]


@pytest.mark.parametrize("given", [SHORT | PLAIN, BYTES | PLAIN, BYTES | {"ZERO": 1}])
def test_numbers_are_loaded_where_they_are_multiplied(given: dict[str, object]) -> None:
    """Tiles go through shared memory, or from thread to thread, only when warps add their sums."""
    given = given | FEW | {"KIND": 0, "ROWS": 16}
    made = compiled(few.few, given, 90, aligned=True, num_warps=4, num_stages=1)
    assert "local_alloc" not in made.asm["ttgir"]
    assert made.asm["ptx"].count("shfl.sync") < 16
    assert made.asm["ptx"].count("bar.sync") <= 2


def test_no_number_of_a_hadamard_transform_changes_places() -> None:
    """What passes through shared memory is the input, and H once."""
    made = compiled(*KERNELS["hadamard"], 90, aligned=True, num_warps=4)
    assert "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16" in made.asm["ptx"]
    loop = made.asm["ttgir"].split("scf.for")[-1]
    moved = [line for line in loop.splitlines() if "convert_layout" in line and "mma" in line]
    assert moved
    assert all("dot_op" in line for line in moved)  # from registers to registers
    assert made.asm["ptx"].count("bar.sync") < 12


class Layer(torch.nn.Module):
    """A linear in the kernels' operators."""

    def forward(self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor]:
        codes, scales = torch.ops.qc_triton.round_rows(x, None, False)
        return (torch.ops.qc_triton.linear_scaled(codes, scales, w, s, None, 40, x.dtype),)


def test_compilers_see_the_launches() -> None:
    """Inductor's own way of tracing finds two launches; an exported program keeps the operators."""
    inputs = (torch.randn(3, 100), torch.zeros(128, 128, dtype=torch.int8), torch.ones(40))
    with torch.no_grad():
        graph = aot_export_module(Layer(), inputs, trace_joint=False)[0].graph
        kept = torch.export.export(Layer(), inputs).graph
    targets = [n.target for n in graph.nodes]
    assert targets.count(torch.ops.higher_order.triton_kernel_wrapper_functional) == 2
    assert not [t for t in targets if "qc_triton" in str(t)]
    assert torch.ops.qc_triton.linear_scaled.default in [n.target for n in kept.nodes]
    (value,) = next(n for n in kept.nodes if n.op == "output").args[0]
    assert value.meta["val"].shape == (3, 40)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    reason = TritonBackend().available()
    assert reason is not None and "sees no GPU; use --backend cpu" in reason
    with pytest.raises(qcompiler.BackendError, match="sees no GPU"):
        torch.ops.qc_triton.round_rows(torch.randn(2, 8), None, False)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'qcompiler[triton]'" in TritonBackend().available()
