"""Files of a few nodes, by which this machine's kernels are tried before they are trusted."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

MICROSOFT = "com.microsoft"
Run = Callable[[np.ndarray], np.ndarray]


def session_options(exact: bool) -> ort.SessionOptions:
    """Options for kernels that compute what the program says."""
    options = ort.SessionOptions()
    # The process has one budget of threads, and torch is where the user sets it.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Errors come as exceptions, with the same text.
    options.log_severity_level = 4
    # Without VNNI, products of uint8 and int8 are added in pairs in 16 bits, which saturates. This
    # makes weights uint8, whose kernels are exact and slower: so only where it is needed.
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    # A dequantized weight may become MatMulNBits, which by default rounds activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


def rows(width: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """The file's input, any number of rows."""
    return ir.Value(name="x", shape=ir.Shape(["m", width]), type=ir.TensorType(dtype))


def node(op: str, *inputs: ir.Value | np.ndarray, domain: str = "", **attributes: int) -> ir.Value:
    """What one operator makes of values and of weights of its own."""
    values = [
        value if isinstance(value, ir.Value) else ir.Value(const_value=ir.tensor(value))
        for value in inputs
    ]
    made: ir.Value = ir.node(op, values, attributes, domain=domain).outputs[0]
    return made


def nbits(
    x: ir.Value, data: np.ndarray, scale: np.ndarray, bits: int, block: int, level: int
) -> ir.Value:
    """`MatMulNBits` of data (N, blocks, bytes) and scale (N, blocks)."""
    assert x.shape is not None
    return node(
        *("MatMulNBits", x, data, scale),
        domain=MICROSOFT,
        K=int(x.shape[1]),  # type: ignore[arg-type]
        N=len(data),
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )


def opened(
    x: ir.Value, y: ir.Value, exact: bool, copies: int = 1, dtype: ir.DataType = ir.DataType.FLOAT
) -> list[Run]:
    """The function from `x` to `y`, of type `dtype`; each copy has weights of its own."""
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    waiting = [y]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if producer is not None and producer not in nodes:
            nodes.insert(0, producer)
            waiting += [v for v in producer.inputs if v is not None]
        elif value.const_value is not None:
            weights.append(value)
            value.name = f"w{len(weights)}"
    y.type = ir.TensorType(dtype)
    domains = {"": 21, MICROSOFT: 1}
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports=domains)
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return [
        partial(_run, ort.InferenceSession(model, session_options(exact))) for _ in range(copies)
    ]


def _run(session: ort.InferenceSession, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether this processor gets sums of 255 · 127 wrong in its kernels for uint8 and int8.

    Measured, because ONNX Runtime only asks if its kernels for uint8 are others: with VNNI it
    would give up more than half of the speed for nothing.
    """
    depth = 64
    x = rows(depth, ir.DataType.UINT8)
    total = node("MatMulInteger", x, np.full((depth, 32), 127, np.int8))
    run = opened(x, total, exact=False, dtype=ir.DataType.INT32)[0]
    # one row and many are different kernels
    sums = [run(np.full((count, depth), 255, np.uint8)) for count in (1, 8)]
    return not all((s == 255 * 127 * depth).all() for s in sums)


@lru_cache(maxsize=64)
def rounds_input(bits: int, block: int) -> bool:
    """Whether `MatMulNBits` of these `bits`, told to compute in int8, rounds its input in `block`s
    to -127 … 127, as `int8:group…:dynamic` does: on some processors it rounds otherwise, or not."""
    generator = np.random.default_rng(0)
    width, out = 3 * block, 32
    fields = generator.integers(0, 256, (out, 3, block * bits // 8), dtype=np.uint8)
    scale = generator.uniform(0.5, 2, (out, 3)).astype(np.float32)
    x = rows(width)
    run = opened(x, nbits(x, fields, scale, bits, block, level=4), exact=False)[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (fields[..., None] >> shifts & (2**bits - 1)).reshape(out, 3, block)
    w = (codes.astype(float) - 2 ** (bits - 1)) * scale[..., None]
    for count in (1, 8):  # see above
        values = generator.standard_normal((count, 3, block)).astype(np.float32)
        step = np.abs(values).max(-1, keepdims=True) / 127
        wanted = np.einsum("mbk,nbk->mn", np.round(values / step) * step.astype(float), w)
        off = run(values.reshape(count, width)) - wanted
        if np.linalg.norm(off) > 1e-5 * np.linalg.norm(wanted):
            return False
    return True
