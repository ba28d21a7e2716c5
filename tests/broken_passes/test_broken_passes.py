"""Passes broken on purpose: each is caught, rolled back, and named to its first bad edit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import fx

import qcompiler
from qcompiler import BadInput, Edit, Effect, Facts, Pass, PassError, Program, QFormat
from qcompiler.check import relative_error
from qcompiler.pipeline import run_pipeline
from qcompiler.program import digest, node_id
from qcompiler.registry import make_passes

aten = torch.ops.aten
GOOD = "multiplies by one twice"


@dataclass(frozen=True, kw_only=True)
class Broken(Pass):
    """Two harmless edits, the bad one, two harmless ones: bisection must name number 3."""

    name: ClassVar[str] = "broken"
    effect: ClassVar[Effect] = Effect.EXACT
    bad: Callable[[Edit], None]

    def run(self, edit: Edit, facts: Facts) -> None:
        linears = [n for n in edit.calls(aten.linear.default)]
        for number in range(5):
            if number == 2:
                self.bad(edit)
            else:
                node = linears[number % len(linears)]
                edit.spend(GOOD, node)
                same = edit.call(aten.mul.Tensor, node, 1.0, like=node)
                edit.replace(node, same)


@dataclass(frozen=True, kw_only=True)
class BrokenLower(Broken):
    """The same, as a lowering."""

    effect: ClassVar[Effect] = Effect.LOWER

    def tolerance(self, facts: Facts) -> float:
        return 1e-3


def named(edit: Edit, suffix: str) -> fx.Node:
    return next(n for n in edit.nodes if node_id(n).endswith(suffix))


def scale(edit: Edit, node: fx.Node, factor: float) -> None:
    users = list(node.users)
    edit.replace(node, edit.call(aten.mul.Tensor, node, factor, like=node), only=users)


def forgotten_bias(edit: Edit) -> None:
    """v_proj's rows doubled, out_proj's columns halved, v_proj's bias forgotten."""
    edit.spend("value to output, without the bias", named(edit, "layers.0.self_attn.v_proj.weight"))
    scale(edit, named(edit, "layers.0.self_attn.v_proj.weight"), 2.0)
    scale(edit, named(edit, "layers.0.self_attn.out_proj.weight"), 0.5)


def one_reader_left(edit: Edit) -> None:
    """The norm's gain doubled, q and k halved, v forgotten."""
    gain = named(edit, "layers.1.input_layernorm.weight")
    edit.spend("norm to q and k, without v", gain)
    scale(edit, gain, 2.0)
    for name in ("q", "k"):
        scale(edit, named(edit, f"layers.1.self_attn.{name}_proj.weight"), 0.5)


def transposed_inverse(edit: Edit) -> None:
    """v_proj's rows turned by R per head, o_proj's columns by Rᵀ's transpose."""
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0]
    value = named(edit, "layers.0.self_attn.out_proj.weight")
    edit.spend("output turned back with the wrong inverse", value)
    r = edit.new_param("r", turn)
    residual = next(n for n in edit.calls(aten.linear.default) if n.args[1] is value)
    back = edit.call(aten.linear.default, residual, r, like=residual)  # y Rᵀ
    again = edit.call(aten.linear.default, back, r, like=residual)  # and Rᵀ once more, not R
    edit.replace(residual, again, only=[u for u in residual.users if u is not back])


def tied_weight_twice(edit: Edit) -> None:
    """ln_f's gain halved and the head doubled, although the head is the embedding too."""
    gain = named(edit, "ln_f.weight")
    edit.spend("the head's table is the embedding's", gain)
    scale(edit, gain, 0.5)
    scale(edit, named(edit, "ln_f.bias"), 0.5)
    scale(edit, named(edit, "wte.weight"), 2.0)


def cannot_run(edit: Edit) -> None:
    """A weight of another shape."""
    weight = named(edit, "layers.0.mlp.down_proj.weight")
    edit.spend("a weight that is too small", weight)
    edit.set_param(weight, torch.zeros(3, 3))


