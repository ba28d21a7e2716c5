"""GGUF files that transformers reads by itself, and that then compute what the reference does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from folders import PLAIN, ROTATED, SMOOTHED, TINY, error, save, tokens
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qcompiler
from qcompiler.backends.checkpoint.gguf import GgufBackend, file, llama
from qcompiler.backends.checkpoint.gguf.blocks import pack
from qcompiler.cli import main
from qcompiler.formats import Grid, QFormat

EXACT = {
    "int4:group32:mirrored:scale(fp16)": "Q4_0",
    "int4:channel:scale(fp16)": "Q4_0",
    "int5:group64:full:scale(fp16)": "Q5_0",
    "int8:group32:scale(fp16)": "Q8_0",
}
"""Formats whose scales are float16 already → the type of tensor."""
ROUNDED = {
    "int4:group32:mirrored": "Q4_0",
    "int4:group32:asym:scale(fp16)": "Q4_1",
    "uint4:group32:asym": "Q4_1",
    "int5:group32:asym": "Q5_1",
    "int8:channel": "Q8_0",
}
"""Formats of which float16 rounds something: scales, or the minimum -z s."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> object:
    return cache(lambda name, dtype=torch.float32: save(name, tmp_path_factory.mktemp(name), dtype))


def written(source: Path, passes: str, output: Path) -> tuple[qcompiler.Compiled, object]:
    compiled = qcompiler.compile(source, passes=passes, backend="gguf")
    return compiled, GgufBackend().write(compiled.program, source, output)


def opened(path: Path) -> nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, output_loading_info=True
    )
    assert not any(report.values())
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("text", [*EXACT, *ROUNDED])
def test_blocks(text: str) -> None:
    """The package gguf decodes our numbers: to the last bit where float16 rounds nothing, else by
    less than the told part of a step."""
    x = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) + 0.1
    fmt = QFormat.parse(text)
    stored = Grid.fit(x, fmt).quantize(x)
    blocks = pack("w", stored)
    assert blocks.kind.name == (EXACT | ROUNDED)[text]
    found = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.kind).copy())
    wanted = stored.dequantize()
    if text in EXACT:
        assert torch.equal(found, wanted) and blocks.moved == 0
    else:
        steps = (found - wanted).abs() / stored.grid.columns((24, 128))[0].abs()
        assert 0 < blocks.moved < 0.07 and float(steps.max()) <= blocks.moved + 1e-5


def test_tiny_llama(tmp_path: Path) -> None:
    """Rotated and smoothed; queries and keys in llama.cpp's order; the same words for a text."""
    scheme = "weight=int4:group32:mirrored:scale(fp16)"
    compiled, told = written(TINY, ROTATED.format(scheme), tmp_path / "model.gguf")
    assert dict(told.formats) == {"Q4_0": 28} and told.notes == ()
    assert told.bytes == told.output.stat().st_size
    model, ids = opened(told.output), tokens(1024)
    assert error(logits(model, ids), compiled(ids)["logits"]) < 1e-5
    text = "def f(x):\n    return x + 12345  # héllo 你好<|endoftext|>"
    own = AutoTokenizer.from_pretrained(TINY)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(text).input_ids == own(text).input_ids


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("tied_llama", SMOOTHED),
        ("tied_llama", ROTATED),
        ("biased_qwen2", ROTATED),
        ("large_heads_qwen3", ROTATED),
        ("mistral", ROTATED),
    ],
)
def test_other_models(name: str, passes: str, saved: object, tmp_path: Path) -> None:
    """Grouped heads, tied tables, biases, norms of heads; all types of tensor."""
    rules = (
        '"*q_proj*=int4:group32:asym","*k_proj*=int5:group32:mirrored","*v_proj*=int8:channel",'
        '"*up_proj*=int5:channel:asym"'
    )
    scheme = f"weight=int4:group32 exceptions=[{rules}]"
    compiled, told = written(saved(name), passes.format(scheme), tmp_path / "model.gguf")
    assert sorted(told.formats) == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
    assert any("float16" in n for n in told.notes) and "no tokenizer" in told.notes[-1]
    kept = gguf.GGUFReader(told.output).get_field("tokenizer.ggml.model")
    assert kept is not None and kept.contents() == "no_vocab"  # llama.cpp wants to be told
    model, ids = opened(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < 2e-3  # scales in float16
    assert model.config.tie_word_embeddings == (name == "tied_llama" and passes is SMOOTHED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype: torch.dtype, saved: object, tmp_path: Path) -> None:
    """What stays in floating point keeps its type, but norms, which are float32."""
    scheme = "weight=int8:group32:scale(fp16)"
    compiled, told = written(saved("tied_llama", dtype), PLAIN.format(scheme), tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(told.output).tensors}
    assert kinds["token_embd.weight"] == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["output_norm.weight"] == "F32" and kinds["blk.1.ffn_up.weight"] == "Q8_0"
    params = compiled.program.params
    found = opened(told.output).state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[name], params[name].float())


