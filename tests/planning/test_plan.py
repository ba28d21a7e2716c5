"""Plans, from budgets to the file and from the file to the model."""

from __future__ import annotations

import html
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, Program, QFormat, Scheme, capture
from qcompiler.allocate import Budget
from qcompiler.backend import Backend
from qcompiler.backends.reference import ReferenceBackend
from qcompiler.cli import main
from qcompiler.costs import benches
from qcompiler.passes.allocate import Allocate
from qcompiler.planning.front import plan
from qcompiler.planning.planned import Planned
from qcompiler.planning.question import Question
from qcompiler.planning.reasons import why
from qcompiler.registry import get_metric, make_passes
from qcompiler.rounded import rounded_program

FORMATS = ("int2:group16:scale(fp16)", "int4:group16:scale(fp16)", "int8:channel")


class Net(nn.Module):
    """Two readers of one input, a chain behind them, a residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)
        self.k.weight.data.mul_(0.02)  # what it is rounded to matters little

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.q(x) * torch.sigmoid(self.k(x))
        return self.head(h + self.down(torch.relu(self.up(h))))


def net() -> nn.Module:
    return Net().eval()


def data(count: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 32) for _ in range(count)]


def question(*budgets: str, **options: object) -> Question:
    given = {"formats": FORMATS, "timed": False} | options
    return Question(tuple(Budget.parse(b) for b in budgets), **given)  # type: ignore[arg-type]


def planned(tmp_path: Path, *budgets: str, batches: int = 4, **options: object) -> Planned:
    return plan(
        net(),
        data(1)[0],
        question=question(*budgets, **options),
        data=data(batches),
        backend="reference",
        cache=tmp_path,
    )


def test_within_the_budget_and_below_every_uniform_one(tmp_path: Path) -> None:
    found = planned(tmp_path, "5bits")
    assert found.bits_per_weight <= 5 and found.allocation.optimal
    assert set(found.chosen) == {f"{n}/linear#0" for n in ("q", "k", "up", "down")}
    for alone in found.uniform().values():
        if alone.totals["weight_bytes"] <= found.allocation.totals["weight_bytes"]:
            assert found.allocation.loss <= alone.loss
    assert set(found.uniform()) == set(FORMATS)
    assert "% of the total predicted loss" in found.why(0)


def test_several_budgets_hold_at_once(tmp_path: Path) -> None:
    whole = planned(tmp_path, "8bits").allocation.totals
    found = planned(tmp_path, "6bits", f"{whole['bytes'] - 900}B", "0.2x-bitops")
    totals = found.allocation.totals
    assert found.bits_per_weight <= 6 and totals["bytes"] <= whole["bytes"] - 900
    assert totals["bitops"] <= 0.2 * found.whole["bitops"]


def test_bytes_are_those_of_the_model(tmp_path: Path) -> None:
    found = planned(tmp_path, "5bits")
    found.file().write(tmp_path / "plan.toml")
    compiled = qcompiler.compile(
        net(), data(1)[0], plan=tmp_path / "plan.toml", backend="reference", data=data()
    )
    assert compiled.bytes == found.allocation.totals["bytes"]
    assert compiled.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert dict(compiled.program.plan) == found.chosen
    step = next(s for s in compiled.history if s.name == "use_plan")
    assert {e.nodes[0]: e.why for e in step.edits} == {c.site: c.why for c in found.file().choices}


def test_the_prediction_is_the_loss(tmp_path: Path) -> None:
    """Of rounding to nearest, at few bits, on the data that it was measured on."""
    found = planned(tmp_path, "5bits", metric=get_metric("divergence"))
    found.file().write(tmp_path / "plan.toml")
    passes = "canonicalize{optional=true},assign,quantize"
    compiled = qcompiler.compile(
        net(), data(1)[0], passes=passes, plan=tmp_path / "plan.toml", backend="reference"
    )
    x = torch.cat(data())
    wanted, have = net()(x).detach(), compiled(x)
    assert isinstance(have, Tensor)
    loss = float((wanted - have).square().sum() / wanted.square().sum())
    assert found.allocation.loss == pytest.approx(loss, rel=0.5)


def test_another_budget_runs_nothing(tmp_path: Path) -> None:
    first = planned(tmp_path, "5bits")
    second = planned(tmp_path, "3.5bits")
    assert first.sensitivity.batches > 0 and second.sensitivity.batches == 0
    assert second.allocation.loss > first.allocation.loss
    assert planned(tmp_path, "5bits", batches=5).sensitivity.batches > 0  # other data
    assert planned(tmp_path, "5bits", formats=FORMATS[1:]).sensitivity.batches > 0


def test_what_is_chosen_from_by_itself() -> None:
    """Rounded activations where they save something, and float where nothing does."""
    sizes, times = question("4bits", formats=()), question("4bits", "0.7x-decode", formats=())
    assert set(sizes.formats) < set(times.formats)
    assert "float" in times.formats and "int8:channel/int8:token:dynamic" in times.formats
    assert not [f for f in sizes.formats if "/" in f or f == "float"]
    assert question("0.7x-decode").formats == FORMATS


def test_reasons_are_in_terms_of_what_binds(tmp_path: Path) -> None:
    assert re.search(
        r"costs \d+ bytes more than int4:group16, saves", _why(planned(tmp_path, "8bits"))
    )
    formats = ("int4:channel/int4:token:dynamic", "int8:channel/int8:token:dynamic")
    found = planned(tmp_path, "0.02x-bitops", formats=formats)
    assert "0.02x-bitops" in found.binding and re.search(
        r"would cost [\d.]+ [kM]bitops more and save", _why(found)
    )
    alone = planned(tmp_path, "5bits", formats=FORMATS[:1])
    assert alone.why(0) == "int2:group16: the only candidate"
    two = planned(tmp_path, "32bits", formats=(FORMATS[2], f"{FORMATS[2]}/int2:token:dynamic"))
    assert two.why(0) == "int8:channel: no other is cheaper or loses less"


def test_a_reason_where_other_budgets_decide(tmp_path: Path) -> None:
    """A better format that costs no more in one budget is no saving in it."""
    found = planned(tmp_path, "5bits", formats=FORMATS[1:])
    unit = next(i for i, k in enumerate(found.allocation.choice) if k == 0)
    costs = dict(found.problem.costs)
    costs["bitops"] = tuple((2.0, 1.0) for _ in found.problem.units)
    moved = replace(found.problem, costs=costs)
    text = why(moved, replace(found.allocation, binding=("bitops",)), unit)
    assert text.startswith("int4:group16: int8:channel would cost no more and lose less, but other")
    assert "saves" not in text


def test_what_no_kernel_serves_stays_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And costs what float costs, not nothing."""
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(benches.Benches, "compare", lambda *_: None)
    asked = question("0.9x-prefill", timed=True)
    with pytest.raises(BadInput, match=r"nothing to choose.*could not build"):
        plan(net(), data(1)[0], question=asked, data=data(), backend="cpu", cache=tmp_path)