def saturate(edit: Edit) -> None:
    """A kernel whose sums stop at a small number."""
    node = list(edit.calls(aten.linear.default))[3]
    edit.spend("a kernel with 16-bit sums", node)
    users = list(node.users)
    edit.replace(node, edit.call(aten.clamp.default, node, -0.1, 0.1, like=node), only=users)


CASES = {
    "forgotten bias": ("opt", Broken, forgotten_bias),
    "one reader of a norm left unscaled": ("llama", Broken, one_reader_left),
    "transposed inverse": ("opt", Broken, transposed_inverse),
    "tied weight scaled twice": ("gpt2", Broken, tied_weight_twice),
    "graph that does not run": ("llama", Broken, cannot_run),
    "lowering that saturates": ("llama", BrokenLower, saturate),
}


def picture(program: Program) -> tuple[object, ...]:
    """Everything a roll-back must leave as it was."""
    return (
        str(program), tuple((n, digest(t)) for n, t in program.params.items()),
        dict(program.plan), len(program.history),
    )  # fmt: skip


@pytest.fixture(scope="module")
def canonical(captured: Callable[..., tuple[object, object, Program]]) -> Callable[[str], Program]:
    def make(name: str) -> Program:
        return run_pipeline(captured(name)[2], make_passes("canonicalize"))

    return make


@pytest.mark.parametrize("case", CASES)
def test_first_bad_edit_is_named(case: str, canonical: Callable[[str], Program]) -> None:
    model, cls, bad = CASES[case]
    program = canonical(model)
    before = picture(program)
    with pytest.raises(PassError) as caught:
        run_pipeline(program, [cls(bad=bad)])
    text = str(caught.value)
    assert "number 3 of 5" in text and "rolled back" in text and GOOD not in text, text
    assert caught.value.nodes[0] in text
    assert picture(program) == before


def test_good_edits_alone_pass(canonical: Callable[[str], Program]) -> None:
    """The harmless edits around the bad one are harmless: it is the bad one that is caught."""

    def harmless(edit: Edit) -> None:
        gain = named(edit, "layers.1.input_layernorm.weight")
        edit.spend("norm to q, k and v", gain)
        scale(edit, gain, 2.0)
        for name in "qkv":
            scale(edit, named(edit, f"layers.1.self_attn.{name}_proj.weight"), 0.5)

    program = run_pipeline(canonical("llama"), [Broken(bad=harmless)])
    assert program.history[-1].metrics["error"] < 1e-9


@dataclass(frozen=True, kw_only=True)
class PlanThatTouchesAWeight(Pass):
    name: ClassVar[str] = "sly_plan"
    effect: ClassVar[Effect] = Effect.PLAN

    def run(self, edit: Edit, facts: Facts) -> None:
        weight = named(edit, "q_proj.weight")
        edit.spend("only planning", weight)
        edit.set_param(weight, edit.tensor(weight) * 1.0001)


@dataclass(frozen=True, kw_only=True)
class OverBudget(Pass):
    name: ClassVar[str] = "greedy"
    effect: ClassVar[Effect] = Effect.LOSSY

    def tolerance(self, facts: Facts) -> float:
        return 1e-3

    def run(self, edit: Edit, facts: Facts) -> None:
        for node in list(edit.calls(aten.linear.default))[:3]:
            weight = node.args[1]
            edit.spend("two levels are enough", weight)
            edit.set_param(weight, edit.tensor(weight).sign() * edit.tensor(weight).abs().mean())


@dataclass(frozen=True, kw_only=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, edit: Edit, facts: Facts) -> None:
        edit.skip(next(iter(edit.calls())), "nothing to do here")


@dataclass(frozen=True, kw_only=True)
class BehindTheBack(Pass):
    name: ClassVar[str] = "behind"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, edit: Edit, facts: Facts) -> None:
        node = next(iter(edit.calls(aten.linear.default)))
        edit.spend("looks harmless")
        node.args = (node.args[0], list(edit.calls(aten.linear.default))[3].args[1])


