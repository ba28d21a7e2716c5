"""Weights at ±127 steps and activations at their largest, where sums in 16 bits would overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

import qcompiler
from qcompiler.backends.openvino.session import openvino

STATIC = "canonicalize{optional=true},assign{activation=int8:tensor head=same},quantize"


def largest(backend: str) -> tuple[torch.nn.Module, torch.Tensor, qcompiler.Compiled]:
    model = torch.nn.Sequential(torch.nn.Linear(256, 32, bias=False), torch.nn.ReLU())
    model[0].weight.data.fill_(0.5)
    x = torch.full((4, 256), 3.0)
    return model, x, qcompiler.compile(model, x, passes=STATIC, backend=backend, data=[x])


def test_openvino_does_not_saturate() -> None:
    model, x, compiled = largest("openvino")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=0)


def test_openvino_does_not_saturate_without_vnni() -> None:
    """The same in a process whose kernels may use AVX2 only."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_saturation; test_saturation.test_openvino_does_not_saturate()"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        check=True,
        timeout=300,
    )


@pytest.mark.parametrize("rows", [1, 8])
def test_unsigned_weights_saturate_nowhere(rows: int, tmp_path: Path) -> None:
    """Both runtimes with their defaults, on any processor."""
    model, _, compiled = largest("reference")
    file = compiled.export(tmp_path / "model.onnx", unsigned=True)
    x = np.full((rows, 256), 3.0, np.float32)
    wanted = model(torch.from_numpy(x)).detach().numpy()
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": x})[0], wanted, rtol=1e-5)
    opened = openvino().Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(opened([x])[0], wanted, rtol=2e-2)


def test_openvino_reports_to_nobody() -> None:
    """Its Python package says over the network that it was imported, if it finds the means to."""
    openvino()
    assert sys.modules["openvino.tools.ovc"].telemetry.__module__.endswith("telemetry_stub")
