"""What the peers' scripts share: the model, the data, the metric and the answer's form.

    PYTHON <name>_run.py MODEL_FOLDER DATA_FOLDER --kind llama --formats w4g128,w8a8 --methods a,b

A script runs in its peer's own environment and imports nothing of qcompiler. It reads
`calibration.safetensors` and `heldout.safetensors` from DATA_FOLDER (tensors by input name) and
prints one JSON object on stdout: the versions, and a row for each method at each format; every row
also goes to stderr as one line of JSON when it is finished. A row holds a value or an `error` in
the peer's own words. Pairs that a peer does not have are no rows.

    llama    perplexity: exp of the mean cross-entropy of each next token
    minilm   mean cosine of the sentence vectors (mean over the words) to those of the float model
    digits   top-1 accuracy; `relative_error` is ‖z − z₀‖ / ‖z₀‖ over all logits

In every row all linears are quantized but `lm_head` (`head` of the digits model), and embeddings,
norms and the patch convolution stay float. `bits_per_weight` counts what a quantized linear stores,
codes, scales and zero points, over its weights; `model_bits_per_weight` also all that stays float,
over all parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

BATCH = {"llama": 8, "minilm": 8, "digits": 64}
HEADS = ("lm_head", "head")
Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]
"""A batch → logits, or the last hidden states of MiniLM."""


@dataclass(frozen=True)
class Format:
    """`w4g32-asym`: 4 bits, groups of 32; `w8a8`: channels, activations per token and dynamic."""

    name: str
    bits: int
    group: int | None
    """Inputs that share a scale; None: all of an output channel."""
    symmetric: bool
    activation: int | None
    """Bits; per token, symmetric, scales found at run time."""

    @classmethod
    def parse(cls, name: str) -> Format:
        found = re.fullmatch(r"w(\d)(?:g(\d+))?(?:a(\d))?(-asym)?", name)
        if found is None:
            raise SystemExit(f"a format is like w8, w4g32, w4g32-asym, w4a8; found {name!r}")
        bits, group, activation, asymmetric = found.groups()
        if group is None and (bits, activation) == ("4", "8"):
            group = "32"
        return cls(
            name,
            int(bits),
            int(group) if group else None,
            not asymmetric,
            int(activation) if activation else None,
        )

    def stored(self, shape: torch.Size, scale: int, zero: int = 0) -> int:
        """Bits of a weight's codes and of a scale and a zero point, so wide, for each group."""
        rows, columns = shape
        groups = rows * math.ceil(columns / (self.group or columns))
        return rows * columns * self.bits + groups * (scale + (0 if self.symmetric else zero))


@dataclass(frozen=True)
class Result:
    """A quantized model."""

    run: Run
    stored: int
    """Bits of all that the quantized linears store in place of their weights."""
    more: int = 0
    """Bits of what the float model does not have, such as matrices of online rotations."""
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way of the peer to quantize, and the formats it is for."""

    apply: Callable[[Task, Format, int], Result]
    """(task, format, seed) → what came of it."""
    offers: Callable[[Format], bool] = lambda form: True
    prepare: Callable[[Task], object] = lambda task: None
    """What is done before the clock starts: conversion to the peer's own form of a model."""
    kinds: tuple[str, ...] = ("llama", "minilm", "digits")
    seeded: bool = False


class Task:
    """A float model, its calibration and held-out batches, and the metric of its kind."""

    def __init__(self, folder: Path, data: Path, kind: str) -> None:
        self.folder, self.kind = folder.resolve(), kind
        self.scratch = tempfile.TemporaryDirectory()
        self.calibration, self.heldout = (
            load_file(data / f"{name}.safetensors") for name in ("calibration", "heldout")
        )
        self.labels = self.heldout.pop("labels", None)
        self.calibration.pop("labels", None)
        model = self.model()
        self.shapes = {n: linear.weight.shape for n, linear in self.linears(model).items()}
        self.weights = sum(shape.numel() for shape in self.shapes.values())
        self.parameters = sum(p.numel() for p in model.parameters())
        if kind != "llama":
            self.reference = self.outputs(self.runner(model))

    def model(self) -> nn.Module:
        """The float32 model, read again."""
        if self.kind == "digits":
            spec = importlib.util.spec_from_file_location("model", self.folder / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["model"] = module
            spec.loader.exec_module(module)
            model = module.build()
            model.load_state_dict(load_file(self.folder / "model.safetensors"))
            return pretrained(model, self.scratch.name).eval()
        from transformers import AutoModel, AutoModelForCausalLM

        options: dict[str, object] = {"dtype": torch.float32}
        if self.kind == "llama":
            model = AutoModelForCausalLM.from_pretrained(self.folder, **options)
            model.config.use_cache = False
        else:  # the pooler's output is no part of a sentence vector
            model = AutoModel.from_pretrained(self.folder, add_pooling_layer=False, **options)
        return model.eval()

    def linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linears that every row quantizes, by name."""
        named = model.named_modules()
        return {n: m for n, m in named if isinstance(m, nn.Linear) and n not in HEADS}

    def stored(self, form: Format, scale: int, zero: int = 0) -> int:
        """`Format.stored` of all quantized linears."""
        return sum(form.stored(shape, scale, zero) for shape in self.shapes.values())

    def exported(self) -> torch.export.ExportedProgram:
        """The float model on positional inputs, in the data's order, for any number of rows.

        Sentences may be of any length too.
        """
        first = next(iter(self.batches(self.calibration)))
        free = (0, 1) if self.kind == "minilm" else (0,)
        rows = tuple(dict.fromkeys(free, torch.export.Dim.DYNAMIC) for _ in first)
        plain = Positional(self.runner(model := self.model()), model, list(first))
        with torch.no_grad():
            return torch.export.export(plain, tuple(first.values()), dynamic_shapes=(rows,))

    def runner(self, model: nn.Module) -> Run:
        """The model's own forward pass on a batch."""
        if self.kind == "digits":
            return lambda batch: model(batch["images"])
        part = "logits" if self.kind == "llama" else "last_hidden_state"
        return lambda batch: getattr(model(**batch), part)

    def batches(self, data: Batch) -> list[Batch]:
        size, rows = BATCH[self.kind], len(next(iter(data.values())))
        return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, rows, size)]

    @torch.no_grad()
    def outputs(self, run: Run) -> Tensor:
        """Sentence vectors, or logits, of all held-out inputs."""
        found = []
        for batch in self.batches(self.heldout):
            out = run(batch).float()
            if self.kind == "minilm":
                mask = batch["attention_mask"].unsqueeze(-1).float()
                out = (out * mask).sum(1) / mask.sum(1)
            found.append(out)
        return torch.cat(found)

    def score(self, run: Run) -> tuple[float, dict[str, float]]:
        """(value of the metric, what else was measured)."""
        if self.kind == "llama":
            return perplexity(run, self.batches(self.heldout)), {}
        out, want = self.outputs(run), self.reference
        error = float((out - want).norm() / want.norm())
        if self.kind == "minilm":
            return float(cosine_similarity(out, want, dim=-1).mean()), {"relative_error": error}
        assert self.labels is not None
        right = (out.argmax(-1) == self.labels).float().mean()
        return float(right), {"relative_error": error}