def _why(found: Planned) -> str:
    return "\n".join(found.why(i) for i in range(len(found.problem.units)))


def test_agreement(tmp_path: Path) -> None:
    free = planned(tmp_path, "3.5bits").texts
    assert len({free["q/linear#0"], free["k/linear#0"]}) == 2  # or the rest would say nothing
    for agree in ("inputs", "[qk]/*"):
        texts = planned(tmp_path, "3.5bits", agree=(agree,)).texts
        assert texts["q/linear#0"] == texts["k/linear#0"]
    joined = planned(tmp_path, "3.5bits", agree=("joins",))
    assert (0, 3) not in joined.problem.groups  # q is gated before it is added
    with pytest.raises(BadInput, match="matches no site"):
        planned(tmp_path, "3.5bits", agree=("nothing*",))


def test_tied_weights_are_one_choice(tmp_path: Path) -> None:
    model = Net().eval()
    model.k.weight = model.q.weight
    found = plan(
        model, data(1)[0], question=question("5bits"), data=data(), backend="reference",
        cache=tmp_path,
    )  # fmt: skip
    assert found.texts["q/linear#0"] == found.texts["k/linear#0"]
    assert found.weights == 32 * 32 + 2 * 32 * 64


def test_activations_and_float(tmp_path: Path) -> None:
    formats = ("int4:group16", "int8:channel/int8:token:dynamic", "float")
    found = planned(tmp_path, "20bits", formats=formats)
    assert set(found.texts.values()) <= set(formats) and "float" in found.texts.values()
    found.file().write(tmp_path / "plan.toml")
    compiled = qcompiler.compile(
        net(), data(1)[0], plan=tmp_path / "plan.toml", backend="reference"
    )
    assert dict(compiled.program.plan) == {k: s for k, s in found.chosen.items() if s != Scheme()}


