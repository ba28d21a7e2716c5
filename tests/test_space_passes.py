"""Passes on spaces: exact, true to their equations, worth it on planted outliers, runnable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, PassError, Program
from qcompiler.backends.null import NullBackend
from qcompiler.check import relative_error
from qcompiler.cores import orthogonal_core
from qcompiler.hadamard import hadamard
from qcompiler.padding import Padding, rows
from qcompiler.pipeline import run_pipeline
from qcompiler.program import op_name
from qcompiler.registry import make_passes
from qcompiler.run import evaluate, evaluate_wide
from qcompiler.samples import Flat, random_inputs, synthetic_data
from qcompiler.sites import sites
from qcompiler.spaces import inputs_of

Captured = Callable[..., tuple[nn.Module, object, Program]]

READY = "canonicalize,untie{optional=true},absorb_norms{optional=true},center{optional=true}"
PLAN = "assign{weight=int4:group8 activation=int8:token:dynamic head=same}"
PASSES = {
    "smooth": "smooth",
    "smooth, searched": f"{PLAN},smooth{{search=true}}",
    "awq": f"{PLAN},smooth{{method=awq}}",
    "smooth without norms": "smooth{norms=false}",
    "shift": "shift",
    "equalize": "equalize",
    "permute": f"{PLAN},permute",
    "reparameterize": "reparameterize",
    "affine": f"{PLAN},affine{{steps=0}}",
    "affine online": f"{PLAN},affine{{steps=0 online=true}}",
    "rotate": "rotate",
    "rotate at random": "rotate{kind=random}",
    "rotate online": "rotate{online=true heads=true}",
    "rotate online at random": "rotate{online=true heads=true kind=random}",
}
LINEAR_ONLY = {"shift", "permute", "reparameterize", "affine", "rotate", "rotate at random"}
LINEAR_ONLY |= {"rotate online", "rotate online at random"}
"""Between any two layers of the CNN stands a ReLU, behind padding, and it has no groups."""
EACH = pytest.mark.parametrize("which", PASSES)


def run(program: Program, passes: str, data: Sequence[Tensor] | None = None) -> Program:
    feed = None if data is None else (lambda: iter([(x,) for x in data]))
    return run_pipeline(program, make_passes(passes), data=feed)


@pytest.fixture(scope="module")
def prepared(captured: Captured) -> Callable[..., Program]:
    """`prepared(name, dtype, which)`: a model of the zoo as the pass `which` wants to find it."""

    @cache
    def make(name: str, dtype: torch.dtype, base: str) -> Program:
        return run(captured(name, dtype)[2], base)

    def get(name: str, dtype: torch.dtype, which: str) -> Program:
        return make(name, dtype, READY if which.startswith("rotate") else "canonicalize")

    return get


def step(program: Program, name: str) -> qcompiler.Step:
    return next(s for s in reversed(program.history) if s.name == name)


def read(program: Program, batches: Iterator[Flat] | list[Flat]) -> dict[str, Tensor]:
    """Site → all vectors that it reads, (vectors, channels), by running the program; without
    padding, as calibration has it."""
    found: dict[str, list[Tensor]] = {}
    readers = [(s.x, s.id, s.kind.channel) for s in sites(program.nodes) if s.x is not None]
    padding = Padding(program)

    def watch(node: torch.fx.Node, value: object, counts: Tensor | None) -> None:
        for x, id, axis in readers:
            if x is node:
                assert isinstance(value, Tensor)
                data = rows(value, counts) if axis == -1 else value
                found.setdefault(id, []).append(data.double().movedim(axis, -1).flatten(0, -2))

    for inputs in batches:
        evaluate(program, inputs, partial(watch, counts=padding.counts(inputs)))
    return {id: torch.cat(vectors) for id, vectors in found.items()}


def weight_of(program: Program, id: str) -> Tensor:
    """Stored weight of a site, float64."""
    node = program.node(id)
    return next(program.tensor(s.weight) for s in sites([node])).double()


def edited(record: qcompiler.Step) -> list[list[str]]:
    """The layers whose inputs each edit changed, from its reason."""
    found = []
    for edit in record.edits:
        match = re.search(r"(?:inputs of|before) (.+?)(?: take| are| get| in order|: )", edit.why)
        assert match, edit.why
        found.append(match[1].split(", "))
    return found


def free(program: Program, kind: str) -> list[Tensor]:
    """Values of the program's free maps of one kind, in the order in which they were made."""
    return [program.params[name] for name, what in program.maps.items() if what == kind]


def other_maps(program: Program, seed: int = 0) -> Program:
    """The program with another map of the same kind in the place of each free one."""
    generator = torch.Generator().manual_seed(seed)
    params = dict(program.params)
    for name, kind in program.maps.items():
        old = params[name]
        noise = torch.randn(2, *old.shape, generator=generator, dtype=torch.float64)
        if kind in ("orthogonal", "invertible"):
            turns = torch.linalg.qr(noise)[0]
            stretch = torch.rand(old.shape[-1], generator=generator, dtype=torch.float64) + 0.5
            value = turns[0] if kind == "orthogonal" else turns[0] * stretch @ turns[1]
        else:
            value = noise[0] if kind == "shift" else noise[0].clamp(-1, 1).exp()
        params[name] = value.to(old.dtype)
    return replace(program, params=params)


def gap(program: Program, other: Program) -> float:
    """Relative error of the outputs in float64, on a random input."""
    inputs = random_inputs(program.io, 7)
    return relative_error(evaluate_wide(program, inputs), evaluate_wide(other, inputs))


