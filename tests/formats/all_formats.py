"""All elements, formats of them, and tensors that are hard to round."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qcompiler.formats import QFormat, element
from qcompiler.formats.element import Integer, Ternary

INTEGERS = (*(f"int{b}" for b in (2, 3, 4, 5, 6, 7, 8, 16)), *(f"uint{b}" for b in range(1, 9)))
MINIFLOATS = tuple(
    f"fp{bits}_e{exponent}m{bits - 1 - exponent}"
    for bits in range(2, 9)
    for exponent in range(1, bits)
)
LEVELS = (
    "ternary", "binary", "mid2", "mid3", "mid4", "nf2", "nf3", "nf4",
    *(f"pot{b}" for b in range(2, 9)), *(f"twinlog{b}" for b in range(2, 9)),
    *(f"tan{b}" for b in range(1, 9)), *(f"log{b}" for b in range(1, 8)),
)  # fmt: skip
ELEMENTS = (*INTEGERS, *MINIFLOATS, *LEVELS)
"""All that take a scale. `int1` needs a zero point besides."""
ALONE = ("fp16", "bf16", "e8m0")
BLOCKS = (None, (-1,), (8,), (5,), (1,), (100,), (8, 4), (2, -1), (-1, -1, -1))
"""Of widths up to 20: some last groups are short, some blocks longer than the tensor."""
SCALES = (
    None, "e8m0", "fp16", "bf16", "fp8_e4m3:tensor", "fp8_e5m2:channel", "uint8:group2",
    "int8:tensor:scale(fp16)", "uint4:group3:asym:scale(fp8_e4m3:tensor:scale(bf16))",
)  # fmt: skip


@st.composite
def formats(draw: st.DrawFn, dynamic: bool | None = None) -> QFormat:
    name = draw(st.sampled_from((*ELEMENTS, "int1")))
    integer = isinstance(element(name), Integer) and not isinstance(element(name), Ternary)
    asym = name == "int1" or (integer and draw(st.booleans()))
    scale = draw(st.sampled_from(SCALES))
    stored = None if scale is None else QFormat.parse(scale)
    signed = name.startswith("int") and name != "int1" and not asym
    whole = draw(st.sampled_from(("", "full", "mirrored"))) if signed else ""
    moving = draw(st.booleans()) if dynamic is None else dynamic
    return QFormat(
        name,
        draw(st.sampled_from(BLOCKS)),
        symmetric=not asym,
        dynamic=moving,
        full=whole == "full",
        mirrored=whole == "mirrored" and (stored is None or stored.signed),
        scale=stored,
        clip=draw(st.floats(0.01, 0.99)) if moving and draw(st.booleans()) else 1.0,
        planes=name != "ternary" and draw(st.booleans()),
    )


@st.composite
def tensors(draw: st.DrawFn, rank: int | None = None) -> Tensor:
    """Up to three axes; random, zero in blocks, one huge number among small ones, tiny, halves."""
    sizes = st.lists(st.integers(1, 20), min_size=rank or 1, max_size=rank or 3)
    x = torch.randn(draw(sizes), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    kind = draw(st.sampled_from(("normal", "zeros", "huge", "tiny", "halves", "positive", "wide")))
    if kind == "zeros":
        x = torch.where(torch.arange(x.shape[-1]) % 8 < 5, 0.0, x)
        x[0] = 0.0
    elif kind == "huge":
        x.view(-1)[0] = -1e6
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "halves":
        x = (2 * x).round() / 2
    elif kind == "positive":
        x = x.abs() + 3
    elif kind == "wide":
        x = x * torch.exp2(torch.arange(x.shape[-1], dtype=torch.float32) - 10)
    return x.to(draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))))


def numbers(name: str) -> Tensor:
    """All numbers of an element, in rising order, without NaN and infinity."""
    values = element(name).values()
    if name == "ternary":
        values = torch.tensor([-1.0, 0.0, 1.0])
    return values[values.isfinite()].unique()
