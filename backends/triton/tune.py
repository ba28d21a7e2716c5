"""Which tile sizes a launch gets: the fastest of a few candidates on this GPU, remembered.

Measured once for each device, kernel and shape (tokens in powers of two), by CUDA events with the
L2 cache emptied before each run, as the weights of a network find it; the times are kept in the
user's cache folder. Where nothing can be measured (in the interpreter, in a trace, while a CUDA
graph is captured) the answer that is known serves, else the first candidate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from qcompiler.costs.cache import Cache, cache_folder

RUNS = 7
FLUSH = 256 << 20
"""Bytes that are written before each run; more than the L2 cache of any GPU."""

SMALL = 1 << 20
"""Bytes of a weight for which compiling the candidates would take longer than they could save."""


@dataclass(frozen=True)
class Config:
    """How one launch divides its work."""

    rows: int
    """Rows of the weight in one tile."""
    tokens: int = 1
    inner: int = 128
    """Inputs that one step sums over."""
    split: int = 1
    """Parts into which the sum is split, added by a second kernel."""
    warps: int = 4
    stages: int = 3
    descriptors: bool = False
    """Whether tiles are loaded by the tensor memory accelerator (Hopper)."""
    apart: bool = False
    """Whether each warp sums over inputs of its own."""

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.tokens}x{self.inner}", f"{self.split} parts"]
        words += [f"{self.warps} warps", f"{self.stages} stages"]
        flags = {"descriptors": self.descriptors, "apart": self.apart}
        return " ".join(words + [name for name, on in flags.items() if on])


def bucket(tokens: int) -> int:
    """Tokens as keys know them: the next power of two."""
    return 1 << max(int(tokens) - 1, 0).bit_length()


def best(
    key: str, weight: Tensor, candidates: Sequence[Config], run: Callable[[Config], object]
) -> Config:
    """The fastest of `candidates` for a launch on `weight` that `key` describes."""
    first = candidates[0]
    if weight.device.type != "cuda" or weight.numel() * weight.element_size() < SMALL:
        return first
    cache = _cache(torch.cuda.get_device_name(weight.device))
    known = cache.get(key)
    if isinstance(known, dict) and set(known) == set(map(str, candidates)):
        return min(candidates, key=lambda c: known[str(c)])
    if traced(weight) or torch.cuda.is_current_stream_capturing() or len(candidates) == 1:
        return first
    times = {str(c): seconds(partial(run, c)) for c in candidates}
    cache.put(key, times)
    return min(candidates, key=lambda c: times[str(c)])


def traced(tensor: Tensor) -> bool:
    """Whether a compiler looks at a launch, rather than that it runs."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()


def remembered(key: str, measure: Callable[[], float]) -> float:
    """What `measure` gives on the current GPU, measured once."""
    cache = _cache(torch.cuda.get_device_name())
    known = cache.get(key)
    if not isinstance(known, float):
        known = measure()
        cache.put(key, known)
    return known


def seconds(run: Callable[[], object]) -> float:
    """Seconds of `run` on the GPU, median; infinite if it does not fit there."""
    try:
        run()
    except Exception as error:
        if _too_large(error):
            return float("inf")
        raise
    scratch = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return float(statistics.median(times))


def _too_large(error: Exception) -> bool:
    """Tiles that need more shared memory or registers than the GPU has."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")


@lru_cache(maxsize=8)
def _cache(device: str) -> Cache:
    import triton

    about = {"gpu": device, "triton": triton.__version__, "layout": "2"}
    return Cache(cache_folder("triton"), about)