# --- exact -------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "vit", "cnn"])
def test_exact_before_and_after_fold(
    name: str, which: str, prepared: Callable[..., Program]
) -> None:
    """In float64 nothing is rounded, so that a wrong fold cannot hide; any other map does too."""
    program = prepared(name, torch.float64, which)
    if name == "cnn" and which in LINEAR_ONLY:
        with pytest.raises(PassError, match="changed nothing"):
            run(program, PASSES[which])
        return
    done = run(program, PASSES[which])
    assert done.history[-1].edits and done.history[-1].metrics["error"] <= 1e-12
    assert gap(done, other_maps(done)) <= 1e-12
    folded = run(done, "fold{optional=true}")
    assert folded.history[-1].metrics["error"] <= 1e-12
    assert gap(program, folded) <= 1e-12
    assert not folded.maps


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("vit", torch.bfloat16), ("opt", torch.float32)],
    ids=["llama-bfloat16", "vit-bfloat16", "opt-float32"],
)
def test_exact_in_narrow_types(
    name: str, dtype: torch.dtype, prepared: Callable[..., Program]
) -> None:
    for which in set(PASSES) - {"smooth", "rotate", "affine"}:  # of which others are more
        done = run(prepared(name, dtype, which), PASSES[which])
        assert done.history[-1].edits, which
        assert done.history[-1].metrics["error"] <= 1e-12, which
        assert gap(done, other_maps(done)) <= 1e-12, which


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_exact_one_after_another(name: str, captured: Captured) -> None:
    """Each pass finds its spaces behind the maps of those before it."""
    passes = f"{READY},{PLAN},rotate{{online=true}},affine{{steps=0}},equalize,reparameterize,"
    passes += "shift{optional=true},smooth,permute{optional=true}"
    program = captured(name, torch.float64)[2]
    done = run(program, passes)
    assert all(s.metrics["error"] <= 1e-12 for s in done.history[1:])
    assert set(done.maps.values()) == {"orthogonal", "invertible", "diagonal", "shift"}
    assert gap(done, other_maps(done)) <= 1e-11
    folded = run(done, "fold")
    assert gap(program, folded) <= 1e-12 and not folded.maps


# --- equations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_smooth_takes_the_scales_of_its_equation(share: float, captured: Captured) -> None:
    """s = max|X|^alpha / max|W|^(1 - alpha), over all readers of a norm."""
    program = run(captured("opt")[2], "canonicalize")
    x = read(program, synthetic_data(program.io))
    done = run(program, f"smooth{{alpha={share}}}")
    layers = edited(step(done, "smooth"))
    assert len(layers) == 8 and ["q_proj", "k_proj", "v_proj"] in [
        [id.split(".")[-1].split("/")[0] for id in group] for group in layers
    ]
    for group, scale in zip(layers, free(done, "diagonal"), strict=True):
        large = torch.stack([x[id].abs().amax(0) for id in group]).amax(0)
        heavy = torch.stack([weight_of(program, id).abs().amax(0) for id in group]).amax(0)
        wanted = torch.where(large > 1e-5, heavy ** (1 - share) / large**share, 1.0)
        torch.testing.assert_close(scale.double(), wanted, rtol=1e-4, atol=0)


def test_awq_takes_the_scales_of_its_equation(captured: Captured) -> None:
    """s = mean|X|^r, divided by sqrt(max s · min s), with the r that the reason tells."""
    program = run(captured("opt")[2], f"canonicalize,{PLAN}")
    x = read(program, synthetic_data(program.io))
    done = run(program, "smooth{method=awq}")
    record = step(done, "smooth")
    shares = [float(e.why.rpartition(" at ")[2].rstrip(")")) for e in record.edits]
    assert len(set(shares)) > 1
    for group, share, scale in zip(edited(record), shares, free(done, "diagonal"), strict=True):
        mean = torch.stack([x[id].abs().mean(0) for id in group]).mean(0)
        wanted = mean.clamp(min=1e-4) ** share
        wanted = wanted / (wanted.max() * wanted.min()).sqrt()
        torch.testing.assert_close(1 / scale.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "vit", "cnn"])
@pytest.mark.parametrize("option", ["search=true", "method=awq"])
def test_a_search_never_predicts_more_noise(name: str, option: str, captured: Captured) -> None:
    record = step(run(captured(name)[2], f"canonicalize,{PLAN},smooth{{{option}}}"), "smooth")
    told = [re.search(r"noise (\S+) → (\S+) at", e.why) for e in record.edits]
    assert all(m and float(m[2]) < float(m[1]) for m in told)
    for refusal in record.skipped:
        if "costs less" in refusal.why:
            match = re.search(r"noise (\S+) → (\S+) at", refusal.why)
            assert match and float(match[2]) >= float(match[1])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_smooth_leaves_norms_alone(name: str, captured: Captured) -> None:
    record = step(run(captured(name)[2], "canonicalize,smooth{norms=false}"), "smooth")
    last = {id.rpartition(".")[2].partition("/")[0] for group in edited(record) for id in group}
    assert last == ({"o_proj", "down_proj"} if name == "llama" else {"out_proj", "fc2"})
    alone = {r.nodes[0]: r.why for r in record.skipped if "norm" in r.why}
    fed = ("q_proj", "gate_proj") if name == "llama" else ("q_proj", "fc1")
    for layer in range(2):
        for part in fed:
            why = next(w for id, w in alone.items() if f"layers.{layer}." in id and part in id)
            assert why == "a norm produces its inputs; `norms` is false"


