"""Which of the kernels that fit serves a linear: the one that measures best here, memory counted.

    seconds · √(bits of a weight in memory), the least        at 1 and at 64 tokens, geometric mean

A kernel that holds weights as floats is taken if it is much faster, as it often is with weights of
2 bits or, without rounded activations, of 8. What rounds the input is common to all and left out.
Results are kept on disk for each machine, number of threads, shape and scheme.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import onnx_ir as ir
import torch

from qcompiler.backends.onnxruntime import capabilities as names
from qcompiler.backends.onnxruntime.layout import block_of
from qcompiler.backends.onnxruntime.probe import Run, nbits, node, opened, rows, saturates
from qcompiler.costs.cache import Cache, cache_folder, environment
from qcompiler.export.weights import container
from qcompiler.formats import QFormat, Scheme
from qcompiler.timing import floors

BYTES = (names.INTEGER, names.QDQ)
"""Kernels whose input is bytes."""
SMALL = 2**16
"""Weights below which the table decides: nothing is gained there."""
TOKENS = (1, 64)
SECONDS = 0.05
"""For each kernel at each number of tokens."""
ROWS = 4096
"""Outputs that are timed at most: more take as much longer in all kernels."""
CACHED, COPIES = 2**25, 8
"""Bytes of weights that are gone through in turn, so that they come from memory as in a network,
and copies at most."""


def best(kernels: Sequence[str], shape: tuple[int, int], scheme: Scheme) -> tuple[str, str]:
    """(the kernel for a weight of `shape` (N, K), the same with how it compares to the others)."""
    first = kernels[0]
    if len(kernels) == 1 or math.prod(shape) < SMALL:
        return first, first
    out, width = shape
    times = _seconds(tuple(kernels), min(out, ROWS), width, scheme, torch.get_num_threads())
    assert scheme.weight is not None
    bits = {k: _bits(k, scheme.weight) for k in kernels}
    chosen = min(kernels, key=lambda k: times[k] * math.sqrt(bits[k]))
    others = ", ".join(
        f"{times[k] / times[chosen]:.1f} × as fast here as {k}" for k in kernels if k != chosen
    )
    return chosen, f"{chosen}, {others}; {bits[chosen]} bits a weight in memory"


def _bits(kernel: str, weight: QFormat) -> int:
    held = {names.INTEGER: 8, names.QDQ: 8, names.TWO_NBITS: 8, names.DEQUANTIZED: 32}
    return held.get(kernel, container(weight.bits))


@lru_cache(maxsize=1024)
def _seconds(
    kernels: tuple[str, ...], out: int, width: int, scheme: Scheme, threads: int
) -> dict[str, float]:
    cache = Cache(cache_folder("onnxruntime"), environment("onnxruntime"))
    key = f"{out}x{width} {scheme} of {' '.join(kernels)}"
    kept = cache.get(key)
    if not isinstance(kept, dict) or set(kept) != set(kernels):
        kept = _measure(kernels, out, width, scheme)
        cache.put(key, kept)
    return {str(name): float(value) for name, value in kept.items()}


def _measure(kernels: tuple[str, ...], out: int, width: int, scheme: Scheme) -> dict[str, float]:
    made = {k: _made(k, out, width, scheme) for k in kernels}
    times: dict[str, list[float]] = {k: [] for k in kernels}
    for tokens in TOKENS:
        calls = {k: partial(_each, runs, _input(k, tokens, width)) for k, runs in made.items()}
        for kernel, value in floors(calls, seconds=SECONDS).items():
            times[kernel].append(value / len(made[kernel]))
    return {kernel: statistics.geometric_mean(values) for kernel, values in times.items()}


def _each(runs: list[Run], x: np.ndarray) -> None:
    for run in runs:
        run(x)


def _input(kernel: str, tokens: int, width: int) -> np.ndarray:
    if kernel in BYTES:
        return np.full((tokens, width), 3, np.uint8)
    return np.full((tokens, width), 0.5, np.float32)


def _made(kernel: str, out: int, width: int, scheme: Scheme) -> list[Run]:
    """Copies of the product as the dialect writes it; their numbers are of no account."""
    weight = scheme.weight
    assert weight is not None
    bits = _bits(kernel, weight)
    copies = max(1, min(COPIES, CACHED * 8 // (out * width * bits)))
    x = rows(width, ir.DataType.UINT8 if kernel in BYTES else ir.DataType.FLOAT)
    y = _product(kernel, x, out, width, scheme)
    return opened(x, y, saturates(), copies)


def _product(kernel: str, x: ir.Value, out: int, width: int, scheme: Scheme) -> ir.Value:
    weight, scale = scheme.weight, np.full(out, 0.01, np.float32)
    assert weight is not None
    if kernel == names.DEQUANTIZED:
        return node("MatMul", x, np.full((width, out), 0.01, np.float32))
    if kernel in BYTES:
        step, middle = np.float32(0.1), np.uint8(128)
        codes, zeros = np.full((width, out), 3, np.int8), np.zeros(out, np.int8)
        if kernel == names.INTEGER:
            total = node("MatMulInteger", x, codes, np.array(middle), zeros)
            return node("Mul", node("Mul", node("Cast", total, to=1), np.array(step)), scale)
        floats = node("DequantizeLinear", x, np.array(step), np.array(middle))
        return node("MatMul", floats, node("DequantizeLinear", codes, scale, zeros, axis=1))
    block = block_of(weight, width, scheme.activation if kernel == names.NBITS_INT8 else None)
    assert block is not None
    blocks = -(-width // block)
    halves, bits = (2, 4) if kernel == names.TWO_NBITS else (1, container(weight.bits))
    level = 4 if kernel == names.NBITS_INT8 else 1
    data = np.full((out, blocks, block * bits // 8), 0x5A, np.uint8)
    scales = np.full((out, blocks), 0.01, np.float32)
    parts = [nbits(x, data, scales, bits, block, level) for _ in range(halves)]
    return parts[0] if halves == 1 else node("Add", *parts)
