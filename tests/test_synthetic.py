"""Calibration data made from the model itself, and inputs that no table has a row for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, capture
from qcompiler.blocks import Runner, blocks
from qcompiler.run import evaluate
from qcompiler.samples import random_inputs
from qcompiler.synthetic import _mismatch, synthesize

from .zoo import build


def test_images_are_distilled_from_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of all batch norms come near to what these have seen in training (ZeroQ)."""
    monkeypatch.setattr("qcompiler.synthetic.STEPS", 30)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    images = 3 + 2 * torch.randn(64, 3, 12, 12)
    for _ in range(60):
        model(images)
    program = capture(model.eval(), (torch.rand(4, 3, 12, 12),), dynamic={"input": {0: "batch"}})
    runners = [Runner(program, b) for b in blocks(program)]

    def off(inputs: tuple[object, ...]) -> float:
        return float(_mismatch(program, runners, dict(zip(program.inputs, inputs, strict=True))))

    told: list[tuple[int, int]] = []
    made = synthesize(program, 2, lambda done, total: told.append((done, total)))
    assert len(made) == 2 and told[-1] == (60, 60)
    assert off(made[0]) < 0.1 * off(random_inputs(program.io, 0, {"batch": 8}))
    assert not torch.equal(made[0][0], made[1][0])  # type: ignore[arg-type]


def test_texts_are_written_by_the_model() -> None:
    """Each next token is drawn from what the model predicts: it is likelier than a random one."""
    model, example = build("llama")
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.5  # surer of itself
    program = capture(model, example)
    made = synthesize(program, 1)[0]
    place = next(i for i, t in enumerate(made) if isinstance(t, Tensor))
    ids = made[place]
    assert isinstance(ids, Tensor)
    assert ids.shape[1] > 8 and int(ids.min()) >= 0 and int(ids.max()) < 100

    def surprise(ids: Tensor) -> float:
        logits = evaluate(program, (*made[:place], ids, *made[place + 1 :]))[0]
        assert isinstance(logits, Tensor)
        flat = logits[:, :-1].flatten(0, 1)
        return float(nn.functional.cross_entropy(flat, ids[:, 1:].flatten()))

    assert surprise(ids) < surprise(torch.randint(0, 100, ids.shape)) - 0.5
    assert torch.equal(ids, synthesize(program, 1)[0][place])  # type: ignore[arg-type]


def test_compile_says_that_data_were_made() -> None:
    model, example = build("llama")
    passes = "canonicalize,assign{activation=int8:tensor},quantize"
    made = qcompiler.compile(model, example, passes=passes, backend="null", data="synthetic")
    assert any("made from the model itself" in n for n in made.notes)
    with pytest.raises(BadInput, match="or 'synthetic'"):
        qcompiler.compile(model, example, passes=passes, backend="null", data="random")


@pytest.mark.parametrize("token", [100, -1])
def test_a_token_without_a_row(token: int) -> None:
    """Found before anything is computed, with the table and its rows named."""
    model, example = build("llama")
    data = [{"input_ids": torch.tensor([[5, token, 7]])}]
    with pytest.raises(BadInput, match=rf"data batch 0: input input_ids holds {token}, .* 0 to 99"):
        qcompiler.compile(model, example, backend="null", data=data)
