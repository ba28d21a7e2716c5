"""Maps, options and demands that cannot be: a `BadInput` that says where and why, nothing done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import qcompiler
from qcompiler import BadInput, Edit, Program
from qcompiler.pipeline import run_pipeline
from qcompiler.program import digest
from qcompiler.registry import make_passes
from qcompiler.sites import sites
from qcompiler.spaces import Space, find, inputs_of
from qcompiler.spaces.apply import apply_map, apply_matrix, apply_scale, apply_shift, map_input
from qcompiler.spaces.maps import Hadamard, Kronecker, Matrix, Order
from qcompiler.spaces.verify import changed

Captured = Callable[..., tuple[nn.Module, object, Program]]
PLAN = "assign{weight=int4:group8 activation=int8:token:dynamic head=same}"
NAN, INF = math.nan, math.inf


def run(program: Program, passes: str) -> Program:
    return run_pipeline(program, make_passes(passes))


def fingerprint(program: Program) -> tuple[object, ...]:
    """All that a program holds, contents of its tensors included."""
    params = {name: digest(value) for name, value in program.params.items()}
    kept = (program.slots, program.plan, program.maps, program.counters)
    shapes = [(n.name, n.target, str(n.args), str(n.meta["custom"])) for n in program.nodes]
    return str(program), shapes, params, *map(dict, kept), len(program.history)


@pytest.fixture(scope="module")
def llama(captured: Captured) -> Program:
    return run(captured("llama")[2], "canonicalize")


@pytest.fixture(scope="module")
def bert(captured: Captured) -> Program:
    return run(captured("bert")[2], "canonicalize")


def free(program: Program, kind: str) -> Space:
    """The first free space of a kind with parameters on both sides."""
    return next(s for s in find(program, kind) if not s.blocked_by and len(s.params) > 1)


def edit_of(program: Program) -> Edit:
    edit = Edit(program, "test")
    edit.spend("wrong")
    return edit


# --- weights that take no map ------------------------------------------------------------------


class Integers(nn.Module):
    """Three linears, the second with its weight in int8, cast where it is read."""

    def __init__(self, arithmetic: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.a, self.c = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 10)
        weight = torch.randint(-127, 128, (16, 16), dtype=torch.int8, generator=generator)
        self.register_buffer("w", weight)
        self.register_buffer("scale", torch.rand(16, 1, generator=generator) / 100)
        self.arithmetic = arithmetic

    def forward(self, x: Tensor) -> Tensor:
        weight = self.w.to(torch.float32)
        if self.arithmetic:
            weight = weight * self.scale
        return self.c(F.linear(self.a(self.norm(x)), weight))


@pytest.mark.parametrize("kind", ["diagonal", "orthogonal", "invertible", "permutation"])
def test_a_weight_of_integers_takes_no_map(kind: str) -> None:
    """Its cast is the node in the way of whatever is made for it, or of it."""
    program = qcompiler.capture(Integers(False), torch.randn(3, 5, 12))
    (cast,) = (n for n in program.by_id if "to#" in n)
    touching = [
        s for s in find(program, kind)
        if any(m.name in ("a.bias", "c.weight") and m.node.meta["val"].shape[m.axis] == 16
               for m in s.params)
    ]  # fmt: skip
    assert len(touching) >= 2
    for space in touching:
        assert (cast, "it is made from integers") in [
            (b.node, b.reason) for b in space.blocked_by
        ], [m.name for m in space.params]
        with pytest.raises(BadInput, match="is blocked at"):
            apply_scale(edit_of(program), space, torch.ones(space.size), "s")


@pytest.mark.parametrize("passes", ["smooth", "rotate", "equalize", f"{PLAN},permute"])
def test_passes_leave_integers_alone(passes: str) -> None:
    """Layers before and behind the integers are refused with the cast as the reason."""
    program = qcompiler.capture(Integers(False), torch.randn(3, 5, 12))
    name = passes.rpartition(",")[2]
    done = run(program, f"{passes}{{optional=true}}")
    record = done.history[-1]
    assert record.name == name and record.metrics["error"] <= 1e-12
    assert torch.equal(done.params["w"], program.params["w"])
    assert len(record.edits) == (1 if name == "smooth" else 0)  # the norm and the first layer
    if name != "equalize":  # which looks at pairs of weights only, and finds none
        assert any("it is made from integers" in r.why for r in record.skipped)
    else:
        assert not record.skipped


def test_a_shift_passes_integers_by() -> None:
    """Only biases take it, so that a weight of integers does no harm; and it is exact."""
    program = qcompiler.capture(Integers(False), torch.randn(3, 5, 12))
    done = run(program, "shift")
    assert len(done.history[-1].edits) == 3 and done.history[-1].metrics["error"] <= 1e-12


def test_maps_go_behind_arithmetic_on_integers() -> None:
    """Integers times scales are a weight like any other; verified with maps of all kinds."""
    program = qcompiler.capture(Integers(True), torch.randn(3, 5, 12))
    found = qcompiler.verify(program)
    assert {v.space.kind for v in found} >= {"diagonal", "shift", "orthogonal", "invertible"}
    assert all(v.error <= 1e-9 for v in found)
    done = run(program, "smooth,equalize")
    assert all(s.metrics["error"] <= 1e-12 for s in done.history[1:])


# --- maps --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    at=st.integers(0, 47),
    bad=st.sampled_from([0.0, -1.0, -1e-30, NAN, INF, -INF, 1e-60, 1e60]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_scales_are_positive_and_finite(at: int, bad: float, dtype: torch.dtype) -> None:
    """Also in float32, in which they are kept: 1e-60 is 0 there, and 1e60 infinite."""
    program = linears()
    scale = torch.ones(48, dtype=dtype)
    scale[at] = bad
    with pytest.raises(BadInput, match=r"space \d+ must be positive and finite"):
        apply_scale(edit_of(program), free(program, "diagonal"), scale, "s")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(at=st.integers(0, 47), bad=st.sampled_from([NAN, INF, -INF, 1e60, -1e60]))
def test_shifts_are_finite(at: int, bad: float) -> None:
    program = linears()
    shift = torch.zeros(48, dtype=torch.float64)
    shift[at] = bad
    with pytest.raises(BadInput, match=r"space \d+ must be finite"):
        apply_shift(edit_of(program), free(program, "shift"), shift, "s")


_LINEARS: list[Program] = []


def linears() -> Program:
    """Two linears in a row, with 48 channels between them that take any map."""
    if not _LINEARS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 48), nn.Linear(48, 10))
        _LINEARS.append(qcompiler.capture(model, torch.randn(3, 12)))
    return _LINEARS[0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["diagonal", "shift", "permutation", "orthogonal", "invertible", "signs"]),
    size=st.integers(1, 60).filter(lambda n: n != 48),
)
def test_a_map_has_the_size_of_its_space(kind: str, size: int) -> None:
    program = linears()
    space = free(program, "orthogonal" if kind == "signs" else kind)
    assert space.size == 48
    edit = edit_of(program)
    with pytest.raises(BadInput, match=r"space \d+ takes (a )?48 |no Hadamard matrix of size"):
        if kind == "diagonal":
            apply_scale(edit, space, torch.ones(size), "m")
        elif kind == "shift":
            apply_shift(edit, space, torch.ones(size), "m")
        elif kind == "permutation":
            apply_map(edit, space, Order(edit, space.home, torch.arange(size), "m"))
        elif kind == "signs":
            apply_map(edit, space, Hadamard(edit, space.home, torch.ones(size), "m"))
        else:
            apply_matrix(edit, space, torch.eye(size), "m")


@pytest.mark.parametrize(
    "value",
    [torch.ones(48, 1), torch.ones(1, 48), torch.tensor(1.0), torch.ones(0)],
    ids=["column", "row", "number", "nothing"],
)
@pytest.mark.parametrize("kind", ["diagonal", "shift"])
def test_factors_and_shifts_are_vectors(kind: str, value: Tensor) -> None:
    program = linears()
    apply = apply_scale if kind == "diagonal" else apply_shift
    with pytest.raises(BadInput, match="takes 48"):
        apply(edit_of(program), free(program, kind), value, "m")


def test_one_matrix_for_each_head_or_one_for_all(llama: Program) -> None:
    space = free(llama, "invertible")
    assert space.maps == (2,) and space.size == 12
    for shape in ((5, 12, 12), (1, 12, 12), (2, 1, 12, 12), (2, 11, 11)):
        matrix = torch.eye(shape[-1]).expand(shape)
        with pytest.raises(BadInput, match=r"takes a 12 × 12 matrix, or one for each of \[2\]"):
            apply_matrix(edit_of(llama), space, matrix, "m")
    apply_matrix(edit_of(llama), space, torch.eye(12).expand(2, 12, 12), "m")


def _nearly_singular(size: int) -> Tensor:
    turns = torch.linalg.qr(torch.randn(2, size, size, dtype=torch.float64))[0]
    return turns[0] * torch.logspace(0, -9, size, dtype=torch.float64) @ turns[1]


SINGULAR = {
    "ones": torch.ones(48, 48),
    "zeros": torch.zeros(48, 48),
    "nearly": _nearly_singular(48),
    "NaN": torch.full((48, 48), NAN),
    "one NaN": torch.eye(48).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(NAN)),
    "infinite": torch.diag(torch.full((48,), INF)),
}


@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize("kind", ["orthogonal", "invertible"])
def test_singular_matrices_are_refused(kind: str, matrix: Tensor) -> None:
    program = linears()
    word = "orthogonal" if kind == "orthogonal" else "invertible"
    with pytest.raises(BadInput, match=f"an {word} matrix is expected"):
        apply_matrix(edit_of(program), free(program, kind), matrix, "m")


def test_one_singular_head_of_two_is_refused(llama: Program) -> None:
    matrix = torch.eye(12).repeat(2, 1, 1)
    matrix[1, 3, 3] = 0
    with pytest.raises(BadInput, match="nearly singular"):
        apply_matrix(edit_of(llama), free(llama, "invertible"), matrix, "m")


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (torch.eye(6), torch.ones(8, 8), "invertible matrix"),
        (torch.zeros(6, 6), torch.eye(8), "invertible matrix"),
        (torch.eye(6) * NAN, torch.eye(8), "invertible matrix"),
        (torch.eye(6), _nearly_singular(8), "invertible matrix"),
        (torch.ones(6, 2), torch.eye(8), "square matrix"),
        (torch.ones(6), torch.eye(8), "square matrix"),
        (torch.eye(2).repeat(6, 1, 1), torch.eye(8), "square matrix"),  # 6 and 8, by their lengths
        (torch.eye(5), torch.eye(8), "48"),
        (torch.eye(12), torch.eye(8), "48"),
    ],
    ids=["ones", "zeros", "NaN", "nearly", "oblong", "vector", "many", "too few", "too many"],
)
def test_bad_kronecker_factors_are_refused(left: Tensor, right: Tensor, words: str) -> None:
    """Whatever is wrong with them is said when they are put in, not when the program runs."""
    program = linears()
    readers = [s for s in sites(program.nodes) if s.id == "1/linear#0"]
    edit = edit_of(program)
    with pytest.raises(BadInput, match=words):
        map_input(edit, readers, Kronecker(edit, readers[0].node, left, right, "m"))


def test_kronecker_factors_are_nearly_singular_together() -> None:
    """cond(A ⊗ B) = cond(A) cond(B): two that pass alone must not cost the product its digits."""
    program = linears()
    readers = [s for s in sites(program.nodes) if s.id == "1/linear#0"]
    turns = torch.linalg.qr(torch.randn(2, 8, 8, dtype=torch.float64))[0]
    right = turns[0] * torch.logspace(0, -5.5, 8, dtype=torch.float64) @ turns[1]
    turns = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    left = turns[0] * torch.logspace(0, -5.5, 6, dtype=torch.float64) @ turns[1]
    edit = edit_of(program)
    with pytest.raises(BadInput, match="nearly singular"):
        map_input(edit, readers, Kronecker(edit, readers[0].node, left, right, "m"))


@pytest.mark.parametrize(
    "order",
    [
        torch.zeros(48, dtype=torch.long),
        torch.arange(48) - 1,
        torch.arange(48) + 1,
        torch.cat([torch.tensor([1]), torch.arange(1, 48)]),
        torch.arange(48).reshape(1, 48),
        torch.tensor(0),
        torch.arange(48.0),
        torch.arange(48) == 3,
    ],
    ids=["zeros", "negative", "beyond", "twice", "row", "number", "floats", "booleans"],
)
def test_an_order_names_each_channel_once(order: Tensor) -> None:
    program = linears()
    space, edit = free(program, "permutation"), edit_of(program)
    with pytest.raises(BadInput, match="names each once"):
        apply_map(edit, space, Order(edit, space.home, order, "m"))


@pytest.mark.parametrize(
    "signs",
    [2 * torch.ones(48), torch.zeros(48), torch.full((48,), NAN), torch.ones(6, 8), torch.ones(())],
    ids=["two", "zero", "NaN", "matrix", "number"],
)
def test_signs_are_one_or_minus_one(signs: Tensor) -> None:
    program = linears()
    space, edit = free(program, "orthogonal"), edit_of(program)
    with pytest.raises(BadInput, match="signs are a vector of 1 and -1"):
        apply_map(edit, space, Hadamard(edit, space.home, signs, "m"))


def test_signs_need_a_hadamard_matrix_of_their_size() -> None:
    """There is none of size 6, and a fast transform would fail when the program runs."""
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 10))
    program = qcompiler.capture(model, torch.randn(3, 12))
    space, edit = free(program, "orthogonal"), edit_of(program)
    with pytest.raises(BadInput, match="Hadamard"):
        apply_map(edit, space, Hadamard(edit, space.home, torch.ones(6), "m"))


OTHER = [
    (made, space)
    for made in ("scale", "shift", "order", "rotation", "matrix", "signs")
    for space in ("diagonal", "shift", "permutation", "orthogonal", "invertible")
    if (made, space)
    not in {
        ("scale", "diagonal"),
        ("shift", "shift"),
        ("order", "permutation"),
        ("rotation", "orthogonal"),
        ("signs", "orthogonal"),
        ("matrix", "invertible"),
        ("rotation", "invertible"),
        ("signs", "invertible"),  # rotations are invertible
    }
]


@pytest.mark.parametrize(("made", "kind"), OTHER)
def test_a_map_of_another_kind_is_refused(made: str, kind: str) -> None:
    """A space says what cancels out in it: what is made for another would change the function."""
    program = linears()
    space, edit = free(program, kind), edit_of(program)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=generator, dtype=torch.float64))[0]
    with pytest.raises(BadInput, match=rf"space {space.id} takes no .*{kind}"):
        if made == "scale":
            apply_scale(edit, space, torch.rand(48) + 0.5, "m")
        elif made == "shift":
            apply_shift(edit, space, torch.rand(48), "m")
        elif made == "order":
            apply_map(edit, space, Order(edit, space.home, torch.arange(48), "m"))
        elif made == "signs":
            apply_map(edit, space, Hadamard(edit, space.home, torch.ones(48), "m"))
        elif made == "rotation":
            apply_map(edit, space, Matrix(edit, space.home, turn, "m"))
        else:
            apply_map(edit, space, Matrix(edit, space.home, 2 * turn, "m", "invertible"))


def test_a_matrix_is_no_order() -> None:
    """`apply_matrix` takes its kind from the space; a space of orders takes no matrix."""
    program = linears()
    matrix = torch.eye(48) + 0.1
    with pytest.raises(BadInput, match="permutation"):
        apply_matrix(edit_of(program), free(program, "permutation"), matrix, "m")


@pytest.mark.parametrize("kind", ["diagonal", "shift", "permutation", "orthogonal", "invertible"])
def test_a_blocked_space_cannot_be_forced(kind: str, bert: Program) -> None:
    """The error says how many channels, at which node, and why; the program stays what it was."""
    before = fingerprint(bert)
    blocked = [s for s in find(bert, kind) if s.blocked_by and s.params]
    assert len(blocked) >= 3
    for space in blocked:
        first = space.blocked_by[0]
        with pytest.raises(BadInput) as caught:
            changed(bert, space, 0)
        words = str(caught.value)
        assert f"space {space.id} ({kind}, {space.size} channels) is blocked at" in words
        assert f"{first.node}: {first.reason}" in words
        others = len(space.blocked_by) - 1
        assert (f"and at {others} other nodes" in words) == (others > 0)
        assert first.node in bert.by_id and " " in first.reason
    assert fingerprint(bert) == before


def test_an_unknown_kind_is_told(llama: Program) -> None:
    for call in (find, inputs_of):
        with pytest.raises(BadInput, match="unknown kind of map 'digonal'; did you mean"):
            call(llama, "digonal")
    with pytest.raises(BadInput, match="unknown kind of map"):
        qcompiler.verify(llama, ["nothing"])


def test_forced_or_not_a_program_stays_what_it_was() -> None:
    """Maps go into a copy: also one that is legal leaves the program alone."""
    program = linears()
    before = fingerprint(program)
    for kind in ("diagonal", "shift", "permutation", "orthogonal", "invertible"):
        after = changed(program, free(program, kind), 0)
        assert fingerprint(after) != before
        assert fingerprint(program) == before
    space = replace(free(program, "diagonal"), params=())
    apply_scale(edit_of(program), space, torch.ones(48), "s")
    assert fingerprint(program) == before


# --- options -----------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("smooth{alpha=2}", "smooth: alpha is between 0 and 1; found 2"),
    ("smooth{alpha=-0.1}", "smooth: alpha is between 0 and 1"),
    ("smooth{alpha=nan}", "smooth: alpha is between 0 and 1; found nan"),
    ("smooth{alpha=inf}", "smooth: alpha is between 0 and 1"),
    ("smooth{alpha=half}", "'smooth': option alpha is float; found 'half'"),
    ("smooth{method=gptq}", "option method is 'smoothquant' or 'awq'; found 'gptq'"),
    ("smooth{norm=false}", "did you mean 'norms'"),
    ("smooth{search=true}", "smooth: a search .* put `assign` before it"),
    ("smooth{method=awq}", "smooth: a search .* put `assign` before it"),
    ("smooth{demand=down_proj}", "option demand is list of str; found 'down_proj'"),
    ("equalize{rounds=0}", "equalize: rounds are positive; found 0"),
    ("equalize{rounds=-3}", "equalize: rounds are positive; found -3"),
    ("equalize{rounds=1.5}", "option rounds is int; found 1.5"),
    ("permute", "permute: .* put `assign` before it"),
    (f"{PLAN},permute{{by=size}}", "option by is 'salience' or 'activation' or 'weight'"),
    ("affine", "affine .* put `assign` before it"),
    (f"{PLAN},affine{{steps=-1}}", "affine: steps are 0 or more"),
    (f"{PLAN},affine{{rate=0}}", "affine: .* rate is positive"),
    (f"{PLAN},affine{{rate=-1.0}}", "affine: .* rate is positive"),
    (f"{PLAN},affine{{rate=nan}}", "affine: .* rate is positive"),
    (f"{PLAN},affine{{rate=inf steps=1}}", "affine: .* rate"),
    (f"{PLAN},affine{{loss=kl}}", "option loss is 'auto' or 'kl_top' or 'mse'; found 'kl'"),
    ("rotate,learn_rotation", "learn_rotation: .* put `assign` before it"),
    (f"{PLAN},learn_rotation", "learn_rotation: no map is left to train; put `rotate`"),
    (f"{PLAN},rotate,learn_rotation{{steps=-1}}", "learn_rotation: steps"),
    (f"{PLAN},rotate,learn_rotation{{rate=0}}", "learn_rotation: .* rate is positive"),
    (f"{PLAN},rotate,learn_rotation{{rate=nan}}", "learn_rotation: .* rate is positive"),
    (f"{PLAN},rotate,learn_rotation{{rate=inf}}", "learn_rotation: .* rate is"),
    ("rotate{kind=hadamrd}", "option kind is 'hadamard' or 'random'; found 'hadamrd'"),
    ("rotate{seed=1.5}", "option seed is int; found 1.5"),
    (f"rotate{{seed={2**65}}}", "rotate: .*seed"),
    ("rotate{heads=2}", "option heads is bool; found 2"),
    ("smooth,rotate", "'rotate' must come before 'smooth'"),
    ("shift{alpha=1.0}", "unknown option of pass 'shift'"),
    ("reparametrize", "did you mean 'reparameterize'"),
]


@pytest.mark.parametrize(("passes", "words"), OUT_OF_RANGE, ids=[p for p, _ in OUT_OF_RANGE])
def test_options_have_bounds(passes: str, words: str, captured: Captured) -> None:
    """One kind of error through the front door, whatever is wrong; nothing is half done."""
    program = captured("llama")[2]
    before = fingerprint(program)
    with pytest.raises(BadInput, match=words):
        run_pipeline(program, make_passes(f"canonicalize,{passes}"))
    assert fingerprint(program) == before


def test_the_front_door_says_the_same() -> None:
    model = nn.Sequential(nn.Linear(12, 48), nn.Linear(48, 10))
    weights = [p.clone() for p in model.parameters()]
    for passes, words in (
        ("smooth{alpha=2}", "between 0 and 1"),
        ("equalize{rounds=0}", "rounds are positive"),
        (f"{PLAN},affine{{steps=-1}}", "steps are 0 or more"),
        (f"{PLAN},rotate,learn_rotation{{rate=0}}", "rate is positive"),
        ('smooth{demand=["0.weigth"]}', "no weight of that name"),
    ):
        with pytest.raises(BadInput, match=words):
            qcompiler.compile(model, torch.randn(3, 12), passes=passes, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Outputs(nn.Module):
    """Two linears, and an output of some kind."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.what = nn.Linear(12, 16), nn.Linear(16, 12), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return y.argmax(-1) if self.what == "integers" else y.mean()


