"""Small orthogonal matrices whose entries are nearly of one size: what a fast transform of
n = c 2^k numbers, O_c ⊗ H₂ ⊗ … ⊗ H₂, does with the factor that is no power of two.

A Hadamard matrix would be of 4, 8, … times an odd factor; these are of that factor or of twice it,
and exist for all. The largest entry times √c says how flat they are: 1 would be Hadamard's.

    c = 4t - 1   (B + γ J) / √(c + 1),  γ = (1 - √(c + 1)) / c                  1.08 … 1.18
    c = q + 1    C / √q,                q ≡ 1 mod 4 a power of a prime          1.01 … 1.10
    c = q        Q / √q + J / q,        the same q                              1 + 1 / √q
    c = a b      O_a ⊗ O_b

B is a Hadamard matrix of c + 1 with a first row and column of ones, without these: its rows sum to
-1 and B Bᵀ = (c + 1) I - J. Q is q × q with the quadratic character of i - j, so that it is
symmetric, Q J = 0, Q² = q I - J; C is Q with a border of ones and a corner of zero, a conference
matrix, C² = q I. J is all ones.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qcompiler.hadamard import bordered, core_size, hadamard, jacobsthal, prime_power

FLAT = 1.2
"""Of √c times its largest entry: what is flatter need not be of twice the size."""
LARGEST = 512


@lru_cache(maxsize=256)
def fast_core(n: int) -> int | None:
    """The c with n = c 2^k that a fast transform of n numbers takes: the odd part of n, or twice it
    if that is flatter; None if it is too large for a product of c × c to be called fast."""
    odd = n
    while odd and odd % 2 == 0:
        odd //= 2
    sizes = [c for c in (odd, 2 * odd) if 0 < c <= LARGEST and n % c == 0]
    known = {c: flatness(o) for c in sizes if (o := orthogonal_core(c)) is not None}
    if not known:
        return None
    return next((c for c, f in known.items() if f <= FLAT), min(known, key=known.__getitem__))


def refuses_transform(n: int, core: int) -> str | None:
    """None if there are O_core and a Hadamard matrix of n / core, else a sentence."""
    fits = core > 0 and n > 0 and n % core == 0
    if fits and core_size(n // core) is not None and has_core(core):
        return None
    behind = f" with a core of {core}" if core != 1 else ""
    return f"no Hadamard matrix of size {n}{behind} can be constructed"


def random_hadamard(n: int, signs: Tensor) -> Tensor | None:
    """H diag(±1) / √n, orthogonal (QuaRot, Ashkboos et al. 2024, section 2); where there is no
    Hadamard matrix of n, one with a core, and None if that is too large."""
    core = 1 if core_size(n) is not None else fast_core(n)
    outer = None if core is None else orthogonal_core(core)
    inner = None if core is None else hadamard(n // core)
    if outer is None or inner is None:
        return None
    turned: Tensor = torch.kron(outer, inner) * signs / len(inner) ** 0.5
    return turned


def flatness(matrix: Tensor) -> float:
    """√c times the largest entry of an orthogonal c × c matrix."""
    largest = float(matrix.abs().max())
    return largest * math.sqrt(len(matrix))


@lru_cache(maxsize=256)
def has_core(c: int) -> bool:
    """Whether `orthogonal_core` makes one, without making it: shapes are computed where torch's
    tensors are fake."""
    return (
        c == 1
        or (c % 4 == 3 and core_size(c + 1) is not None)
        or (c % 4 == 2 and (c - 1) % 4 == 1 and prime_power(c - 1) is not None)
        or (c % 4 == 1 and prime_power(c) is not None)
        or any(c % a == 0 and has_core(a) and has_core(c // a) for a in range(3, int(c**0.5) + 1))
    )


@lru_cache(maxsize=64)
def orthogonal_core(c: int) -> Tensor | None:
    """O_c, float64, for an odd c or twice an odd one; None where no construction here gives one.

    It is kept: nobody may write into it.
    """
    made = [*_made(c)] if c > 1 else [torch.ones(1, 1, dtype=torch.float64)]
    return min(made, key=flatness, default=None)


def _made(c: int) -> list[Tensor]:
    found = []
    whole = hadamard(c + 1) if c % 4 == 3 else None
    if whole is not None:
        ones = whole * whole[:1]
        ones = ones * ones[:, :1]
        root = (c + 1) ** 0.5
        found.append((ones[1:, 1:] + (1 - root) / c) / root)
    if c % 4 == 2 and (c - 1) % 4 == 1 and prime_power(c - 1):
        found.append(bordered(c - 1, 1.0) / (c - 1) ** 0.5)
    if c % 4 == 1 and prime_power(c):
        found.append(jacobsthal(c) / c**0.5 + 1 / c)
    for a in range(3, int(c**0.5) + 1):
        first, second = (orthogonal_core(a), orthogonal_core(c // a)) if c % a == 0 else (None,) * 2
        if first is not None and second is not None:
            found.append(torch.kron(first, second))
    return found
