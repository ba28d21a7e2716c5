"""8-bit codes as 16-bit numbers, four at a time: for values of a cache, which lie as they come."""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.backends.triton.codes import E4M3, EMULATED, INT8, cast, number


@triton.constexpr_function
def assembly(fp8, half):
    """PTX: four codes, $2, as two pairs of float16 or bfloat16, $0 and $1. A byte's bits become the
    last of 1024 or 128, and what that is too much is taken away by a fused multiply-add; those of
    e4m3 go to their places, and a factor makes good what the exponent's bias is short of."""
    if fp8:
        shift, mask, times = (1, 0x3F80, 0x5C00) if half else (4, 0x07F0, 0x7B80)
        order = ("0x1404", "0x3424")
        side = f"""and.b32 s, t, 0x80008000; shr.b32 t, t, {shift}; mov.b32 c, 0;
            lop3.b32 t, t, {mask * 0x10001}, s, 0xEA; mov.b32 s, {times * 0x10001};"""
    elif half:
        order = ("0x4140", "0x4342")
        side = """lop3.b32 t, t, 0x64806480, 0, 0x3C; mov.b32 c, 0xE480E480;
            mov.b32 s, 0x3C003C00;"""
    else:
        order = ("0x4140", "0x4342")
        side = """lop3.b32 c, t, 0x00800080, 0xC300C300, 0xEA;
            lop3.b32 t, t, 0x007f007f, 0x43004300, 0xEA; mov.b32 s, 0x3F803F80;"""
    kind = "f16x2" if half else "bf16x2"
    sides = "".join(
        f"prmt.b32 t, $2, 0, {places}; {side} fma.rn.{kind} ${i}, t, s, c;"
        for i, places in enumerate(order)
    )
    return "{.reg .b32 t, s, c;" + sides + "}"


@triton.jit
def floats(codes, FP8: tl.constexpr, DTYPE: tl.constexpr):
    """Codes as 16-bit numbers, exactly. Not "pure": codes would be moved byte by byte to where the
    product wants them, and only then become numbers."""
    if EMULATED:
        return cast(number(codes.to(tl.int32), E4M3 if FP8 else INT8), DTYPE)
    else:
        asm: tl.constexpr = assembly(FP8, tl.float16 == DTYPE)
        return tl.inline_asm_elementwise(
            asm, "=r,=r,r", [codes], dtype=DTYPE.value, is_pure=False, pack=4
        )