def test_a_target_for_the_loss(tmp_path: Path) -> None:
    best = planned(tmp_path, "8.5bits").allocation
    found = planned(tmp_path, loss=20 * best.loss)
    assert found.allocation.loss <= 20 * best.loss
    assert found.allocation.totals["bytes"] < best.totals["bytes"]


def test_a_target_in_another_unit(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="predicts no loss"):
        planned(tmp_path, loss=0.1, metric=get_metric("taylor"))


def test_the_smallest_that_is_accepted(tmp_path: Path) -> None:
    """By a measurement of the rounded program itself."""
    x, model = torch.cat(data()), net()
    wanted = model(x).detach()
    seen: list[float] = []

    def accept(program: Program) -> bool:
        found = program(x)
        assert isinstance(found, Tensor)
        seen.append(float((found - wanted).square().sum() / wanted.square().sum()))
        return seen[-1] <= 1e-4

    found = plan(
        model, data(1)[0], question=question(), data=data(), backend="reference",
        cache=tmp_path, accept=accept,
    )  # fmt: skip
    assert 1 < len(seen) <= 10 and 3 < found.bits_per_weight < 9
    assert accept(rounded_program(capture(model, data(1)[0]), found.chosen, [(x,)]))


def test_greedy_is_no_better(tmp_path: Path) -> None:
    greedy = planned(tmp_path, "4.2bits", solver="greedy").allocation
    assert greedy.loss >= planned(tmp_path, "4.2bits").allocation.loss
    assert not greedy.optimal


def test_pairs(tmp_path: Path) -> None:
    """Never for worse, by what is predicted."""
    plain = planned(tmp_path, "5bits")
    found = planned(tmp_path, "5bits", pairs=True)
    assert found.pairs and not plain.pairs and found.bits_per_weight <= 5
    assert found.sensitivity.batches == 0  # the same draws tell
    assert found.allocation.loss <= found.loss(plain.allocation.choice)
    assert found.loss(found.allocation.choice) == pytest.approx(found.allocation.loss)
    with pytest.raises(BadInput, match="write --metric gauss_newton"):
        planned(tmp_path, "5bits", pairs=True, metric=get_metric("error"))


def test_a_pass_does_the_same(tmp_path: Path) -> None:
    found = planned(tmp_path, "5bits")
    allocate = Allocate(budgets=("5bits",), formats=FORMATS)
    assert make_passes(str(allocate)) == (allocate,)
    compiled = qcompiler.compile(
        *(net(), data(1)[0]),
        passes=["canonicalize{optional=true}", allocate, "quantize"],
        backend="reference",
        data=data(),
    )
    assert dict(compiled.program.plan) == found.chosen
    step = next(s for s in compiled.history if s.name == "allocate")
    assert [e.why for e in step.edits] == [found.why(i) for i in range(4)]


class Picky(Backend):
    """int8 alone, and q and k as one."""

    name, summary = "picky", "for this test"

    def refuses(self, site, scheme) -> str | None:
        return None if str(scheme.weight) == "int8:channel" else "picky has int8 alone"

    def agree(self, sites):
        return (("q/linear#0", "k/linear#0"),)

    def build(self, program):
        raise NotImplementedError


