"""Pairs from few draws: what is chance goes, what is there stays."""

from __future__ import annotations

import pytest
import torch

from qcompiler.sensitivity.pairs import shrunk

SITES = [f"site{i}" for i in range(30)]


def draws(count: int, shared: float) -> torch.Tensor:
    """Roots of variance 1 whose correlation is `shared`."""
    generator = torch.Generator().manual_seed(0)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(count, columns, generator=generator, dtype=torch.float64)

    return normal(1) * shared**0.5 + normal(len(SITES)) * (1 - shared) ** 0.5


def apart(pairs: torch.Tensor) -> torch.Tensor:
    return pairs[~torch.eye(len(SITES), dtype=torch.bool)]


def test_chance_is_taken_for_nothing() -> None:
    roots = draws(16, 0.0)
    plain = 2 * roots.T @ roots / len(roots)
    found = shrunk(roots, SITES)
    assert float(apart(found).abs().mean()) < float(apart(plain).abs().mean()) / 4


def test_what_is_there_stays() -> None:
    found = shrunk(draws(4000, 0.5), SITES)
    assert torch.allclose(apart(found), torch.tensor(1.0, dtype=torch.float64), atol=0.15)
    assert float(apart(found).mean()) == pytest.approx(1.0, abs=0.03)
    some = float(apart(shrunk(draws(64, 0.5), SITES)).mean())
    assert 0.7 < some < 1.3


def test_one_site_is_exact() -> None:
    roots = draws(16, 0.0)[:, :2]
    assert torch.equal(shrunk(roots, ["a", "a"]), 2 * roots.T @ roots / 16)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_fewer_the_draws_the_less_is_believed(count: int) -> None:
    """On pure chance what is left does not depend on how few they are."""
    left = []
    for seed in range(40):
        roots = torch.randn(count, 30, generator=torch.Generator().manual_seed(seed)).double()
        plain = 2 * roots.T @ roots / count
        left.append(float(apart(shrunk(roots, SITES)).norm() / apart(plain).norm()))
    assert sum(left) / len(left) < 0.2


def test_one_site_that_changes_nothing() -> None:
    roots = draws(8, 0.0)[:, :2] * torch.tensor([1.0, 0.0])
    assert torch.equal(shrunk(roots, ["a", "b"]), 2 * roots.T @ roots / 8)


def test_a_change_of_nothing_has_no_pairs() -> None:
    roots = draws(64, 0.5)
    roots[:, 3] = 0
    found = shrunk(roots, SITES)
    assert found.isfinite().all() and not found[3].any()
