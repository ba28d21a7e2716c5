"""Folders that transformers loads by itself, and that then compute what the reference does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folders import PLAIN, ROTATED, SMOOTHED, TINY, error, save, tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import qcompiler
from qcompiler.backends.checkpoint import CheckpointBackend, compressed, folder
from qcompiler.backends.checkpoint.match import match
from qcompiler.cli import main
from qcompiler.export.target import Written
from qcompiler.run import param_value

CANONICAL = "canonicalize{optional=true}"
W4A16 = "weight=int4:group32:mirrored"
W8A8 = "weight=int8:channel activation=int8:token:full:dynamic"
FLIPS = 5e-3
"""Where inputs are rounded, a last digit may turn one rounding the other way."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> object:
    return cache(lambda name, dtype=torch.float32: save(name, tmp_path_factory.mktemp(name), dtype))


def written(
    source: Path, passes: str, output: Path, **options: object
) -> tuple[qcompiler.Compiled, Written]:
    compiled = qcompiler.compile(source, passes=passes, backend="checkpoint", **options)
    return compiled, CheckpointBackend().write(compiled.program, source, output)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("scheme", "format_"), [(W4A16, "pack-quantized"), (W8A8, "int-quantized")]
)
def test_tiny_llama(scheme: str, format_: str, tmp_path: Path) -> None:
    """Rotated and smoothed: all of it is in the weights. compressed-tensors computes what the
    reference does, in the same order, so that nothing but float32's own rounding is left."""
    compiled, told = written(TINY, ROTATED.format(scheme), tmp_path / "out")
    assert dict(told.formats) == {format_: 28} and told.notes == ()
    assert told.bytes == sum(f.stat().st_size for f in told.output.iterdir())
    model, report = AutoModelForCausalLM.from_pretrained(told.output, output_loading_info=True)
    assert not any(report.values())
    ids = tokens(1024)
    limit = FLIPS if "activation" in scheme else 1e-5
    assert error(logits(model, ids), compiled(ids)["logits"]) < limit
    again, own = (AutoTokenizer.from_pretrained(f)("def f(x):") for f in (told.output, TINY))
    assert again.input_ids == own.input_ids


FORMATS = {
    "pack-quantized": (
        *(
            "int4:group16",
            "int4:group16:mirrored:scale(fp16)",
            "int3:group16:planes",
            "int8:channel",
        ),
        *("int8:tensor:asym", "int6:channel:full", "int2:group16"),
    ),
    "naive-quantized": ("fp8_e4m3:channel", "fp8_e4m3:tensor", "fp8_e4m3:group16"),
    "int-quantized": (
        *("int8:channel/int8:token:full:dynamic", "int8:channel/int8:token:asym:dynamic"),
        *("int8:channel/int8:tensor:full", "int8:channel:asym/uint8:tensor:asym"),
        *("int4:group16/int8:tensor:full:dynamic", "int4:group16/int8:group16:full:dynamic"),
    ),
    "float-quantized": (
        "fp8_e4m3:channel/fp8_e4m3:token:dynamic",
        "fp8_e4m3:tensor/fp8_e4m3:tensor",
    ),
}
LAYERS = [
    f"*layers.{i}.*{p}_proj*" for i in (0, 1) for p in ("q", "k", "v", "o", "gate", "up", "down")
]


@pytest.mark.parametrize("format_", FORMATS)
def test_formats(format_: str, saved: object, tmp_path: Path) -> None:
    """One layer in each."""
    schemes = FORMATS[format_]
    rules = ",".join(f'"{layer}={s}"' for layer, s in zip(LAYERS, schemes, strict=False))
    passes = PLAIN.format(f"weight=float exceptions=[{rules}]")
    compiled, told = written(saved("llama"), passes, tmp_path / "out")
    assert dict(told.formats) == {format_: len(schemes)} and told.notes == ()
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    limit = FLIPS if "/" in schemes[0] else 1e-5
    assert error(logits(model, ids), compiled(ids)["logits"]) < limit


