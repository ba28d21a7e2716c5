"""The passes on seven kinds of model: exact where they say so; what they raise and skip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import zoo
from torch.utils import _pytree as pytree

import qcompiler
from qcompiler import BadInput, PassError, Program
from qcompiler.io import as_call
from qcompiler.pipeline import run_pipeline
from qcompiler.program import op_name
from qcompiler.registry import make_passes

Captured = Callable[..., tuple[torch.nn.Module, object, Program]]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def run(program: Program, passes: str) -> Program:
    return run_pipeline(program, make_passes(passes))


def operators(program: Program) -> Counter[str]:
    return Counter(op_name(n.target) for n in program.nodes if n.op == "call_function")


@DTYPES
@pytest.mark.parametrize("name", zoo.MODELS)
def test_exact_passes_are_exact(name: str, dtype: torch.dtype, captured: Captured) -> None:
    program = run(captured(name, dtype)[2], "canonicalize,smooth")
    assert all(s.metrics["error"] <= 1e-9 for s in program.history[1:])
    assert program.history[1].edits and program.history[2].edits


FLOOR_DB = {"llama": 33, "qwen3": 32, "opt": 42, "gpt2": 45, "bert": 50, "vit": 35, "cnn": 40}
"""SQNR that int8 must keep on these random models, a few dB under what was measured."""


@DTYPES
@pytest.mark.parametrize("name", zoo.MODELS)
def test_int8_on_reference_and_cpu(name: str, dtype: torch.dtype, captured: Captured) -> None:
    model, example, _ = captured(name, dtype)
    args, kwargs = as_call(example)
    outputs = []
    for backend in ("reference", "cpu"):
        compiled = qcompiler.compile(model, example, recipe="w8a8-dynamic", backend=backend)
        assert compiled.history[-1].metrics["capture_sqnr_db"] > FLOOR_DB[name]
        assert compiled.bytes < compiled.float_bytes
        outputs.append(pytree.tree_leaves(compiled(*args, **kwargs))[0].double())
    reference, cpu = outputs
    assert (reference - cpu).norm() / reference.norm() < (1e-5 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize(
    ("name", "raised", "gone"),
    [
        ("llama", {"rms_norm": 5, "qc.rope": 4, "linear": 15}, ("pow", "rsqrt", "neg", "view")),
        ("qwen3", {"rms_norm": 9, "qc.rope": 4}, ("pow", "rsqrt", "neg")),
        ("gpt2", {"linear": 9, "slice": 7}, ("addmm", "split", "getitem", "view")),
        ("opt", {"linear": 13, "layer_norm": 5}, ("dropout", "view")),
        ("cnn", {"conv2d": 7, "relu": 5}, ("batch_norm", "relu_")),
    ],
)
def test_canonicalize_raises(
    name: str, raised: dict[str, int], gone: tuple[str, ...], captured: Captured
) -> None:
    program = run(captured(name)[2], "canonicalize")
    count = operators(program)
    assert {k: count[k] for k in raised} == raised
    assert not any(count[k] for k in gone)
    again = run(program, "canonicalize{optional=true}")
    assert not again.history[-1].edits  # the canonical form is a fixed point


def test_grouped_heads_are_raised(captured: Captured) -> None:
    program = run(captured("llama")[2], "canonicalize")
    for node in program.nodes:
        if op_name(node.target) == "scaled_dot_product_attention":
            assert node.kwargs["enable_gqa"] is True
            assert node.args[1].meta["val"].shape[1] == 2


@pytest.mark.parametrize(
    ("name", "edits"),
    [("llama", 9), ("qwen3", 9), ("opt", 8), ("gpt2", 6), ("bert", 2), ("vit", 7), ("cnn", 5)],
)
def test_smooth_finds_its_places(name: str, edits: int, captured: Captured) -> None:
    step = run(captured(name)[2], "canonicalize,smooth").history[-1]
    assert len(step.edits) == edits
    assert all("cannot be changed: " in r.why or "no parameter" in r.why for r in step.skipped)


def test_smooth_says_what_blocks(captured: Captured) -> None:
    step = run(captured("bert")[2], "canonicalize,smooth").history[-1]
    why = {r.nodes[0]: r.why for r in step.skipped}
    assert "gelu commutes with no map" in why["encoder.layer.0.output.dense/linear#0"]
    assert "layer_norm normalises it" in why["encoder.layer.0.intermediate.dense/linear#0"]


def test_smooth_moves_magnitude_into_weights(captured: Captured) -> None:
    """alpha 1 makes the largest magnitude of every smoothed channel 1, exactly as the equation."""
    program = run(captured("opt")[2], "canonicalize,smooth{alpha=1.0},fold")
    from qcompiler.facts import measure
    from qcompiler.samples import synthetic_data

    seen = measure(program, synthetic_data(program.io))
    absmax = seen.activation("model.decoder.layers.0.fc1/linear#0").absmax
    torch.testing.assert_close(absmax, torch.ones_like(absmax), rtol=1e-4, atol=0)


def test_fold_leaves_stored_weights_only(captured: Captured) -> None:
    program = run(captured("cnn")[2], "canonicalize,smooth,fold")
    assert set(operators(program)) == {"conv2d", "relu", "add", "mean", "linear"}
    assert not any(name.startswith("smooth") for name in program.params)


@pytest.mark.parametrize("wide", [False, True])
def test_fold_is_judged_by_what_it_stores(wide: bool) -> None:
    """Maps are in float64 until they are folded, and more than the weights of a narrow model; so
    may a layer be that is not touched."""

    class Narrow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm = torch.nn.Linear(3, 64), torch.nn.RMSNorm(64)
            self.down = torch.nn.Linear(64, 3)
            self.last = torch.nn.Linear(3, 400).double() if wide else torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(self.norm(self.up(x)))
            out: torch.Tensor = self.last(y.double()).float() if wide else y
            return out

    program = qcompiler.capture(Narrow(), torch.randn(6, 3))
    rotated = run(program, "canonicalize,absorb_norms,rotate")
    assert rotated.params["rotate.1"].dtype == torch.float64
    assert rotated.dtype == (torch.float64 if wide else torch.float32)
    assert 1e-12 < run(rotated, "fold").history[-1].metrics["error"] < 1e-5


def test_assign_options(captured: Captured) -> None:
    program = run(
        captured("llama")[2],
        "canonicalize,assign{weight=int4:group32 embedding=int8:channel head=same "
        'exceptions=["*down_proj*=int8:channel/int8:token:dynamic", "*o_proj*=float"]}',
    )
    plan = {k: str(v) for k, v in program.plan.items()}
    assert plan["model.embed_tokens/embedding#0"].startswith("weight=int8:channel")
    assert plan["lm_head/linear#0"].startswith("weight=int4:group32")
    assert plan["model.layers.0.mlp.down_proj/linear#0"].endswith("int8:token:dynamic")
    assert not any("o_proj" in k for k in plan)
    assert not program.history[-1].diff.graph_changed


@pytest.mark.parametrize(
    ("passes", "error", "words"),
    [
        ("canonicalize,quantize", BadInput, "put `assign` before it"),
        ("canonicalize,assign{exceptions=['*nope*=float']}".replace("'", '"'), BadInput, "no site"),
        ("canonicalize,smooth{alpha=2.0}", BadInput, "between 0 and 1"),
        ("canonicalize,assign,quantize{rounding=nearst}", BadInput, "did you mean 'nearest'"),
        ("canonicalize,assign{weight=int2:channel},quantize{budget=0.01}", PassError, "budget"),
        ("canonicalize,canonicalize{optional=false}", PassError, "changed nothing"),
    ],
)
def test_refusals(passes: str, error: type[Exception], words: str, captured: Captured) -> None:
    with pytest.raises(error, match=words):
        run(captured("llama")[2], passes)


def test_smooth_without_fold_is_told(captured: Captured) -> None:
    program = captured("llama")[2]
    with pytest.raises(PassError, match="put `fold` before quantize"):
        run(program, 'canonicalize,smooth,assign{exceptions=["*head*=int8:channel"]},quantize')


def test_lossy_steps_tell_which_layer_hurts(captured: Captured) -> None:
    step = run(captured("llama")[2], "canonicalize,assign,quantize").history[-1]
    linears = [v for k, v in step.nodes.items() if "linear" in k]
    assert len(linears) == 14 and all(20 < v < 80 for v in linears)


class Turned(torch.nn.Module):
    """Rotary embeddings by complex numbers, with a cast that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] / torch.tensor(
            [1.0, 7, 9, 3]
        )
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        pairs = torch.view_as_complex(self.layer(x).reshape(*x.shape[:2], 4, 2))
        return torch.view_as_real(pairs * turn).flatten(2)


def test_complex_numbers_are_checked_in_float64() -> None:
    module = Turned().eval()
    program = run(qcompiler.capture(module, torch.randn(3, 11, 8)), "canonicalize")
    x = torch.randn(2, 5, 8)
    assert torch.allclose(program(x), module(x), atol=1e-6)


class LastOfAKind(torch.nn.Module):
    """The token in front of the last 3 of each row: random rows need not have one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.head(self.table(ids).clone())
        return x[ids == 3].reshape(ids.shape[0], -1, 4)[:, -1]


def test_drawn_inputs_that_a_model_does_not_take() -> None:
    module, ids = LastOfAKind().eval(), torch.tensor([[1, 2, 3], [8, 0, 3]])
    captured = qcompiler.capture(module, ids, dynamic=False)
    program = run_pipeline(captured, make_passes("canonicalize"), example=(ids,))
    assert torch.equal(program(ids), module(ids))
    with pytest.raises(PassError, match="hand over example inputs that the model takes"):
        run_pipeline(captured, make_passes("canonicalize"))
