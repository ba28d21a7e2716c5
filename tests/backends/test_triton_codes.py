"""What the kernels' assembly computes, for every code, by an interpreter of the few instructions
that it consists of: the kernels themselves decode by it on a GPU only."""

from __future__ import annotations

import re

import pytest
import torch

from qcompiler.formats import Grid, QFormat

pytest.importorskip("triton", reason="triton is not installed: qcompiler[triton]")

from qcompiler.backends.triton import codes, widen

PAIR = re.compile(r"fma\.rn\.(b?f16)x2")


def execute(text: str, *inputs: int, outputs: int = 1) -> list[int]:
    """Registers $0, … of a PTX text, given those that follow."""
    registers = {f"${i + outputs}": v for i, v in enumerate(inputs)}

    def value(word: str) -> int:
        return registers[word] if word in registers else int(word, 0)

    for line in text.strip().strip("{}").split(";"):
        if not (line := line.strip()) or line.startswith("."):
            continue
        name, _, rest = line.partition(" ")
        target, *args = [w.strip() for w in rest.split(",")]
        registers[target] = run(name, [value(a) for a in args]) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def run(name: str, a: list[int]) -> int:
    match name:
        case "mov.b32":
            return a[0]
        case "shl.b32":
            return a[0] << a[1]
        case "shr.b32":
            return a[0] >> a[1]
        case "and.b32":
            return a[0] & a[1]
        case "xor.b32":
            return a[0] ^ a[1]
        case "sub.u32":
            return a[0] - a[1]
        case "lop3.b32":
            return {0xEA: a[0] & a[1] | a[2], 0x6A: a[0] & a[1] ^ a[2], 0x3C: a[0] ^ a[1]}[a[3]]
        case "prmt.b32":
            places = [a[2] >> 4 * i & 15 for i in range(4)]
            return sum(((a[0] | a[1] << 32) >> 8 * p & 255) << 8 * i for i, p in enumerate(places))
    x, y, z = (halves(v, PAIR.fullmatch(name)[1]) for v in a)
    # Exact in float64, and rounded once, as the instruction does it.
    return bits((x.double() * y.double() + z.double()).to(x.dtype))


def halves(register: int, kind: str) -> torch.Tensor:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    low, high = register & 0xFFFF, register >> 16
    return torch.tensor([low, high], dtype=torch.uint16).view(dtype)


def bits(pair: torch.Tensor) -> int:
    low, high = pair.view(torch.uint16).tolist()
    return low | high << 16


FORMATS = {0: "int4:tensor", 1: "fp4_e2m1:tensor", 2: "int8:tensor", 3: "fp8_e4m3:tensor"}


def numbers(kind: int) -> torch.Tensor:
    """What each code stands for, by the reference."""
    size = 16 if kind <= 1 else 256
    data = torch.arange(size)
    if kind == 0:
        return (data - 8).double()
    if kind == 2:
        return data.to(torch.int8).double()
    grid = Grid(QFormat.parse(FORMATS[kind]), torch.ones(()))
    return grid.decode(data.to(torch.uint8), torch.float64)


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_code_becomes_its_number(kind: int, half: bool) -> None:
    """Beside other codes, in each plane, in both lanes."""
    wanted, size = numbers(kind), 4 if kind <= 1 else 8
    for code in range(1 << size):
        other = (code * 7 + 3) % (1 << size)
        for j in range(16 // size):
            low = sum((code if i == j else other) << size * i for i in range(16 // size))
            high = sum((other if i == j else code) << size * i for i in range(16 // size))
            text = codes.assembly(kind, j, half, False)
            found = halves(*execute(text, low | high << 16), "f16" if half else "bf16").double()
            expected = torch.stack([wanted[code], wanted[other]])
            assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [2, 3])
def test_four_bytes_become_four_numbers(kind: int, half: bool) -> None:
    wanted, text = numbers(kind), widen.assembly(kind == 3, half)
    for code in range(256):
        four = [code, (code * 7 + 3) % 256, 255 - code, code ^ 0x80]
        found = execute(text, sum(c << 8 * i for i, c in enumerate(four)), outputs=2)
        values = torch.cat([halves(r, "f16" if half else "bf16") for r in found]).double()
        expected = wanted[four]
        assert torch.equal(values[~expected.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
def test_zero_points(half: bool) -> None:
    dtype, kind = (torch.float16, "f16") if half else (torch.bfloat16, "bf16")
    base = 1024.0 if half else 128.0
    for zero in (0, 3, 15, 127):
        for code in range(16):
            pair = torch.full((2,), -base - zero, dtype=dtype)
            found = halves(*execute(codes.assembly(0, 2, half, True), code << 8, bits(pair)), kind)
            assert found.tolist() == [code - zero, -zero]
            (four,) = execute(codes.bytes_of(1, True), code << 4 | code << 28, zero * 0x01010101)
            signed = torch.tensor([four], dtype=torch.uint32).view(torch.int8).tolist()
            assert signed == [code - zero, -zero, -zero, code - zero]
    moved = torch.tensor([1.5, -2.0], dtype=dtype)
    found = halves(*execute(codes.addition(half), bits(moved), bits(moved)), kind)
    assert found.tolist() == [3.0, -4.0]
