"""How long llm-compressor's own GPTQ takes for one layer, and what it finds.

    PYTHON gptq_speed_llmcompressor.py LAYERS RESULT [--make] [--order static] [--threads 1]

runs in that peer's environment. LAYERS is a `.safetensors` file of `<name>.weight` (out, in) and
`<name>.hessian` (in, in); `--make` writes one first, random, of the shapes below. Timed is
`quantize_weight` alone, factoring the Hessian included, median of five after a first; it may write
into what it is given, so each run gets copies. int4 symmetric (−8 … 7, s = max|w| / 7.5), blocks of
128 columns, damping 0.01.

RESULT gets `<name>.<format>.weight` (rounded) and `.scale`; stdout a JSON object with for each the
seconds by the clock and of all processor cores together, the peer's own loss, and the error
tr((W − Q) H (W − Q)ᵀ), which any other GPTQ can be held against. Peaks are of the whole process so
far: name one layer with `--only` to see that layer's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"

import torch
from common import claim_stdout
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

SHAPES = ((256, 256), (1024, 1024), (2048, 2048), (4096, 1024))
FORMATS = {"group128": 128, "channel": None}
BLOCK, DAMPING, RUNS = 128, 0.01, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layers", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--make", action="store_true", help="write random layers first")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers with TEXT in the name")
    parser.add_argument("--order", choices=("static", "none"), default="static")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    answer = claim_stdout()
    torch.set_num_threads(options.threads)
    if options.make:
        save_file(random_layers(), options.layers)
    tensors = load_file(options.layers)
    found: dict[str, Tensor] = {}
    rows = []
    start = peak()
    for name in (n.removesuffix(".weight") for n in tensors if n.endswith(".weight")):
        if options.only not in name:
            continue
        weight, hessian = tensors[f"{name}.weight"], tensors[f"{name}.hessian"]
        for form, group in FORMATS.items():
            args = arguments(group, options.order)
            row, rounded, scale = layer(weight, hessian, args)
            found |= {f"{name}.{form}.weight": rounded, f"{name}.{form}.scale": scale}
            rows.append({"layer": name, "format": form, "order": options.order} | row)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    save_file(found, options.result)
    versions = {p: version(p) for p in ("llmcompressor", "compressed-tensors", "torch")}
    versions["python"] = platform.python_version()
    answer.write(json.dumps({"versions": versions, "rss_before_mb": start, "rows": rows}) + "\n")


def random_layers() -> dict[str, Tensor]:
    """Weights, and Gram matrices of inputs with the few strong channels that real ones have."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, Tensor] = {}
    for rows, columns in SHAPES:
        mixed = torch.randn(columns, columns // 8, generator=generator)
        hidden = torch.randn(2 * columns, columns // 8, generator=generator)
        inputs = torch.randn(2 * columns, columns, generator=generator) + hidden @ mixed.T / 8
        inputs[:, torch.randperm(columns, generator=generator)[:4]] *= 16
        name = f"{rows}x{columns}"
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        layers |= {f"{name}.weight": weight, f"{name}.hessian": inputs.T @ inputs / len(inputs)}
    return layers


def arguments(group: int | None, order: str) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group" if group else "channel",
        group_size=group,
        actorder=None if order == "none" else order,
    )


@torch.no_grad()
def layer(
    weight: Tensor, hessian: Tensor, args: QuantizationArgs
) -> tuple[dict[str, float], Tensor, Tensor]:
    """(figures, rounded weight, scales)."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    times, processor = [], []
    for _ in range(RUNS + 1):
        w, h, s, z = (t.clone().unsqueeze(0) for t in (weight, hessian, scale, zero))
        start, used = time.perf_counter(), time.process_time()
        rounded, loss, fallback = quantize_weight(w, h, s, z, None, args, BLOCK, DAMPING)
        times.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    assert not fallback.any(), "the Hessian was not positive definite"
    off = (weight - rounded[0]).double()
    figures = {
        "seconds": statistics.median(times[1:]),
        "cpu_seconds": statistics.median(processor[1:]),
        "loss": float(loss.sum()),
        "error": float(((off @ hessian.double()) * off).sum()),
        "peak_rss_mb": peak(),
    }
    return figures, rounded[0].contiguous(), scale


def peak() -> float:
    """Largest resident set of the process so far, in MB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    main()
