"""ONNX files of small models, written by others: torch's exporters, ONNX Runtime's quantizers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from small_models import build
from torch import Tensor, nn

MODELS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "bert",
    "vit", "deit", "swin", "resnet", "mobilenet_v2", "whisper", "t5",
)  # fmt: skip
"""Architectures that torch exports to ONNX with dynamic batch and length."""


def export(name: str, path: Path, opset: int = 20) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write the small model called `name` by torch's exporter; returns it with its example."""
    model, example = build(name)
    model.requires_grad_(False)
    shapes: dict[str, object] = {key: _open_axes(key, x) for key, x in example.items()}
    inputs: dict[str, object] = {**example}
    if "use_cache" in model.forward.__code__.co_varnames:
        inputs["use_cache"], shapes["use_cache"] = False, None
    for logger in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, kwargs=inputs, f=path, dynamo=True, dynamic_shapes=shapes,
            opset_version=opset, verbose=False, external_data=False,
        )  # fmt: skip
    return model, example


def _open_axes(name: str, x: Tensor) -> dict[int, str]:
    if x.ndim != 2 or x.is_floating_point():
        return {0: "batch"}
    return {0: "batch", 1: "target" if "decoder" in name else "sequence"}


class _ByPosition(nn.Module):
    """The older exporter takes positional inputs and tensors as outputs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        return self.model(**named).logits  # type: ignore[no-any-return]


def export_torchscript(name: str, path: Path, opset: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Write the small model called `name` by the exporter that torch had before."""
    model, example = build(name)
    model.requires_grad_(False)
    model.config._attn_implementation = "eager" if opset < 14 else "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _ByPosition(model, list(example)).eval(), tuple(example.values()), path, dynamo=False,
            opset_version=opset, input_names=list(example), output_names=["logits"],
            dynamic_axes={key: _open_axes(key, x) for key, x in example.items()},
        )  # fmt: skip
    return model, example


class _Reader(CalibrationDataReader):
    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def _static(source: Path, path: Path, batches: list[dict[str, np.ndarray]], form: str) -> None:
    quantize_static(
        source, path, _Reader(batches), quant_format=QuantFormat[form], per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def _nbits(source: Path, path: Path, bits: int) -> None:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=bits == 4,
                                     bits=bits)  # fmt: skip
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


def quantize(how: str, source: Path, path: Path, batches: list[dict[str, np.ndarray]]) -> None:
    """Quantize the file `source` by ONNX Runtime's own tools; `how` is a key of the tests."""
    bare = onnx.load(source)
    del bare.graph.value_info[:]  # the tools turn weights around and trip over what it says
    onnx.save(bare, source)
    if how in ("QDQ", "QOperator"):
        _static(source, path, batches, how)
    elif how == "dynamic":
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)
    elif how == "dynamic uint8":
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    else:
        _nbits(source, path, int(how[-1]))
