"""Every architecture goes through the same code: what is found is exact, whatever the model."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from small_models import ARCHITECTURES, CAUSAL, build

import qcompiler
from qcompiler.check import relative_error
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.spaces import find

ROOT = Path(__file__).parents[2]
PREPARE = "untie{optional=true},absorb_norms{optional=true},center{optional=true}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_free_space_is_exact(name: str) -> None:
    program = qcompiler.capture(*build(name))
    program = run_pipeline(program, make_passes("canonicalize{optional=true}"))
    found = qcompiler.verify(program)
    prepared = run_pipeline(program, make_passes(PREPARE))
    found += qcompiler.verify(prepared, kinds=("orthogonal",))
    for verified in found:
        where = [m.name for m in verified.space.params]
        assert verified.error <= 1e-9, (verified.space.kind, where)
        assert verified.one_sided > 1e-7, (verified.space.kind, where)
    assert any(v.space.kind == "diagonal" for v in found)
    for space in find(prepared, "orthogonal"):
        assert all(b.node and b.reason for b in space.blocked_by)


@pytest.mark.parametrize("name", [n for n, (auto, _) in ARCHITECTURES.items() if auto == CAUSAL])
def test_a_text_in_pieces_is_the_whole_text(name: str) -> None:
    module, example = build(name)
    if name in ("gptj", "gpt_neo"):
        words = r"does more with its cache|torch\.export refuses"
        with pytest.raises(qcompiler.errors.BadInput, match=words):
            qcompiler.capture(module, example, cache=True)
        return
    program = qcompiler.capture(module, example, cache=True)
    ids = torch.randint(4, 100, (3, 12), generator=torch.Generator().manual_seed(3))
    past, logits = None, []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
        out = program(ids[:, start:end], past_key_values=past)
        past = out.past_key_values
        logits.append(out.logits)
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
    assert relative_error(whole, torch.cat(logits, 1)) < 2e-6


def _words(source: str) -> set[str]:
    """Words of names and of strings that are not docstrings, in small letters."""
    found: set[str] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        statement = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type == tokenize.NAME or (token.type == tokenize.STRING and not statement):
            parts = re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])", token.string)
            found |= {p.lower() for p in parts}
        previous = token.type
    return found


def test_no_code_knows_an_architecture() -> None:
    names = {re.split(r"[ _-]", name)[0] for name in ARCHITECTURES} | {"transformer"}
    assert "llama" in _words('x = "LlamaDecoderLayer"')  # the test can fail
    for folder in ("qcompiler", "passes", "backends"):
        for path in (ROOT / folder).rglob("*.py"):
            known = _words(path.read_text()) & names
            # A GGUF file says which architecture it is of: the format is a table of their names.
            if "gguf" not in path.parts:
                assert not known, f"{path.relative_to(ROOT)} speaks of {known}"
