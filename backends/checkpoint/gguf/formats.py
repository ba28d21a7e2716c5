"""Which formats are GGUF's."""

from __future__ import annotations

from qcompiler.formats import QFormat, Scheme

BLOCK = 32
"""Numbers in a block."""
KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1"} | {
    (8, True): "Q8_0"
}
"""(Bits, whether without zero point) → type of tensor."""


def kind_of(fmt: QFormat) -> str | None:
    """The type of tensor that holds codes of `fmt` as they are; None if there is none."""
    integer = fmt.element.startswith(("int", "uint")) and fmt.is_integer
    block = None if fmt.block is None else fmt.block[-1]
    if not integer or (fmt.block is not None and len(fmt.block) > 1):
        return None
    if block not in (None, -1) and block % BLOCK:
        return None
    if fmt.symmetric and not fmt.signed:
        return None
    return KINDS.get((fmt.bits, fmt.symmetric))


def refusal(scheme: Scheme) -> str | None:
    """Why GGUF cannot say `scheme`; None if it can."""
    if scheme.activation is not None:
        return (
            f"GGUF says nothing of how inputs are rounded ({scheme}); round weights alone "
            "(`activation=float`)"
        )
    if scheme.weight is not None and kind_of(scheme.weight) is None:
        return (
            f"weights in {scheme.weight}: GGUF has int4, int5 (with and without zero points) and "
            "int8 in groups of a multiple of 32, or per channel"
        )
    return None
