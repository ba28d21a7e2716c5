"""Random wirings of what networks are made of, for property tests of the spaces."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A random wiring of what networks are made of; `plan` picks one piece after another."""

    WIDTH = 12

    def __init__(self, plan: list[str]) -> None:
        super().__init__()
        self.plan = plan
        w = self.WIDTH
        self.linears = nn.ModuleList(nn.Linear(w, w, bias=i % 2 == 0) for i in range(3 * len(plan)))
        self.norms = nn.ModuleList(nn.LayerNorm(w) for _ in plan)
        self.wide = nn.ModuleList(nn.Linear(w, 2 * w) for _ in plan)
        self.gain = nn.ParameterList(nn.Parameter(torch.rand(w) + 0.5) for _ in plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, piece in enumerate(self.plan):
            a, b, c = self.linears[3 * i : 3 * i + 3]
            if piece == "relu":
                x = b(torch.relu(a(x)))
            elif piece == "norm":
                x = a(self.norms[i](x))
            elif piece == "gate":
                x = c(nn.functional.silu(a(x)) * b(x))
            elif piece == "bilinear":
                x = c(a(x) * b(x))
            elif piece == "residual":
                x = x + b(torch.relu(a(x)))
            elif piece == "split":
                left, right = self.wide[i](x).chunk(2, -1)
                x = a(left) + b(torch.relu(right))
            elif piece == "cat":
                both = torch.cat([a(x), torch.relu(b(x))], -1)
                x = nn.functional.linear(both, self.wide[i].weight.t())
            elif piece == "gain":
                x = b(torch.relu(a(x)) * self.gain[i])
            elif piece == "shared":
                x = a(torch.relu(a(x)))
            elif piece == "attention":
                q, k, v = (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (a, b, c))
                y = nn.functional.scaled_dot_product_attention(q, k, v)
                x = nn.functional.linear(y.transpose(1, 2).flatten(-2), a.weight)
        return x


PIECES = (
    "relu", "norm", "gate", "bilinear", "residual", "split", "cat", "gain", "shared", "attention",
)  # fmt: skip
