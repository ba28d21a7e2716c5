"""The operators that qcompiler adds to aten: `qc::…`, in plain torch.

They are the reference: every backend kernel is compared with them. Everything else in a program is
an ordinary aten operator.

========================  =====================================================================
`qc::fake_quantize`       x' = dequantize(quantize(x)) with given scales, or dynamic ones
`qc::dequantize`          a stored (packed) weight as floating point numbers
`qc::lookup`              a stored (packed) weight by a codebook for each row
`qc::quantize`            q = clamp(round(x / s) + z) as integers, one in each element
`qc::dequantize_integers` (q - z) * s, the way back
`qc::dynamic_scale`       scale and zero point that cover the range of x
`qc::rope`                rotary position embedding, halves or interleaved pairs
`qc::hadamard`            x (O ⊗ H)ᵀ / √n along the last axis, as a fast transform
`qc::sparse_linear`       x Sᵀ with a sparse matrix S in CSR
========================  =====================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompiler.cores import orthogonal_core, refuses_transform
from qcompiler.formats import Grid, QFormat, dequantize
from qcompiler.hadamard import core_size, hadamard

FACTOR = 64
"""Size up to which a Hadamard matrix is multiplied as one."""

_library = torch.library.Library("qc", "DEF")
_library.define(
    "fake_quantize(Tensor x, str format, Tensor? scale=None, Tensor? zero=None) -> Tensor"
)
_library.define(
    "dequantize(Tensor data, Tensor? scale, Tensor? zero, str format, int width, ScalarType dtype)"
    " -> Tensor"
)
_library.define(
    "lookup(Tensor data, Tensor table, str format, int width, ScalarType dtype) -> Tensor"
)
_library.define(
    "quantize(Tensor x, str format, Tensor scale, Tensor? zero, ScalarType dtype) -> Tensor"
)
_library.define(
    "dequantize_integers(Tensor q, str format, Tensor scale, Tensor? zero, ScalarType dtype)"
    " -> Tensor"
)
_library.define("dynamic_scale(Tensor x, str format) -> (Tensor, Tensor)")
_library.define("hadamard(Tensor x, int core=1) -> Tensor")
_library.define("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor")
_library.define("sparse_linear(Tensor x, Tensor values, Tensor columns, Tensor rows) -> Tensor")


def fake_quantize(
    x: Tensor, format: str, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Round `x` to what `format` can hold; same shape and dtype as `x`.

    Without `scale` the format is dynamic: each block (a token, say) brings its own.
    """
    fmt = QFormat.parse(format)
    wide = x if x.dtype == torch.float64 else x.float()
    grid = Grid.fit(wide, fmt) if scale is None else Grid(fmt, scale, zero)
    y = grid.round(wide)
    if not fmt.is_integer:  # the nearest of a list of numbers is a number, whatever x is
        y = torch.where(wide.isnan(), wide, y)
    return y.to(x.dtype)


