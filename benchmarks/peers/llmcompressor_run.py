"""llm-compressor's own recipes on a folder and token windows: one JSON object on stdout.

Runs inside the environment that `benchmarks/accuracy.py --peers` makes, which also starts it; it
imports nothing of qcompiler. From the folder `tokens` it reads `calibration.npy` and `heldout.npy`,
both (windows, tokens) of int64; perplexity is computed by the formula of `qcompiler.evaluate`.

Everything is the peer's default but for what the rows below say. Two of its properties are needed
to read the figures:

* A symmetric int4 is −8 … 7 with s = max|x| / 7.5 there, which is our word `full`.
* `SpinQuantModifier` subtracts each embedding's mean before it rotates. That is exact where a
  LayerNorm reads the stream; RMSNorm sees the mean, so a Llama becomes another function. Rows "not
  centred" leave this one step out.

The modifier has no seed, and every run of it draws the same signs. Its factory of matrices takes a
seed, and gets the row's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "LLM_COMPRESSOR_LOG_DISABLED": "true",
}

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.transform import TransformFactory
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.utils import DEFAULT_SMOOTHQUANT_MAPPINGS
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from loguru import logger
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BATCH = 8
PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
UP_TO_DOWN = (["re:.*down_proj"], "re:.*up_proj")


class NotCentred(SpinQuantModifier):
    """`SpinQuantModifier` without the step that changes what an RMSNorm model computes."""

    def _center_embeddings(self, model: nn.Module) -> None:
        pass


def smooth(more: bool = False) -> Modifier:
    """Between norms and linears, its default; `more`: also between up_proj and down_proj.

    Between v_proj and o_proj, as ours, it cannot: with grouped queries the two differ in width, and
    it multiplies the one's columns by the other's rows (a RuntimeError on this model).
    """
    mappings = [*DEFAULT_SMOOTHQUANT_MAPPINGS, UP_TO_DOWN] if more else None
    return SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings)


def spin(*rotations: str, centred: bool = True) -> Modifier:
    """Random Hadamard rotations at the places named."""
    kind = SpinQuantModifier if centred else NotCentred
    return kind(rotations=list(rotations), transform_type="random-hadamard")


@dataclass(frozen=True)
class Recipe:
    """The modifiers before `QuantizationModifier`, and how the row is run."""

    modifiers: Callable[[], list[list[Modifier]]]
    """A list for each call of `oneshot`."""
    seeded: bool = False
    plain: bool = False
    """Also run without quantization, to see what the modifiers alone do to the model."""
    quantized: bool = True


RECIPES: dict[str, Recipe] = {
    "float": Recipe(lambda: [[]], plain=True, quantized=False),
    "nearest": Recipe(lambda: [[]]),
    "SmoothQuant": Recipe(lambda: [[smooth()]]),
    "SmoothQuant + up/down": Recipe(lambda: [[smooth(more=True)]]),
    "SpinQuant R1 R2": Recipe(lambda: [[spin("R1", "R2")]], seeded=True, plain=True),
    "SpinQuant R1 R2 R4": Recipe(lambda: [[spin("R1", "R2", "R4")]], seeded=True),
    "SpinQuant R1 R2, not centred": Recipe(
        lambda: [[spin("R1", "R2", centred=False)]], seeded=True, plain=True
    ),
    "SpinQuant R1 R2 R4, not centred": Recipe(
        lambda: [[spin("R1", "R2", "R4", centred=False)]], seeded=True
    ),
    "SmoothQuant + up/down, SpinQuant R1 R2 R4, not centred": Recipe(
        lambda: [[smooth(more=True)], [spin("R1", "R2", "R4", centred=False)]], seeded=True
    ),
}


def main() -> None:
    """Run every recipe at every width of bits and seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logger.remove()
    calibration, heldout = (
        torch.from_numpy(np.load(options.tokens / f"{name}.npy"))
        for name in ("calibration", "heldout")
    )
    rows = []
    for bits in (None, *map(int, options.bits.split(","))):
        for name, recipe in RECIPES.items():
            if options.only not in name or not (recipe.plain if bits is None else recipe.quantized):
                continue
            for seed in range(options.seeds if recipe.seeded else 1):
                row = {"recipe": name, "bits": bits, "seed": seed if recipe.seeded else None}
                print(f"llm-compressor {name}, {bits or 'no'} bits, {seed} …", file=sys.stderr)
                rows.append(row | run(recipe, bits, seed, options.model, calibration, heldout))
    versions = {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}
    print(json.dumps({"versions": versions, "rows": rows}))