def centres(x: Tensor) -> tuple[Tensor, Tensor]:
    """(max + min, max - min) of each channel of vectors (vectors, channels)."""
    high, low = x.amax(0), x.amin(0)
    return high + low, high - low


@pytest.mark.parametrize(("name", "count"), [("opt", 11), ("vit", 11), ("bert", 2)])
def test_shift_centres_what_it_says(name: str, count: int, captured: Captured) -> None:
    """Every layer that was not refused reads channels whose range lies around zero."""
    program = run(captured(name)[2], "canonicalize")
    before = read(program, synthetic_data(program.io))
    done = run(program, "shift,fold")
    after = read(done, synthetic_data(done.io))
    record = step(done, "shift")
    shifted = [id for group in edited(record) for id in group]
    assert len(shifted) >= count and not set(shifted) & {r.nodes[0] for r in record.skipped}
    assert set(shifted) | {r.nodes[0] for r in record.skipped} == set(before)
    for id in shifted:
        (was, width), (now, same) = centres(before[id]), centres(after[id])
        assert (was.abs() / width).max() > 0.1, id
        assert (now.abs() / width).max() < 1e-4, id
        torch.testing.assert_close(width, same, rtol=1e-3, atol=1e-6)  # moved, not scaled


def test_shift_centres_all_copies_of_a_head_at_once(captured: Captured) -> None:
    """Two query heads read one value head: their common range is what can be centred."""
    done = run(captured("llama")[2], "canonicalize,shift,fold")
    after = read(done, synthetic_data(done.io))
    for layer in range(2):
        x = after[f"model.layers.{layer}.self_attn.o_proj/linear#0"]
        middle, width = centres(x.unflatten(1, (2, 2, 12)).movedim(2, 1).flatten(0, 1).flatten(1))
        assert (middle.abs() / width).max() < 1e-4


@pytest.mark.parametrize("name", ["opt", "vit"])
def test_reparameterize_gives_one_range_to_all_channels(name: str, captured: Captured) -> None:
    program = run(captured(name)[2], "canonicalize")
    before = read(program, synthetic_data(program.io))
    done = run(program, "reparameterize,fold")
    after = read(done, synthetic_data(done.io))
    changed = [id for group in edited(step(done, "reparameterize")) for id in group]
    fed = ("q_proj", "fc1", "classifier") if name == "vit" else ("q_proj", "fc1")  # by LayerNorms
    assert all(any(part in id for id in changed) for part in fed)
    for id in changed:
        width = centres(before[id])[1]
        if "fc2" not in id:  # a ReLU may have channels that are never on
            assert width.max() > 1.2 * width.min(), id
        middle, now = centres(after[id])
        assert (middle.abs() / now.mean()).max() < 1e-4, id
        torch.testing.assert_close(
            now, torch.full_like(now, float(width.mean())), rtol=1e-3, atol=0
        )


NEIGHBOURS = [  # producers, and all that reads them
    (["stem"], ["blocks.0.conv1", "blocks.0.short.0"]),
    (["blocks.0.conv1"], ["blocks.0.conv2"]),
    (["blocks.0.conv2", "blocks.0.short.0"], ["blocks.1.conv1", "blocks.1.short.0"]),
    (["blocks.1.conv1"], ["blocks.1.conv2"]),
    (["blocks.1.conv2", "blocks.1.short.0"], ["fc"]),
]


