"""What two changes at once cost beyond the sum of both, from few draws.

    pair_ij = 2 (1 - λ) E a_i a_j        λ = Σ Var r_ij / Σ r_ij²        r_ij: correlation

A root a_i of each draw squares to the loss of change i, so that (a_i + a_j)² is that of both. With
few draws most of a correlation is chance, and a search over many pairs finds what only seems to
help. λ is the share of chance in all pairs of different sites (Schäfer and Strimmer 2005, for a
covariance that is shrunk towards its diagonal): with draws enough it goes to zero by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shrunk(roots: Tensor, sites: Sequence[str]) -> Tensor:
    """(columns, columns) from roots (draws, columns) of changes at these sites; what two changes
    of one site have in common stays as it is."""
    count = len(roots)
    products = roots.T @ roots / count
    unit = roots / products.diagonal().sqrt().clamp_min(torch.finfo(roots.dtype).tiny)
    r, fourth = unit.T @ unit / count, unit.square().T @ unit.square() / count
    numbers = {site: n for n, site in enumerate(dict.fromkeys(sites))}
    place = torch.tensor([numbers[site] for site in sites])
    apart = place[:, None] != place
    chance = (fourth - r.square())[apart].sum() / max(count - 1, 1)
    all_ = r[apart].square().sum()
    share = (chance / all_).clamp(0, 1) if count > 1 and all_ > 0 else torch.ones(())
    return 2 * products * torch.where(apart, 1 - share, 1.0)
