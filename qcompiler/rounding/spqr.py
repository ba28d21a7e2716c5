"""SpQR: small groups whose scales are rounded themselves, fitted without what does not belong.

    e(group, fit) = Σ_j (w_j - w'_j)² / [H⁻¹]_jj
    gain_j = e(group, fit to group) - e(group without j, fit to group without j)

(Dettmers et al. 2023, SpQR, section 4 and algorithm 1.) A group leaves out the weight with the
largest gain, again and again; only an end of its range can have any. What is left out is rounded
to the range's end here, and its error counts when the best fit is chosen: the pass `split_sparse`
is what stores outliers by themselves. GPTQ then makes up for all errors on the grid that was found.

The bilevel part is the format's: `int3:group16:asym:scale(int3:group16)`. Scales of scales are
settled by the whole ranges. Codebooks have no scales (see `kmeans`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.rounding.folded import best_of, fold, round_folded, sides, with_range
from qcompiler.rounding.gptq import Factor, gptq
from qcompiler.rounding.scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class SpQR(Scaled):
    """GPTQ on scales that are fitted without each group's outliers."""

    name: ClassVar[str] = "spqr"
    instead: ClassVar[str] = "gptq"

    outliers: int = 3
    """Weights that a group leaves out, at most."""

    def solve(self, weight: Tensor, fmt: QFormat, gram: Tensor, found: Factor) -> QTensor:
        triangle = torch.linalg.cholesky(found.damped(gram, torch.float64))
        importance = 1 / torch.cholesky_inverse(triangle).diagonal()
        return gptq(weight, found, leave_out(weight, fmt, importance.float(), self.outliers))


def leave_out(weight: Tensor, fmt: QFormat, importance: Tensor, most: int) -> Grid:
    """The grid for a matrix (out, in) whose groups leave out up to `most` weights each.

    `importance` (in,) is 1 / [H⁻¹]_jj.
    """
    grid = Grid.fit(weight, fmt)
    x, counts = fold(weight, fmt), fold(importance.expand(weight.shape), fmt)

    def loss(trial: Grid) -> Tensor:
        return _error(trial, x, counts)

    return best_of(grid, _trials(grid, x, counts, most), loss)


def _trials(grid: Grid, x: Tensor, counts: Tensor, most: int) -> Iterator[Grid]:
    """Grids without one more weight of each group at a time: what was left out is 0 in `rest`."""
    rest = x
    for _ in range(most):
        if grid.zero is None:
            rest = _without(rest, rest.abs().argmax(1))
            yield _fit(grid, rest)
            continue
        ends = [_without(rest, rest.argmin(1)), _without(rest, rest.argmax(1))]
        fits = [_fit(grid, end) for end in ends]
        left = [_error(f, end, counts * (end != 0)) for f, end in zip(fits, ends, strict=True)]
        rest = torch.where((left[0] < left[1])[:, None], ends[0], ends[1])
        yield _fit(grid, rest)


def _without(x: Tensor, index: Tensor) -> Tensor:
    return x.scatter(1, index[:, None], 0.0)


def _fit(grid: Grid, x: Tensor) -> Grid:
    low, high = x.aminmax(dim=1)
    return with_range(grid, low.reshape(grid.scale.shape), high.reshape(grid.scale.shape))


def _error(grid: Grid, x: Tensor, counts: Tensor) -> Tensor:
    """e of each group."""
    return ((round_folded(x, *sides(grid), grid.format) - x).square() * counts).sum(1)