def test_equalize_makes_ranges_equal_without_data(captured: Captured) -> None:
    def no_data() -> Iterator[Flat]:
        raise AssertionError("weights alone decide")

    def ranges(program: Program, names: list[str], axis: int) -> Tensor:
        weights = [program.params[f"{n}.weight"].abs().movedim(axis, 0) for n in names]
        return torch.stack([w.flatten(1).amax(1) for w in weights]).amax(0)

    program = run(captured("cnn")[2], "canonicalize")
    done = run_pipeline(program, make_passes("equalize,fold"), data=no_data)
    assert len(step(done, "equalize").edits) == len(NEIGHBOURS)
    for producers, consumers in NEIGHBOURS:
        was = ranges(program, producers, 0) / ranges(program, consumers, 1)
        assert (was.log().abs() > 0.1).any()
        now = ranges(done, producers, 0) / ranges(done, consumers, 1)
        torch.testing.assert_close(now, torch.ones_like(now), rtol=1e-2, atol=0)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(2, 9), st.integers(1, 9)),
    dead=st.sampled_from(["none", "first", "second"]),
    spread=st.floats(0.1, 3.0),
)
def test_equalize_takes_the_geometric_mean(
    sizes: tuple[int, int, int], dead: str, spread: float
) -> None:
    """Both ranges become sqrt(r1 r2); a channel without one of them stays as it is."""
    torch.manual_seed(0)
    first, second = nn.Linear(sizes[0], sizes[1]), nn.Linear(sizes[1], sizes[2])
    first.weight.data *= torch.logspace(-spread, spread, sizes[1])[:, None]
    if dead == "first":
        first.weight.data[0] = 0
    elif dead == "second":
        second.weight.data[:, 0] = 0
    program = qcompiler.capture(nn.Sequential(first, nn.ReLU(), second), torch.randn(4, sizes[0]))
    done = run(program, "equalize{optional=true},fold{optional=true}")
    was = [first.weight.abs().amax(1), second.weight.abs().amax(0)]
    now = [done.params["0.weight"].abs().amax(1), done.params["2.weight"].abs().amax(0)]
    alive = (was[0] > 0) & (was[1] > 0)
    for side in (0, 1):
        wanted = torch.where(alive, (was[0] * was[1]).sqrt(), was[side])
        torch.testing.assert_close(now[side], wanted.detach(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("by", ["salience", "activation", "weight"])
def test_permute_sorts_channels(by: str, captured: Captured) -> None:
    """E|x_j| · max|W_j| falls along the channels of whatever was reordered, over all its heads."""
    program = run(captured("vit")[2], f"canonicalize,{PLAN}")
    done = run(program, f"permute{{by={by}}},fold")
    x = read(done, synthetic_data(done.io))
    groups = edited(step(done, "permute"))
    assert max(map(len, groups)) == 9  # all that read the stream, and the classifier
    for group in groups:
        heads = 4 if "o_proj" in group[0] else 1
        mean = torch.stack([x[id].abs().mean(0) for id in group]).unflatten(1, (heads, -1))
        heavy = torch.stack([weight_of(done, id).abs().amax(0) for id in group])
        first, second = mean.amax((0, 1)), heavy.unflatten(1, (heads, -1)).amax((0, 1))
        key = {"salience": first * second, "activation": first, "weight": second}[by]
        assert (key.diff() <= 1e-6 * key.max()).all(), group


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("plan", ["int4:channel", "int4:tensor"])
def test_an_order_is_for_groups_only(name: str, plan: str, captured: Captured) -> None:
    plan = f"canonicalize,assign{{weight={plan} activation=int8:token:dynamic head=same}}"
    record = run(captured(name)[2], f"{plan},permute{{optional=true}}").history[-1]
    assert not record.edits
    assert any("no groups of channels" in r.why for r in record.skipped)
    with pytest.raises(PassError, match="changed nothing"):
        run(captured(name)[2], f"{plan},permute")


@pytest.mark.parametrize(("transform", "core"), [("fast", 10), ("hadamard", 1)])
def test_rotated_inputs_are_hadamard_transforms(
    transform: str, core: int, captured: Captured
) -> None:
    """R4: x' = x diag(±1) Hᵀ / √n in front of the down projection, with the stored signs."""
    program = run(captured("llama")[2], READY)
    done = run(program, f"rotate{{online=true transform={transform}}},fold")
    before, after = (read(p, [random_inputs(p.io, 3)]) for p in (program, done))
    outer, inner = orthogonal_core(core), hadamard(80 // core)
    assert outer is not None and inner is not None
    matrix = torch.kron(outer * core**0.5, inner)
    signs = [v.double() for v in done.params.values() if tuple(v.shape) == (80,)]
    assert len(signs) == 2
    for layer in range(2):
        id = f"model.layers.{layer}.mlp.down_proj/linear#0"
        candidates = [before[id] * s @ matrix.t() / 80**0.5 for s in signs]
        assert min(relative_error(c, after[id]) for c in candidates) < 1e-5
        assert relative_error(before[id], after[id]) > 0.5


@pytest.mark.parametrize(
    ("options", "core"), [("", ()), (" transform=fast", (10,)), (" transform=hadamard", ())]
)
def test_a_backend_prefers_options_where_none_are_given(
    options: str, core: tuple[int, ...]
) -> None:
    class Tensors(NullBackend):
        name = "tensors"
        prefers: ClassVar[dict[str, dict[str, str]]] = {"rotate": {"transform": "hadamard"}}

    module, example = zoo.build("llama")
    made = qcompiler.compile(
        module, example, backend=Tensors(),
        passes=f"{READY},rotate{{online=true{options}}},fold",
    )  # fmt: skip
    turned = [n for n in made.program.graph.nodes if n.target is torch.ops.qc.hadamard.default]
    assert [n.args[1:] for n in turned] == [core] * 2
    assert ("transform=hadamard" in str(made.history[-2].spec)) == (core == ())


def test_kronecker_factors_mix_the_channels_of_their_layer(captured: Captured) -> None:
    """x' = x (A ⊗ B)ᵀ at run time, with the factors that the program holds."""
    program = run(captured("opt")[2], f"canonicalize,{PLAN}")
    done = other_maps(run(program, "affine{steps=0 online=true}"))
    before, after = (read(p, [random_inputs(p.io, 3)]) for p in (program, done))
    record = next(s for s in done.history if s.name == "affine")
    factors = [e for e in record.edits if " ⊗ " in e.why]
    assert len(factors) == 7
    for edit in factors:
        left = next(n for n in edit.nodes if n.endswith(".left"))
        right = next(n for n in edit.nodes if n.endswith(".right"))
        both = torch.kron(done.params[left], done.params[right])
        ids = edit.why.partition(" before ")[2].partition(": ")[0].split(", ")
        for id in ids:
            assert relative_error(before[id] @ both.t(), after[id]) < 1e-5


# --- worth it ----------------------------------------------------------------------------------


class Planted(nn.Module):
    """LayerNorm and two linears, with a few channels (or offsets) far larger than the others."""

    def __init__(self, where: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.norm, self.a, self.b = nn.LayerNorm(48), nn.Linear(48, 64), nn.Linear(64, 40)
        for linear in (self.a, self.b):
            shape = linear.weight.shape
            linear.weight.data = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            linear.bias.data = torch.randn(shape[0], generator=generator) / 10
        if where == "gains":
            self.norm.weight.data[[5, 17, 30]] = 40.0
            self.a.weight.data[:, [5, 17, 30]] /= 10
        elif where == "gain":
            self.norm.weight.data[[5, 17]] = 10.0
        elif where == "offsets":
            self.norm.bias.data = torch.randn(48, generator=generator) * 10
        elif where == "rows":
            self.a.weight.data[[5, 17]] *= 15
        elif where == "levels":
            self.a.weight.data[::2] *= 8
            self.a.bias.data[::2] *= 8
            self.b.weight.data[:, ::2] /= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.norm(x)))


DATA = [torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(4 + i)) for i in range(4)]
W4A4 = "assign{weight=int4:channel activation=int4:token:dynamic head=same}"
W4 = "assign{weight=int4:channel head=same}"
STATIC = "assign{weight=int4:channel activation=int4:tensor head=same}"
STATIC8 = "assign{weight=int8:channel activation=int8:tensor head=same}"
GROUPS = "assign{weight=int4:group8 activation=int4:group8:dynamic head=same}"


@cache
def planted(where: str) -> Program:
    return qcompiler.capture(Planted(where), DATA[0])


@cache
def error(where: str, passes: str) -> float:
    """Relative error of the quantized outputs on the first batch."""
    wanted = planted(where)(DATA[0])
    found = run(planted(where), f"{passes},quantize{{budget=10.0}}", DATA)(DATA[0])
    assert isinstance(wanted, Tensor) and isinstance(found, Tensor)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("where", "plan", "passes", "least"),
    [
        ("gains", W4A4, "smooth", 2.5),
        ("gains", W4A4, "smooth{search=true}", 2.5),
        ("gains", STATIC, "smooth", 2),
        ("gains", W4, "smooth{method=awq}", 1.1),
        ("rows", W4A4, "smooth{norms=false}", 1.3),
        ("rows", W4A4, "rotate", 1.3),
        ("rows", W4A4, "rotate{kind=random}", 1.2),
        ("rows", W4A4, "affine{steps=30 loss=mse rate=3.0}", 1.3),
        ("gain", W4A4, "affine{steps=30 loss=mse rate=4.0 online=true}", 1.2),
        ("offsets", W4A4, "shift", 4),
        ("offsets", STATIC, "shift", 4),
        ("gains", STATIC, "reparameterize", 2.5),
        ("gains", STATIC8, "reparameterize", 8),
        ("offsets", STATIC8, "reparameterize", 4),
        ("levels", GROUPS, "permute", 1.5),
        ("levels", GROUPS, "permute{by=activation}", 2),
        ("levels", GROUPS, "permute{by=weight}", 2),
    ],
)
def test_planted_outliers_cost_less(where: str, plan: str, passes: str, least: float) -> None:
    nearest = error(where, plan)
    assert nearest > 0.01
    assert nearest > least * error(where, f"{plan},{passes},fold")


