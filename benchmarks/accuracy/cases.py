"""The four models, what they are calibrated and measured on, and by which figure.

===============  =========================================================================
`tiny_llama`     perplexity on text that it never saw
`outliers`       its twin with outlier channels, the same
`minilm`         mean cosine of 423 sentence vectors with those of the float model
`digits_vit`     top-1 accuracy on 397 images; one image is 0.25 points, so that the relative
                 error of the logits decides between equals
===============  =========================================================================
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import qcompiler
from qcompiler.capture import open_model
from qcompiler.data import BATCH, WINDOW, read_batches
from qcompiler.evaluate import perplexity
from qcompiler.program import Program
from qcompiler.samples import Flat

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LLAMA = EXAMPLES / "tiny_llama"
LLAMA_BATCHES = 16
SENTENCES, SENTENCE = 256, 32
"""Sentences to calibrate on, and tokens of any sentence: longer ones are cut, shorter ones padded,
since the peers read one tensor of all."""

Run = Callable[[Flat], tuple[object, ...]]
Score = tuple[float, dict[str, float]]
"""(value of the metric, what else was measured)."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One model, ready to be quantized and measured."""

    name: str
    kind: str
    """What the peers' scripts call it: llama, minilm or digits."""
    folder: Path
    program: Program
    calibration: list[Batch]
    heldout: list[Batch]
    metric: str
    measure: Callable[[Run], Score]
    labels: Tensor | None = None
    keep: str = ""
    """For `assign`: what stays in floating point besides head and embeddings."""

    @property
    def observed(self) -> list[Flat]:
        return flat(self.program, self.calibration)

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "perplexity"


def open_case(name: str, tokens: int) -> Case:
    """The case called `name`, language models measured on `tokens` tokens."""
    return {
        "tiny_llama": partial(_llama, name, LLAMA / "model", tokens),
        "outliers": partial(_llama, name, LLAMA / "outliers", tokens),
        "minilm": _minilm,
        "digits_vit": _digits,
    }[name]()


MODELS = ("tiny_llama", "outliers", "minilm", "digits_vit")


def flat(program: Program, batches: list[Batch]) -> list[Flat]:
    return [program.io.flatten((), batch) for batch in batches]


def _llama(name: str, folder: Path, tokens: int) -> Case:
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, LLAMA / "outliers.py"], check=True)
    program, _, _ = open_model(folder)
    windows = partial(read_batches, io=program.io, tokenizer=folder)
    calibration = windows(LLAMA / "calibration.txt", limit=LLAMA_BATCHES)
    heldout = windows(LLAMA / "heldout.txt", limit=max(tokens // (BATCH * WINDOW), 1))
    feed = flat(program, heldout)
    return Case(
        *(name, "llama", folder, program, calibration, heldout, "perplexity"),
        lambda run: (perplexity(run, feed), {}),
    )


def _digits() -> Case:
    folder = EXAMPLES / "digits_vit"
    module, calibration, heldout, labels = _script(folder / "model.py").load()
    program = qcompiler.capture(module, calibration[0])
    feed = flat(program, heldout)
    reference = _logits(program.flat, feed)

    def measure(run: Run) -> Score:
        found = _logits(run, feed)
        right = (found.argmax(-1) == labels).float().mean()
        return float(right), {"relative_error": _relative(found, reference)}

    # as in the peers' scripts, where a row is about linears
    keep = ' exceptions=["patch/*=float"]'
    return Case(
        *("digits_vit", "digits", folder, program, calibration, heldout, "accuracy"),
        *(measure, labels, keep),
    )


def _minilm() -> Case:
    search = _script(EXAMPLES / "embedding_search" / "search.py")
    folder = search.model_folder()
    names, texts = zip(*search.rows(search.HERE / "functions.tsv"), strict=True)
    queries, answers = zip(*search.rows(search.HERE / "queries.tsv"), strict=True)
    right = [[names.index(a) for a in answer.split()] for answer in answers]
    program, _, _ = open_model(folder)
    calibration = _coded(folder, sentences({*texts, *queries}))
    heldout = _coded(folder, [*texts, *queries])
    feed = flat(program, heldout)
    reference = _vectors(program.flat, feed)
    ranks = search.ranking(*_parts(reference, len(texts)))

    def measure(run: Run) -> Score:
        found = _vectors(run, feed)
        mine = search.ranking(*_parts(found, len(texts)))
        extra = {"relative_error": _relative(found, reference)} | search.hits(mine, right)
        extra["same_ten"] = search.overlap(ranks, mine, 10)
        return float(cosine_similarity(found, reference, dim=-1).mean()), extra

    return Case("minilm", "minilm", folder, program, calibration, heldout, "cosine", measure)


def sentences(known: set[str]) -> list[str]:
    """Sentences of comments and docstrings in the tiny Llama's texts, none of them in `known`."""
    files = ("calibration.txt", "heldout.txt")
    text = "".join((LLAMA / file).read_text("utf-8") for file in files).replace("#", " ")
    found = re.findall(r"[A-Z][a-z][^.!?\"=(){}\[\]]*[.!?](?=\s)", text)
    lines = dict.fromkeys(" ".join(s.split()) for s in found)
    usable = [s for s in lines if len(s.split()) >= 5 and s not in known]
    return usable[:: len(usable) // SENTENCES][:SENTENCES]


def _coded(folder: Path, texts: list[str]) -> list[Batch]:
    """Batches of ids and masks."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=SENTENCE)
    tokenizer.enable_truncation(SENTENCE)
    coded = tokenizer.encode_batch(texts)
    ids = torch.tensor([c.ids for c in coded]).split(BATCH)
    mask = torch.tensor([c.attention_mask for c in coded]).split(BATCH)
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def _vectors(run: Run, feed: list[Flat]) -> Tensor:
    """Mean of the last hidden states over the words of each sentence."""
    found = []
    for inputs in feed:
        hidden, mask = run(inputs)[0], inputs[1]
        assert isinstance(hidden, Tensor) and isinstance(mask, Tensor)
        weights = mask.unsqueeze(-1).float()
        found.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.cat(found)


def _parts(vectors: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """(texts, queries), of length 1."""
    unit = normalize(vectors, dim=-1)
    return unit[:texts], unit[texts:]


def _logits(run: Run, feed: list[Flat]) -> Tensor:
    outputs = [run(inputs)[0] for inputs in feed]
    return torch.cat([o for o in outputs if isinstance(o, Tensor)])


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def _script(file: Path) -> ModuleType:
    """A script of the examples as a module."""
    spec = spec_from_file_location(f"{file.parent.name}.{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
