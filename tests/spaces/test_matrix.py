"""Spaces of matrices, their verification, and the passes that use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn
from torch.utils import _pytree as pytree

import qcompiler
from qcompiler import BadInput, Edit, PassError, Program
from qcompiler.cores import fast_core, flatness, has_core, orthogonal_core, random_hadamard
from qcompiler.hadamard import hadamard, random_signs
from qcompiler.io import as_call
from qcompiler.pipeline import run_pipeline
from qcompiler.program import node_id
from qcompiler.registry import make_passes
from qcompiler.spaces import find
from qcompiler.spaces.apply import apply_matrix

Captured = Callable[..., tuple[nn.Module, object, Program]]
READY = "canonicalize,untie{optional=true},absorb_norms{optional=true}"

FREE = {  # norms not prepared: value → output, and query · key where no rotary stands between
    "llama": 2, "qwen3": 2, "opt": 4, "gpt2": 4, "bert": 4, "vit": 4, "cnn": 0,
}  # fmt: skip


def canonical(program: Program) -> Program:
    return run(program, "canonicalize{optional=true}")


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def run(program: Program, pipeline: str) -> Program:
    return run_pipeline(program, make_passes(pipeline))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_free_space_takes_any_matrix(name: str, captured: Captured) -> None:
    found = qcompiler.verify(canonical(captured(name)[2]), kinds=("orthogonal", "invertible"))
    assert all(v.holds for v in found)
    count = Counter(v.space.kind for v in found)
    assert count["orthogonal"] == count["invertible"] == FREE[name]


def test_a_matrix_that_ignores_its_blockers_is_seen(captured: Captured) -> None:
    """No space is refused without need: with its marks ignored, the function changes."""
    program = run(captured("llama")[2], READY)
    inputs = program.io.flatten((), captured("llama")[1])
    wanted = program.flat(inputs)
    blocked = [s for s in find(program, "orthogonal") if s.blocked_by and s.consumers]
    assert blocked
    for space in blocked:
        edit = Edit(program, "forced")
        edit.spend("forced")
        apply_matrix(edit, replace(space, blocked_by=()), rotation(space.size), "r")
        got = edit.seal()[0].flat(inputs)
        gap = [(a - b).abs().max() for a, b in zip(wanted, got, strict=True) if torch.is_tensor(a)]
        assert max(gap) > 1e-5, [m.name for m in space.params]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rotate_finds_r1_r2_and_r4(name: str, captured: Captured) -> None:
    program = run(captured(name)[2], READY + ",rotate{online=true seed=3}")
    step = program.history[-1]
    sizes = Counter(int(e.why.split(" of ")[1].split()[0]) for e in step.edits)
    assert sizes == {48: 1, 12: 2, 80: 2}  # stream, heads' values, inputs of down_proj
    assert step.metrics["error"] <= 1e-13
    stream = next(e for e in step.edits if " of 48 " in e.why)
    touched = " ".join(stream.nodes)
    for part in ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "up_proj", "down"):
        assert part in touched
    assert "lm_head" in touched
    offline = run(captured(name)[2], READY + ",rotate")
    assert len(offline.history[-1].edits) == 3
    assert any("multiplied channel by channel" in r.why for r in offline.history[-1].skipped)


def test_gains_are_absorbed_or_told(captured: Captured) -> None:
    program = run(captured("qwen3")[2], "canonicalize,absorb_norms")
    step = program.history[-1]
    assert len(step.edits) == 5 and step.metrics["error"] <= 1e-13
    norms = [r for r in step.skipped if "its gain stays" in r.why]
    assert len(norms) == 4 and all("_norm" in r.nodes[0] for r in norms)  # q and k, two layers


@pytest.mark.parametrize(("name", "norms"), [("opt", 5), ("gpt2", 5), ("vit", 5)])
def test_layernorm_models_are_rotated(name: str, norms: int, captured: Captured) -> None:
    """Centred writers make RMSNorms of all LayerNorms, and R1 is free."""
    program = run(captured(name)[2], READY + ",center")
    assert len(program.history[-2].edits) == norms and not program.history[-2].skipped
    assert len(program.history[-1].edits) == 1
    assert program.history[-1].metrics["error"] <= 1e-13
    ops = Counter(n.target for n in program.graph.nodes)
    assert ops[torch.ops.aten.rms_norm.default] == norms
    assert ops[torch.ops.aten.layer_norm.default] == 0
    rotated = run(program, "rotate{online=true},fold")
    step = rotated.history[-2]
    sizes = Counter(int(e.why.split(" of ")[1].split()[0]) for e in step.edits)
    assert sizes == {48: 1, 12: 2, 80: 2}
    assert step.metrics["error"] <= 1e-13
    assert any(" - mean(" in e.why and ") · rotate" in e.why for e in rotated.history[-1].edits)


def test_the_mean_is_not_taken_from_who_sees_it(captured: Captured) -> None:
    """RMSNorm sees it (a centred Llama is another model), and so does a post-norm's next reader."""
    with pytest.raises(PassError, match="changed nothing"):
        run(captured("llama")[2], "canonicalize,center")
    program = run(captured("bert")[2], "canonicalize,center")
    step = program.history[-1]
    assert [e.nodes[0] for e in step.edits] == ["embeddings.LayerNorm/layer_norm#0"]
    assert len(step.skipped) == 4
    assert all("the mean of its input is seen" in r.why for r in step.skipped)