def grid(values: Tensor, group: int) -> Tensor:
    """Four bits, symmetric, `group` neighbours to a scale."""
    blocks = values.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return (blocks / scale).round().clamp(-7, 7).mul(scale).flatten(-2)


def measured(program: Program, id: str, groups: tuple[int, int]) -> float:
    """Noise of a layer's output relative to its size, by an arithmetic of the test's own."""
    x, weight = read(program, [(b,) for b in DATA])[id], weight_of(program, id)
    wanted = x @ weight.t()
    found = grid(x, groups[0]) @ grid(weight, groups[1]).t()
    return float((found - wanted).pow(2).mean() / wanted.pow(2).mean())


def test_permute_predicts_the_noise_that_comes() -> None:
    program = planted("levels")
    done = run(program, f"{GROUPS},permute,fold", DATA)
    (edit,) = step(done, "permute").edits
    told = re.search(r"noise (\S+) → (\S+)$", edit.why)
    assert told
    wanted = [measured(p, "b/linear#0", (8, 8)) for p in (program, done)]
    assert [float(told[1]), float(told[2])] == pytest.approx(wanted, rel=0.02)
    assert wanted[1] < wanted[0]


@pytest.mark.parametrize("option", ["search=true", "method=awq"])
def test_a_search_predicts_the_noise_that_comes(option: str) -> None:
    """The layer alone is in the plan; no fixed share on the grid is better than the one found."""
    plan = W4A4.replace("}", ' exceptions=["b/*=float"]}')
    program = planted("gains")
    done = run(program, f"{plan},smooth{{{option} optional=true}},fold", DATA)
    (edit,) = step(done, "smooth").edits
    told = re.search(r"noise (\S+) → (\S+) at", edit.why)
    assert told
    wanted = [measured(p, "a/linear#0", (48, 48)) for p in (program, done)]
    assert [float(told[1]), float(told[2])] == pytest.approx(wanted, rel=0.02)
    if option == "search=true":
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            fixed = run(program, f"{plan},smooth{{alpha={share}}},fold", DATA)
            assert wanted[1] <= 1.001 * measured(fixed, "a/linear#0", (48, 48))


# --- learned -----------------------------------------------------------------------------------

TOLD = re.compile(r"(?:kl_top|mse) (\S+) → (\S+?)(?: |$)")


def told(program: Program, name: str = "learn_rotation") -> tuple[float, float]:
    """Loss before and after, as the pass tells it in its reason or note."""
    record = step(program, name)
    found = TOLD.search(" ".join([*(e.why for e in record.edits), *record.notes]))
    assert found, (record.edits, record.notes)
    return float(found[1]), float(found[2])


