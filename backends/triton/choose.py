"""Which kernel serves a linear: the one that measures fastest on this GPU; without one, in the
interpreter, the first in the table that takes the site."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qcompiler.backends.triton.kernels import KERNELS, Kernel
from qcompiler.backends.triton.runtime import device
from qcompiler.backends.triton.weights import Weight
from qcompiler.formats import QTensor, Scheme
from qcompiler.sites import Site

TOKENS = (1, 64)


def candidates(site: Site, scheme: Scheme, q: QTensor) -> tuple[list[Kernel], dict[str, str]]:
    """Kernels that take the site, and why others made for its formats do not."""
    found, refused = [], {}
    for kernel in KERNELS.values():
        if any(c.fits(site, scheme) for c in kernel.capabilities):
            if reason := kernel.unfit(q) or kernel.missing():
                refused[kernel.name] = reason
            else:
                found.append(kernel)
    return found, refused


def times(
    kernels: list[Kernel],
    scheme: Scheme,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    prepare: Callable[[Kernel], Weight],
) -> Mapping[str, float]:
    """Kernel → seconds for a weight (rows, inputs), geometric mean over `TOKENS`, on this GPU;
    empty without one."""
    if device().type != "cuda":
        return {}
    from qcompiler.backends.triton.tune import remembered, seconds, size

    def measure(kernel: Kernel) -> float:
        weight = prepare(kernel)
        tensors = {k: v.to(device()) for k, v in weight.tensors.items()}
        if kernel.name == "float":
            tensors["weight"] = tensors["weight"].to(dtype)
        largest = max(tensors, key=lambda name: size(tensors[name]))
        found = []
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], device=device(), dtype=dtype)
            run = partial(_run, kernel, x, weight, scheme)

            def on(weights: Tensor, run: Callable[..., object] = run) -> object:
                return run(tensors | {largest: weights})

            # torch rounds activations in ways that cannot be captured: then none of them are.
            capture = scheme.activation is None
            found.append(seconds(on, tensors[largest], capture=capture))
        return statistics.geometric_mean(found)

    about = f"{scheme} {shape} {dtype}"
    return {k.name: remembered(f"{k.name} {about}", partial(measure, k)) for k in kernels}


def _run(
    kernel: Kernel, x: Tensor, weight: Weight, scheme: Scheme, tensors: Mapping[str, Tensor]
) -> object:
    """One run with dynamic activations, as they would be computed in the program."""
    if scheme.activation is not None and not kernel.rounds:
        x = torch.ops.qc.fake_quantize(x, str(replace(scheme.activation, dynamic=True)))

    def call(target: Any, *args: object) -> Any:
        return target(*args)

    def rounded(fp8: bool) -> Any:
        return torch.ops.qc_triton.round_rows(x, None, fp8)

    return kernel.compute(call, x, rounded, tensors, weight, None, x.dtype)
