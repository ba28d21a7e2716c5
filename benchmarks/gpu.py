"""Kernels of the backend `triton` on this GPU, beside torch's bfloat16 linear and its own kernels.

    python benchmarks/gpu.py [--json FILE] [--minutes 8] [--only "decode 4096,attention"]

Linears of a Llama's layer (grouped queries, 3.5 × wide) of hidden 4096 and 8192: decode of 1 and 16
tokens with 4- and 8-bit weights, prefill of 4096 tokens in int8 and e4m3 with the rounding of
activations included, the Hadamard transform fused with rounding beside its linear, and attention
over a cache of int8 beside one of bfloat16; at the end the conformance of the device.

Each contender is one CUDA graph of calls on copies of its weights that together are larger than the
L2 cache, as the weights of a network are; contenders are replayed in turn, and the median counts.
Errors are against float32 on the decoded weights. Without a GPU the script says so and exits 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qcompiler.backends.triton import TritonBackend, layout, load_operators
from qcompiler.backends.triton.kernels import KERNELS
from qcompiler.backends.triton.runtime import device
from qcompiler.backends.triton.weights import LANES
from qcompiler.testing import conformance

HIDDEN = (4096, 8192)
LINEARS = {"qkv": (1.5, 1.0), "out": (1.0, 1.0), "gate_up": (7.0, 1.0), "down": (1.0, 3.5)}
"""(outputs, inputs) in units of hidden."""
GROUP = 128
PREFILL = 4096
COLD = 192 << 20
"""Bytes of weights that the calls of a graph go through at least."""
CALLS = 8
"""Calls of a graph, at least."""
REPLAYS = 15
TARGETS = {"w4a16 1": 3.2, "w4a16 16": 2.5, "fp8 4096": 1.6, "int8 4096": 1.6}
"""Times as fast as bfloat16, over the linears of a layer."""
HADAMARD = 0.05
"""Most that the transform may add, as a share of its linear."""

Run = Callable[[int], object]
"""A call on copy i of its weights."""


@dataclass
class Results:
    """What was measured so far, written down after each line."""

    file: Path | None
    about: dict[str, str]
    rows: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
        self.write()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    def write(self) -> None:
        sys.stdout.flush()
        if self.file is not None:
            kept = {k: v for k, v in asdict(self).items() if k != "file"}
            self.file.write_text(json.dumps(kept, indent=1) + "\n")


def graph_of(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    """One graph of a call on each copy, compiled and tuned before."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return graph


def race(contenders: dict[str, tuple[Run, int]]) -> dict[str, float]:
    """Seconds of one call of each contender (run, copies), replayed in turn."""
    graphs = {name: graph_of(run, copies) for name, (run, copies) in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPLAYS + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1e-3 / contenders[name][1])
    return {name: statistics.median(found) for name, found in times.items()}