LEARNED = {
    "rotations": "rotate",
    "rotations at random": "rotate{kind=random}",
    "scales": "smooth",
    "rotations and scales": "rotate,smooth",
    "matrices": "affine{steps=0}",
}


@pytest.mark.parametrize("maps", LEARNED.values(), ids=LEARNED)
def test_training_lowers_the_loss(maps: str) -> None:
    """The loss that is told falls, and with it the error of the quantized program."""
    program = run(planted("rows"), f"{W4A4},{maps}", DATA)
    done = run(program, "learn_rotation{steps=20 loss=mse}", DATA)
    before, after = told(done)
    assert after < before
    assert done.maps == program.maps
    assert done.history[-1].metrics["error"] <= 1e-12
    assert all(not torch.equal(done.params[n], program.params[n]) for n in done.maps)
    unlearned, learned = (error("rows", f"{W4A4},{m},fold") for m in (maps, f"{maps},{TRAINED}"))
    assert learned < unlearned


TRAINED = "learn_rotation{steps=20 loss=mse}"


def test_rotations_stay_rotations(captured: Captured) -> None:
    """R1, one R2 for each value head and layer, and random ones; all kinds of loss."""
    data = list(synthetic_data(captured("llama")[2].io, 3))
    for maps, loss in (("rotate", "kl_top"), ("rotate{kind=random},smooth", "mse")):
        passes = make_passes(f"{READY},{W4A4},{maps},learn_rotation{{steps=4 loss={loss}}}")
        done = run_pipeline(captured("llama")[2], passes, data=lambda: iter(data))
        assert done.history[-1].edits and done.history[-1].metrics["error"] <= 1e-12
        turns = free(done, "orthogonal")
        assert sorted(t.shape[-1] for t in turns) == [12, 12, 48]
        for turn in turns:
            identity = torch.eye(turn.shape[-1], dtype=torch.float64)
            assert turn.dtype == torch.float64
            assert (turn @ turn.mT - identity).abs().max() <= 1e-10
        assert all(bool((s > 0).all()) for s in free(done, "diagonal"))


@pytest.mark.parametrize("maps", ["rotate", "rotate,smooth"])
@pytest.mark.parametrize("rate", [1e-6, 1.5, 1e3, 1e9])
def test_training_is_never_worse_than_the_start(maps: str, rate: float) -> None:
    program = run(planted("rows"), f"{W4A4},{maps}", DATA)
    done = run(program, f"learn_rotation{{steps=3 rate={rate} loss=mse optional=true}}", DATA)
    before, after = told(done)
    assert after <= before
    if not done.history[-1].edits:
        assert all(torch.equal(done.params[n], program.params[n]) for n in program.params)
    for turn in free(done, "orthogonal"):
        gram = turn @ turn.mT
        assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() <= 1e-10


