"""Which kernel serves a linear: the one that measures fastest here, on its own shape.

Each candidate runs on random data at 1 and at 64 tokens; the geometric mean decides. Results are
kept on disk, per machine, number of threads, shape and formats: what one process chose, the next
one chooses.
"""

from __future__ import annotations

import statistics
from functools import lru_cache, partial

import torch

from qcompiler.backends.cpu.kernels import (
    GENERATED,
    KERNELS,
    Call,
    Kernel,
    Static,
    instructions,
    self_test,
)
from qcompiler.costs.cache import Cache, cache_folder, environment
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
    if site.kind.name == "conv" and GENERATED:
        from qcompiler.backends.cpu import race_conv

        return race_conv.seconds(site, scheme)
    if site.kind.name != "linear" or scheme.weight is None:
        return {}
    out, width = (int(n) for n in weight.shape)
    return dict(_seconds(out, width, scheme, torch.get_num_threads(), weight.dtype))


def refusals(site: Site, scheme: Scheme) -> dict[str, str]:
    """Kernel → why it does not serve this site although it is made for its formats."""
    if site.kind.name == "conv" and GENERATED:
        from qcompiler.backends.cpu import choose_conv

        reason = choose_conv.refuses(site, scheme)
        return {choose_conv.NAME: reason} if reason else {}
    if site.kind.name != "linear" or scheme.weight is None:
        return {}
    out, width = (int(n) for n in site.weight.meta["val"].shape)
    found = {}
    for kernel in KERNELS.values():
        if any(c.fits(site, scheme) for c in kernel.claims):
            reason = kernel.shape(out, width, scheme.weight) or self_test(kernel.name)
            if reason:
                found[kernel.name] = reason
    return found


@lru_cache(maxsize=1024)
def _seconds(
    out: int, width: int, scheme: Scheme, threads: int, dtype: torch.dtype
) -> tuple[tuple[str, float], ...]:
    candidates = [k for k in KERNELS.values() if fits(k, out, width, scheme)]
    cache = Cache(cache_folder("cpu"), environment("cpu"))
    names = " ".join(k.name for k in candidates)
    key = f"{out}x{width} {scheme} {dtype} {instructions()} of {names}"
    kept = cache.get(key)
    if not isinstance(kept, dict) or set(kept) != {k.name for k in candidates}:
        kept = _measure(candidates, out, width, scheme, dtype)
        cache.put(key, kept)
    return tuple((str(name), float(value)) for name, value in kept.items())


def _measure(
    candidates: list[Kernel], out: int, width: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, float]:
    assert scheme.weight is not None
    generator = torch.Generator().manual_seed(0)  # the user's own stays as it is
    q = nearest(torch.randn(out, width, generator=generator), scheme.weight)
    activation = scheme.activation
    static = Static()
    if activation is not None and not activation.dynamic:
        zero = None if activation.symmetric else torch.zeros(1)
        static = Static(torch.tensor([0.05]), zero)
    calls = {k.name: k.prepare(q, None, activation, static) for k in candidates}
    calls["float"].parameters["weight"] = q.dequantize().to(dtype)
    times: dict[str, list[float]] = {k.name: [] for k in candidates}
    for tokens in TOKENS:
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        runs = {name: partial(_run, call, x, activation, static) for name, call in calls.items()}
        for name, value in floors(runs, seconds=SECONDS).items():
            times[name].append(value)
    return {name: statistics.geometric_mean(values) for name, values in times.items()}


def _run(call: Call, x: torch.Tensor, activation: QFormat | None, static: Static) -> torch.Tensor:
    if activation is not None and not call.rounds:
        x = torch.ops.qc.fake_quantize(x, str(activation), static.scale, static.zero)
    return call(x)


def fits(kernel: Kernel, out: int, width: int, scheme: Scheme) -> bool:
    """Whether the kernel serves a linear of this shape here."""
    weight = scheme.weight
    return (
        weight is not None
        and any(c.fits_formats(scheme) for c in kernel.claims)
        and kernel.shape(out, width, weight) is None
        and self_test(kernel.name) is None
    )