def dequantize_packed(
    data: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    format: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed codes (…, bytes) to numbers (…, `width`) of `dtype`; without `scale`, of scale 1."""
    fmt = QFormat.parse(format)
    scale = torch.ones((), device=data.device) if scale is None else scale
    return dequantize(fmt.unpack(data, width), scale, zero, fmt, dtype)


def lookup(data: Tensor, table: Tensor, format: str, width: int, dtype: torch.dtype) -> Tensor:
    """Packed codes (rows, bytes) to the numbers that each row's `table` (rows or 1, 2^bits) has
    for them: (rows, `width`) of `dtype`."""
    codes = QFormat.parse(format).unpack(data, width)
    return table.expand(codes.shape[0], -1).gather(1, codes.long()).to(dtype)


def quantize_integers(
    x: Tensor, format: str, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Integers of `x` in `format`, unpacked: the shape of `x`, of the integer type `dtype`."""
    wide = x if x.dtype == torch.float64 else x.float()
    return Grid(QFormat.parse(format), scale, zero).codes(wide).to(dtype)


def dequantize_integers(
    q: Tensor, format: str, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(q - z) * s for unpacked integers `q`, as floating point numbers of `dtype`."""
    return dequantize(q, scale, zero, QFormat.parse(format), dtype)


def dynamic_scale(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int16, zeros when symmetric) that let `format` hold `x`."""
    grid = Grid.fit(x, QFormat.parse(format))
    zero = torch.zeros_like(grid.scale, dtype=torch.int16) if grid.zero is None else grid.zero
    return grid.scale, zero


def hadamard_transform(x: Tensor, core: int = 1, transposed: bool = False) -> Tensor:
    """x (O ⊗ H)ᵀ along the last axis (…, n): O of `core` numbers (`cores.orthogonal_core`), and
    H = H₂ ⊗ … ⊗ H₂ ⊗ H_m, of n / core (`hadamard.hadamard`), over √(n / core).

    H is a product of factors of about 64, H_a ⊗ H_b ⊗ …, each a small product of matrices, so that
    it costs n (a + b + …) and not n²: factors of 2 would cost less yet, and take longer, as each
    goes over the memory once. A size without such a matrix (92 with a core of 1) is an error.
    """
    n = int(x.shape[-1])
    if reason := refuses_transform(n, core):
        raise ValueError(reason)
    size = n // core
    y, inner = x, 1
    while inner < n:
        if inner < size:
            width = core_size(size) if inner == 1 else 1
            assert width is not None
            while width < FACTOR and inner * width < size:
                width *= 2
            matrix = hadamard(width)
        else:
            width, matrix = core, orthogonal_core(core)
        assert matrix is not None
        factor = (matrix.t() if transposed else matrix).to(y)
        y = y.reshape(*x.shape[:-1], n // (inner * width), width, inner)
        y = factor @ y
        inner *= width
    out: Tensor = y.reshape(x.shape) * size**-0.5
    return out


def _hadamard(x: Tensor, core: int = 1) -> Tensor:
    return hadamard_transform(x, core)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of channels: x cos + rot(x) sin (RoFormer, Su et al. 2021, eq. 34).

    A pair is (i, i + d/2) by default, (2i, 2i + 1) when `interleaved`. `cos` and `sin` broadcast
    against `x`, whose last axis holds the d rotated channels.
    """
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return x * cos + turned * sin


def sparse_linear(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """x Sᵀ for a sparse matrix S (out, in) in CSR: (…, in) to (…, out).

    Row i holds `values[rows[i]:rows[i + 1]]` (of x's type) at `columns` of the same range. Each row
    sums what it reads of xᵀ, a bag of embeddings: the work is that of the entries, not of out × in.
    """
    table = x.reshape(-1, x.shape[-1]).t().contiguous()
    y = torch.nn.functional.embedding_bag(
        columns, table, rows, mode="sum", per_sample_weights=values, include_last_offset=True
    )
    return y.t().reshape(*x.shape[:-1], y.shape[0]).contiguous()


def _fake_quantize_shape(
    x: Tensor, format: str, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x)


def _dequantize_shape(
    data: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    format: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    return data.new_empty((*data.shape[:-1], width), dtype=dtype)


def _lookup_shape(
    data: Tensor, table: Tensor, format: str, width: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty((*data.shape[:-1], width), dtype=dtype)


def _quantize_shape(
    x: Tensor, format: str, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _dynamic_scale_shape(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    fmt = QFormat.parse(format)
    shape = fmt.scale_shape(tuple(x.shape))
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int16)


def _hadamard_shape(x: Tensor, core: int = 1) -> Tensor:
    if reason := refuses_transform(int(x.shape[-1]), core):
        raise ValueError(reason)
    return torch.empty_like(x)


def _rope_shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return x * cos + x * sin


def _sparse_linear_shape(x: Tensor, values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows.shape[0] - 1))


for _name, _run, _shape in (
    ("fake_quantize", fake_quantize, _fake_quantize_shape),
    ("dequantize", dequantize_packed, _dequantize_shape),
    ("lookup", lookup, _lookup_shape),
    ("quantize", quantize_integers, _quantize_shape),
    ("dequantize_integers", dequantize_integers, _quantize_shape),
    ("dynamic_scale", dynamic_scale, _dynamic_scale_shape),
    ("hadamard", _hadamard, _hadamard_shape),
    ("rope", rope, _rope_shape),
    ("sparse_linear", sparse_linear, _sparse_linear_shape),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qc::{_name}", _shape, lib=_library)


def _no_context(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
    """Nothing of the forward is needed backward."""


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Rounding counts as the identity (Bengio et al. 2013)."""
    return grad, None, None, None


def _hadamard_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.core = inputs[1]


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return hadamard_transform(grad, ctx.core, transposed=True), None


def _rope_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The rotation by the opposite angles; the angles themselves are no parameters."""
    cos, sin = ctx.saved_tensors
    turned = grad * sin
    back = rope(turned, torch.zeros_like(cos), -torch.ones_like(sin), ctx.interleaved)
    return grad * cos + back, None, None, None


for _name, _backward, _context in (
    ("fake_quantize", _straight_through, _no_context),
    ("hadamard", _hadamard_backward, _hadamard_context),
    ("rope", _rope_backward, _rope_context),
):
    torch.library.register_autograd(f"qc::{_name}", _backward, setup_context=_context, lib=_library)