def test_a_slower_plan_is_called_so(tmp_path: Path) -> None:
    found = planned(tmp_path, "5bits")
    times = {"prefill": 1.0, "decode": 1.0}
    totals = {**found.allocation.totals, "prefill": 0.7, "decode": 1.2}
    moved = replace(
        found, whole={**found.whole, **times}, allocation=replace(found.allocation, totals=totals)
    )
    assert [note.partition(" on this")[0] for note in moved.slower()] == [
        "smaller, but decode takes 1.20 × as long as in float"
    ]
    assert not found.slower()  # nothing was timed


def test_formats_that_the_backend_has(tmp_path: Path) -> None:
    found = plan(
        net(), data(1)[0], question=question("9bits"), data=data(), backend=Picky(), cache=tmp_path
    )
    assert set(found.texts.values()) == {"int8:channel"}
    assert any("picky has int8 alone" in note for note in found.notes)
    assert found.problem.together()[0] == (0, 1)
    asked = question("3bits", formats=FORMATS[:1])
    with pytest.raises(BadInput, match="picky has int8 alone"):
        plan(net(), data(1)[0], question=asked, data=data(), backend=Picky(), cache=tmp_path)


def test_impossible_budgets_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"1bits is impossible here, 3bits is the near"):
        planned(tmp_path, "1bits")
    with pytest.raises(BadInput, match=r"0.01x-bytes is impossible here, 0\.\d+x-bytes .* 6bits"):
        planned(tmp_path, "0.01x-bytes", "6bits")
    for text in ("4.2", "4.2bit", "-3bits", "many"):
        with pytest.raises(BadInput):
            Budget.parse(text)
    with pytest.raises(BadInput, match="needs a budget"):
        planned(tmp_path)


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    layers = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()\n"
        "    return nn.Sequential(*layers, nn.Linear(32, 4)).eval(), (torch.randn(8, 32),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*words: str, ok: bool = True) -> str:
    result = CliRunner().invoke(main, list(words))
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_bench(place: Path) -> None:
    """Beside the captured program, and beside what the same backend makes of it."""
    run("compile", "made:net", "--recipe", "w8a8-dynamic", "-o", "out")
    for against in ("float", "backend"):
        found = json.loads(run("bench", "out", "--against", against, "--json"))
        assert found["speedup"] == pytest.approx(found["float_seconds"] / found["seconds"])
        assert found["bytes"] < found["float_bytes"]
    assert "float on cpu" in run("bench", "out", "--against", "backend")


PLAN = ("plan", "made:net", "--formats", ",".join(FORMATS), "--backend", "reference", "--no-time")


def test_the_command(place: Path) -> None:
    found = json.loads(run(*PLAN, "--budget", "5bits", "-o", "plan.toml", "--json"))
    wanted = {"bits_per_weight", "bytes", "predicted_loss", "uniform", "binding", "choices"}
    assert wanted <= set(found)
    assert found["binding"] == ["5bits"] and found["bits_per_weight"] <= 5
    assert run(*PLAN, "--budget", "5bits", "-o", "plan.toml", "--html", "plan.html")
    text = (place / "plan.html").read_text("utf-8")
    assert text.count("<svg") == 1 and all(
        html.escape(why) in text for why in found["why"].values()
    )
    for words in (["-o", "."], ["-o", "plan.toml", "--html", "."], ["-o", "p", "--plot", "p.xyz"]):
        assert "error: " in run(*PLAN, "--budget", "5bits", *words, ok=False)
    raw = tomllib.loads((place / "plan.toml").read_text())
    assert {c["site"]: c["weight"] for c in raw["choice"]} == found["choices"]
    again = json.loads(run(*PLAN, "--budget", "4.5bits", "-o", "other.toml", "--json"))
    assert found["batches_run"] > 0 and again["batches_run"] == 0
    made = run("compile", "made:net", "--plan", "plan.toml", "-o", "out", "--backend", "reference",
               "--json")  # fmt: skip
    assert json.loads(made)["bits_per_weight"] == pytest.approx(found["bits_per_weight"])
    assert found["why"]["0/linear#0"] in run("diff", "out", "--why", "0/linear#0")


