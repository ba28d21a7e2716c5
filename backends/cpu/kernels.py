"""The kernels, as one table: what each serves, how a weight is prepared for it, what is called.

=============  ============================================================================
`integer`      generated: codes of 1-8 bits × int8 codes, exact integer sums
`decoding`     generated: codes of 1-8 bits, decoded in registers, × float32
`int8`         torch: int8 × int8 → int32, exact
`packed8`      torch: int8 weights, bfloat16 activations, float32 sums
`packed4`      torch: int4 weights in groups, bfloat16 activations, float32 sums
`conv`         generated: the same for convolutions (`choose_conv.py`)
`float`        float weights made once from the integers: small on disk only, never wrong
`gather`       an embedding that decodes the rows that are read
=============  ============================================================================
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

import qcompiler.backends.cpu.library  # noqa: F401  (defines operators)
from qcompiler.backend import Capability
from qcompiler.formats import Grid, QFormat, QTensor

GENERATED = importlib.util.find_spec("llvmlite") is not None
if GENERATED:
    from qcompiler.backends.cpu import generated
    from qcompiler.backends.cpu.codegen.isa import host

cpu = torch.ops.qc_cpu


@dataclass(frozen=True, eq=False)
class Static:
    """Scale and zero point of a site's activation, where they are known beforehand."""

    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """An operator with all that it needs besides x: operator(x, *parameters, *constants)."""

    operator: Callable[..., Tensor]
    parameters: dict[str, Tensor | None]
    """By name, in the order of the operator's arguments."""
    constants: tuple[object, ...] = ()
    rounds: bool = True
    """The operator rounds x itself."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(x, *self.parameters.values(), *self.constants)


Prepare = Callable[[QTensor, Tensor | None, QFormat | None, Static], Call]
"""(weight, bias, activation format, its scale) → the call"""


@dataclass(frozen=True)
class Kernel:
    """One kernel."""

    name: str
    claims: tuple[Capability, ...]
    prepare: Prepare
    shape: Callable[[int, int, QFormat], str | None] = lambda out, width, fmt: None
    """(out, in, weight format) → why the kernel cannot take it, or None."""
    proofs: tuple[tuple[str, str], ...] = field(default=())
    """(weight, activation) formats that it must be exact with, or nearly, before it is used."""

    @property
    def tolerance(self) -> float:
        """Largest relative error of its output against the reference."""
        return max(c.tolerance for c in self.claims)


def _claims(
    kernel: str,
    weights: tuple[str, ...],
    activations: tuple[str, ...],
    tolerance: float,
    accumulator: str,
    note: str,
    multiple_of: tuple[int, int] = (1, 1),
) -> tuple[Capability, ...]:
    return tuple(
        Capability(
            kernel,
            "linear",
            weight,
            activation,
            tolerance,
            note,
            decoded=True,
            accumulator=accumulator,
            multiple_of=multiple_of,
        )
        for weight in weights
        for activation in activations
    )


def point_of(activation: QFormat | None, static: Static) -> int | None:
    """The zero point of int8 codes, None for 0. Unsigned codes are moved by 128, so that they are
    int8 as well."""
    if activation is None or activation.dynamic:
        return None
    zero = 0 if static.zero is None else int(static.zero)
    return zero - (0 if activation.signed else 128) or None


def _generated(q: QTensor, bias: Tensor | None, activation: QFormat | None, static: Static) -> Call:
    out, point = q.data.shape[0], point_of(activation, static)
    packed = generated.pack(q, activation is None, point)
    parameters = {
        **packed._asdict(),
        "bias": generated.pack_bias(bias, out),
        "x_scale": None if static.scale is None else static.scale.float(),
        "x_zero": None if point is None else torch.tensor([float(point)]),
    }
    constants = (str(q.format.decoded), str(activation or "float"), out)
    return Call(cpu.linear.default, parameters, constants)


def _int8(q: QTensor, bias: Tensor | None, activation: QFormat | None, static: Static) -> Call:
    scale = q.scale.reshape(-1).float()
    parameters = {"weight": _bytes(q), "scale": scale, "bias": bias, "x_scale": static.scale}
    return Call(cpu.linear_int8.default, parameters)


def _packed8(q: QTensor, bias: Tensor | None, activation: QFormat | None, static: Static) -> Call:
    parameters = {"weight": _bytes(q), "scale": q.scale.reshape(-1).float(), "bias": bias}
    return Call(cpu.linear_packed8.default, parameters)


def _packed4(q: QTensor, bias: Tensor | None, activation: QFormat | None, static: Static) -> Call:
    assert q.format.block is not None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.data.int() + 8, 1)
    scale = q.scale.t().to(torch.bfloat16)
    scales = torch.stack([scale, torch.zeros_like(scale)], -1)
    parameters = {"weight": packed, "scales": scales, "bias": bias}
    constants = (q.format.block[0], int(q.data.shape[0]))
    return Call(cpu.linear_packed4.default, parameters, constants)


def _float(q: QTensor, bias: Tensor | None, activation: QFormat | None, static: Static) -> Call:
    parameters = {"weight": q.dequantize(), "bias": bias}
    return Call(torch.ops.aten.linear.default, parameters, rounds=False)


def _bytes(q: QTensor) -> Tensor:
    return q.data.to(torch.int8).contiguous()


def _shape4(out: int, width: int, fmt: QFormat) -> str | None:
    group = fmt.block[0] if fmt.block else 0
    if group not in (32, 64, 128) or width % group or out % 16:
        return (
            "takes groups of 32, 64 or 128 that divide the inputs, and rows in 16s; "
            f"found groups of {group}, {out} × {width}"
        )
    return None


def _shape8(out: int, width: int, fmt: QFormat) -> str | None:
    # torch's kernel reads 16 inputs at a time and does not look where the row ends.
    return None if width % 16 == 0 else f"takes inputs in 16s; found {width}"


INTEGERS = ("int[2-8]:*", "uint[1-8]:*", "ternary:*", "int1:*asym*")
TOKENS = (
    "int[2-8]:token:dynamic",
    "int[2-8]:token:dynamic:full",
    "int[2-8]:token:dynamic:clip*",
    "int[2-8]:tensor",
    "int[2-8]:tensor:full",
    "int[2-8]:tensor:asym",
    "uint[2-8]:tensor",
    "uint[2-8]:tensor:asym",
)
ANY = Capability("float", "linear", "*", "*", 1e-3, "float weights in memory", splits_sums=True)
ROWS = "decodes only the rows that are read"


def _kernels() -> list[Kernel]:
    made = []
    if GENERATED:
        made += [
            Kernel(
                "integer",
                _claims("integer", INTEGERS, TOKENS, 1e-5, "int32", "generated for this CPU"),
                _generated,
                generated.fits,
                (
                    ("int8:channel:full", "int8:token:dynamic:full"),
                    ("int4:group32:mirrored", "int8:token:dynamic:full"),
                ),
            ),
            Kernel(
                "decoding",
                _claims(
                    "decoding", INTEGERS, ("float",), 1e-5, "float32", "generated for this CPU"
                ),
                _generated,
                generated.fits,
                (("int8:channel", "float"), ("int4:group32", "float")),
            ),
        ]
    made += [
        Kernel(
            "int8",
            _claims(
                "int8",
                ("int8:channel",),
                ("int8:token:dynamic", "int8:tensor"),
                5e-3,
                "int32",
                "torch",
            ),
            _int8,
            proofs=(("int8:channel", "int8:token:dynamic"),),
        ),
        Kernel(
            "packed8",
            _claims(
                "packed8",
                ("int8:channel",),
                ("float",),
                2e-2,
                "float32",
                "torch, bfloat16 activations",
                (1, 16),
            ),
            _packed8,
            _shape8,
            (("int8:channel", "float"),),
        ),
        Kernel(
            "packed4",
            _claims(
                "packed4",
                ("int4:group*[0-9ld]",),
                ("float",),
                3e-2,
                "float32",
                "torch, bfloat16 activations",
                (16, 32),
            ),
            _packed4,
            _shape4,
            (("int4:group32", "float"),),
        ),
        Kernel("float", (ANY,), _float),
    ]
    return made


KERNELS = {k.name: k for k in _kernels()}
"""Kernels of linear layers by name."""
GATHER = Capability("gather", "embedding", "*", "float", 1e-6, ROWS)


def instructions() -> str:
    """The instruction set that kernels are generated for; empty if none can be."""
    return host().name if GENERATED else ""


@lru_cache(maxsize=64)
def self_test(name: str) -> str | None:
    """Prove a kernel on this CPU with weights and activations at ±qmax; None, or what is wrong.

    This is where sums of 16 bits overflow: 255 · 127 · 2 needs 17.
    """
    kernel = KERNELS[name]
    for weight, activation in kernel.proofs:
        fmt = QFormat.parse(weight)
        rounding = None if activation == "float" else QFormat.parse(activation)
        if reason := _proof(kernel, fmt, rounding):
            return reason
    return None


def _proof(kernel: Kernel, fmt: QFormat, activation: QFormat | None) -> str | None:
    generator = torch.Generator().manual_seed(0)
    exact = activation is not None or kernel.tolerance < 1e-4
    for rows in (1, 17):
        sign = torch.randint(0, 2, (64, 512), generator=generator, dtype=torch.int16)
        extremes = torch.where(sign == 0, fmt.qmin, fmt.qmax).to(torch.int16)
        for data in (torch.full_like(sign, fmt.qmax), torch.full_like(sign, fmt.qmin), extremes):
            q = QTensor(data, Grid(fmt, torch.full(fmt.scale_shape((64, 512)), 0.5)))
            if activation is None:
                x = rounded = torch.rand(rows, 512, generator=generator)
            else:
                x = torch.ones(rows, 512)
                rounded = Grid.fit(x, activation).round(x)
            try:
                y = kernel.prepare(q, None, activation, Static())(x)
            except RuntimeError as error:  # torch built without this kernel
                return f"torch {torch.__version__} cannot run it here: {str(error).splitlines()[0]}"
            want = rounded.double() @ q.dequantize(torch.float64).t()
            off = float((y.double() - want).norm() / want.norm())
            if not off <= (1e-5 if exact else 1e-2):
                return (
                    f"on this CPU its sums are off by {off:.1%} with weights at {fmt.qmin} and "
                    f"{fmt.qmax}, as where partial sums of 16 bits saturate"
                )
    return None
