"""`torch.compile(model, backend="qcompiler")`, and artifacts that are themselves compiled."""

from __future__ import annotations

import pickle
import tomllib
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import build

import qcompiler
from qcompiler.check import relative_error
from qcompiler.dynamo import backend
from qcompiler.dynamo.frozen import MOST, Frozen
from qcompiler.errors import BackendError, BadInput

RECIPE = {"recipe": "w8a8-dynamic", "backend": "reference"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[qcompiler.Compiled]:
    """What was compiled, in order."""
    found: list[qcompiler.Compiled] = []
    compile = Frozen._compile

    def recorded(self: Frozen, *args: object) -> qcompiler.Compiled:
        found.append(compile(self, *args))
        return found[-1]

    monkeypatch.setattr(Frozen, "_compile", recorded)
    return found


def compiled(model: nn.Module, dynamic: bool | None = None, **options: object) -> nn.Module:
    return torch.compile(model, backend=backend, options=RECIPE | options, dynamic=dynamic)


def same(found: object, wanted: object, error: float = 1e-5) -> None:
    assert relative_error((found,), (wanted,)) <= error


class Mlp(nn.Module):
    """Three layers; between them Dynamo's graph breaks, or it does not."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(3))

    def forward(self, x: Tensor, scale: int = 1) -> dict[str, object]:
        for layer in self.layers:
            x = layer(x)
        return {"y": x * scale, "rows": x.shape[0], "nothing": None}


class Layer(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return self.down(self.up(x).relu()) + x


def test_named_in_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    group = "torch_dynamo_backends"
    place = project["project"]["entry-points"][group]["qcompiler"]
    assert EntryPoint("qcompiler", place, group).load() is backend


@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_as_compiled_directly(name: str, made: list[qcompiler.Compiled]) -> None:
    model, example = build(name)
    inputs = example if isinstance(example, dict) else {"x": example}
    if hasattr(model, "config"):
        model.config.use_cache = False
    direct = qcompiler.compile(model, inputs, **RECIPE)
    fast = compiled(model.eval())

    def output(found: object) -> object:
        return found if isinstance(found, Tensor) else found["logits"]

    for rows in (3, 2, 4):  # at the second call Dynamo takes the batch for open
        cut = {n: torch.cat([x, x])[:rows] for n, x in inputs.items()}
        same(output(fast(**cut)), output(direct(**cut)))
    assert len(made) == 2
    assert {i.split("#")[0] for i in made[1].program.plan} == {
        i.split("#")[0] for i in direct.program.plan
    }
    assert set(made[1].program.params) == set(direct.program.params)
    assert "batch" in made[1].program.io.dims


def test_the_rest_of_the_outputs(made: list[qcompiler.Compiled]) -> None:
    model = Mlp().eval()
    direct = qcompiler.compile(model, torch.randn(4, 16), **RECIPE)
    fast = compiled(model)
    for rows in (4, 5, 6):
        x = torch.randn(rows, 16)
        found = fast(x)
        same(found["y"], direct(x)["y"])
        assert found["rows"] == rows and found["nothing"] is None
    assert len(made) == 2


def test_layers_that_share_a_graph_have_their_own_weights(made: list[qcompiler.Compiled]) -> None:
    passes = "assign{weight=int8:channel activation=int8:token:dynamic head=same},quantize"
    x = torch.randn(4, 16)
    direct = qcompiler.compile(Mlp().eval(), x, passes=passes, backend="reference")
    fast = compiled(Mlp(breaks=True).eval(), recipe=None, passes=passes)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="weights were written")
        for _ in range(2):
            same(fast(x)["y"], direct(x)["y"])
    assert [len(m.program.plan) for m in made] == [2, 2, 2]


def test_written_weights_are_compiled_again(made: list[qcompiler.Compiled]) -> None:
    model, x = Layer(False).eval(), torch.randn(4, 16)
    fast = compiled(model)
    first = fast(x)
    model.down.weight.mul_(-1)
    model.down.bias.mul_(-1)
    with pytest.warns(UserWarning, match="weights were written"):
        same(fast(x), 2 * x - first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)
    assert len(made) == 2


def test_numbers(made: list[qcompiler.Compiled]) -> None:
    """A number that is no size is a constant of a program."""
    model, x = Mlp().eval(), torch.randn(4, 16)
    direct, fast = qcompiler.compile(model, x, **RECIPE), compiled(model, dynamic=True)
    for scale in (2, 3, 2.5, 3.5, 2):
        same(fast(x, scale)["y"], scale * direct(x)["y"])
    assert len(made) == 4
    with pytest.raises(BadInput, match="hand over as tensors"):
        for scale in range(2, MOST + 3):
            fast(x, scale)


def test_a_size_computed_from_another(made: list[qcompiler.Compiled]) -> None:
    """torch.export takes no such input as open: each size is a program."""

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(torch.cat([x, x])) + y

    model = Doubled().eval()
    fast = compiled(model, dynamic=True)
    for rows in (3, 5, 3):
        x, y = torch.randn(rows, 16), torch.randn(2 * rows, 16)
        same(fast(x, y), model(x, y), 0.02)
    assert len(made) == 2


def test_without_weights_it_runs_unchanged(made: list[qcompiler.Compiled]) -> None:
    x = torch.randn(4, 16)
    assert torch.equal(compiled(nn.Softmax(-1))(x), x.softmax(-1))
    assert not made


def test_a_piece_that_is_a_head_stays_in_float(made: list[qcompiler.Compiled]) -> None:
    model, x = nn.Linear(16, 16).eval(), torch.randn(4, 16)
    fast = compiled(model)
    with pytest.warns(UserWarning, match=r"a graph with weight, bias runs in float"):
        assert torch.equal(fast(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x)


def test_calibrated_on_its_first_calls(made: list[qcompiler.Compiled]) -> None:
    model = Mlp(breaks=True).eval()
    fast = compiled(model, recipe="w8a8-static", calibrate=2)
    for _ in range(2):
        x = torch.randn(8, 16)
        same(fast(x)["y"], model(x)["y"], 1e-7)
    assert not made
    x = torch.randn(8, 16)
    found = fast(x)["y"]
    same(found, model(x)["y"], 0.05)
    assert not torch.equal(found, model(x)["y"]) and len(made) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recip": "w8a8-dynamic"}, "unknown option 'recip'; did you mean 'recipe'"),
        ({"data": []}, "calibrate"),
        ({"recipe": "w8a9"}, "unknown recipe 'w8a9'"),
    ],
)
def test_bad_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(Exception, match=words):
        compiled(nn.Linear(16, 16).eval(), **options)(torch.randn(4, 16))


def test_a_mode_is_inductors() -> None:
    fast = torch.compile(nn.Linear(16, 16).eval(), backend=backend, mode="reduce-overhead")
    with pytest.raises(Exception, match="is Inductor's"):
        fast(torch.randn(4, 16))


def test_gradients_are_refused() -> None:
    with torch.enable_grad(), pytest.raises(BadInput, match=r"torch\.no_grad"):
        compiled(nn.Linear(16, 16).eval())(torch.randn(4, 16))


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(16)], ids=["dropout", "norm"])
def test_training_is_refused(layer: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"model\.eval\(\)"):
        compiled(nn.Sequential(nn.Linear(16, 16), layer).train())(torch.randn(4, 16))


def test_state_is_refused() -> None:
    class Counting(Layer):
        def __init__(self) -> None:
            super().__init__(breaks=False)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x) * self.calls

    with pytest.raises(BadInput, match="writes into 'calls'"):
        compiled(Counting().eval())(torch.randn(4, 16))


@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_an_artifact_as_a_module(name: str) -> None:
    model, example = build(name)
    inputs = example if isinstance(example, dict) else {"x": example}
    artifact = qcompiler.compile(model, inputs, recipe="w8a8-dynamic")
    module = artifact.module()
    wanted = artifact(**inputs)
    outputs = tuple(wanted.values()) if isinstance(wanted, dict) else (wanted,)
    exported = torch.export.export(module, (), inputs, strict=False).module()
    again = pickle.loads(pickle.dumps(module))
    for run in (module, exported, again):
        found = run(**inputs)
        found = tuple(found.values()) if isinstance(found, dict) else (found,)
        assert relative_error(found, outputs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_an_artifact_in_inductor(name: str) -> None:
    model, example = build(name)
    inputs = example if isinstance(example, dict) else {"x": example}
    artifact = qcompiler.compile(model, inputs, recipe="w8a8-dynamic")
    fast = torch.compile(artifact.module(), fullgraph=True)
    for rows in (3, 2):
        cut = {n: x[:rows] for n, x in inputs.items()}
        found, wanted = fast(**cut), artifact(**cut)
        if isinstance(wanted, dict):
            found, wanted = found["logits"], wanted["logits"]
        same(found, wanted)


def test_not_every_artifact_has_a_module() -> None:
    artifact = qcompiler.compile(Mlp(), torch.randn(4, 16), recipe="w8a8-dynamic", backend="null")
    with pytest.raises(BackendError, match="runs no operators of torch"):
        artifact.module()
