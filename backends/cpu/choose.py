"""Which kernel serves a linear: the one that measures fastest here, on its own shape.

Each candidate runs on random data at 1 and at 64 tokens; the geometric mean decides. Results are
kept for the process, per shape and formats.
"""

from __future__ import annotations

import statistics
from functools import lru_cache, partial

import torch

from qcompiler.backends.cpu.kernels import KERNELS, Kernel, self_test
from qcompiler.formats import QFormat, Scheme
from qcompiler.rounding import nearest
from qcompiler.sites import Site
from qcompiler.timing import floors

TOKENS = (1, 64)
SECONDS = 0.05
"""For each kernel at each number of tokens."""


def seconds(site: Site, scheme: Scheme) -> dict[str, float]:
    """Kernel that fits → seconds of one run of the site, geometric mean over `TOKENS`."""
    weight = site.weight.meta["val"]
    if site.kind.name != "linear" or scheme.weight is None:
        return {}
    out, width = (int(n) for n in weight.shape)
    return dict(_measure(out, width, scheme, torch.get_num_threads(), weight.dtype))


def refusals(site: Site, scheme: Scheme) -> dict[str, str]:
    """Kernel → why it does not serve this site although it is made for its formats."""
    if site.kind.name != "linear":
        return {}
    out, width = (int(n) for n in site.weight.meta["val"].shape)
    found = {}
    for kernel in KERNELS.values():
        if kernel.capability.fits(site, scheme) and scheme.weight is not None:
            reason = kernel.shape(out, width, scheme.weight) or self_test(kernel.name)
            if reason:
                found[kernel.name] = reason
    return found


@lru_cache(maxsize=1024)
def _measure(
    out: int, width: int, scheme: Scheme, threads: int, dtype: torch.dtype
) -> tuple[tuple[str, float], ...]:
    assert scheme.weight is not None
    q = nearest(torch.randn(out, width), scheme.weight)
    static = scheme.activation is not None and not scheme.activation.dynamic
    x_scale = torch.tensor(0.05) if static else None
    candidates = [k for k in KERNELS.values() if _fits(k, out, width, scheme)]
    prepared = {k.name: k.prepare(q) for k in candidates}
    if "float" in prepared:
        prepared["float"]["weight"] = prepared["float"]["weight"].to(dtype)
    times: dict[str, list[float]] = {k.name: [] for k in candidates}
    for tokens in TOKENS:
        x = torch.randn(tokens, width).to(dtype)
        runs = {
            k.name: partial(k.call, x, prepared[k.name], None, scheme.activation, x_scale)
            for k in candidates
        }
        for name, value in floors(runs, seconds=SECONDS).items():
            times[name].append(value)
    return tuple((name, statistics.geometric_mean(values)) for name, values in times.items())


def _fits(kernel: Kernel, out: int, width: int, scheme: Scheme) -> bool:
    capability = kernel.capability
    weight: QFormat | None = scheme.weight
    return (
        capability.op == "linear"
        and weight is not None
        and capability.fits_formats(scheme)
        and weight.symmetric
        and kernel.shape(out, width, weight) is None
        and self_test(kernel.name) is None
    ) or kernel.name == "float"
