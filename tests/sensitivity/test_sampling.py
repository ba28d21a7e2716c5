"""How long a metric runs, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, QFormat, Scheme
from qcompiler.keep import Keep
from qcompiler.registry import get_metric
from qcompiler.sensitivity import Study, measure
from qcompiler.sites import sites


@pytest.fixture
def study() -> Study:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    program = qcompiler.capture(model, torch.randn(3, 5))
    return Study(
        program, {s.id: (Scheme(QFormat.parse("int4:channel")),) for s in sites(program.nodes)}
    )


def batches(count: int) -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 5),) for _ in range(count)]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on(study: Study, tmp_path: Path, monkeypatch) -> None:
    """As if it had not been killed, to the last bit, without a run of what was done."""
    metric, data = get_metric("gauss_newton"), batches(5)
    whole = measure(study, metric, data, precision=0.0)
    monkeypatch.setattr("qcompiler.sensitivity.sampling.EVERY", -1.0)

    def kill(done: int, total: int) -> None:
        if done == 8:
            raise Killed

    keep = Keep(tmp_path / "kept")
    with pytest.raises(Killed):
        measure(study, metric, data, precision=0.0, keep=keep, tick=kill)
    again = measure(study, metric, data, precision=0.0, keep=keep)
    assert again.losses == whole.losses and again.errors == whole.errors
    assert again.batches == 20 - 7  # the eighth was not yet written
    known = measure(study, metric, data, precision=0.0, keep=keep)
    assert known.batches == 0 and known.losses == whole.losses


def test_it_ends_when_it_is_sure(study: Study) -> None:
    rough = measure(study, get_metric("gauss_newton"), batches(30), precision=0.5)
    fine = measure(study, get_metric("gauss_newton"), batches(30), precision=0.1)
    assert rough.batches < fine.batches <= 120
    relative = sorted(fine.errors[c] / fine.losses[c] for c in fine.losses)
    assert relative[(len(relative) - 1) // 2] <= 0.1


def test_what_draws_nothing_runs_once(study: Study) -> None:
    assert measure(study, get_metric("error"), batches(3), precision=0.0).batches == 3


def test_errors_say_how_far_to_trust_it(study: Study) -> None:
    """Means of runs of their own are spread as their standard errors say."""
    data = batches(20)
    runs = [measure(study, get_metric("gauss_newton"), data[i::4], precision=0.0) for i in range(4)]
    column = next(iter(runs[0].losses))
    means = torch.tensor([r.losses[column] for r in runs])
    said = torch.tensor([r.errors[column] for r in runs]).mean()
    assert 0.2 < float(means.std() / said) < 4


def test_infinite_losses_are_named(study: Study) -> None:
    with pytest.raises(BadInput, match=r"sensitivity of 0/linear#0 to weight=int4:channel"):
        measure(study, get_metric("error"), [(torch.full((3, 5), float("nan")),)])


def test_no_data(study: Study) -> None:
    with pytest.raises(BadInput, match="at least one batch"):
        measure(study, get_metric("error"), [])
