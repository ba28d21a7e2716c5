"""Elements are what other packages mean by the same name: numbers, codes, rounding and bytes."""

from __future__ import annotations

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch
from all_formats import numbers
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qcompiler import Grid, QFormat
from qcompiler.formats import element


def inputs(top: float) -> Tensor:
    """Every float16 number up to `top`, halfway cases among them, and random ones."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    draw = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * top / 3
    x = torch.cat([every, draw, draw * 1e-3])
    return x[x.abs() <= top]


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_torch_float8(name: str, dtype: torch.dtype) -> None:
    """The same up to the top. Above, ours saturate; torch gives e5m2 infinity."""
    kind = element(name)
    assert kind.top == torch.finfo(dtype).max
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(dtype).float()
    assert torch.equal(kind.decode(codes).nan_to_num(7.0), theirs.nan_to_num(7.0))
    x = inputs(kind.top)
    assert torch.equal(kind.encode(x).to(torch.uint8), x.to(dtype).view(torch.uint8))
    beyond = torch.tensor([kind.top * 1.5, -torch.inf])
    assert kind.decode(kind.encode(beyond)).tolist() == [kind.top, -kind.top]


def test_torch_e8m0() -> None:
    """The same numbers. Between two, torch goes to the nearest and `e8m0` to the nearest by ratio;
    MX floors before either sees the number."""
    kind, codes = element("e8m0"), torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(kind.decode(codes).nan_to_num(0.0), theirs.nan_to_num(0.0))
    assert torch.equal(kind.encode(theirs[:-1]).to(torch.uint8), codes[:-1])
    x = torch.tensor([1.45, 1.55])
    assert kind.decode(kind.encode(x)).tolist() == [2.0, 2.0]
    assert x.to(torch.float8_e8m0fnu).float().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_torch_halves(name: str, dtype: torch.dtype) -> None:
    fmt, x = QFormat.parse(name), inputs(60000.0).reshape(1, -1)
    grid = Grid.fit(x, fmt)
    assert torch.equal(grid.round(x), x.to(dtype).float())
    assert torch.equal(fmt.pack(grid.quantize(x).data), x.to(dtype).view(torch.uint8))


# --- ml_dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fp4_e2m1", "float4_e2m1fn"),
        ("fp6_e2m3", "float6_e2m3fn"),
        ("fp6_e3m2", "float6_e3m2fn"),
        ("fp8_e3m4", "float8_e3m4"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
    ],
)
def test_ml_dtypes(name: str, theirs: str) -> None:
    kind, dtype = element(name), np.dtype(getattr(ml_dtypes, theirs))
    assert kind.top == float(ml_dtypes.finfo(dtype).max)
    codes = np.arange(2**kind.bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(kind.values().numpy(), values)
    x = inputs(kind.top)
    expected = x.numpy().astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(kind.encode(x).numpy().astype(np.uint8), expected)


def test_e4m3_is_not_the_one_of_ieee() -> None:
    assert float(ml_dtypes.finfo(ml_dtypes.float8_e4m3).max) == 240 != element("fp8_e4m3").top


# --- onnx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("int4:unscaled", "int4"),
        ("uint4:unscaled", "uint4"),
        ("int2:unscaled", "int2"),
        ("uint2:unscaled", "uint2"),
        ("fp4_e2m1:unscaled", "float4_e2m1fn"),
    ],
)
def test_onnx_packs_the_same(text: str, dtype: str) -> None:
    fmt = QFormat.parse(text)
    codes = torch.arange(fmt.qmin, fmt.qmax + 1).repeat(3)[None]
    values = fmt.kind.decode(codes).numpy().astype(getattr(ml_dtypes, dtype))
    tensor = numpy_helper.from_array(values)
    assert tensor.raw_data == bytes(fmt.pack(codes)[0].tolist())


def onnx_round(x: Tensor, grid: Grid, type: int) -> tuple[Tensor, Tensor]:
    """Codes (as numbers) and values of QuantizeLinear and DequantizeLinear."""
    block = grid.format.blocks(tuple(x.shape))[1]
    extra = {"block_size": block} if block != -1 else {}
    scale = grid.scale if extra else grid.scale[:, 0]
    nodes = [
        helper.make_node("QuantizeLinear", "xs", "q", axis=len(extra), output_dtype=type, **extra),
        helper.make_node("DequantizeLinear", "qs", "y", axis=len(extra), **extra),
        helper.make_node("Cast", "q", "c", to=TensorProto.FLOAT),
    ]
    if grid.zero is not None:
        zero = grid.zero if extra else grid.zero[:, 0]
        values = zero.flatten().tolist()
        constant = helper.make_tensor("z", type, zero.shape, values)
        nodes.insert(0, helper.make_node("Constant", [], "z", value=constant))
        nodes[1].input.append("z")
        nodes[1].attribute.remove(next(a for a in nodes[1].attribute if a.name == "output_dtype"))
        nodes[2].input.append("z")
    floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xscy"]
    graph = helper.make_graph(nodes, "g", floats[:2], floats[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    found = ReferenceEvaluator(model).run(None, {"x": x.numpy(), "s": scale.numpy()})
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


@pytest.mark.parametrize(
    ("text", "type"),
    [
        ("int8:channel:full", TensorProto.INT8),
        ("uint8:channel:asym", TensorProto.UINT8),
        ("int4:channel:full", TensorProto.INT4),
        ("int4:group8:full", TensorProto.INT4),
        ("int4:group8:asym", TensorProto.INT4),
        ("uint4:group8:asym", TensorProto.UINT4),
        ("fp8_e4m3:channel", TensorProto.FLOAT8E4M3FN),
        ("fp8_e5m2:channel", TensorProto.FLOAT8E5M2),
        ("fp8_e4m3:group8", TensorProto.FLOAT8E4M3FN),
        ("fp4_e2m1:channel", TensorProto.FLOAT4E2M1),
    ],
)
def test_onnx_rounds_the_same(text: str, type: int) -> None:
    """Under scales that let some numbers saturate. Without `full`, ours stop at -qmax."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    found = Grid.fit(x, QFormat.parse(text))
    grid = Grid(found.format, found.scale * 0.8, found.zero)
    q = grid.quantize(x)
    codes, values = onnx_round(x, grid, type)
    assert torch.equal(grid.format.kind.decode(q.data), codes)
    assert torch.equal(q.dequantize(), values)


