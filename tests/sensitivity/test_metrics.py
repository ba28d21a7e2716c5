"""Metrics against exact second derivatives of small networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import qcompiler
from qcompiler import BadInput, Program, QFormat, Scheme
from qcompiler.registry import get_metric
from qcompiler.sensitivity import Metric, Study, measure
from qcompiler.sensitivity.curvature import traces
from qcompiler.sensitivity.traced import trace
from qcompiler.sites import sites

FORMATS = (Scheme(QFormat.parse("int3:channel")), Scheme(QFormat.parse("int5:channel")))
JOINT = Scheme(QFormat.parse("int4:channel"), QFormat.parse("int4:token:dynamic"))


class Numbers(nn.Module):
    """Two linears, any numbers out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Words(nn.Module):
    """Ids in, scores of all words out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(self.table(ids))))


def case(words: bool) -> tuple[nn.Module, Program, Tensor]:
    torch.manual_seed(1)
    model = (Words() if words else Numbers()).eval()
    x = torch.randint(0, 9, (6, 4)) if words else torch.randn(6, 5)
    return model, qcompiler.capture(model, x), x


def study(program: Program, schemes: tuple[Scheme, ...] = FORMATS) -> Study:
    return Study(program, {s.id: schemes for s in sites(program.graph.nodes) if s.x is not None})


def loss_of(model: nn.Module, found: Study, x: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """The loss between the model and itself with another weight `name`."""
    wanted = (model(x).detach(),)

    def loss(weight: Tensor) -> Tensor:
        return found.objective(wanted, (functional_call(model, {name: weight}, (x,)),))

    return loss


def hessians(model: nn.Module, found: Study, x: Tensor) -> dict[str, Tensor]:
    """Site id → its exact Hessian, (n, n)."""
    result = {}
    for id, site in found.sites.items():
        name = found.program.param_of(site.weight)
        weight = model.get_parameter(str(name)).detach()
        full = torch.func.hessian(loss_of(model, found, x, str(name)))(weight)
        result[id] = full.detach().reshape(weight.numel(), weight.numel())
    return result


def many(metric: Metric, found: Study, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """(mean, standard error) over `draws`."""
    seen = measure(found, metric, [(x,)], precision=0.0, rounds=draws)
    return torch.tensor(list(seen.losses.values())), torch.tensor(list(seen.errors.values()))


@pytest.mark.parametrize("words", [False, True])
def test_traces(words: bool) -> None:
    """Hutchinson's draws against the exact trace, and the procedure that PyHessian publishes (one
    layer at a time, its own product, until the mean settles)."""
    model, program, x = case(words)
    found = study(program)
    exact = {id: float(h.trace()) for id, h in hessians(model, found, x).items()}
    drawn: dict[str, list[float]] = {id: [] for id in exact}
    for draw in range(400):
        weights, _ = traces(found, (x,), trace(found, (x,), "wx"), draw)
        for id, value in weights.items():
            drawn[id].append(value)
    for id, value in exact.items():
        values = torch.tensor(drawn[id])
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - value) < 4 * error + 1e-6
        name = str(found.program.param_of(found.sites[id].weight))
        weight = model.get_parameter(name).detach().requires_grad_()
        grad = torch.autograd.grad(
            loss_of(model, found, x, name)(weight), weight, create_graph=True
        )
        theirs, before = [], 0.0
        generator = torch.Generator().manual_seed(7)
        for _ in range(1000):
            v = torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1
            (product,) = torch.autograd.grad(grad, weight, v, retain_graph=True)
            theirs.append(float((product * v).sum()))
            mean = sum(theirs) / len(theirs)
            if len(theirs) > 100 and abs(mean - before) / (abs(mean) + 1e-6) < 1e-3:
                break
            before = mean
        assert mean == pytest.approx(float(values.mean()), rel=0.15)


@pytest.mark.parametrize("words", [False, True])
def test_gauss_newton_is_the_quadratic_form(words: bool) -> None:
    """½ ΔᵀHΔ for the exact Hessian, which for these losses is Gauss and Newton's matrix."""
    model, program, x = case(words)
    found = study(program)
    exact = []
    for id, h in hessians(model, found, x).items():
        for scheme in FORMATS:
            d = found.change(found.sites[id], scheme.weight).flatten()
            exact.append(float(d @ h @ d) / 2)
    mean, error = many(get_metric("gauss_newton"), found, x, 400)
    assert bool(((mean - torch.tensor(exact)).abs() < 4 * error).all())
    assert bool((error < 0.2 * mean).all())


