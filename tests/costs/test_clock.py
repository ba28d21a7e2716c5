"""The clock adds up, asks once for equal sites, remembers, and says what a backend refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler import Backend, QFormat, Scheme, timing
from qcompiler.costs import Clock, Workload, layers
from qcompiler.costs import benches as bench_module
from qcompiler.costs.cache import Cache, cache_folder
from qcompiler.costs.layers import Layer
from qcompiler.registry import get_backend
from qcompiler.schemes import fit
from qcompiler.sites import Site, sites

Captured = Callable[..., tuple[torch.nn.Module, object, qcompiler.Program]]
INT8 = ("int8:channel", "int8:token:dynamic")
WORK = Workload(prefill=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test is about how exact a time is."""
    monkeypatch.setattr(layers, "MOST", 1)
    monkeypatch.setattr(timing, "LEAST", 1)
    monkeypatch.setattr(timing.floors, "__defaults__", (10.0, 0.0))
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Scheme]:
    """Schemes of all benches that were built."""
    seen: list[Scheme] = []
    build = bench_module.build

    def note(program: qcompiler.Program, scheme: Scheme, *rest: Any) -> Any:
        seen.append(scheme)
        return build(program, scheme, *rest)

    monkeypatch.setattr(bench_module, "build", note)
    return seen


def mlp() -> qcompiler.Program:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    return qcompiler.capture(model, torch.randn(2, 64))


@pytest.mark.parametrize(
    ("backend", "model"), [("cpu", "llama"), ("onnxruntime", "mlp"), ("reference", "cnn")]
)
def test_what_sites_take_adds_up(backend: str, model: str, captured: Captured) -> None:
    program = mlp() if model == "mlp" else captured(model)[2]
    ticks: list[tuple[int, int]] = []
    clock = Clock(
        get_backend(backend), program, WORK, tick=lambda done, of: ticks.append((done, of))
    )
    found = [s for s in sites(program.nodes) if s.kind.name != "embedding"]
    choice = {s.id: fit(s, *INT8) for s in found}
    clock.prepare({id: [scheme, None] for id, scheme in choice.items()})
    assert ticks[-1][0] == ticks[-1][1] > 0
    one = found[0]
    for phase in clock.workload.phases:
        plain = clock.total({}, phase)
        assert plain >= clock.rest(phase) >= 0 and clock.overhead(phase) > 0
        mine = clock.seconds(one, choice[one.id], phase)
        own = clock.seconds(one, None, phase)
        assert mine is not None and own is not None
        assert clock.total({one.id: choice[one.id]}, phase) == pytest.approx(plain + mine - own)
        others = clock.rest(phase, [one])
        assert others >= clock.rest(phase)


def test_the_whole_rounded_is_what_it_took(
    monkeypatch: pytest.MonkeyPatch, captured: Captured
) -> None:
    """What fusion saves is no layer's own: each site has its share, so that the total is right."""
    runs: list[int] = []

    def together(self: object, chosen: dict[str, Scheme]) -> dict[str, float]:
        runs.append(len(chosen))
        return {"prefill": 0.25, "decode": 0.5}

    monkeypatch.setattr(bench_module.Benches, "together", together)
    program = captured("llama")[2]
    clock = Clock(get_backend("cpu"), program, WORK)
    linears = [s for s in sites(program.nodes) if s.kind.name == "linear"]
    choice = {s.id: fit(s, *INT8) for s in linears}
    clock.prepare({id: (None, scheme) for id, scheme in choice.items()})
    shares = {"prefill": 0.25, "decode": 0.5}
    for phase in clock.workload.phases:
        plain = clock.total({}, phase)
        assert clock.total(choice, phase) == pytest.approx(shares[phase] * plain)
        first = {linears[0].id: choice[linears[0].id]}
        assert clock.total(first, phase) != pytest.approx(plain)
    assert runs == [len(linears)]