# --- normal floats -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats(bits: int) -> None:
    """As bitsandbytes' `create_normal_map` and, for other bits, LoftQ's build them (their offset is
    that of 4 bits whatever the bits). nf4 differs from the formula in its last bits: the table that
    everybody ships was computed once, in float32."""
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    ends = np.linspace(0.9677083, 0.5, half + 1)[:-1], np.linspace(0.9677083, 0.5, half)[:-1]
    up, down = ([quantile(p) for p in end] for end in ends)
    built = np.sort(np.array([*up, 0.0, *(-v for v in down)]))
    expected = torch.from_numpy(built / np.abs(built).max()).float()
    near = {"rtol": 0, "atol": 2.0**-22 if bits == 4 else 0}
    torch.testing.assert_close(numbers(f"nf{bits}"), expected, **near)


# --- NVFP4 and MXFP4 -----------------------------------------------------------------------------

GIVEN = ((torch.arange(128) * 7919 % 2003 - 1001) / 256).reshape(2, 64) / torch.tensor([[1], [64]])
EXPECTED = {
    # torchao 0.18.0, nvfp4_quantize(x, 16, per_tensor_amax_to_scale(amax)), and compressed-tensors
    # 0.19.0, calculate_qparams and quantize with the strategy tensor_group and generate_gparam.
    "nvfp4": (
        [126, 125, 126, 124, 78, 78, 78, 75],
        "7f6656452381a9ccedeeff776656452390badcedeeff676656451298cbddeeff"
        "7f6766453402a9cbddeefe7f6656452381a9cbddeeff776666452391caddeeff",
    ),
    # torchao 0.18.0, to_mx(x, …, 32, ScaleCalculationMode.FLOOR).
    "mxfp4": (
        [126, 126, 120, 120],
        "7f7766553481badceeffff777766452390caddeeffff7767664513a8cbedfeff"
        "7f7767563412a9dcedfeff7f7767563481badceeffff777766552491caddeeff",
    ),
    "mxfp8_e4m3": (
        [120, 120, 114, 114],
        "fe7e7d7b7a787673706a61d2e6edf1f4f7f9fafcfdfe7e7e7c7b797775726d67"
        "56e0eaf0f3f6f8fafbfdfefe7e7d7b7a787673706b62cee5ecf1f4f7f9fafcfd"
        "fe7e7e7c7b797875726e6859dee9eff2f5f8fafbfdfefe7e7d7c7a797673706b"
        "63c6e4ecf1f4f7f9fafcfdfe7e7e7c7b797875726e685bdce9eff2f5f8fafbfc",
    ),
}
"""Format → codes of the scales, and the packed codes, of `GIVEN`."""


@pytest.mark.parametrize("name", EXPECTED)
def test_torchao_and_compressed_tensors(name: str) -> None:
    fmt = QFormat.parse(name)
    q = Grid.fit(GIVEN, fmt).quantize(GIVEN)
    assert q.grid.stored is not None
    scales, data = EXPECTED[name]
    assert q.grid.stored.data.flatten().tolist() == scales
    assert bytes(fmt.pack(q.data).flatten().tolist()).hex() == data