def test_a_bias_that_others_read_stays(captured: Captured) -> None:
    with pytest.raises(PassError, match="changed nothing"):
        run(captured("bert")[2], "canonicalize,absorb_norms")
    program = run(captured("bert")[2], "canonicalize,absorb_norms{optional=true}")
    assert all("its bias stays: " in r.why for r in program.history[-1].skipped)


def test_a_tied_table_is_untied(captured: Captured) -> None:
    program = run(captured("gpt2")[2], "canonicalize,untie")
    table = program.by_id["transformer.wte.weight"]
    assert [node_id(u) for u in table.users] == ["transformer.wte/embedding#0"]
    with pytest.raises(PassError, match="changed nothing"):
        run(captured("llama")[2], "canonicalize,untie")


def test_rotation_survives_fold_save_and_lowering(captured: Captured, tmp_path: Path) -> None:
    model, example, _ = captured("llama")
    passes = READY + ",rotate{online=true},fold,assign,quantize"
    compiled = qcompiler.compile(model, example, passes=passes)
    compiled.save(tmp_path / "out")
    again = qcompiler.load(tmp_path / "out")
    flat = compiled.program.io.flatten((), example)
    assert torch.equal(compiled.artifact.run(flat)[0], again.artifact.run(flat)[0])
    formula = compiled.diff().why("model.layers.0.self_attn.v_proj.weight")
    assert any("rotate." in text and "input_layernorm" in text for _, _, text in formula)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (torch.eye(5), "takes a 12 × 12 matrix"),
        (torch.ones(12, 12), "orthogonal matrix"),
        (2 * torch.eye(12), "orthogonal matrix"),
        (torch.full((12, 12), float("nan")), "orthogonal matrix"),
    ],
)
def test_bad_matrices_are_refused(matrix: torch.Tensor, words: str, captured: Captured) -> None:
    program = canonical(captured("llama")[2])
    space = next(s for s in find(program, "orthogonal") if not s.blocked_by and len(s.params) > 1)
    edit = Edit(program, "test")
    edit.spend("wrong")
    with pytest.raises(BadInput, match=words):
        apply_matrix(edit, space, matrix, "r")


def test_a_singular_matrix_is_refused(captured: Captured) -> None:
    program = canonical(captured("llama")[2])
    space = next(s for s in find(program, "invertible") if not s.blocked_by and len(s.params) > 1)
    edit = Edit(program, "test")
    edit.spend("wrong")
    with pytest.raises(BadInput, match="invertible matrix"):
        apply_matrix(edit, space, torch.ones(12, 12), "r")


@pytest.mark.parametrize(
    "n", [1, 2, 4, 12, 20, 28, 36, 40, 48, 60, 76, 80, 108, 140, 244, 256, 344, 2816]
)
def test_hadamard(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n, dtype=torch.float64))