def test_packed_zero_points(saved: object, tmp_path: Path) -> None:
    """The place that compressed-tensors 0.20 has for them is not packed: dequantized they load."""
    scheme = "weight=int4:group16:asym"
    compiled, told = written(saved("llama"), PLAIN.format(scheme), tmp_path / "out")
    assert "dequantize=True" in told.notes[0]
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(told.output, quantization_config=config)
    ids = tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < 1e-5


def test_inputs_on_another_grid_are_told(saved: object, tmp_path: Path) -> None:
    """s = max|x| / 127 here, max|x| / 127.5 there: another rounding of the same program."""
    source = saved("llama")
    scheme = "weight=int8:channel activation=int8:token:dynamic"
    compiled, told = written(source, PLAIN.format(scheme), tmp_path / "out")
    assert "max|x| / 127.5" in told.notes[0] and "int8:token:full:dynamic" in told.notes[0]
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    assert 1e-4 < error(logits(model, ids), compiled(ids)["logits"]) < 0.03
    exact = logits(AutoModelForCausalLM.from_pretrained(source), ids)
    here, there = error(compiled(ids)["logits"], exact), error(logits(model, ids), exact)
    assert there < 1.25 * here


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("llama", ROTATED),
        ("qwen3", ROTATED),
        ("tied_llama", ROTATED),
        ("tied_llama", SMOOTHED),
        ("biased_qwen2", ROTATED),
        ("opt", SMOOTHED),
    ],
)
@pytest.mark.parametrize("scheme", ["weight=int4:group16", W8A8])
def test_other_models(name: str, passes: str, scheme: str, saved: object, tmp_path: Path) -> None:
    """Grouped heads, norms of heads, tied tables, biases, LayerNorm."""
    compiled, told = written(saved(name), passes.format(scheme), tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(told.output, output_loading_info=True)
    assert not any(report.values())
    ids = tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < FLIPS
    tied = name in ("tied_llama", "opt") and passes is SMOOTHED
    assert model.config.tie_word_embeddings == tied


def test_bert(saved: object, tmp_path: Path) -> None:
    """With a folder of sentence-transformers beside it."""
    source = saved("bert")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text("{}")
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    compiled, told = written(source, SMOOTHED.format(W8A8), tmp_path / "out")
    assert (told.output / "1_Pooling/config.json").is_file()
    model = AutoModel.from_pretrained(told.output)
    ids, mask = tokens(), torch.ones(3, 17, dtype=torch.int64)
    mask[1, 9:] = 0
    with torch.no_grad():
        found = model(ids, attention_mask=mask)
    wanted = compiled(input_ids=ids, attention_mask=mask)
    assert error(found.last_hidden_state, wanted["last_hidden_state"]) < FLIPS
    assert error(found.pooler_output, wanted["pooler_output"]) < FLIPS


def test_a_plan_with_several_formats(saved: object, tmp_path: Path) -> None:
    """Layers by name, a stored table, a stored head that was tied to it, one layer left alone."""
    scheme = (
        "weight=int4:group16 embedding=int8:channel head=same exceptions=["
        '"*down_proj*=int8:channel/int8:token:full:dynamic","*v_proj*=float"]'
    )
    passes = f"canonicalize{{optional=true}},assign{{{scheme}}},quantize"
    compiled, told = written(saved("tied_llama"), passes, tmp_path / "out")
    assert dict(told.formats) == {"pack-quantized": 11, "int-quantized": 2, "naive-quantized": 1}
    config = json.loads((told.output / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert all("v_proj" in n for n in config["quantization_config"]["ignore"])
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < FLIPS


def test_without_canonicalize(saved: object, tmp_path: Path) -> None:
    compiled, told = written(saved("llama"), f"assign{{{W8A8}}},quantize", tmp_path / "out")
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < FLIPS


def test_biases_where_the_config_has_a_word_for_them(saved: object, tmp_path: Path) -> None:
    passes = PLAIN.replace("assign{{", "assign{{weight=int4:group16 ")
    passes = passes.replace("quantize", "quantize{{bias_correction=true}}")
    source = saved("llama")
    compiled, told = written(source, passes.format("head=float"), tmp_path / "out")
    config = json.loads((told.output / "config.json").read_text())
    assert config["attention_bias"] and config["mlp_bias"]
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) < 1e-5
    with pytest.raises(qcompiler.BackendError, match=r"no place for: .*lm_head\.bias"):
        written(source, passes.format("head=same"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_bfloat16(saved: object, tmp_path: Path) -> None:
    """Scales are of the model's type there: exact if the format says so, else it is told."""
    source = saved("llama", torch.bfloat16)
    for scheme, exact in (("int8:channel:scale(bf16)", True), ("int8:channel", False)):
        passes = f"canonicalize{{optional=true}},assign{{weight={scheme}}},quantize"
        compiled, told = written(source, passes, tmp_path / scheme)
        assert [n for n in told.notes if "scale(bf16)" in n] == list(told.notes)
        assert (not told.notes) == exact
        config = CompressedTensorsConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(told.output, quantization_config=config)
        name = "model.layers.0.mlp.down_proj"
        wanted = param_value(compiled.program, compiled.program.node(f"{name}/linear#0").args[1])
        found = model.get_parameter(f"{name}.weight")
        assert torch.equal(found, wanted.bfloat16()) == exact
        assert error(found, wanted) < 0.005


def test_errors_are_seen(saved: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code of sixteen that is off by one is another model."""
    pack = compressed.pack_to_int32
    monkeypatch.setattr(compressed, "pack_to_int32", lambda q, *a: pack(q.clamp(max=6), *a))
    compiled, told = written(saved("llama"), PLAIN.format("weight=int4:group16"), tmp_path / "out")
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    assert error(logits(model, ids), compiled(ids)["logits"]) > 1e-3


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ("weight=nvfp4", "no fp4_e2m1"),
        ("weight=nf4:channel", "no nf4"),
        ("weight=int8:block16x16", "per tensor, channel or group"),
        ("weight=int8:channel activation=int8:tensor:dynamic:clip0.9", "`clip`"),
        ("weight=float activation=int8:token:dynamic", "floating point"),
        ("key=int8:token:dynamic", "attention"),
    ],
)
def test_formats_are_refused_by_node(scheme: str, what: str, saved: object) -> None:
    passes = f"canonicalize{{optional=true}},assign{{{scheme}}},quantize"
    with pytest.raises(qcompiler.BackendError, match=rf"(?s)node model\.layers\.0.*{what}"):
        qcompiler.compile(saved("llama"), passes=passes, backend="checkpoint")


def test_what_runs_online_is_refused(saved: object, tmp_path: Path) -> None:
    passes = ROTATED.replace("rotate{{", "rotate{{online=true ").format("weight=int4:group16")
    float_ = qcompiler.compile(saved("llama"), passes=CANONICAL, backend="reference").program
    compiled = qcompiler.compile(saved("llama"), passes=passes, backend="reference")
    for refuse in (CheckpointBackend().build, lambda p: match(p, float_, "LlamaForCausalLM")):
        with pytest.raises(qcompiler.BackendError, match=r"mlp/qc\.hadamard#0.*`rotate`.*online="):
            refuse(compiled.program)
    with pytest.raises(qcompiler.BackendError, match=r"mlp/qc\.hadamard#0"):
        CheckpointBackend().write(compiled.program, saved("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_place_in_the_architecture_is_named(saved: object, tmp_path: Path) -> None:
    passes = (
        "canonicalize{optional=true},assign{weight=int8:channel},split_low_rank{rank=2},"
        "fold{optional=true},quantize"
    )
    compiled = qcompiler.compile(saved("llama"), passes=passes, backend="reference")
    with pytest.raises(qcompiler.BackendError, match=r"`split_low_rank`.*Llama\w+ has no place"):
        CheckpointBackend().write(compiled.program, saved("llama"), tmp_path / "out")


def test_bad_input(saved: object, tmp_path: Path) -> None:
    compiled = qcompiler.compile(saved("llama"), passes=f"assign{{{W8A8}}},quantize")
    write, out = CheckpointBackend().write, tmp_path / "out"
    with pytest.raises(qcompiler.BadInput, match="--source"):
        write(compiled.program, tmp_path / "nowhere", out)
    with pytest.raises(qcompiler.BadInput, match=r"config\.json"):
        write(compiled.program, tmp_path, out)
    with pytest.raises(qcompiler.BackendError, match="Qwen3ForCausalLM has no place"):
        write(compiled.program, saved("qwen3"), out)
    with pytest.raises(qcompiler.BadInput, match="does not exist"):
        write(compiled.program, saved("llama"), tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(qcompiler.BadInput, match="exists"):
        write(compiled.program, saved("llama"), out)
    assert out.read_text() == "mine"


def test_other_layouts(saved: object, tmp_path: Path) -> None:
    """GPT-2 holds its layers turned: they stay as they are, or are refused."""
    source, out = saved("gpt2"), tmp_path / "out"
    with pytest.raises(qcompiler.BackendError, match=r"c_\w+\.weight' .* another layout"):
        written(source, PLAIN.format("weight=int8:channel"), out)
    passes = PLAIN.format("weight=float embedding=int8:channel")
    compiled, told = written(source, passes, out)
    model, ids = AutoModelForCausalLM.from_pretrained(told.output), tokens()
    wanted = compiled(input_ids=ids)["logits"]
    assert error(logits(model, ids), wanted) < 1e-5


def test_a_short_last_group_is_refused(saved: object, tmp_path: Path) -> None:
    with pytest.raises(qcompiler.BackendError, match="rows of 80 in groups of 32"):
        written(saved("llama"), "assign{weight=int4:group32},quantize", tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    failure: BaseException, saved: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(folder, "save_file", full)
    with pytest.raises((qcompiler.BadInput, KeyboardInterrupt)):
        written(saved("llama"), f"assign{{{W8A8}}},quantize", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_the_command(saved: object, tmp_path: Path) -> None:
    passes = ROTATED.format("weight=int4:group16")
    qcompiler.compile(saved("llama"), passes=passes).save(tmp_path / "artifact")
    out = tmp_path / "folder"
    code, text = run("export", tmp_path / "artifact", "--format", "checkpoint", "-o", out, "--json")
    assert code == 0, text
    assert json.loads(text)["formats"] == {"pack-quantized": 14}
    AutoModelForCausalLM.from_pretrained(out)
    code, text = run("export", tmp_path / "artifact", "--format", "checkpoint", "-o", out)
    assert code == 2 and "exists" in text
    code, text = run("export", tmp_path / "artifact", "--format", "null", "-o", tmp_path / "x")
    assert code == 2 and "onnx, checkpoint, gguf" in text
    code, text = run(
        "export",
        tmp_path / "artifact",
        "--format",
        "checkpoint",
        "--unsigned",
        "-o",
        tmp_path / "x",
    )
    assert code == 2 and "for ONNX files" in text


def test_the_command_asks_for_the_source(saved: object, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    compiled = qcompiler.compile(
        model, {"input_ids": tokens()}, passes=f"assign{{{W8A8}}},quantize"
    )
    compiled.save(tmp_path / "artifact")
    arguments = ("export", tmp_path / "artifact", "--format", "checkpoint", "-o", tmp_path / "out")
    code, text = run(*arguments)
    assert code == 2 and "--source FOLDER" in text
    code, text = run(*arguments, "--source", saved("llama"))
    assert code == 0, text
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens())
    assert error(found, compiled(input_ids=tokens()).logits) < FLIPS