@dataclass(frozen=True, kw_only=True)
class Unannounced(Pass):
    name: ClassVar[str] = "unannounced"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, edit: Edit, facts: Facts) -> None:
        edit.new_param("x", torch.zeros(1))


@dataclass(frozen=True, kw_only=True)
class Crash(Pass):
    name: ClassVar[str] = "crash"
    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, edit: Edit, facts: Facts) -> None:
        edit.spend("the second step of many")
        raise ValueError("an index too far")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (PlanThatTouchesAWeight(), ["plan", "number 1 of 1", "q_proj.weight", "rolled back"]),
        (OverBudget(), ["budget 0.001", "number 1 of 3", "two levels", "rolled back"]),
        (Nothing(), ["changed nothing", "nothing to do here", "nothing{optional=true}"]),
        (BehindTheBack(), ["behind the editor's back", "linear#0"]),
        (Unannounced(), ["before it called spend"]),
        (Crash(), ["'crash'", "edit 1", "the second step of many", "an index too far"]),
    ],
    ids=lambda v: v.name if isinstance(v, Pass) else "",
)
def test_caught(step: Pass, words: list[str], canonical: Callable[[str], Program]) -> None:
    program = canonical("llama")
    before = picture(program)
    with pytest.raises(PassError) as caught:
        run_pipeline(program, [step])
    for word in words:
        assert word in str(caught.value)
    assert picture(program) == before


@dataclass(frozen=True, kw_only=True)
class Doing(Pass):
    """Anything, to the first linear layer."""

    name: ClassVar[str] = "doing"
    effect: ClassVar[Effect] = Effect.EXACT
    do: Callable[[Edit, fx.Node], object]

    def run(self, edit: Edit, facts: Facts) -> None:
        node = next(iter(edit.calls(aten.linear.default)))
        edit.spend("does it", node)
        self.do(edit, node)


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda e, n: e.tensor(_weight(n)).mul_(2), "wrote into 0.weight in place"),
        (lambda e, n: e.assign(n, "int8:channel"), "assigns 'int8:channel' to 0/linear#0"),
        (lambda e, n: setattr(n, "target", aten.tanh.default), "another operator of node 0/linear"),
        (
            lambda e, n: e.set_param(_weight(n), e.tensor(_weight(n)) * 1.7 / 1.7),
            "what float32 rounds off: write the map on the weight's edge",
        ),
        (
            lambda e, n: e.set_param(_weight(n), e.tensor(_weight(n)) * 1.7),
            "at output_1 in float64 .*'does it', at 0/linear#0, 0.weight$",
        ),
    ],
)
def test_what_an_edit_may_not(do: Callable[[Edit, fx.Node], object], words: str) -> None:
    class Two(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, super().forward(x)

    torch.manual_seed(0)
    program = qcompiler.capture(Two(torch.nn.Linear(8, 8)), torch.randn(4, 8))
    with pytest.raises(PassError, match=words):
        run_pipeline(program, (Doing(do=do),))


def test_a_call_that_fails_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """torch logs the traceback of what fails on fake tensors."""
    program = qcompiler.capture(torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(4, 8))
    wrong = Doing(do=lambda e, n: e.call(aten.linear.default, n, n.args[1], like=n))
    with pytest.raises(PassError, match=r"failed in edit 1 \('does it'\)"):
        run_pipeline(program, (wrong,))
    assert capfd.readouterr() == ("", "")


def test_integers_are_decided_by_numbers() -> None:
    """An argmax may turn where numbers move: that is told, and no error of a lossy pass."""

    class Label(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 20)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.layer(x)
            return y, y.topk(3, -1).indices

    torch.manual_seed(0)
    example = torch.randn(64, 16)
    passes = "assign{weight=int3:channel head=same},quantize"
    for backend in ("reference", "cpu"):
        made = qcompiler.compile(Label(), example, passes=passes, backend=backend)
        metrics = made.history[-1].metrics
        assert 0.05 < metrics["error"] < 0.5
        assert 0.05 < metrics["turned"] < 0.9
        assert f"{metrics['turned']:.1%} of integers" in str(made.diff())
    program = qcompiler.capture(Label(), example)
    negate = Doing(do=lambda e, n: scale(e, n, -1.0))
    with pytest.raises(PassError, match="promises exact"):
        run_pipeline(program, (negate,))


def test_options_are_checked_in_python_too() -> None:
    from qcompiler.passes.quantize import Quantize

    with pytest.raises(BadInput, match="option rounding is str; found 3"):
        Quantize(rounding=3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"found 3, \(-1,\)"):
        QFormat(3, (-1,))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="found 'int8', 'channel'"):
        QFormat("int8", "channel")  # type: ignore[arg-type]