def test_a_plan_edited_by_hand(place: Path) -> None:
    (place / "plan.toml").write_text(
        '[[choice]]\nsite = "0/linear#0"\nweight = "int4:group16"\nwhy = "because I say so"\n'
    )
    run("compile", "made:net", "--plan", "plan.toml", "-o", "out", "--backend", "reference")
    compiled = qcompiler.load("out")
    assert dict(compiled.program.plan) == {"0/linear#0": Scheme(QFormat.parse("int4:group16"))}
    assert "because I say so" in run("diff", "out", "--why", "0/linear#0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[choice]]\nsite = "0/linear#7"\n', "choice 1.*did you mean '0/linear#0'"),
        ('[[choice]]\nsite = "0/linear#0"\nweigth = "int4"\n', "did you mean 'weight'"),
        ('[[choice]]\nsite = "0/linear#0"\nweight = "int4:grup16"\n', "choice 1, 0/linear#0"),
        ('[[choice]]\nsite = "0/linear#0"\nweight = 4\n', "weight is no str: 4"),
        ('[[choice]]\nweight = "int4:channel"\n', "choice 1 names no site"),
        ('[[choice]]\nsite = "0/linear#0"\n[[choice]]\nsite = "0/linear#0"\n', "chosen for above"),
        ("budgets = 3\n", "has no .*choice"),
        ("[[choice\n", "is no TOML"),
        (None, "no plan at plan.toml"),
    ],
)
def test_bad_plans(place: Path, text: str | None, words: str) -> None:
    if text is not None:
        (place / "plan.toml").write_text(text)
    said = run("compile", "made:net", "--plan", "plan.toml", "-o", "out", ok=False)
    assert re.search(words, " ".join(said.split())), said
    assert not (place / "out").exists()


def test_a_format_that_the_backend_refuses(place: Path) -> None:
    (place / "plan.toml").write_text('[[choice]]\nsite = "0/linear#0"\nweight = "nf4:group16"\n')
    said = " ".join(
        run(
            *("compile", "made:net", "--plan", "plan.toml", "-o", "out"),
            *("--backend", "onnxruntime"),
            ok=False,
        ).split()
    )
    assert "choice 1, 0/linear#0: onnxruntime has no linear kernel for weight=nf4:group16" in said
    assert "int[2-4]" in said


def test_a_recipe_without_a_place_for_it(place: Path) -> None:
    (place / "plan.toml").write_text('[[choice]]\nsite = "0/linear#0"\nweight = "int4:channel"\n')
    said = run(
        *("compile", "made:net", "--plan", "plan.toml", "-o", "out"),
        *("--passes", "canonicalize{optional=true},quantize"),
        ok=False,
    )
    assert "takes the place of `assign`" in " ".join(said.split())


def test_a_plot(place: Path) -> None:
    run(*PLAN, "--budget", "5bits", "-o", "plan.toml", "--plot", "plan.png")
    assert (place / "plan.png").read_bytes().startswith(b"\x89PNG")


class Slow(Backend):
    """A microsecond for each bit of a weight, whatever the tokens."""

    name, summary = "slow", "for this test"

    def refuses(self, site, scheme) -> str | None:
        return None

    def cost(self, site, scheme, tokens: int) -> float:
        return 1e-3 * (32 if scheme.weight is None else scheme.weight.bits)

    def build(self, program):
        return ReferenceBackend().build(program)


def test_seconds_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head, which is not decided, is in what is fixed; relative budgets are of the whole."""
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    found = plan(
        net(), data(1)[0], question=question("0.5x-prefill", timed=True), data=data(),
        backend=Slow(), cache=tmp_path,
    )  # fmt: skip
    assert found.whole["prefill"] == pytest.approx(found.problem.fixed["prefill"] + 4 * 32e-3)
    bits = sum(s.weight.bits for s in found.chosen.values() if s.weight is not None)
    total = found.problem.fixed["prefill"] + 1e-3 * bits
    assert found.allocation.totals["prefill"] == pytest.approx(total)
    assert total <= 0.5 * found.whole["prefill"]
    with pytest.raises(BadInput, match="is not run token by token"):
        plan(
            net(), data(1)[0], question=question("1ms-decode"), data=data(), backend=Slow(),
            cache=tmp_path,
        )  # fmt: skip