def copies_for(*tensors: Tensor) -> int:
    size = sum(t.numel() * t.element_size() for t in tensors)
    return max(1, -(-COLD // size))


def many(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Copies of a weight, enough to be cold, and calls that a graph's own start is nothing to."""
    first = make()
    copies = [first, *(make() for _ in range(copies_for(*first) - 1))]
    return copies * -(-CALLS // len(copies))


def floats(out: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(out, width, device="cuda", dtype=torch.bfloat16) / width**0.5,)


def units(out: int, width: int, bits: int, unit: int) -> tuple[Tensor, ...]:
    """Random integers in the kernels' layout, and scales of groups of 4 bits, of rows of 8 bits."""
    lanes, group = LANES[0], GROUP if bits == 4 else width
    shape = (width * bits // (unit * lanes), layout.padded(out, layout.ROWS), lanes)
    codes = torch.randint(0, 256, (*shape, unit // 8), device="cuda", dtype=torch.uint8)
    scale = torch.rand(width // group, shape[1], device="cuda").add_(0.5).mul_(width**-0.5 / 4)
    return codes.view(torch.uint8 if unit == 8 else torch.int16).squeeze(-1), scale.half()


def int4pack(out: int, width: int) -> tuple[Tensor, ...]:
    """Random 4-bit weights as torch's own kernel wants them, scales and zero points beside them."""
    codes = torch.randint(0, 256, (out, width // 2), device="cuda", dtype=torch.uint8)
    sides = torch.rand(width // GROUP, out, 2, device="cuda", dtype=torch.bfloat16)
    return torch._convert_weight_to_int4pack(codes, 8), sides


def octets(out: int, width: int, fp8: bool) -> tuple[Tensor, ...]:
    """Codes of the numbers that bfloat16 multiplies, and a scale for each row. (Products of codes
    that are as often large as small draw more power, and run slower.)"""
    codes, scale = torch.ops.qc_triton.round_rows(*floats(out, width), None, fp8)
    packed = layout.pack_rows(codes)
    return packed, torch.nn.functional.pad(scale[:, 0], (0, len(packed) - out))


def numbers(weight: tuple[Tensor, ...], out: int, width: int) -> Tensor:
    """4-bit weights in float32."""
    found = layout.unpack_units(weight[0], out, width, 4).float() - 8
    scale = layout.unpack_scales(weight[1], out).float()
    return found * scale.repeat_interleave(GROUP, 1)[:, :width]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def decode(results: Results, hidden: int, tokens: int) -> None:
    """Linears of one layer with few tokens: the time of reading the weights."""
    totals: dict[str, float] = {}
    for name, (rows, columns) in LINEARS.items():
        found = decode_one(results, hidden, tokens, name, int(rows * hidden), int(columns * hidden))
        for kernel, seconds in found.items():
            totals[kernel] = totals.get(kernel, 0.0) + seconds
    summary(results, "decode", hidden, tokens, totals)


def decode_one(
    results: Results, hidden: int, tokens: int, name: str, out: int, width: int
) -> dict[str, float]:
    ops = torch.ops.qc_triton
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    plain = many(lambda: floats(out, width))
    short, byte = many(lambda: units(out, width, 4, 16)), many(lambda: units(out, width, 4, 8))
    long, torchs = many(lambda: units(out, width, 8, 16)), many(lambda: int4pack(out, width))
    octet = many(lambda: octets(out, width, False))

    def w4a16(i: int) -> Tensor:
        return ops.linear_decoded(x, None, *short[i], None, None, GROUP, out, "int4", x.dtype)

    def w4a8(i: int) -> Tensor:
        codes, scales = ops.round_rows(x, None, False)
        sides = (None, None, GROUP, out, "int4", x.dtype)
        return ops.linear_decoded(codes, scales, *byte[i], *sides)

    def w8a16(i: int) -> Tensor:
        return ops.linear_decoded(x, None, *long[i], None, None, width, out, "int8", x.dtype)

    def w8a8(i: int) -> Tensor:
        return ops.linear_scaled(*ops.round_rows(x, None, False), *octet[i], None, out, x.dtype)

    error = off(w4a16(0), x.float() @ numbers(short[0], out, width).t())
    found = race({
        "bf16": (lambda i: torch.nn.functional.linear(x, *plain[i]), len(plain)),
        "torch int4pack": (
            lambda i: torch._weight_int4pack_mm(x, torchs[i][0], GROUP, torchs[i][1]),
            len(torchs),
        ),
        "w4a16": (w4a16, len(short)),
        "w4a8": (w4a8, len(byte)),
        "w8a16": (w8a16, len(long)),
        "w8a8": (w8a8, len(octet)),
    })  # fmt: skip
    weights = {
        "bf16": plain[0], "torch int4pack": torchs[0], "w4a16": short[0], "w4a8": byte[0],
        "w8a16": long[0], "w8a8": octet[0],
    }  # fmt: skip
    for kernel, seconds in found.items():
        size = sum(t.numel() * t.element_size() for t in weights[kernel])
        results.add(
            what="decode", hidden=hidden, tokens=tokens, linear=name, kernel=kernel,
            us=seconds * 1e6, gb_per_s=size / seconds * 1e-9,
            times_bf16=found["bf16"] / seconds,
            **({"error": error} if kernel == "w4a16" else {}),
        )  # fmt: skip
    return found


def prefill(results: Results, hidden: int) -> None:
    """Linears of one layer on many tokens: products of codes, rounding included."""
    totals: dict[str, float] = {}
    for name, (rows, columns) in LINEARS.items():
        found = prefill_one(results, hidden, name, int(rows * hidden), int(columns * hidden))
        for kernel, seconds in found.items():
            totals[kernel] = totals.get(kernel, 0.0) + seconds
    summary(results, "prefill", hidden, PREFILL, totals)


def prefill_one(results: Results, hidden: int, name: str, out: int, width: int) -> dict[str, float]:
    ops = torch.ops.qc_triton
    x = torch.randn(PREFILL, width, device="cuda", dtype=torch.bfloat16)
    plain = floats(out, width)
    kinds = ("int8", "fp8") if torch.cuda.get_device_capability() >= (8, 9) else ("int8",)
    weights = {kind: octets(out, width, kind == "fp8") for kind in kinds}

    def scaled(kind: str) -> Tensor:
        codes, scales = ops.round_rows(x, None, kind == "fp8")
        return ops.linear_scaled(codes, scales, *weights[kind], None, out, x.dtype)

    def library(kind: str) -> Tensor:
        """torch's products of codes behind the same rounding."""
        codes, scales = ops.round_rows(x, None, kind == "fp8")
        weight, side = weights[kind]
        if kind == "int8":
            return (torch._int_mm(codes, weight.t()) * scales * side).to(x.dtype)
        codes, weight = (t.view(torch.float8_e4m3fn) for t in (codes, weight))
        return torch._scaled_mm(codes, weight.t(), scales, side[None], out_dtype=x.dtype)

    runs: dict[str, tuple[Run, int]] = {}
    for kind in kinds:
        runs[kind] = (partial(lambda kind, i: scaled(kind), kind), CALLS)
        runs[f"torch {kind}"] = (partial(lambda kind, i: library(kind), kind), CALLS)
    found = race({"bf16": (lambda i: torch.nn.functional.linear(x, *plain), CALLS)} | runs)
    for kernel, seconds in found.items():
        error = {}
        if kernel in weights:
            codes, scale = weights[kernel]
            held = codes.view(torch.float8_e4m3fn) if kernel == "fp8" else codes
            wanted = x[:64].float() @ held[:out, :width].float().t() * scale[:out]
            error = {"error": off(scaled(kernel)[:64], wanted)}
        results.add(
            what="prefill", hidden=hidden, tokens=PREFILL, linear=name, kernel=kernel,
            us=seconds * 1e6, tflops=2e-12 * PREFILL * out * width / seconds,
            times_bf16=found["bf16"] / seconds, **error,
        )  # fmt: skip
    return found


def summary(
    results: Results, what: str, hidden: int, tokens: int, totals: dict[str, float]
) -> None:
    """All linears of a layer together, beside what is wanted."""
    for kernel, seconds in totals.items():
        times, wanted = totals["bf16"] / seconds, TARGETS.get(f"{kernel} {tokens}")
        verdict = {} if wanted is None else {"target": wanted, "met": times >= wanted}
        results.add(
            what=what, hidden=hidden, tokens=tokens, linear="layer", kernel=kernel,
            us=seconds * 1e6, times_bf16=times, **verdict,
        )  # fmt: skip


def hadamard(results: Results, hidden: int) -> None:
    """What the transform adds where activations are rounded and an int8 linear reads them, as a
    share of that linear."""
    for name in ("out", "down"):
        out, width = (int(n * hidden) for n in LINEARS[name])
        weights = many(partial(octets, out, width, False))
        for tokens in (1, 16, PREFILL):
            hadamard_one(results, hidden, tokens, name, weights, out, width)


def hadamard_one(
    results: Results, hidden: int, tokens: int, name: str, weights: list[tuple[Tensor, ...]],
    out: int, width: int,
) -> None:  # fmt: skip
    from qcompiler.backends.triton.hadamard import factor

    ops = torch.ops.qc_triton
    made = factor(width)
    assert not isinstance(made, str)
    right = made.cuda()
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)

    def linear(i: int, codes: Tensor, scales: Tensor) -> Tensor:
        return ops.linear_scaled(codes, scales, *weights[i], None, out, x.dtype)

    rounded = ops.round_rows(x, None, False)
    found = race({
        "linear": (lambda i: linear(i, *rounded), len(weights)),
        "round": (lambda i: linear(i, *ops.round_rows(x, None, False)), len(weights)),
        "turn": (lambda i: linear(i, *ops.turn_rows(x, right, None, False)), len(weights)),
    })  # fmt: skip
    share = (found["turn"] - found["round"]) / found["linear"]
    results.add(
        what="hadamard", hidden=hidden, tokens=tokens, linear=name, width=width,
        **{f"{k}_us": v * 1e6 for k, v in found.items()},
        share=share, target=HADAMARD, met=share <= HADAMARD,
    )  # fmt: skip


def ceilings(results: Results) -> None:
    """What the device can do: a large copy, and a large product of bfloat16."""
    big = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(big)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = race({"copy": (lambda i: other.copy_(big), 2), "product": (lambda i: a @ b, 2)})
    results.add(
        what="ceilings", copy_gb_per_s=2e-9 * big.numel() / found["copy"],
        bf16_tflops=2e-12 * 8192**3 / found["product"],
    )  # fmt: skip


def attention(results: Results) -> None:
    """One new token of 8 sequences, 32 query heads on 8, over 8192 tokens of 128 channels."""
    sequences, queries, heads, capacity, d = 8, 32, 8, 8192, 128
    q = torch.randn(sequences, queries, d, device="cuda", dtype=torch.bfloat16)
    shape = (sequences, heads, capacity, d)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    codes = [(t.float() * 30).round().clamp(-127, 127).to(torch.int8) for t in (k, v)]
    scales = [torch.full((*shape[:3], 1), 1 / 30, device="cuda") for _ in range(2)]
    lengths = torch.full((sequences,), capacity, device="cuda", dtype=torch.int32)

    def plain(i: int) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], k, v, enable_gqa=True
        )

    def ours(i: int) -> Tensor:
        return torch.ops.qc_triton.decode_attention(q, *codes, *scales, lengths, None, None)

    found = race({"bf16": (plain, 4), "int8": (ours, 4)})
    size = 2 * codes[0].numel()
    results.add(
        what="attention", tokens=capacity, sequences=sequences, us=found["int8"] * 1e6,
        gb_per_s=size / found["int8"] * 1e-9, times_bf16=found["bf16"] / found["int8"],
        error=off(ours(0), plain(0)[:, :, 0].float()),
    )  # fmt: skip


def conform(results: Results, kernel: str) -> None:
    """The claims of a kernel against the reference, on this device."""
    report = conformance(TritonBackend(), claims=kernel, quick=True)
    results.note(str(report))


def about() -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write what is measured here, line by line")
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing new after these")
    parser.add_argument("--only", default="", help="steps whose names begin with one of these")
    options = parser.parse_args()
    reason = TritonBackend().available()
    if reason is None and device().type != "cuda":
        reason = "times are taken on a GPU, not in Triton's interpreter"
    if reason:
        print(reason)
        return 2
    load_operators()
    torch.manual_seed(0)
    results = Results(options.json, about())
    print("  ".join(f"{k} {v}" for k, v in results.about.items()))
    start = time.monotonic()
    steps: list[tuple[str, Callable[[], None]]] = [("ceilings", partial(ceilings, results))]
    for hidden in HIDDEN:
        for tokens in (1, 16):
            steps.append((f"decode {hidden} {tokens}", partial(decode, results, hidden, tokens)))
        steps.append((f"prefill {hidden}", partial(prefill, results, hidden)))
        steps.append((f"hadamard {hidden}", partial(hadamard, results, hidden)))
    steps.append(("attention", partial(attention, results)))
    steps += [(f"conformance of {name}", partial(conform, results, name)) for name in KERNELS]
    failed = 0
    wanted = tuple(options.only.split(","))
    for name, step in steps:
        if not name.startswith(wanted):
            continue
        if (spent := time.monotonic() - start) > 60 * options.minutes:
            results.note(f"{name}: not measured, {spent:.0f} s were over")
            continue
        try:
            step()
        except Exception as error:  # the rest is worth measuring all the same
            failed += 1
            results.note(f"{name} fails: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()
    results.note(f"{time.monotonic() - start:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
