"""Linear layers as other libraries run them: each maker gives a function x → y for one weight.

A maker takes the weight (out, in) float32 and the number of threads, and raises what its library
raises when that cannot run it here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

Run = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor, int], Run]


def torch_float(weight: Tensor, threads: int) -> Run:
    """F.linear in float32."""
    return lambda x: linear(x, weight)


def torch_bfloat16(weight: Tensor, threads: int) -> Run:
    """F.linear in bfloat16; the input is rounded in the call."""
    half = weight.bfloat16()
    return lambda x: linear(x.bfloat16(), half).float()


def torch_dynamic(weight: Tensor, threads: int) -> Run:
    """torch.ao's dynamic int8 linear."""
    packed = _torch_packed(weight)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=False)


def torch_static(weight: Tensor, threads: int) -> Run:
    """torch.ao's static int8 linear, input and output rounded per tensor."""
    packed = _torch_packed(weight)
    spread = float(weight.norm(dim=1).mean()) * 4.5 / 127

    def run(x: Tensor) -> Tensor:
        q = torch.quantize_per_tensor(x, 4.5 / 127, 128, torch.quint8)
        return torch.ops.quantized.linear(q, packed, spread, 128).dequantize()

    return run


def _torch_packed(weight: Tensor) -> torch.ScriptObject:
    """int8 rows for the engine `x86`, which torch has first here."""
    torch.backends.quantized.engine = "x86"
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    q = torch.quantize_per_channel(weight, weight.abs().amax(1) / 127, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(q, None)


def torch_int4(weight: Tensor, threads: int) -> Run:
    """torch's int4 product with bfloat16 activations, groups of 32."""
    q, scale = _groups(weight, 32, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q + 8, 1)
    half = scale.t().bfloat16()
    scales = torch.stack([half, torch.zeros_like(half)], -1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: product(x.bfloat16(), packed, 32, scales).float()


def torchao_dynamic(weight: Tensor, threads: int) -> Run:
    """torchao's int8 dynamic activations and int8 weights, compiled as it advises."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    model = torch.nn.Sequential(layer).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, dynamic=True)


def ort_dynamic(weight: Tensor, threads: int) -> Run:
    """onnxruntime's quantize_dynamic: activations per tensor, weights per tensor."""
    return _session(_ort_quantized(weight, static=False), threads)


def ort_qdq(weight: Tensor, threads: int) -> Run:
    """onnxruntime's static QDQ, uint8 activations and int8 weights per channel."""
    return _session(_ort_quantized(weight, static=True), threads)


def ort_nbits(bits: int, block: int, level: int) -> Maker:
    """onnxruntime's MatMulNBits; at level 4 activations are rounded to int8 by blocks."""

    def make(weight: Tensor, threads: int) -> Run:
        from onnx import TensorProto, helper

        q, scale = _groups(weight, block, bits)
        out, width = weight.shape
        codes = (q + (1 << bits - 1)).to(torch.uint8).reshape(out, width // block, block)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=width, N=out, bits=bits, block_size=block, accuracy_level=level,
        )  # fmt: skip
        constants = {"w": codes.numpy(), "s": scale.flatten().numpy()}
        return _session(_model([node], constants, TensorProto.FLOAT, out, width), threads)

    return make


def openvino_weights(bits: int, block: int) -> Maker:
    """OpenVINO with weights in integers; it rounds activations by groups itself where it pays."""

    def make(weight: Tensor, threads: int) -> Run:
        import openvino as ov
        from openvino import opset13 as ops

        q, scale = _groups(weight, block or weight.shape[1], bits)
        out, width = weight.shape
        shape = [out, width // block, block] if block else [out, width]
        values = q.reshape(shape).numpy().astype(np.int8)
        kind = ov.Type.i4 if bits == 4 else ov.Type.i8
        constant = ops.constant(values, dtype=kind)
        decoded = ops.convert(constant, ov.Type.f32)
        factor = ops.constant(scale.reshape([*shape[:-1], 1]).numpy())
        decoded = ops.reshape(
            ops.multiply(decoded, factor), ops.constant(np.array([out, width])), False
        )
        x = ops.parameter([-1, width], ov.Type.f32)
        model = ov.Model([ops.matmul(x, decoded, False, True)], [x])
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

        def run(x: Tensor) -> Tensor:
            request.infer([x.numpy()], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor().data)

        return run

    return make


PEERS: dict[str, Maker] = {
    "torch float32": torch_float,
    "torch bfloat16": torch_bfloat16,
    "torch int8 dynamic": torch_dynamic,
    "torch int8 static": torch_static,
    "torch int4pack": torch_int4,
    "torchao int8 dynamic": torchao_dynamic,
    "onnxruntime dynamic": ort_dynamic,
    "onnxruntime QDQ": ort_qdq,
    "MatMulNBits 4:32 level 0": ort_nbits(4, 32, 0),
    "MatMulNBits 4:32 level 4": ort_nbits(4, 32, 4),
    "MatMulNBits 4:128 level 4": ort_nbits(4, 128, 4),
    "MatMulNBits 8:32 level 4": ort_nbits(8, 32, 4),
    "OpenVINO int8": openvino_weights(8, 0),
    "OpenVINO int4:128": openvino_weights(4, 128),
}
BITS = {
    n: 32 if "float32" in n else 16 if "bfloat16" in n else 4 if "int4" in n or " 4:" in n else 8
    for n in PEERS
}
"""Of a weight, by name."""


def _groups(weight: Tensor, block: int, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes int32 (out, in) and scales (out, groups)."""
    out, width = weight.shape
    blocks = weight.reshape(out, width // block, block)
    top = (1 << bits - 1) - 1
    scale = blocks.abs().amax(-1, keepdim=True) / top
    q = (blocks / scale).round().clamp(-top, top).int().reshape(out, width)
    return q, scale.squeeze(-1)


def _model(nodes, constants, kind, out: int, width: int) -> bytes:
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes, "linear",
        [helper.make_tensor_value_info("x", kind, ["tokens", width])],
        [helper.make_tensor_value_info("y", kind, ["tokens", out])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def _ort_quantized(weight: Tensor, static: bool) -> bytes:
    import tempfile
    from pathlib import Path

    from onnx import TensorProto, helper
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(5)
            self.left = [torch.randn(256, weight.shape[1], generator=generator).numpy()]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return {"x": self.left.pop()} if self.left else None

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    constants = {"w": weight.t().contiguous().numpy()}
    plain = _model([node], constants, TensorProto.FLOAT, *weight.shape)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(plain)
        if static:
            quantize_static(
                source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
        else:
            quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        return target.read_bytes()


def _session(model: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