def test_sizes_without_a_construction() -> None:
    for n in (0, 3, 6, 92):
        assert hadamard(n) is None
        with pytest.raises(ValueError, match="no Hadamard matrix"):
            torch.ops.qc.hadamard(torch.ones(2, n))


@pytest.mark.parametrize("n", range(1, 200, 2))
def test_any_odd_factor_has_a_core(n: int) -> None:
    """Orthogonal, and nearly as flat as Hadamard's: of the factor or of twice it."""
    core = fast_core(16 * n)
    assert core in (n, 2 * n)
    matrix = orthogonal_core(core)
    assert matrix is not None
    identity = torch.eye(core, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), identity, rtol=0, atol=1e-13)
    assert flatness(matrix) < (1.19 if n in (3, 5, 7, 9, 11, 13, 15, 27, 35, 37, 43) else 1.51)


@pytest.mark.parametrize(
    ("n", "factor", "core"),
    [
        *((0, 0, None), (1, 1, 1), (4096, 1, 1), (5120, 5, 10), (11008, 43, 43)),
        *((18432, 9, 18), (92, 23, 23), (5, 5, 5), (2 * 1031, 1031, None)),
    ],
)
def test_the_core_of_a_size(n: int, factor: int, core: int | None) -> None:
    """It is flat to a fifth, where that is to be had; nobody multiplies by a huge matrix."""
    assert fast_core(n) == core
    signs = random_signs(n, torch.Generator().manual_seed(0))
    matrix = random_hadamard(n, signs) if n < 100 or core is None else None
    assert (matrix is None) == (core is None or n >= 100)
    if matrix is not None:
        assert flatness(matrix) < 1.5
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64))


def test_whether_there_is_a_core_is_known_without_it() -> None:
    for c in range(1, 200):
        assert has_core(c) == (orthogonal_core(c) is not None)


def test_an_artifact_loads_where_no_core_was_made_yet(tmp_path: Path) -> None:
    """Shapes are computed with fake tensors, which no matrix may become."""
    module, example = zoo.build("llama")
    passes = f"{READY},rotate{{online=true}},fold,assign{{weight=int8:channel}},quantize"
    made = qcompiler.compile(module, example, passes=passes, backend="reference")
    made.save(tmp_path / "out")
    for kept in (orthogonal_core, fast_core, has_core, hadamard):
        kept.cache_clear()
    loaded = qcompiler.load(tmp_path / "out")
    args, kwargs = as_call(example)
    wanted, found = made(*args, **kwargs), loaded(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("core", [0, 2, 4, 3, 24])
def test_a_transform_that_there_is_not(core: int) -> None:
    with pytest.raises(ValueError, match=f"of size 16 with a core of {core} can be constructed"):
        torch.ops.qc.hadamard(torch.ones(2, 16), core)


@pytest.mark.parametrize(
    ("n", "core"),
    [
        *((1, 1), (2, 1), (12, 1), (48, 1), (80, 1), (128, 1), (344, 1), (2816, 1)),
        *((11, 11), (12, 3), (80, 10), (344, 43), (368, 23), (2816, 11)),
    ],
)
def test_fast_transform(n: int, core: int) -> None:
    """qc::hadamard is x (O ⊗ H)ᵀ / √n, and its gradient is that of the matrix."""
    x = torch.randn(3, 5, n, dtype=torch.float64, requires_grad=True)
    outer, inner = orthogonal_core(core), hadamard(n // core)
    assert outer is not None and inner is not None
    wanted = x @ torch.kron(outer, inner).t() / len(inner) ** 0.5
    torch.testing.assert_close(torch.ops.qc.hadamard(x, core), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    (by_matrix,) = torch.autograd.grad((wanted * weight).sum(), x)
    (by_transform,) = torch.autograd.grad((torch.ops.qc.hadamard(x, core) * weight).sum(), x)
    torch.testing.assert_close(by_matrix, by_transform, rtol=1e-12, atol=1e-12)


def test_unknown_kind(captured: Captured) -> None:
    with pytest.raises(BadInput, match="did you mean 'orthogonal'"):
        find(canonical(captured("cnn")[2]), "ortogonal")
