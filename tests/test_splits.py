"""Splits of linears: exact always, worth their bytes or refused, and runnable everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qcompiler
from qcompiler import BadInput, PassError, Program
from qcompiler.pipeline import run_pipeline
from qcompiler.program import op_name
from qcompiler.registry import make_passes

Captured = Callable[..., tuple[torch.nn.Module, object, Program]]

PLAN = "assign{weight=int4:channel activation=int8:token:dynamic head=same}"
FORCE = "gain=-1e9"
SPLITS = {
    "channels": f"split_channels{{ratio=0.1 {FORCE}}}",
    "inputs": f"split_channels{{ratio=0.1 halve=activation {FORCE}}}",
    "outliers": f"split_outliers{{ratio=0.1 {FORCE}}}",
    "integer outliers": "split_outliers{ratio=0.1 outlier=int8:channel/int8:token:dynamic "
    f"{FORCE}}}",
    "sparse": f"split_sparse{{ratio=0.03 {FORCE}}}",
    "svd": f"split_low_rank{{rank=3 method=svd {FORCE}}}",
    "residual": f"split_low_rank{{rank=3 method=residual weighted=false {FORCE}}}",
}
EACH = pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)


def run(program: Program, passes: str, data: list[torch.Tensor] | None = None) -> Program:
    feed = None if data is None else (lambda: iter([(x,) for x in data]))
    return run_pipeline(program, make_passes(passes), data=feed)


def step(program: Program, name: str = "split") -> qcompiler.Step:
    return next(s for s in program.history if s.name.startswith(name))


FIGURES = re.compile(r"error (\S+) → (\S+), ([\d,]+) → ([\d,]+) bytes, (\S+) % more")


def figures(why: str) -> tuple[float, ...]:
    """(error before, after, bytes before, after, share of multiplications) that a reason tells."""
    found = FIGURES.search(why)
    assert found, why
    return tuple(float(text.replace(",", "")) for text in found.groups())


class Planted(nn.Module):
    """Linears with a few channels (of input or of weight) that are far larger than the others."""

    def __init__(self, where: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(64, 48, generator=generator)
        self.gain = nn.Parameter(torch.ones(48))
        self.linear = nn.Linear(48, 64, bias=False)
        if where == "input":
            self.gain.data[[5, 17, 40]] = 40.0
            weight[:, [5, 17, 40]] /= 10
        elif where == "channel":
            weight[:, 11] *= 20
        elif where == "entries":
            weight[torch.arange(64), torch.randint(48, (64,), generator=generator)] *= 12
        elif where == "rank":
            left, right = (torch.randn(n, 2, generator=generator) for n in (64, 48))
            weight += 5 * left @ right.t()
        self.linear.weight.data = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.gain)


@cache
def planted(where: str) -> tuple[Program, torch.Tensor]:
    x = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(4))
    return qcompiler.capture(Planted(where), x), x


# --- exact -------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_exact(name: str, split: str, captured: Captured) -> None:
    program = run(captured(name)[2], f"canonicalize,{PLAN},{split}")
    assert step(program).metrics["error"] <= 1e-12
    assert len(step(program).edits) >= 8


def test_exact_in_bfloat16_and_one_after_another(captured: Captured) -> None:
    chain = ",".join(SPLITS.values())
    program = run(captured("llama", torch.bfloat16)[2], f"canonicalize,{PLAN},{chain}")
    splits = [s for s in program.history if s.name.startswith("split")]
    assert len(splits) == len(SPLITS) and all(s.metrics["error"] <= 1e-12 for s in splits)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    ratio=st.floats(0.001, 0.999),
    rank=st.integers(1, 12),
    bias=st.booleans(),
    weight=st.sampled_from(["int8:channel", "int3:tensor", "int4:group8", "int4:channel:asym"]),
)
def test_any_size_is_exact(
    sizes: tuple[int, int], ratio: float, rank: int, bias: bool, weight: str
) -> None:
    torch.manual_seed(0)
    program = qcompiler.capture(nn.Linear(*sizes, bias=bias), torch.randn(5, sizes[0]))
    for split in (
        f"split_channels{{ratio={ratio}",
        f"split_channels{{ratio={ratio} halve=activation",
        f"split_outliers{{ratio={ratio}",
        f"split_sparse{{ratio={ratio}",
        f"split_low_rank{{rank={rank}",
    ):
        passes = f"assign{{weight={weight} head=same}},{split} {FORCE} optional=true}}"
        done = run(program, f"{passes},fold{{optional=true}},quantize")
        assert step(done).metrics["error"] <= 1e-12
        assert step(done).edits or step(done).skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sparse_linear_is_a_product(dtype: torch.dtype) -> None:
    dense = torch.randn(7, 13).to(dtype) * (torch.rand(7, 13) < 0.2)
    dense[2] = 0
    rows, columns = dense.nonzero().int().unbind(1)
    starts = torch.searchsorted(rows, torch.arange(8, dtype=torch.int32)).int()
    for shape in ((13,), (4, 13), (2, 0, 13), (2, 3, 13)):
        x = torch.randn(shape).to(dtype)
        found = torch.ops.qc.sparse_linear(x, dense[dense != 0], columns, starts)
        wanted = x.double() @ dense.double().t()
        torch.testing.assert_close(
            found.double(), wanted, atol=3e-2 if dtype.itemsize == 2 else 1e-6, rtol=0
        )
    torch.library.opcheck(
        torch.ops.qc.sparse_linear.default,
        (x, dense[dense != 0], columns, starts),
        test_utils=("test_schema", "test_faketensor"),
    )


# --- worth it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "weight", "split", "least"),
    [
        ("input", "int8:channel", "split_outliers", 10),
        ("input", "int8:channel", "split_channels{halve=activation ratio=0.1}", 2),
        ("channel", "int4:channel", "split_channels{ratio=0.08}", 3),
        ("channel", "int4:tensor", "split_channels{ratio=0.08}", 2),
        ("entries", "int4:channel", "split_sparse{ratio=0.03}", 10),
        ("entries", "int4:group16", "split_sparse{ratio=0.03}", 2),
        ("rank", "int4:channel", "split_low_rank{rank=2 method=svd}", 10),
        ("none", "int3:channel", "split_low_rank{method=residual}", 1.3),
    ],
)
def test_error_falls_as_predicted(where: str, weight: str, split: str, least: float) -> None:
    program, x = planted(where)
    plan = f"assign{{weight={weight} activation=int8:token:dynamic head=same}}"
    wanted = program(x)
    errors = []
    for passes in (f"{plan},quantize", f"{plan},{split},fold,quantize"):
        done = run(program, passes, [x])
        errors.append(float((done(x) - wanted).pow(2).sum() / wanted.pow(2).sum()))
    before, after, *_ = figures(step(done).edits[0].why)
    assert errors == pytest.approx([before, after], rel=0.06)  # two digits are told
    assert errors[0] > least * errors[1]


def test_both_ways_to_choose_are_tried() -> None:
    """`best` is no worse than either way alone."""
    for stem, ways in (
        ("split_sparse{by=", ("magnitude", "sensitivity", "best")),
        ("split_low_rank{method=", ("svd", "residual", "best")),
    ):
        for where in ("input", "entries", "rank"):
            program, x = planted(where)
            found = [run(program, f"{PLAN},{stem}{way} {FORCE}}}", [x]) for way in ways]
            errors = [figures(step(p).edits[0].why)[1] for p in found]
            assert errors[2] == min(errors)


@EACH
def test_told_bytes_are_stored_bytes(split: str, captured: Captured) -> None:
    program = captured("opt")[2]
    plain = run(program, f"canonicalize,{PLAN},quantize")
    done = run(program, f"canonicalize,{PLAN},{split},fold,quantize")
    told = [figures(e.why) for e in step(done).edits]
    assert done.bytes - plain.bytes == sum(after - before for _, _, before, after, _ in told)


def test_splits_in_whole_groups() -> None:
    program, x = planted("input")
    for split, width in (("split_channels{multiple=16 ", 64), ("split_outliers{multiple=16 ", 32)):
        done = run(program, f"{PLAN},{split}{FORCE}}},fold", [x])
        assert done.params["linear.weight"].shape == (64, width)


def test_told_multiplications() -> None:
    program, x = planted("none")
    for split, share in (
        ("split_channels{ratio=0.1 ", 5 / 48),
        ("split_outliers{ratio=0.1 ", 0),
        ("split_sparse{ratio=0.01 ", math.ceil(0.01 * 48 * 64) / (48 * 64)),
        ("split_low_rank{rank=4 ", 4 * (48 + 64) / (48 * 64)),
    ):
        done = run(program, f"{PLAN},{split}{FORCE}}}", [x])
        assert figures(step(done).edits[0].why)[4] == pytest.approx(100 * share, rel=0.05)


def test_layers_that_read_the_same_channels_share_a_gather(captured: Captured) -> None:
    done = run(captured("llama")[2], f"canonicalize,{PLAN},{SPLITS['outliers']},fold,quantize")
    gathers = [n for n in done.nodes if op_name(n.target) == "index_select"]
    readers = [n for n in done.nodes if "self_attn.q_proj/index_select" in str(n.meta["custom"])]
    assert len(gathers) == 2 * (4 * 2 + 1)  # q k v | o | gate up | down, two layers; and the head
    assert len(readers) == 2 * 2


# --- schemes -----------------------------------------------------------------------------------


def test_parts_have_schemes(captured: Captured) -> None:
    split = SPLITS["integer outliers"]
    done = run(captured("llama")[2], f"canonicalize,{PLAN},{split},fold,quantize")
    schemes = [str(v) for k, v in done.plan.items() if "mlp.down_proj" in k]
    assert sorted(schemes) == 2 * ["weight=int4:channel activation=int8:token:dynamic"] + 2 * [
        "weight=int8:channel activation=int8:token:dynamic"
    ]
    assert len([n for n in done.params if "mlp.down_proj" in n and n.endswith(".data")]) == 4


@pytest.mark.parametrize("split", [SPLITS["outliers"], SPLITS["sparse"], SPLITS["svd"]])
def test_the_better_part_stays_float(split: str, captured: Captured) -> None:
    done = run(captured("llama")[2], f"canonicalize,{PLAN},{split},fold,quantize")
    assert len(done.plan) == 15
    mine = {n.rpartition("down_proj.")[2]: v for n, v in done.params.items() if "0.mlp.down" in n}
    kept = {n: v.dtype for n, v in mine.items() if v.is_floating_point() and "scale" not in n}
    assert kept and all(dtype == torch.float32 for dtype in kept.values())
    assert mine["weight.data"].dtype in (torch.uint8, torch.int8)
    assert not any(n.op == "call_function" and "index_fill" in str(n.target) for n in done.nodes)


# --- refusals ----------------------------------------------------------------------------------


def refusals(program: Program) -> str:
    return "; ".join(r.why for r in step(program).skipped)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("split_channels", r"a split of 1 channel would .*, for \d+\.\d % more bytes"),
        ("split_outliers", "no input channel exceeds 6 × the median"),
        ("split_outliers{ratio=0.02 gain=0.9}", r"lower its error only from .* to .* \(\d"),
        ("split_sparse{gain=0.9}", "sparse part of 12 weights would lower its error only from"),
        ("split_low_rank{rank=48}", "its weight is 48 × 48; a part of rank 48 is all of it"),
    ],
)
def test_what_does_not_pay_is_left_alone(split: str, words: str, captured: Captured) -> None:
    split = split.replace("}", " optional=true}") if "{" in split else split + "{optional=true}"
    program = run(captured("llama")[2], f"canonicalize,{PLAN},{split}")
    assert re.search(words, refusals(program)), refusals(program)
    assert all("would" not in r.why or "bytes" in r.why for r in step(program).skipped)
    with pytest.raises(PassError, match="changed nothing"):
        run(planted("none")[0], f"{PLAN},split_channels")


def test_convolutions_and_tables_are_no_linears(captured: Captured) -> None:
    program = run(captured("cnn")[2], f"canonicalize,{PLAN},{SPLITS['sparse']}")
    assert "only linears are split, and this is of kind conv" in refusals(program)
    plan = PLAN.replace("head=same", "head=same embedding=int8:channel")
    program = run(captured("llama")[2], f"canonicalize,{plan},{SPLITS['sparse']}")
    assert "of kind embedding" in refusals(program)


def test_shared_weights_are_told(captured: Captured) -> None:
    program = run(captured("opt")[2], f"canonicalize,{PLAN},{SPLITS['svd']}")
    why = {r.nodes[0]: r.why for r in step(program).skipped}
    assert why == {"lm_head/linear#0": "its weight is shared with 1 more reader"}


def test_order(captured: Captured) -> None:
    program = run(captured("llama")[2], f"canonicalize,{PLAN},quantize")
    done = run(program, SPLITS["sparse"].replace("}", " optional=true}"))
    assert all("stored as integers already" in r.why for r in step(done).skipped)
    for passes in (
        f"canonicalize,{PLAN},quantize,split_sparse",
        f"canonicalize,split_sparse,{PLAN},quantize",
        f"canonicalize,{PLAN},split_sparse,smooth,fold,quantize",
    ):
        with pytest.raises(BadInput, match="must come before"):
            qcompiler.pipeline.run_pipeline(captured("llama")[2], make_passes(passes))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("split_channels{ratio=0.0}", "ratio is above 0 and at most 1; found 0.0"),
        ("split_channels{ratio=1.5}", "ratio is above 0"),
        ("split_channels{halve=both}", "halve is 'weight' or 'activation'"),
        ("split_outliers{ratio=1.0}", "ratio is from 0 to below 1"),
        ("split_channels{multiple=0}", "multiple is at least 1"),
        ("split_outliers{multiple=0}", "multiple is at least 1"),
        ("split_outliers{threshold=0.0}", "threshold is above 0"),
        ("split_outliers{outlier=int8:channel:dynamic}", "outlier is `float`"),
        ("split_outliers{outlier=int8:channel/}", "outlier is `float`"),
        ("split_outliers{outlier=int9:channel}", "unknown element type"),
        ("split_sparse{ratio=1.0}", "ratio is between 0 and 1"),
        ("split_low_rank{rank=0}", "rank is at least 1"),
        ("split_low_rank{gain=1.0}", "gain is below 1"),
    ],
)
def test_options_have_bounds(split: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(planted("none")[0], f"{PLAN},{split}")


@EACH
def test_a_plan_is_needed(split: str) -> None:
    with pytest.raises(BadInput, match="the plan is empty; put `assign` before it"):
        run(planted("none")[0], split)


# --- backends ----------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("backend", ["reference", "cpu", "onnxruntime"])
def test_runs_saves_and_loads(split: str, backend: str, captured: Captured, tmp_path: Path) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model, example, _ = captured("opt")
    plan = "assign{weight=int8:channel activation=int8:token:dynamic head=same}"
    passes = f"canonicalize,smooth,{plan},{split},fold,quantize"
    compiled = qcompiler.compile(model, example, passes=passes, backend=backend)
    wanted = compiled.program(**example).logits
    found = compiled(**example).logits
    assert (found - wanted).norm() < 2e-2 * wanted.norm()
    if backend == "onnxruntime":  # the float parts ask for no kernel, every other gets one
        assert set(compiled.artifact.kernels.values()) == {"MatMulInteger"}
        assert compiled.artifact.kernels.keys() == compiled.program.plan.keys()
    compiled.save(tmp_path / "out")
    again = qcompiler.load(tmp_path / "out")
    assert again.backend.name == backend
    assert torch.equal(again.program(**example).logits, wanted)
    torch.testing.assert_close(again(**example).logits, found)
    assert [s.spec for s in again.history] == [s.spec for s in compiled.history]