@pytest.mark.parametrize(
    ("what", "words"), [("integers", "no floating point output"), ("number", "kl_top|logits|words")]
)
@pytest.mark.parametrize(
    "passes", ["rotate,learn_rotation{steps=1 loss=kl_top}", "affine{steps=1 loss=kl_top}"]
)
def test_outputs_that_no_loss_is_for(what: str, words: str, passes: str) -> None:
    program = qcompiler.capture(Outputs(what), torch.randn(4, 12))
    with pytest.raises(BadInput, match=words):
        run(program, f"{PLAN},{passes}")


# --- demands -----------------------------------------------------------------------------------

LAYER = "encoder.layer.0"
UP, DOWN = f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
NORM = f"{LAYER}.output.LayerNorm/layer_norm#0"
FIRST = f"{LAYER}.attention.output.LayerNorm/layer_norm#0"
GELU = f"{LAYER}.intermediate.intermediate_act_fn/gelu#0"
QUERY = f"{LAYER}.attention.self.query.weight"


@pytest.mark.parametrize(
    ("passes", "pattern", "node", "reason"),
    [
        ("smooth", f"{UP}.weight", NORM, "layer_norm normalises it"),
        ("smooth", f"{DOWN}.weight", GELU, "gelu commutes with no map"),
        ("smooth", QUERY, FIRST, "layer_norm normalises it"),
        ("equalize", f"{UP}.weight", NORM, "layer_norm normalises it"),
        ("shift", f"{DOWN}/linear#0", GELU, "gelu commutes with no map"),
        ("reparameterize", f"{UP}.weight", NORM, "layer_norm normalises it"),
        (f"{PLAN},permute", QUERY, "output", "it is an output of the program"),
        (f"{PLAN},affine{{steps=0", f"{UP}.weight", FIRST, "it is multiplied channel by channel"),
        (f"{PLAN},affine{{steps=9", f"{DOWN}.weight", GELU, "gelu commutes with no map"),
        ("rotate", f"{UP}.weight", FIRST, "it is multiplied channel by channel"),
        ("rotate", f"{DOWN}.weight", GELU, "gelu commutes with no map"),
    ],
)
def test_a_demand_of_a_blocked_weight_says_where_and_why(
    passes: str, pattern: str, node: str, reason: str, bert: Program
) -> None:
    before = fingerprint(bert)
    text = f"{passes} " if "{" in passes.rpartition(",")[2] else f"{passes}{{"
    with pytest.raises(BadInput) as caught:
        run(bert, f'{text}demand=["{pattern}"]}}')
    name = passes.rpartition(",")[2].partition("{")[0]
    words = str(caught.value)
    assert words.startswith(f"{name}: {pattern!r} is demanded, but its ")
    assert words.endswith(f"channels are blocked at {node}: {reason}")
    assert fingerprint(bert) == before