def test_fields_may_be_more_than_options() -> None:
    """A pass in Python may have fields that no text could give."""

    @dataclass(frozen=True, kw_only=True)
    class Free(Doing):
        pair: tuple[int, str] = (1, "a")
        share: float = np.float64(0.5)  # type: ignore[assignment]
        made: str = field(init=False, default="")
        none: int = None  # type: ignore[assignment]

    assert Free(do=print).pair == (1, "a")


def test_a_model_made_in_inference_mode() -> None:
    """Its tensors do not count how often they are written to."""
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        made = qcompiler.compile(model, torch.randn(4, 8), recipe="w8a8-dynamic")
        assert made(torch.randn(3, 8)).shape == (3, 4)


def test_complex_outputs_are_compared() -> None:
    x = torch.randn(8, dtype=torch.complex64)
    assert relative_error(x.conj(), x.conj() * 1.5) == pytest.approx(0.5)
    assert relative_error(x, x.real) == relative_error(x.real, x) == float("inf")


def test_an_entry_point_has_the_name_of_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "qcompiler.passes.quantize:Quantize"
    monkeypatch.setattr("qcompiler.registry.table", lambda group: {"round": module})
    with pytest.raises(BadInput, match=r"pass 'round' .* calls itself 'quantize'"):
        make_passes("round")


def test_optional_pass_may_do_nothing(canonical: Callable[[str], Program]) -> None:
    program = run_pipeline(canonical("cnn"), [Nothing(optional=True)])
    assert program.history[-1].skipped[0].why == "nothing to do here"


def test_compile_falls_back_from_a_kernel_that_is_off() -> None:
    """A lowering whose second site is wrong: that site goes back to the reference, and says why."""

    @dataclass(frozen=True, kw_only=True)
    class Lower(Pass):
        name: ClassVar[str] = "lower"
        effect: ClassVar[Effect] = Effect.LOWER
        exclude: tuple[str, ...] = ()

        def tolerance(self, facts: Facts) -> float:
            return 1e-4

        def run(self, edit: Edit, facts: Facts) -> None:
            for number, node in enumerate(list(edit.calls(aten.linear.default))):
                if node_id(node) not in self.exclude:
                    edit.spend("fast", node)
                    factor = 1.5 if number == 1 else 1.0
                    users = list(node.users)
                    scaled = edit.call(aten.mul.Tensor, node, factor, like=node)
                    edit.replace(node, scaled, only=users)

    from qcompiler.backends.reference import ReferenceBackend

    class Off(ReferenceBackend):
        tolerance: ClassVar[float] = 1e-3

        def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
            return (Lower(exclude=tuple(exclude)),)

    layers = [torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 8))
    compiled = qcompiler.compile(model, torch.randn(4, 8), recipe="w8a16", backend=Off())
    assert list(compiled.refused) == ["2/linear#0"]  # and not what reads it
    assert "off the reference" in compiled.refused["2/linear#0"]
    assert set(compiled.kernels) == {"0/linear#0", "4/linear#0"}
