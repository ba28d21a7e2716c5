"""Decoding packed codes in registers, and products that the interpreter can do too.

A *unit* holds the codes of one lane: four of 4 bits or two of 8 bits in 16 bits, or two of 4 bits
in 8 bits where the product is one of int8. Units of two (four) neighbouring lanes share a register,
so that one instruction decodes two (four) codes. Integers become numbers without a conversion:
OR-ed into the fraction of 128 (bfloat16) or 1024 (float16) their bits add u, and one fused
multiply-add takes away what was there and the zero point, exactly.

=======  =======================================================  ===============================
kind     code                                                     codes in a unit
=======  =======================================================  ===============================
`INT4`   u = q + 8 of an integer q, number u - zero (or u - 8)    4 (2 for a product of int8)
`FP4`    e2m1 (OCP MX v1.0, 5.3.3)                                4
`INT8`   q, number q - zero                                       2
`E4M3`   e4m3                                                     2
`PLAIN`  int8, as the product takes it                            1
=======  =======================================================  ===============================
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.backends.triton.runtime import interpreted

INT4, FP4, INT8, E4M3, PLAIN = (tl.constexpr(i) for i in range(5))
WHOLE, REAL = tl.constexpr(1), tl.constexpr(2)
"""Zero points: whole numbers from 0 to 127, or any."""
LIFT = tl.constexpr(128.0)
"""The bfloat16 whose last four bits count from 0 to 15."""
EMULATED = tl.constexpr(interpreted())


@triton.constexpr_function
def assembly(kind, j, half, zero):
    """PTX for plane j: $0 two numbers of 16 bits, $1 two units, $2 what is added (`zero`).

    `half`: float16, else bfloat16."""
    mad = "fma.rn.f16x2" if half else "fma.rn.bf16x2"
    head = ".reg .b32 t, s, one, c; mov.b32 one, " + ("0x3C003C00;" if half else "0x3F803F80;")
    if kind == 0:
        base, eight = ("0x64006400", "0xE408E408") if half else ("0x43004300", "0xC308C308")
        c = "" if zero else f"mov.b32 c, {eight};"
        body = f"""mov.b32 t, $1; {_shift("t", -4 * j)} {c}
            lop3.b32 t, t, 0x000f000f, {base}, 0xEA; {mad} $0, t, one, {"$2" if zero else "c"};"""
    elif kind == 2 and half:
        body = f"""mov.b32 t, $1; {_shift("t", -8 * j)} mov.b32 c, 0xE480E480;
            lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6A; {mad} $0, t, one, c;"""
    elif kind == 2:
        body = f"""mov.b32 t, $1; {_shift("t", -8 * j)}
            lop3.b32 s, t, 0x00800080, 0xC300C300, 0xEA;
            lop3.b32 t, t, 0x007f007f, 0x43004300, 0xEA; {mad} $0, t, one, s;"""
    else:
        # Fields go to their places; what the exponent's bias is short of, a factor makes good.
        if kind == 1:
            size, place, mask, times = (4, 9, 0x0E00, 0x7400) if half else (4, 6, 0x01C0, 0x7E80)
        else:
            size, place, mask, times = (8, 7, 0x3F80, 0x5C00) if half else (8, 4, 0x07F0, 0x7B80)
        body = f"""mov.b32 t, $1; {_shift("t", place - size * j)}
            mov.b32 s, $1; {_shift("s", 16 - size * (j + 1))} and.b32 s, s, 0x80008000;
            lop3.b32 t, t, {mask * 0x10001}, s, 0xEA;
            mov.b32 s, {times * 0x10001}; mov.b32 c, 0; {mad} $0, t, s, c;"""
    return "{" + head + body + "}"


@triton.constexpr_function
def _shift(register, left):
    """PTX that shifts a register in place."""
    if left == 0:
        return ""
    return f"sh{'l' if left > 0 else 'r'}.b32 {register}, {register}, {abs(left)};"


@triton.constexpr_function
def addition(half):
    """PTX: $0 = $1 + $2, pairs of 16-bit numbers."""
    one, kind = ("0x3C003C00", "f16x2") if half else ("0x3F803F80", "bf16x2")
    return "{.reg .b32 one; mov.b32 one, " + one + f"; fma.rn.{kind} $0, $1, one, $2;" + "}"


@triton.constexpr_function
def bytes_of(j, zero):
    """PTX for plane j of four units of 8 bits: $0 four bytes u - zero. 128 + u - zero cannot borrow
    from its neighbour."""
    offset = "$2" if zero else "0x08080808"
    return f"""{{.reg .b32 t; mov.b32 t, $1; {_shift("t", -4 * j)}
        lop3.b32 t, t, 0x0f0f0f0f, 0x80808080, 0xEA; sub.u32 t, t, {offset};
        xor.b32 $0, t, 0x80808080;}}"""


@triton.jit
def decode(
    unit, zero, j: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr
):
    """Numbers of plane j in DTYPE; `zero` has the shape of `unit`, or 1 where it does not vary."""
    if EMULATED:
        return _emulated(unit, zero, j, KIND, ZERO, DTYPE)
    elif tl.int8 == DTYPE:
        return _bytes(unit, zero, j, ZERO)
    else:
        return _pairs(unit, zero, j, KIND, ZERO, DTYPE)


@triton.jit
def _pairs(
    unit, zero, j: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr
):
    HALF: tl.constexpr = tl.float16 == DTYPE
    FOLDED: tl.constexpr = KIND == INT4 and ZERO == WHOLE
    asm: tl.constexpr = assembly(KIND, j, HALF, FOLDED)
    if FOLDED:
        z = (-(1024.0 if HALF else 128.0) - zero.to(tl.float32)).to(DTYPE)
        z = tl.broadcast_to(z, unit.shape)
        w = tl.inline_asm_elementwise(
            asm, "=r,r,r", [unit, z], dtype=DTYPE.value, is_pure=True, pack=2
        )
    else:
        w = tl.inline_asm_elementwise(asm, "=r,r", [unit], dtype=DTYPE.value, is_pure=True, pack=2)
    if ZERO and not FOLDED:
        z = ((8.0 if KIND == INT4 else 0.0) - zero.to(tl.float32)).to(DTYPE)
        z = tl.broadcast_to(z, unit.shape)
        add: tl.constexpr = addition(HALF)
        w = tl.inline_asm_elementwise(
            add, "=r,r,r", [w, z], dtype=DTYPE.value, is_pure=True, pack=2
        )
    return w


@triton.constexpr_function
def lifting(j):
    """PTX for plane j: $0 two bfloat16 128 + u, $1 two units."""
    return f"""{{.reg .b32 t; mov.b32 t, $1; {_shift("t", -4 * j)}
        lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xEA;}}"""


@triton.jit
def lifted(unit, j: tl.constexpr, DTYPE: tl.constexpr):
    """LIFT + u of plane j of `INT4` in bfloat16: half the instructions of `decode`. Sums of
    products are off by up to some 2^-17 of Σ|a| then, in units of the scale, also by activations
    that meet zeros. That is 10^-4 of what rounding the weights to 4 bits may do there."""
    tl.static_assert(tl.bfloat16 == DTYPE)
    if EMULATED:
        return cast(number(unit.to(tl.int32) >> (4 * j), INT4) + LIFT, DTYPE)
    else:
        asm: tl.constexpr = lifting(j)
        return tl.inline_asm_elementwise(
            asm, "=r,r", [unit], dtype=DTYPE.value, is_pure=True, pack=2
        )


@triton.jit
def _bytes(unit, zero, j: tl.constexpr, ZERO: tl.constexpr):
    asm: tl.constexpr = bytes_of(j, ZERO)
    if ZERO:
        z = tl.broadcast_to(zero.to(tl.int8), unit.shape)
        return tl.inline_asm_elementwise(
            asm, "=r,r,r", [unit, z], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(asm, "=r,r", [unit], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def integers(word, zero, j: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr):
    """Numbers of plane j in int8 (…, 4 n) of words (…, n) of four units; `zero` has a zero point in
    each byte. A loop that hands a word on moves one register; four bytes it would take apart."""
    if EMULATED and KIND == INT4:
        code = ((_quarters(word).to(tl.int32) >> (4 * j)) & 15).to(tl.int8)
        return code - (_quarters(zero) if ZERO else 8)
    elif KIND == INT4:
        asm: tl.constexpr = bytes_of(j, ZERO)
        if ZERO:
            word = tl.inline_asm_elementwise(
                asm, "=r,r,r", [word, zero], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            word = tl.inline_asm_elementwise(
                asm, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
            )
    return _quarters(word)


@triton.jit
def _quarters(word):
    """The four bytes of words (a, b, n): int8 (a, b, 4 n)."""
    low = tl.join(word.to(tl.int8), (word >> 8).to(tl.int8))
    high = tl.join((word >> 16).to(tl.int8), (word >> 24).to(tl.int8))
    bytes = tl.permute(tl.join(low, high), (0, 1, 2, 4, 3))
    return tl.reshape(bytes, (word.shape[0], word.shape[1], 4 * word.shape[2]))


@triton.jit
def _emulated(
    unit, zero, j: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr
):
    w = number(unit.to(tl.int32) >> ((4 if KIND <= FP4 else 8) * j), KIND)
    if ZERO:
        w -= zero.to(tl.float32)
    elif KIND == INT4:
        w -= 8.0
    return cast(w, DTYPE)


@triton.jit
def number(code, KIND: tl.constexpr):
    """What the lowest bits of an int32 stand for, in float32; of `INT4`, u."""
    if KIND == INT4:
        return (code & 15).to(tl.float32)
    elif KIND == INT8:
        return ((code << 24) >> 24).to(tl.float32)
    elif KIND == FP4:
        # Fields as the lowest of float32's exponent and the highest of its fraction: subnormal
        # numbers come out right of themselves.
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def dot(a, b, acc):
    """acc + a b. The interpreter multiplies bfloat16 as if they were integers, so that there the
    rounded numbers are widened first, which changes nothing."""
    if EMULATED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, out_dtype=acc.dtype)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in another type, rounded to nearest; the interpreter would cut bfloat16's digits off."""
    if EMULATED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