@pytest.mark.parametrize(
    "passes",
    ["smooth", "shift", "equalize", "reparameterize", "rotate", f"{PLAN},permute",
     f"{PLAN},affine{{steps=0"],
)  # fmt: skip
def test_a_demand_of_an_unknown_weight(passes: str, llama: Program) -> None:
    text = f"{passes} " if "{" in passes.rpartition(",")[2] else f"{passes}{{"
    with pytest.raises(BadInput, match=r"'model\.layers\.7\.mlp\.\*' is demanded, but no"):
        run(llama, f'{text}demand=["model.layers.7.mlp.*"]}}')


@pytest.mark.parametrize(
    ("passes", "met"),
    [
        ("smooth", "model.layers.0.mlp.down_proj.weight"),
        ("smooth", "*.q_proj.weight"),
        ("equalize", "model.layers.1.self_attn.o_proj.weight"),
        ("rotate{online=true", "*.down_proj.weight"),
        ("shift", "*o_proj/linear#0"),
        (f"{PLAN},affine{{steps=0", "*.o_proj.weight"),
    ],
)
def test_a_demand_that_can_be_met(passes: str, met: str, llama: Program) -> None:
    text = f"{passes} " if "{" in passes.rpartition(",")[2] else f"{passes}{{"
    assert run(llama, f'{text}demand=["{met}"]}}').history[-1].edits


