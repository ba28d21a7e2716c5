"""Standard ONNX files of whole networks, in onnxruntime and in OpenVINO, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

import qcompiler
from qcompiler.backends.onnxruntime.session import OnnxArtifact
from qcompiler.backends.openvino.session import OpenVinoArtifact
from qcompiler.check import relative_error
from qcompiler.samples import random_inputs

EXACT = 1e-5
"""Where nothing but weights is rounded, all runtimes compute the same sums in another order."""
FLIPPED = 5e-3
"""Where a last bit turned a rounding of an activation, and the rest of the network followed."""
MODELS = {
    "llama": ("float", "w8a8-dynamic", "w4a16", "w4a8-rotated"),
    "bert": ("float", "w8a8-dynamic"),
    "vit": ("float", "w8a8-static", "w4a8-rotated", "w8a16"),
    "cnn": ("float", "w8a8-dynamic", "w8a8-static", "w4a16"),
    "gpt2": ("float", "w8a8-static"),
}
"""Model → what is tried of it each time; the rest is marked slow."""
ROUNDS = ("w8a8-dynamic", "w8a8-static", "w4a8-rotated")


Captured = Callable[..., tuple[torch.nn.Module, object, qcompiler.Program]]


PAIRS = [(m, r) for m in MODELS for r in ("float", "w4a16", "w8a16", *ROUNDS)]


@pytest.mark.parametrize(
    ("model", "recipe"),
    [pytest.param(*p, marks=() if p[1] in MODELS[p[0]] else pytest.mark.slow) for p in PAIRS],
)
def test_files_compute_what_the_reference_does(
    model: str, recipe: str, captured: Captured, tmp_path: Path
) -> None:
    module, example, exact = captured(model)
    program = exact
    if recipe != "float":
        program = qcompiler.compile(module, example, recipe=recipe, backend="reference").program
    file = qcompiler.export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    artifacts = OnnxArtifact(program, tmp_path), OpenVinoArtifact(program, tmp_path)
    for inputs in (
        random_inputs(program.io, 3),
        random_inputs(program.io, 4, {"batch": 1, "sequence": 1}),
    ):
        wanted, ideal = program.flat(inputs), exact.flat(inputs)
        for artifact in artifacts:
            found = artifact.run(inputs)
            error = relative_error(wanted, found)
            if recipe in ROUNDS and error > EXACT:
                assert error < FLIPPED
                assert relative_error(ideal, found) < 1.25 * relative_error(ideal, wanted)
            else:
                assert error < EXACT
