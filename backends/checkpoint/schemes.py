"""Formats in the words of compressed-tensors, or the sentence that says why it has none for one.

==============================  ====================================================================
ours                            compressed-tensors' `QuantizationArgs`
==============================  ====================================================================
`intN`, `uintN` (N ≤ 8)         type int, num_bits N; codes are signed there, zero points with them
`fp8_e4m3`                      type float, num_bits 8
`tensor`, `channel`, `groupG`   strategy tensor, channel, group with group_size G
`token:dynamic`                 strategy token, dynamic
`asym`                          symmetric false
==============================  ====================================================================
"""

from __future__ import annotations

from qcompiler.formats import QFormat, Scheme

Args = dict[str, object]
"""Fields of a `QuantizationArgs`."""
FLOAT8 = "fp8_e4m3"


def refusal(scheme: Scheme) -> str | None:
    """Why compressed-tensors cannot say `scheme`; None if it can."""
    weight, x = scheme.weight, scheme.activation
    if weight is not None and (why := _element(weight)):
        return f"weights in {weight}: {why}"
    if weight is not None and weight.block is not None and len(weight.block) > 1:
        return f"weights in {weight}: a checkpoint has scales per tensor, channel or group"
    if x is None:
        return None
    if weight is None:
        return f"inputs in {x} with weights in floating point: a checkpoint has no such layer"
    if why := _element(x):
        return f"inputs in {x}: {why}"
    if x.mirrored or x.scale is not None or x.clip != 1.0:
        return f"inputs in {x}: a checkpoint has no `mirrored`, `scale(…)` or `clip` for inputs"
    if not x.dynamic and x.block is not None:
        return f"inputs in {x}: a checkpoint has static inputs per tensor only"
    if x.block is not None and len(x.block) > 1:
        return f"inputs in {x}: a checkpoint has dynamic inputs per tensor, token or group"
    return None


def _element(fmt: QFormat) -> str | None:
    if fmt.element == FLOAT8 or (fmt.element.startswith(("int", "uint")) and fmt.bits <= 8):
        return None
    return f"a checkpoint has int1 to int8 and {FLOAT8}, no {fmt.element}"


def weight_args(fmt: QFormat, width: int) -> Args:
    """The arguments for a weight with rows of `width`."""
    args = _args(fmt)
    if fmt.block is None:
        return args | {"strategy": "tensor"}
    group = fmt.blocks((1, width))[1]
    if group == -1 or group >= width:
        return args | {"strategy": "channel"}
    return args | {"strategy": "group", "group_size": group}


def input_args(fmt: QFormat) -> Args:
    """The arguments for a layer's input."""
    args = _args(fmt) | {"dynamic": fmt.dynamic}
    if fmt.block is None:
        return args | {"strategy": "tensor"}
    group = fmt.block[0]
    if group == -1:
        return args | {"strategy": "token"}
    return args | {"strategy": "group", "group_size": group}


def _args(fmt: QFormat) -> Args:
    kind = "float" if fmt.element == FLOAT8 else "int"
    return {"num_bits": fmt.bits, "type": kind, "symmetric": is_symmetric(fmt)}


def is_symmetric(fmt: QFormat) -> bool:
    """Whether it is, once its codes are signed."""
    return fmt.symmetric and (fmt.signed or not fmt.is_integer)


def input_note(fmt: QFormat) -> str | None:
    """What a reader does otherwise with an input in `fmt` than the reference."""
    if not fmt.is_integer or not fmt.symmetric or fmt.full:
        return None
    low, full = -(fmt.qmax + 1), str(fmt).replace(":dynamic", ":full:dynamic")
    if not fmt.dynamic:
        return f"inputs in {fmt}: readers clamp at {low}, the reference at {fmt.qmin}"
    return (
        f"inputs in {fmt}: compressed-tensors takes max|x| / {fmt.qmax + 0.5} for a scale and "
        f"codes from {low}, the reference max|x| / {fmt.qmax}; `{full}` is its grid exactly"
    )
