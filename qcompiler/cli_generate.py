"""`qcompiler generate`: text from a compiled language model, and how fast it came."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from qcompiler.cli_shared import tokenizer_of
from qcompiler.compiled import load
from qcompiler.console import as_json, err, print_json
from qcompiler.data import open_tokenizer
from qcompiler.store import Saved, read


@click.command("generate")
@click.argument("artifact", type=Path)
@click.argument("prompt")
@click.option("--count", default=128, show_default=True, help="Tokens to write at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Draw from so many; 0: from all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from as many as have this much."
)
@click.option("--seed", default=0, show_default=True)
@as_json
def generate_(
    artifact: Path,
    prompt: str,
    count: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    json_: bool,
) -> None:
    """Go on from PROMPT (`-`: standard input) with a language model that `compile --cache` made."""
    saved = read(artifact)
    tokenizer, end = _tokenizer(saved)
    text = sys.stdin.read() if prompt == "-" else prompt
    prompt_ids = tokenizer.encode(text).ids  # with what the tokenizer says begins a text
    ids = torch.tensor([prompt_ids], dtype=torch.long)
    compiled = load(artifact)
    tokens: list[int] = []
    last = prompt_ids[-1:]  # decoded with what follows: a space between two words is part of one
    known = tokenizer.decode(last)
    said, times = "", [time.perf_counter()]
    stream = compiled.stream(
        ids, count=count, temperature=temperature, top_k=top_k, top_p=top_p, stop=end, seed=seed
    )
    if not json_:
        click.echo(text, nl=False)
    for token in stream:
        times.append(time.perf_counter())
        tokens.append(int(token))
        whole = tokenizer.decode([*last, *tokens]).removeprefix(known)
        if whole.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a letter
            continue
        if not json_:
            click.echo(whole.removeprefix(said), nl=False)
        said = whole
    rest = times[-1] - times[1]
    result = {
        "text": said,
        "tokens": tokens,
        "prompt_tokens": ids.shape[1],
        "prompt_seconds": times[1] - times[0],
        "tokens_per_second": (len(tokens) - 1) / rest if rest else None,
    }
    if json_:
        print_json(result)
        return
    click.echo()
    speed = result["tokens_per_second"]
    err.print(
        f"{ids.shape[1]} tokens read in {result['prompt_seconds']:.2f} s"
        + (f", then {speed:.1f} written a second" if speed else ""),
        highlight=False,
    )


def _tokenizer(saved: Saved) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of an artifact, and the tokens that end a text."""
    folder = saved.tokenizer or tokenizer_of(saved.about.source)
    tokenizer = open_tokenizer(
        folder,
        f"{saved.folder} has no tokenizer.json, so that no text can be read or written; compile "
        "from a Hugging Face folder that has one, or call `generate` in Python with ids",
    )
    assert folder is not None
    named = _json(folder / "tokenizer_config.json").get("eos_token")
    word = named.get("content") if isinstance(named, dict) else named
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    found = {tokenizer.token_to_id(word) if word else None}
    found |= set(ends) if isinstance(ends, list) else {ends}
    return tokenizer, tuple(n for n in found if n is not None)


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