def test_equal_sites_are_measured_once_and_remembered(
    captured: Captured, built: list[Scheme]
) -> None:
    program = captured("llama")[2]
    linears = [s for s in sites(program.nodes) if s.kind.name == "linear"]
    different = {str(Layer.of(s)) for s in linears}
    assert len(different) < len(linears)

    def ask(**options: bool) -> float:
        clock = Clock(get_backend("cpu"), program, WORK, **options)
        return clock.total({s.id: fit(s, *INT8) for s in linears}, "decode")

    first = ask()
    assert sum(scheme != Scheme() for scheme in built) == len(different)
    built.clear()
    assert ask() == first and built == []
    ask(fresh=True)
    assert sum(scheme != Scheme() for scheme in built) == len(different)


def test_what_a_backend_refuses_has_no_time(captured: Captured, built: list[Scheme]) -> None:
    program = captured("llama")[2]
    clock = Clock(get_backend("onnxruntime"), program, WORK)
    site = next(s for s in sites(program.nodes) if s.kind.name == "linear")
    assert clock.seconds(site, Scheme(QFormat.parse("fp4_e2m1:group32")), "decode") is None
    assert built == []


def test_a_total_of_what_is_refused_is_an_error() -> None:
    program = mlp()
    site = sites(program.nodes)[0]

    class Picky(type(get_backend("reference"))):  # type: ignore[misc]
        def refuses(self, site: Site, scheme: Scheme) -> str | None:
            return "not today"

    with pytest.raises(qcompiler.BackendError, match=r"cannot run 0/linear#0 .* another scheme"):
        Clock(Picky(), program, WORK).total({site.id: fit(site, *INT8)}, "prefill")


def test_a_backend_that_knows_is_believed(captured: Captured) -> None:
    class Roofline(type(get_backend("reference"))):  # type: ignore[misc]
        name = "roofline"

        def cost(self, site: Site, scheme: Scheme, tokens: int) -> float | None:
            return float(tokens)

    backend: Backend = Roofline()
    program = captured("llama")[2]
    clock = Clock(backend, program, Workload(batch=2, prefill=8))
    site = sites(program.nodes)[1]
    assert clock.seconds(site, fit(site, *INT8), "prefill") == 16
    assert clock.seconds(site, fit(site, *INT8), "decode") == 2
    assert clock.rest("decode") == 0 and backend.agree([site]) == ()


def test_readers_of_one_value_are_counted(captured: Captured) -> None:
    program = captured("llama")[2]
    readers = {
        s.id.split("/")[0].rpartition(".")[2]: Layer.of(s).readers for s in sites(program.nodes)
    }
    assert readers["q_proj"] == readers["v_proj"] == 3
    assert readers["up_proj"] == 2 and readers["down_proj"] == 1


def test_a_damaged_file_is_written_anew(tmp_path: Path) -> None:
    about = {"backend": "cpu"}
    Cache(tmp_path, about).put("a", 1.5)
    other = Cache(tmp_path, about)
    Cache(tmp_path, about).put("b", 2.5)
    other.put("c", 3.5)  # what another process wrote meanwhile stays
    assert [Cache(tmp_path, about).get(k) for k in "abc"] == [1.5, 2.5, 3.5]
    assert Cache(tmp_path, {"backend": "cpu", "threads": "2"}).get("a") is None
    assert Cache(tmp_path, about, fresh=True).get("a") is None
    (place,) = tmp_path.iterdir()
    place.write_text('{"known": [')
    assert Cache(tmp_path, about).get("a") is None
    Cache(tmp_path, about).put("a", 4.5)
    assert Cache(tmp_path, about).get("a") == 4.5


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder("costs") == tmp_path / "costs"
    monkeypatch.delenv("QCOMPILER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder("costs") == tmp_path / "x" / "qcompiler" / "costs"


def test_the_fastest_runs_count() -> None:
    slow = iter([0.0] * 10**6)
    found = timing.floors({"a": lambda: next(slow), "b": lambda: sum(range(200_000))})
    assert 0 < found["a"] < found["b"]
