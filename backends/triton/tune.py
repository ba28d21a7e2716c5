"""Which tile sizes a launch gets: the fastest of a few candidates on this GPU, remembered.

Measured once for each device, kernel and shape (tokens in powers of two), as launches behind one
another in a CUDA graph, on copies of the weight that no cache holds together: as in a network. The
times are kept in the user's cache folder. Where nothing can be measured (in the interpreter, in a
trace, while a CUDA graph is captured) the answer that is known serves, else the first candidate.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from qcompiler.backends.triton.operators import traced
from qcompiler.costs.cache import Cache, cache_folder

REPLAYS = 7
LEAST, MOST = 8, 64
"""Launches of a graph: beside fewer its own start would count, more would take long."""
CACHES = 2
"""L2 caches that copies of a weight fill."""
APART = 1e-2
"""How far a row of two tiles' results may be apart, as a share of one: sums are added in other
orders."""

CANCELLED = 1e-5
"""And as a share of the largest row."""

AT_ONCE = 1 << 22
"""Numbers of a result that are compared at once: all of them might take what memory is left."""

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
    late: bool = False
    """Whether zero points are taken off sums of groups."""
    ordered: bool = False
    """Whether what comes next is asked for first, whatever registers that takes."""
    whole: bool = False
    """Whether all that a warp sums over is asked for at once."""
    registers: int = 0
    """Most that a thread may take; 0 for as many as the compiler likes."""

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.tokens}x{self.inner}", f"{self.split} parts"]
        words += [f"{self.warps} warps", f"{self.stages} stages"]
        flags = ("descriptors", "apart", "late", "ordered", "whole")
        words += [name for name in flags if getattr(self, name)]
        return " ".join(words + [f"{self.registers} registers"] * bool(self.registers))


def bucket(tokens: int) -> int:
    """Tokens as keys know them: the next power of two."""
    return 1 << max(int(tokens) - 1, 0).bit_length()


def best(
    key: str, cold: Sequence[Tensor], candidates: Sequence[Config], run: Callable[..., object]
) -> Config:
    """The fastest of `candidates` for a launch that `key` describes: run(config, *cold), on tensors
    that come from memory."""
    first, weight = candidates[0], cold[0]
    if weight.device.type != "cuda" or size(weight) < SMALL:
        return first
    cache = _cache(torch.cuda.get_device_name(weight.device))
    known = cache.get(key)
    if isinstance(known, dict) and set(known) == set(map(str, candidates)):
        return min(candidates, key=lambda c: known[str(c)])
    if traced(weight) or torch.cuda.is_current_stream_capturing() or len(candidates) == 1:
        return first
    times = race({str(c): partial(run, c) for c in candidates}, *cold)
    if min(times.values()) < float("inf"):  # else there was no memory, which tells of no tile
        cache.put(key, times)
    return min(candidates, key=lambda c: times[str(c)])


def remembered(key: str, measure: Callable[[], float]) -> float:
    """What `measure` gives on the current GPU, measured once."""
    cache = _cache(torch.cuda.get_device_name())
    known = cache.get(key)
    if not isinstance(known, float):
        known = measure()
        cache.put(key, known)
    return known


def size(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def race(
    runs: Mapping[str, Callable[..., object]], *cold: Tensor, capture: bool = True
) -> dict[str, float]:
    """Seconds of each run(*cold) on the GPU, median, by turns, so that none finds it cooler than
    another; infinite for what does not fit there, or gives other numbers than the first. What waits
    for the GPU, or copies to it, cannot be captured in a graph."""
    again, times = {}, {name: [float("inf")] for name in runs}
    sets: list[tuple[Tensor, ...]] = []
    found = wanted = None
    for name, run in runs.items():
        try:
            _spoil(wanted)
            found = run(*cold)
            if wanted is None:
                wanted = found
            elif not agree(found, wanted):
                warnings.warn(
                    f"the tile {name} gives other numbers on this GPU than {next(iter(runs))}: a "
                    "mistake of triton's compiler, probably. It is not used.",
                    stacklevel=2,
                )
                continue
            sets = sets or _copies(cold)
            each = partial(_each, run, sets)
            again[name] = _captured(each) if capture else each
        except Exception as error:
            if not _too_large(error):
                raise
        else:
            times[name] = []
    del found, wanted  # timings need memory too
    for turn in range(1 + REPLAYS):
        for name, replay in again.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e-3 / len(sets))
    return {name: float(statistics.median(found)) for name, found in times.items()}


def seconds(run: Callable[..., object], *cold: Tensor, capture: bool = True) -> float:
    """Those of one run."""
    return race({"": run}, *cold, capture=capture)[""]


def agree(found: object, wanted: object) -> bool:
    """Whether two runs gave the same numbers in each row, but for the order of their sums."""
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return True
    rows = [x.reshape(-1, x.shape[-1]) for x in (found, wanted)]
    parts = (x.split(max(1, AT_ONCE // x.shape[-1])) for x in rows)
    for part, other in zip(*parts, strict=True):
        a, b = part.double(), other.double()
        there = b.isfinite()
        # What is not finite in `found` alone makes the gap so.
        gap = torch.where(there, a - b, 0.0).norm(dim=1)
        norm = torch.where(there, b, 0.0).norm(dim=1)
        # A row of one number may be next to nothing: what is left of a sum that cancels.
        if norm.numel() and not bool((gap <= APART * norm + CANCELLED * norm.max()).all()):
            return False
    return True


def _spoil(result: object) -> None:
    """Leaves NaN in the memory that the next result of this size gets, so that what a kernel does
    not write is seen: else it may find there what another wrote."""
    if isinstance(result, Tensor) and result.is_floating_point():
        torch.full_like(result, float("nan"))


def _each(run: Callable[..., object], sets: Sequence[tuple[Tensor, ...]]) -> None:
    for tensors in sets:
        run(*tensors)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """Replays what `run` launches."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    return graph.replay


def _copies(cold: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The tensors and copies of them that fill caches, if memory has room; again and again if these
    are few."""
    cache = torch.cuda.get_device_properties(cold[0].device).L2_cache_size
    wanted = min(-(-CACHES * cache // sum(map(size, cold))), MOST)
    sets = [tuple(cold)]
    try:
        while len(sets) < wanted:
            sets.append(tuple(t.clone() for t in cold))
    except torch.cuda.OutOfMemoryError:
        del sets[1:]  # what is to be timed needs memory too
    return sets * -(-LEAST // len(sets))


def _too_large(error: Exception) -> bool:
    """Tiles that need more shared memory or registers than the GPU has, or more memory."""
    names = ("OutOfResources", "PTXASError", "OutOfMemoryError")
    return type(error).__name__ in names


@lru_cache(maxsize=8)
def _cache(device: str) -> Cache:
    import triton

    about = {"gpu": device, "triton": triton.__version__, "layout": "3"}
    return Cache(cache_folder("triton"), about)
