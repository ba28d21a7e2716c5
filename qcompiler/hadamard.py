"""Hadamard matrices: entries ±1, H Hᵀ = n I. What spreads an outlier evenly over all channels.

    H_{2n} = H_2 ⊗ H_n                               (Sylvester)
    n = q + 1,    q ≡ 3 mod 4 a power of a prime     (Paley I)
    n = 2(q + 1), q ≡ 1 mod 4 a power of a prime     (Paley II)

R. Paley, "On orthogonal matrices", 1933. A product of the first with one of the others gives every
size that is common in networks; `hadamard` returns None for the rest (92, say). What serves any
size, and costs less where a size has an odd factor, is in `cores.py`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def hadamard(n: int) -> Tensor | None:
    """An n × n Hadamard matrix, float64, or None if no construction here gives one.

    It is kept: nobody may write into it.
    """
    m = core_size(n)
    if m is None:
        return None
    matrix = hadamard_core(m)
    while len(matrix) < n:
        matrix = torch.kron(_two(), matrix)
    return matrix


def core_size(n: int) -> int | None:
    """The smallest m with H_n = H_2 ⊗ … ⊗ H_2 ⊗ H_m, or None if no construction here gives one."""
    if n < 1:
        return None
    m = n
    while m % 2 == 0:
        m //= 2
    while m <= n:
        if m == 1 or (m % 4 == 0 and (prime_power(m - 1) or _paley_two_size(m))):
            return m
        m *= 2
    return None


def hadamard_core(m: int) -> Tensor:
    """H_m for an m that `core_size` gives, float64."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return _paley_one(m - 1) if prime_power(m - 1) else _paley_two(m // 2 - 1)


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """n random ±1, float64."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def _two() -> Tensor:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def jacobsthal(q: int) -> Tensor:
    """Q[i, j] = χ(i - j), the quadratic character of the field with q = p^k elements."""
    p, k = prime_power(q) or (q, 1)
    character = torch.zeros(q, dtype=torch.float64)
    for exponent, element in enumerate(_powers(p, k)):  # squares are the even powers
        character[element] = 1 if exponent % 2 == 0 else -1
    digits = torch.arange(q)[:, None] // p ** torch.arange(k) % p
    difference = (digits[:, None] - digits[None, :]) % p
    return character[(difference * p ** torch.arange(k)).sum(-1)]


def _powers(p: int, k: int) -> list[int]:
    """All powers of a generator of the field with p^k elements, each as digits base p.

    A generator is the root x of a polynomial x^k = c_0 + c_1 x + …; the first that reaches every
    element but zero is taken.
    """
    for low in product(range(p), repeat=k):
        seen: dict[int, None] = {}
        element = [1] + [0] * (k - 1)
        while (number := sum(d * p**i for i, d in enumerate(element))) not in seen and number:
            seen[number] = None
            top = element[-1]
            element = [(a + top * c) % p for a, c in zip([0, *element[:-1]], low, strict=True)]
        if len(seen) == p**k - 1:
            return list(seen)
    raise AssertionError("every finite field has a generator")


def bordered(q: int, sign: float) -> Tensor:
    """[[0, 1ᵀ], [sign · 1, Q]]"""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, sign, jacobsthal(q)
    return matrix


def _paley_one(q: int) -> Tensor:
    return bordered(q, -1.0) + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered(q, 1.0), _two()) + torch.kron(
        torch.eye(q + 1, dtype=torch.float64), corner
    )


def _paley_two_size(n: int) -> bool:
    return prime_power(n // 2 - 1) is not None and (n // 2 - 1) % 4 == 1


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k for an odd prime p, or None."""
    if q < 3:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, power = 1, p
    while power < q:
        k, power = k + 1, power * p
    return (p, k) if power == q and p > 2 else None