def test_training_is_deterministic() -> None:
    passes = f"{W4A4},rotate{{seed=3}},smooth,{TRAINED}"
    first, second = (run(planted("rows"), passes, DATA) for _ in range(2))
    assert first.maps
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)
    other = run(planted("rows"), passes.replace("seed=3", "seed=4"), DATA)
    assert not all(torch.equal(first.params[n], other.params[n]) for n in first.maps)


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("rotate,learn_rotation", "put `assign` before it"),
        (f"{W4A4},learn_rotation", r"put `rotate` \(or `smooth`\) before it and `fold` behind it"),
        (f"{W4A4},permute{{optional=true}},learn_rotation", "no map is left to train"),
        (f"{W4A4},rotate,learn_rotation{{steps=-1}}", "steps are 0 or more"),
        (f"{W4A4},rotate,learn_rotation{{draws=0}}", "draws 1 or more"),
        (f"{W4A4},rotate,fold,learn_rotation", "must come before"),
    ],
)
def test_training_needs_a_plan_and_maps(passes: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(planted("rows"), passes, DATA)


def test_folded_maps_are_forgotten_and_unfolded_ones_saved(tmp_path: Path) -> None:
    """A saved program can be trained further; once it is folded, nothing is left to train."""
    passes = f"{W4A4},rotate,smooth"
    compiled = qcompiler.compile(
        Planted("rows"), DATA[0], passes=passes, backend="reference", data=DATA
    )
    assert set(compiled.program.maps.values()) == {"orthogonal", "diagonal"}
    compiled.save(tmp_path / "out")
    again = qcompiler.load(tmp_path / "out").program
    assert again.maps == compiled.program.maps
    assert all(torch.equal(again.params[n], compiled.program.params[n]) for n in again.maps)
    trained = [run(p, TRAINED, DATA) for p in (compiled.program, again)]
    for name in again.maps:
        torch.testing.assert_close(trained[0].params[name], trained[1].params[name])
    folded = run(again, "fold")
    assert not folded.maps and not any(n in folded.params for n in again.maps)
    with pytest.raises(BadInput, match="no map is left to train"):
        run(folded, TRAINED, DATA)


class Two(nn.Module):
    """Two outputs, each with a map of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)
        self.c, self.d = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x)), self.d(torch.relu(self.c(x)))


@pytest.mark.parametrize("passes", ["smooth,learn_rotation{steps=2", "affine{steps=2 online=true"])
@pytest.mark.parametrize("loss", ["kl_top", "mse"])
def test_a_map_that_the_loss_does_not_see_stays(passes: str, loss: str) -> None:
    """KL looks at the first output only; maps that are for the second have no gradient."""
    x = [torch.randn(8, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    done = run(qcompiler.capture(Two(), x[0]), f"{W4A4},{passes} loss={loss} optional=true}}", x)
    assert done.history[-1].metrics["error"] <= 1e-12


# --- affine ------------------------------------------------------------------------------------


def test_each_head_has_a_matrix_of_its_own(captured: Captured) -> None:
    """Two value heads are told apart by training; both start as identities."""
    data = list(synthetic_data(captured("llama")[2].io, 3))
    passes = make_passes(f"canonicalize,{W4A4},affine{{steps=4 loss=mse}}")
    done = run_pipeline(captured("llama")[2], passes, data=lambda: iter(data))
    before, after = told(done, "affine")
    assert after < before and done.history[-1].metrics["error"] <= 1e-12
    matrices = free(done, "invertible")
    assert [tuple(m.shape) for m in matrices] == [(2, 12, 12)] * 2
    for matrix in matrices:
        moved = (matrix - torch.eye(12, dtype=torch.float64)).abs().amax((-1, -2))
        assert (moved > 1e-3).all()
        assert (matrix[0] - matrix[1]).abs().max() > 1e-3


def runtime(program: Program) -> Counter[str]:
    """Operators on activations."""
    return Counter(op_name(n.target) for n in program.activations if n.op == "call_function")


@pytest.mark.parametrize("backend", ["reference", "cpu", "onnxruntime"])
def test_kronecker_maps_run_save_and_load(backend: str, captured: Captured, tmp_path: Path) -> None:
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    plan = "assign{weight=int8:channel activation=int8:token:dynamic head=same}"
    passes = f"{plan},affine{{steps=6 rate=4.0 online=true loss=mse}},fold,quantize"
    compiled = qcompiler.compile(
        Planted("gains"), DATA[0], passes=passes, backend=backend, data=DATA
    )
    plain = run(planted("gains"), f"{plan},quantize")
    assert runtime(compiled.program)["matmul"] == 2  # A X Bᵀ before the first linear
    assert runtime(plain)["matmul"] == 0
    wanted = compiled.program(DATA[1])
    assert relative_error(planted("gains")(DATA[1]), wanted) < 0.2
    assert relative_error(wanted, compiled(DATA[1])) < 2e-2
    compiled.save(tmp_path / "out")
    again = qcompiler.load(tmp_path / "out")
    assert again.backend.name == backend
    assert relative_error(compiled(DATA[1]), again(DATA[1])) < 1e-6
    grown = compiled.program.bytes - plain.bytes
    assert 0 < grown <= 4 * (6 * 6 + 8 * 8)  # two small factors, nothing 48 × 48


def test_weights_keep_their_names_behind_kronecker_maps() -> None:
    """What was `a.weight` is still found under that name: by demands, by `why`, by the reader."""
    done = run(planted("gain"), f"{W4A4},affine{{steps=0 online=true}}", DATA)
    names = {m.name for s in qcompiler.spaces(done) for m in s.params}
    assert "a.weight" in names
    folded = run(done, "fold")
    assert {"a.weight", "b.weight"} <= set(folded.params)


# --- rotations at run time ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", "onnxruntime"])
def test_online_rotations_run_everywhere(backend: str, captured: Captured, tmp_path: Path) -> None:
    """R3 and R4 as fast transforms: the outputs are the reference program's, saved or not."""
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model, example, program = captured("llama")
    plan = "assign{weight=int8:channel activation=int8:token:dynamic head=same}"
    passes = f"{READY},rotate{{online=true heads=true}},fold,{plan},quantize"
    compiled = qcompiler.compile(model, example, passes=passes, backend=backend)
    assert runtime(compiled.program)["qc.hadamard"] == 2 + 4  # down projections; queries and keys
    for seed in (3, 4):
        inputs = random_inputs(compiled.program.io, seed)
        wanted = compiled.program.flat(inputs)
        # A number half way between two steps may round either way.
        assert relative_error(wanted, compiled.artifact.run(inputs)) < 3e-3
        assert relative_error(program.flat(inputs), wanted) < 0.05
    compiled.save(tmp_path / "out")
    again = qcompiler.load(tmp_path / "out")
    assert torch.equal(again.program.flat(inputs)[0], wanted[0])
    assert relative_error(compiled.artifact.run(inputs), again.artifact.run(inputs)) < 1e-6


def test_online_rotations_store_signs_only(captured: Captured, tmp_path: Path) -> None:
    """A dense 80 × 80 matrix would be 25,600 bytes; its signs are 320, in memory and on disk."""
    model, example, program = captured("llama")
    fast = "rotate{online=true heads=true}"
    plain = run(program, f"{READY},rotate,fold,{PLAN},quantize")
    passes = f"{READY},{fast},fold,{PLAN},quantize"
    compiled = qcompiler.compile(model, example, passes=passes, backend="reference")
    online = compiled.program
    added = [v for n, v in online.params.items() if n not in plain.params]
    assert added and all(v.ndim == 1 and bool((v.abs() == 1).all()) for v in added)
    assert online.bytes - plain.bytes <= 4 * (2 * 80 + 4 * 12)
    compiled.save(tmp_path / "out")
    stored = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors"))
    assert stored - online.bytes < 150 * len(online.params)  # the header's entries


# --- a post-norm model -------------------------------------------------------------------------


def at(layer: int, *parts: str) -> list[str]:
    return [f"encoder.layer.{layer}.{part}/linear#0" for part in parts]


QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
OUT, UP, DOWN = "attention.output.dense", "intermediate.dense", "output.dense"
NORMALISED = "layer_norm normalises it at encoder.layer.{}.{}.LayerNorm/layer_norm#0"
GAIN = "it is multiplied channel by channel at {}.LayerNorm/layer_norm#0"
GELU = "gelu commutes with no map at encoder.layer.{}.intermediate.intermediate_act_fn/gelu#0"
OUTPUT = "it is an output of the program at output"
POOLER = "pooler.dense/linear#0"


def blockers(kind: str) -> dict[str, str]:
    """Layer of the post-norm BERT → what is in the way of a map of this kind; the rest is free."""
    found = {POOLER: OUTPUT}
    for layer in range(2):
        before = "embeddings" if layer == 0 else f"encoder.layer.{layer - 1}.output"
        if kind == "diagonal":  # a norm's output is what the next norm normalises
            found |= dict.fromkeys(at(layer, *QKV), NORMALISED.format(layer, "attention.output"))
            found |= dict.fromkeys(at(layer, UP), NORMALISED.format(layer, "output"))
        elif kind in ("orthogonal", "invertible"):
            found |= dict.fromkeys(at(layer, *QKV), GAIN.format(before))
            found |= dict.fromkeys(
                at(layer, UP), GAIN.format(f"encoder.layer.{layer}.attention.output")
            )
            found[POOLER] = GAIN.format("encoder.layer.1.output")
        elif kind == "permutation":  # one order for the stream, and the stream is returned
            found |= dict.fromkeys(at(layer, *QKV, UP), OUTPUT)
        if kind != "permutation":
            found |= dict.fromkeys(at(layer, DOWN), GELU.format(layer))
    return found


@pytest.mark.parametrize("kind", ["diagonal", "shift", "permutation", "orthogonal", "invertible"])
def test_what_a_post_norm_model_admits(kind: str, captured: Captured) -> None:
    """Refusals name the LayerNorm in the way; a shift of its output is taken off the residual."""
    program = run(captured("bert")[2], "canonicalize")
    found, wanted = inputs_of(program, kind), blockers(kind)
    everything = {s.id for s in sites(program.nodes) if s.x is not None}
    assert {s.id for group in found.groups for s in group.sites} == everything - set(wanted)
    refused = dict(found.refusals)
    assert refused.keys() == wanted.keys()
    for id, why in wanted.items():
        assert f"its input channels cannot be changed: {why}" in refused[id], id


@pytest.mark.parametrize(
    ("passes", "kind"),
    [
        ("smooth", "diagonal"),
        ("shift", "shift"),
        ("reparameterize", "diagonal"),
        (f"{PLAN},permute", "permutation"),
        (f"{PLAN},affine{{steps=0}}", "invertible"),
    ],
)
def test_what_passes_use_of_a_post_norm_model(passes: str, kind: str, captured: Captured) -> None:
    """Each pass uses all that its spaces admit, or says that it does not pay."""
    record = run(captured("bert")[2], f"canonicalize,{passes}").history[-1]
    used = {id for group in edited(record) for id in group}
    wanted = blockers(kind)
    assert not used & set(wanted)
    refused = {r.nodes[0]: r.why for r in reversed(record.skipped)}
    for id, why in wanted.items():
        assert why in refused[id], id
    for id in set(refused) - set(wanted):
        assert "does not pay" in refused[id], id
    free = {id for layer in range(2) for id in at(layer, *QKV, OUT, UP, DOWN)} - set(wanted)
    assert used == {i for i in free if i not in refused}


def test_equalize_and_rotate_name_the_norms_of_a_post_norm_model(captured: Captured) -> None:
    program = run(captured("bert")[2], "canonicalize")
    record = run(program, "equalize").history[-1]
    assert len(record.edits) == 4  # values → outputs, keys · queries
    norms = {f"encoder.layer.{i}.{part}.LayerNorm/layer_norm#0" for i in range(2)
             for part in ("attention.output", "output")}  # fmt: skip
    assert {r.nodes[0] for r in record.skipped} == norms
    assert all("layer_norm normalises it" in r.why for r in record.skipped)
    record = run(program, "rotate{online=true}").history[-1]
    sizes = Counter(int(e.why.split(" of ")[1].split()[0]) for e in record.edits)
    assert sizes == {12: 2, 80: 2}
    assert norms | {"embeddings.LayerNorm/layer_norm#0"} <= {r.nodes[0] for r in record.skipped}
    assert runtime(run(program, "rotate{online=true}"))["qc.hadamard"] == 2


class Added(torch.nn.Module):
    """A product and what is added to it: a matrix, as in a residual, or a vector."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        self.weight, self.rows = torch.nn.Parameter(torch.randn(8, 8)), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        y = torch.addmm(h if self.rows else self.first.bias, h, self.weight)
        out: torch.Tensor = self.last(y + torch.baddbmm(y, h[None], self.weight[None])[0])
        return out


@pytest.mark.parametrize("rows", [True, False])
def test_what_is_added_to_a_product_may_have_fewer_axes(rows: bool) -> None:
    program = qcompiler.capture(Added(rows), torch.randn(6, 8))
    program = run(program, "canonicalize{optional=true},equalize{optional=true}")
    for verified in qcompiler.verify(program):
        assert verified.error <= 1e-9, verified.space