def run(
    recipe: Recipe, bits: int | None, seed: int, folder: Path, calibration: Tensor, heldout: Tensor
) -> dict[str, object]:
    """One row's figures, or the peer's own words for why there are none."""
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        count = sum(p.numel() for p in model.parameters())
        start = time.perf_counter()
        *first, last = recipe.modifiers()
        with seeded(seed), quiet():
            for modifiers in first:
                apply(model, modifiers, calibration)
            apply(model, [*last, *quantization(bits)], calibration)
        seconds = time.perf_counter() - start
        value = perplexity(model, heldout)
    except Exception as error:  # a peer's failure is a result, not the end of the benchmark
        text = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {text[:160]}"}
    return {"perplexity": value, "bits_per_weight": size(model) / count, "seconds": seconds}


def quantization(bits: int | None) -> list[Modifier]:
    """Weights per output channel, activations per token and dynamic, both symmetric integers."""
    if bits is None:
        return []
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    inputs = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return [QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])]


def apply(model: nn.Module, modifiers: list[Modifier], calibration: Tensor) -> None:
    """`oneshot`, with the calibration windows in order where a modifier wants some."""
    if not modifiers:
        return
    data: dict[str, object] = {}
    if any(m.requires_calibration_data for m in modifiers):
        columns = {"input_ids": calibration.tolist()}
        columns["attention_mask"] = torch.ones_like(calibration).tolist()
        data = {
            "dataset": Dataset.from_dict(columns),
            "max_seq_length": calibration.shape[1],
            "num_calibration_samples": calibration.shape[0],
            "shuffle_calibration_samples": False,
            "batch_size": BATCH,
        }
    oneshot(model=model, recipe=modifiers, **data)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars go nowhere; stdout is for the JSON alone."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Give the factories of random matrices a seed, which they take and the modifier does not."""
    plain = TransformFactory.__dict__["from_scheme"]

    def from_scheme(cls: type, scheme: object, **options: object) -> object:
        return plain.__get__(None, cls)(scheme, seed=seed, **options)

    TransformFactory.from_scheme = classmethod(from_scheme)
    try:
        yield
    finally:
        TransformFactory.from_scheme = plain


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean cross-entropy of each next token."""
    total, count = 0.0, 0
    for ids in windows.split(BATCH):
        flat = model(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
    return math.exp(total / count)


def size(model: nn.Module) -> int:
    """Bits of all parameters, those of a quantized layer as its scheme says, packed."""
    found = 0
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        for name, value in module.named_parameters(recurse=False):
            packed = scheme is not None and scheme.weights is not None and name == "weight"
            width = scheme.weights.num_bits if packed else 8 * value.element_size()
            if not name.endswith("zero_point"):  # all zero: the formats are symmetric
                found += value.numel() * width
    return found - sum(  # a matrix that several layers share was counted for each
        8 * p.numel() * p.element_size() * (times - 1) for p, times in shared(model)
    )


def shared(model: nn.Module) -> list[tuple[Tensor, int]]:
    """(parameter, how many modules hold it)."""
    held: dict[int, list[Tensor]] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            held.setdefault(id(value), []).append(value)
    return [(values[0], len(values)) for values in held.values()]


if __name__ == "__main__":
    main()