@pytest.mark.parametrize("words", [False, True])
def test_fisher_is_the_diagonal(words: bool) -> None:
    model, program, x = case(words)
    found = study(program)
    exact = []
    for id, h in hessians(model, found, x).items():
        for scheme in FORMATS:
            d = found.change(found.sites[id], scheme.weight).flatten()
            exact.append(float((h.diagonal() * d * d).sum()) / 2)
    mean, error = many(get_metric("fisher"), found, x, 400)
    assert bool(((mean - torch.tensor(exact)).abs() < 4 * error).all())


def test_eigenvalue() -> None:
    model, program, x = case(words=False)
    found = study(program)
    exact = []
    for id, h in hessians(model, found, x).items():
        largest = float(torch.linalg.eigvalsh(h)[-1])
        for scheme in FORMATS:
            change = found.change(found.sites[id], scheme.weight)
            exact.append(largest * float(change.square().sum()) / 2)
    mean, _ = many(get_metric("eigenvalue{steps=100 tolerance=1e-5}"), found, x, 1)
    torch.testing.assert_close(mean, torch.tensor(exact), rtol=1e-3, atol=1e-12)


def test_pairs_are_what_two_cost_beyond_the_sum() -> None:
    """(Δa + Δb)ᵀ H (Δa + Δb) / 2 - both alone = Δaᵀ H_ab Δb."""
    model, program, x = case(words=False)
    found = study(program, FORMATS[:1])
    seen = measure(
        found, get_metric("gauss_newton"), [(x,)], precision=0.0, rounds=2000, pairs=True
    )
    assert seen.pairs is not None
    names = [str(program.param_of(s.weight)) for s in found.sites.values()]
    changes = [found.change(s, FORMATS[0].weight) for s in found.sites.values()]
    wanted = (model(x).detach(),)

    def loss(t: Tensor) -> Tensor:
        moved = {
            name: model.get_parameter(name).detach() + t[i] * changes[i]
            for i, name in enumerate(names)
        }
        return found.objective(wanted, (functional_call(model, moved, (x,)),))

    exact = torch.func.hessian(loss)(torch.zeros(2))
    assert float(seen.pairs[0, 1]) == pytest.approx(float(exact[0, 1]), rel=0.2, abs=1e-5)
    assert float(seen.pairs[0, 0]) == pytest.approx(2 * next(iter(seen.losses.values())))


@pytest.mark.parametrize("words", [False, True])
def test_all_tell_more_bits_from_fewer(words: bool) -> None:
    """Every metric, weights and activations; with activations a loss is no smaller."""
    _, program, x = case(words)
    found = study(program, (*FORMATS, JOINT, Scheme()))
    for name in ("divergence", "eigenvalue", "error", "fisher", "gauss_newton", "hessian", "layer",
                 'layer{by="outliers"}', "salience", "taylor",
                 'gauss_newton{by="token"}', 'gauss_newton{by="element"}'):  # fmt: skip
        metric = get_metric(name)
        losses = many(metric, found, x, 8)[0].reshape(-1, 4)
        assert bool((losses[:, 0] > losses[:, 1]).all()), name
        assert bool((losses[:, 3] == 0).all()), name
        assert bool((losses >= 0).all()), name


def test_divergence_is_the_loss() -> None:
    model, program, x = case(words=True)
    found = study(program)
    seen = measure(found, get_metric("divergence"), [(x,)])
    for id, site in found.sites.items():
        name = str(program.param_of(site.weight))
        for scheme in FORMATS:
            loss = loss_of(model, found, x, name)(found.rounded(site, scheme.weight))
            assert seen.loss(id, scheme) == pytest.approx(float(loss), rel=1e-4, abs=1e-7)


def test_a_convolution_and_an_embedding() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 3, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.table(ids).transpose(1, 2)).mean(-1)

    torch.manual_seed(0)
    ids = torch.randint(0, 9, (4, 7))
    program = qcompiler.capture(Both().eval(), ids)
    found = Study(program, {s.id: FORMATS[:1] for s in sites(program.graph.nodes)})
    truth = many(get_metric("divergence"), found, ids, 1)[0]
    guess, error = many(get_metric("gauss_newton"), found, ids, 400)
    # the loss is quadratic in each weight: second order is all there is
    assert bool(((guess - truth).abs() < 4 * error + 1e-6).all())


def test_a_site_that_there_is_not() -> None:
    _, program, _ = case(words=False)
    with pytest.raises(BadInput, match="did you mean 'a/linear"):
        Study(program, {"a/linear#7": FORMATS}).columns  # noqa: B018 (is made when it is read)