def test_order_of_rows_is_seen(
    saved: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.Naming, "rows", lambda *_: None)
    passes = PLAIN.format("weight=int4:group32")
    compiled, told = written(saved("tied_llama"), passes, tmp_path / "model.gguf")
    model, ids = opened(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) > 0.01


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ("weight=int3:group32", "int3:group32: GGUF has int4"),
        ("weight=int4:group16", "multiple of 32"),
        ("weight=int8:channel:asym", "int8:channel:asym"),
        ("weight=nf4:channel", "nf4"),
        ("weight=mxfp4", "fp4_e2m1"),
        ("weight=int8:channel activation=int8:token:dynamic", "inputs are rounded"),
    ],
)
def test_formats_are_refused_by_node(scheme: str, what: str, saved: object) -> None:
    with pytest.raises(qcompiler.BackendError, match=rf"node model\.layers\.0.*{what}"):
        qcompiler.compile(saved("tied_llama"), passes=PLAIN.format(scheme), backend="gguf")


def test_models_are_refused(saved: object, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with pytest.raises(qcompiler.BackendError, match="is a OPTForCausalLM"):
        written(saved("opt"), PLAIN.format("weight=int8:channel"), out)
    with pytest.raises(qcompiler.BackendError, match="rows of 80 in int8:channel"):
        written(saved("llama"), PLAIN.format("weight=int8:channel"), out)
    config = json.loads((saved("tied_llama") / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for name in saved("tied_llama").iterdir():
        (scaled / name.name).write_bytes(name.read_bytes())
    (scaled / "config.json").write_text(json.dumps(config))
    with pytest.raises(qcompiler.BackendError, match="rotary embeddings"):
        written(scaled, PLAIN.format("weight=int8:channel"), out)
    with pytest.raises(qcompiler.BackendError, match="bias"):
        passes = PLAIN.replace("quantize", "quantize{{bias_correction=true}}")
        written(saved("tied_llama"), passes.format("weight=int8:channel"), out)
    assert not out.exists()


def test_scales_out_of_range() -> None:
    x = torch.randn(4, 64) * 1e-9
    with pytest.raises(qcompiler.BackendError, match="out of float16's range"):
        pack("w", Grid.fit(x, QFormat.parse("int8:channel")).quantize(x))


def test_a_failure_leaves_nothing(
    saved: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: gguf.GGUFWriter) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(file.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(qcompiler.BadInput, match=r"no space left.*nothing was changed"):
        written(saved("tied_llama"), PLAIN.format("weight=int8:channel"), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_command(saved: object, tmp_path: Path) -> None:
    """Of a model as it is: nothing is quantized."""
    out = tmp_path / "model.gguf"
    arguments = ["export", str(saved("tied_llama")), "--format", "gguf", "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "no codes" in result.output, result.output
    ids = tokens()
    exact = logits(AutoModelForCausalLM.from_pretrained(saved("tied_llama")), ids)
    np.testing.assert_allclose(logits(opened(out), ids), exact, rtol=1e-5, atol=1e-5)
    assert CliRunner().invoke(main, arguments).exit_code == 2