def pretrained(module: nn.Module, scratch: str) -> nn.Module:
    """The same module as transformers' kind of model, which some peers take only.

    They also read its configuration again from where it says that it comes from: `scratch`.
    """
    from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

    class Config(PreTrainedConfig):
        model_type = "digits"

    class Pretrained(PreTrainedModel):
        config_class = Config
        _no_split_modules = ("Block",)
        forward = type(module).forward

    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    config = Config(name_or_path=scratch)
    config.save_pretrained(scratch)
    model = Pretrained(config)
    for name, child in module.named_children():
        model.add_module(name, child)
    for name, value in module.named_parameters(recurse=False):
        model.register_parameter(name, value)
    return model


class Positional(nn.Module):
    """A model with plain tensors in and out."""

    def __init__(self, run: Run, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.run, self.model, self.names = run, model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(dict(zip(self.names, inputs, strict=True)))


@torch.no_grad()
def perplexity(run: Run, batches: list[Batch]) -> float:
    """exp of the mean cross-entropy of each next token."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        flat = run(batch)[:, :-1].float().flatten(0, 1)
        loss = cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")
        total, count = total + float(loss), count + ids[:, 1:].numel()
    return math.exp(total / count)


def main(
    about: str | None,
    packages: tuple[str, ...],
    methods: dict[str, Method],
    slow: tuple[str, ...] = (),
) -> None:
    """Run every method asked for at every format asked for, the float model first.

    Methods in `slow` take minutes for a row where others are as good; they run when asked for.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kind", choices=tuple(BATCH), required=True)
    parser.add_argument("--formats", required=True, help="w8,w4g128,w4g32-asym,w8a8 …")
    parser.add_argument("--methods", help=", ".join(methods))
    parser.add_argument("--slow", action="store_true", help="all, also " + ", ".join(slow))
    parser.add_argument("--seeds", type=int, default=1, help="runs of a method that draws numbers")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    usual = [name for name in methods if options.slow or name not in slow]
    names = options.methods.split(",") if options.methods else usual
    if unknown := set(names) - set(methods):
        parser.error(f"no method {sorted(unknown)}; there are {', '.join(methods)}")
    forms = [Format.parse(name) for name in options.formats.split(",")]
    answer = claim_stdout()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)

    task = Task(options.model, options.data, options.kind)
    os.chdir(task.scratch.name)  # some peers leave folders where they run
    value, extra = task.score(task.runner(task.model()))
    rows = [{"format": "float", "method": "float", "value": value, "extra": extra}]
    for form in forms:
        for name in names:
            method = methods[name]
            if method.offers(form) and task.kind in method.kinds:
                seeds = options.seeds if method.seeded else 1
                rows.append({"format": form.name, "method": name} | row(task, method, form, seeds))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    versions = {p: version(p) for p in packages} | {"python": platform.python_version()}
    answer.write(json.dumps({"versions": versions, "rows": rows}) + "\n")


def row(task: Task, method: Method, form: Format, seeds: int) -> dict[str, object]:
    """The figures of one row, the mean over its seeds, or the peer's words for why there are none.

    `seconds` is what making the quantized model takes, reading and evaluation left out.
    """
    values, times = [], []
    try:
        for seed in range(seeds):
            torch.manual_seed(seed)
            method.prepare(task)
            start = time.perf_counter()
            result = method.apply(task, form, seed)
            times.append(time.perf_counter() - start)
            value, extra = task.score(result.run)
            values.append(value)
    except Exception as error:  # a peer's failure is a result, not the end of the benchmark
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text[:200]}"}
    whole = result.stored + result.more + 32 * (task.parameters - task.weights)
    extra |= {"model_bits_per_weight": whole / task.parameters} | result.extra
    return {
        "value": statistics.fmean(values),
        "extra": extra | ({"values": values} if method.seeded else {}),
        "bits_per_weight": result.stored / task.weights,
        "seconds": statistics.fmean(times),
    }


def claim_stdout():
    """stdout for the answer alone: whatever else is printed, by libraries too, goes to stderr."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answer
