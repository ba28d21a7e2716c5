"""Weights as compressed-tensors stores them: tensors, and the `quantization_config` that says how.

    pack-quantized    weight_packed (int32, N bits each), weight_scale, weight_shape
    int-quantized     weight (int8), weight_scale            with inputs in integers
    float-quantized   weight (float8), weight_scale          with inputs in floating point
    naive-quantized   weight (float8), weight_scale          with inputs as they are

With zero points `weight_zero_point`, with static inputs `input_scale`, `input_zero_point`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors import __version__
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import Tensor, nn

from qcompiler.backends.checkpoint.schemes import (
    input_args,
    input_note,
    is_symmetric,
    weight_args,
)
from qcompiler.backends.checkpoint.weights import Weights
from qcompiler.errors import BackendError
from qcompiler.formats import Grid, QFormat, QTensor

PACKED, NAIVE = "pack-quantized", "naive-quantized"


@dataclass(frozen=True)
class Compressed:
    """All tensors of a folder, and what its config says of them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    """Format → layers."""
    notes: dict[str, None] = field(default_factory=dict)


def compress(weights: Weights, module: nn.Module) -> Compressed:
    """`weights` of `module` in the layout of compressed-tensors."""
    made = Compressed(dict(weights.floats))
    groups: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    modules = dict(module.named_modules())
    for layer, stored in sorted(weights.codes.items()):
        if not isinstance(modules[layer], nn.Linear | nn.Embedding):
            raise BackendError(
                f"{layer} is a {type(modules[layer]).__name__}; a checkpoint stores nn.Linear and "
                "nn.Embedding in codes. Leave its weight in floating point"
            )
        scheme = _scheme(type(modules[layer]), stored, weights.inputs.get(layer))
        _, layers = groups.setdefault(scheme.model_dump_json(), (scheme, []))
        layers.append(layer)
        made.formats[scheme.format] = made.formats.get(scheme.format, 0) + 1
        dtype = modules[layer].weight.dtype
        grid = weights.inputs.get(layer)
        parts = {f"weight{k}": v for k, v in _weight(layer, stored, scheme, dtype).items()}
        parts |= {} if grid is None else _input(layer, grid, dtype)
        made.tensors.update({f"{layer}.{name}": t for name, t in parts.items()})
        made.notes.update(dict.fromkeys(_notes(stored, grid, parts, dtype)))
    if groups:
        made.config.update(_config(list(groups.values()), modules))
    return made


def _scheme(kind: type, stored: QTensor, grid: Grid | None) -> QuantizationScheme:
    weights = QuantizationArgs(**weight_args(stored.format, stored.data.shape[1]))
    inputs = None if grid is None else QuantizationArgs(**input_args(grid.format))
    scheme = QuantizationScheme(targets=[], weights=weights, input_activations=inputs)
    # transformers cannot make an embedding whose weight is packed
    packs = not issubclass(kind, nn.Embedding)
    scheme.format = infer_module_format(kind, scheme).value if packs else NAIVE
    return scheme


def _weight(
    layer: str, stored: QTensor, scheme: QuantizationScheme, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a weight, by what follows `weight` in their names."""
    fmt, args = stored.format, scheme.weights
    if args.group_size and stored.data.shape[1] % args.group_size:
        raise BackendError(
            f"{layer}: rows of {stored.data.shape[1]} in groups of {args.group_size} leave a short "
            "last group, which a checkpoint does not hold; take groups that divide it, or `channel`"
        )
    shape = (1,) if args.strategy == "tensor" else (stored.data.shape[0], -1)
    parts = {"_scale": _scale(layer, stored.scale.reshape(shape), dtype)}
    if fmt.is_integer:
        codes, zero = _signed(stored.data, fmt), _zero(layer, stored.grid)
    else:
        codes, zero = stored.data.to(torch.uint8).view(torch.float8_e4m3fn), None
    if zero is not None:
        zero = zero.expand(stored.scale.shape).reshape(shape).contiguous()
        packed = scheme.format == PACKED and args.strategy != "tensor"
        parts["_zero_point"] = pack_to_int32(zero, fmt.bits, packed_dim=0) if packed else zero
    if scheme.format == PACKED:
        held = torch.tensor(stored.data.shape)
        return parts | {"_packed": pack_to_int32(codes, fmt.bits), "_shape": held}
    return parts | {"": codes}


def _input(layer: str, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a static input."""
    if grid.format.dynamic:
        return {}
    parts = {"input_scale": _scale(layer, grid.scale.reshape(1), dtype)}
    zero = _zero(layer, grid)
    return parts if zero is None else parts | {"input_zero_point": zero.reshape(1)}


def _signed(codes: Tensor, fmt: QFormat) -> Tensor:
    """Codes in two's complement, int8."""
    return (codes - (0 if fmt.signed else 1 << (fmt.bits - 1))).to(torch.int8)


def _zero(layer: str, grid: Grid) -> Tensor | None:
    """Zero points for signed codes; None if they are all zero by format."""
    fmt = grid.format
    if is_symmetric(fmt):
        return None
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    if not torch.equal(zero, zero.round()):
        raise BackendError(
            f"{layer}: its zero points lie between two codes (HQQ), which a checkpoint does not "
            "hold; round by another method than `hqq`"
        )
    return _signed(zero, fmt)


def _scale(layer: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the type of the model, which is the one that they are read in."""
    kept = scale.to(dtype)
    if not bool((kept.isfinite() & (kept != 0)).all()):
        raise BackendError(
            f"{layer}: a scale is out of the range of {dtype}, the type of the model; compile the "
            "model in another type"
        )
    return kept.contiguous()


def _notes(
    stored: QTensor, grid: Grid | None, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """What readers of a layer do otherwise than the reference."""
    notes = []
    if "weight_zero_point" in parts and parts["weight_zero_point"].dtype == torch.int32:
        notes.append(
            f"packed zero points ({stored.format}): transformers loads them with "
            "`CompressedTensorsConfig(dequantize=True)` only (compressed-tensors 0.20)"
        )
    if not torch.equal(stored.scale.to(dtype).float(), stored.scale):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        notes.append(
            f"scales of {stored.format} are rounded to {short}, the model's type; with "
            f"`scale({short})` in the format they are that already"
        )
    if grid is not None and (note := input_note(grid.format)):
        notes.append(note)
    return notes


def _config(
    groups: list[tuple[QuantizationScheme, list[str]]], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """The `quantization_config`: which layers are stored and computed how, and which are not."""
    stored = {layer for _, layers in groups for layer in layers}
    linears = {name for name, m in modules.items() if isinstance(m, nn.Linear)}
    alike = len(groups) == 1 and stored <= linears
    for scheme, layers in groups:
        scheme.targets = ["Linear"] if alike else layers
    formats = {scheme.format for scheme, _ in groups}
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme for i, (scheme, _) in enumerate(groups)},
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=sorted(linears - stored),
        quantization_status="compressed",
    )
    told = json.loads(config.model_dump_json(exclude={"quant_method"}))
    return {"quant_method": "compressed-tensors", "version": __version__, **told}