@pytest.mark.parametrize("passes", ["smooth", "equalize", "rotate"])
def test_a_demand_is_for_all_that_match(passes: str, bert: Program) -> None:
    """`*.dense.weight` is met by outputs of attention, but not by the MLP's: nothing is done."""
    with pytest.raises(BadInput, match="blocked at"):
        run(bert, f'{passes}{{demand=["encoder.layer.*.dense.weight"]}}')


@pytest.mark.parametrize(
    ("passes", "pattern", "why"),
    [
        ("smooth{norms=false", "model.layers.0.self_attn.q_proj.weight", "norm"),
        ("reparameterize{", "model.layers.0.mlp.down_proj.weight", "shift"),
        (f"{PLAN.replace('group8', 'channel')},permute{{", "*.0.mlp.down_proj.weight", "group"),
        (f"{PLAN},shift{{", "model.layers.0.self_attn.o_proj/linear#0", "pay"),
    ],
)
def test_a_demand_that_is_not_met_says_why(
    passes: str, pattern: str, why: str, llama: Program
) -> None:
    """The weight is in a free space that the pass left out for a reason of its own: it tells it."""
    with pytest.raises(BadInput) as caught:
        run(llama, f'{passes} demand=["{pattern}"]}}')
    assert "no weight of that name" not in str(caught.value)
    assert why in str(caught.value).partition(" is demanded, but ")[2]
