"""Random wirings of what networks are made of, for property tests of the spaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A random wiring of what networks are made of; `plan` picks one piece after another.

    It maps (batch, 5, WIDTH) to the same shape. Each piece brings parameters of its own; `a`, `b`
    and `c` are its square linears.
    """

    WIDTH = 12
    TOKENS = 5

    def __init__(self, plan: list[str]) -> None:
        super().__init__()
        self.plan = plan
        self.pieces = nn.ModuleList(_Piece(name, self.WIDTH, self.TOKENS) for name in plan)

    def forward(self, x: Tensor) -> Tensor:
        for name, piece in zip(self.plan, self.pieces, strict=True):
            x = getattr(self, f"_{name}")(x, piece)
        return x

    def _relu(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(torch.relu(p.a(x)))

    def _norm(self, x: Tensor, p: _Piece) -> Tensor:
        return p.a(p.norm(x))

    def _rms(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(F.rms_norm(p.a(x), (self.WIDTH,), p.gain))

    def _gate(self, x: Tensor, p: _Piece) -> Tensor:
        return p.c(F.silu(p.a(x)) * p.b(x))

    def _bilinear(self, x: Tensor, p: _Piece) -> Tensor:
        return p.c(p.a(x) * p.b(x))

    def _residual(self, x: Tensor, p: _Piece) -> Tensor:
        return x + p.b(torch.relu(p.a(x)))

    def _linears(self, x: Tensor, p: _Piece) -> Tensor:
        return p.c(p.a(x) + p.b(x))

    def _split(self, x: Tensor, p: _Piece) -> Tensor:
        left, right = p.wide(x).chunk(2, -1)
        return p.a(left) + p.b(torch.relu(right))

    def _cat(self, x: Tensor, p: _Piece) -> Tensor:
        both = torch.cat([p.a(x), torch.relu(p.b(x))], -1)
        return F.linear(both, p.wide.weight.t())

    def _gain(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(torch.relu(p.a(x)) * p.gain)

    def _shared(self, x: Tensor, p: _Piece) -> Tensor:
        return p.a(torch.relu(p.a(x)))

    def _tied(self, x: Tensor, p: _Piece) -> Tensor:
        return F.linear(F.linear(x, p.a.weight, p.b.bias), p.a.weight.t())

    def _attention(self, x: Tensor, p: _Piece) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (p.a, p.b, p.c))
        y = F.scaled_dot_product_attention(q, k, v)
        return F.linear(y.transpose(1, 2).flatten(-2), p.out)

    def _grouped(self, x: Tensor, p: _Piece) -> Tensor:
        """One key/value head for three query heads, causal."""
        q = p.a(x).unflatten(-1, (3, 4)).transpose(1, 2)
        k, v = (F.linear(x, w).unsqueeze(1).expand(-1, 3, -1, -1) for w in p.narrow.chunk(2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(-2), p.out)

    def _conv(self, x: Tensor, p: _Piece) -> Tensor:
        y = torch.relu(p.conv(x.transpose(1, 2)))
        return F.conv1d(y, p.point).transpose(1, 2)

    def _depthwise(self, x: Tensor, p: _Piece) -> Tensor:
        y = F.conv1d(p.a(x).transpose(1, 2), p.depth, padding=1, groups=self.WIDTH)
        return p.b(y.transpose(1, 2))

    def _positions(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(p.a(x) + p.table)

    def _masked(self, x: Tensor, p: _Piece) -> Tensor:
        mask = torch.arange(self.WIDTH) > 5
        return p.b(p.a(x).masked_fill(mask, 0.0))

    def _reordered(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(p.a(x)[..., torch.arange(self.WIDTH).flip(0)])

    def _mixed(self, x: Tensor, p: _Piece) -> Tensor:
        """Tokens are mixed too, as in MLP-Mixer."""
        return p.b(p.token(p.a(x).transpose(1, 2)).transpose(1, 2))

    def _einsum(self, x: Tensor, p: _Piece) -> Tensor:
        y = torch.relu(torch.einsum("bti,ci->btc", x, p.out))
        return torch.einsum("btc,cd->btd", y, p.point.squeeze(-1))

    def _rolled(self, x: Tensor, p: _Piece) -> Tensor:
        """Tokens move, channels stay."""
        return p.b(torch.relu(p.a(x)).roll(2, 1).flip(1))

    def _repeated(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(torch.relu(p.a(x)) + p.table[:1].repeat(self.TOKENS, 1))

    def _filled(self, x: Tensor, p: _Piece) -> Tensor:
        """Whole tokens are taken out."""
        gone = (torch.arange(self.TOKENS) > 2).unsqueeze(-1)
        return p.b(p.a(x).masked_fill(gone, 0.0)) + torch.where(gone, p.c(x), 0.0)

    def _doubled(self, x: Tensor, p: _Piece) -> Tensor:
        """Up and down again in size, channel by channel."""
        y = p.a(x).transpose(1, 2).unsqueeze(-1)
        y = F.avg_pool2d(F.interpolate(y, scale_factor=2.0, mode="nearest"), 2)
        return p.b(y.squeeze(-1).transpose(1, 2))

    def _softmax(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(torch.softmax(p.a(x), -1))

    def _pooled(self, x: Tensor, p: _Piece) -> Tensor:
        return p.b(torch.relu(p.a(x))) + p.c(p.a(x).mean(1, keepdim=True))


class _Piece(nn.Module):
    """Parameters for any piece; unused ones do not reach the graph."""

    def __init__(self, name: str, width: int, tokens: int) -> None:
        super().__init__()
        for i, letter in enumerate("abc"):
            setattr(self, letter, nn.Linear(width, width, bias=i != 1 or name == "tied"))
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.token = nn.Linear(tokens, tokens)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.out = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.narrow = nn.Parameter(torch.randn(8, width) / width**0.5)
        self.point = nn.Parameter(torch.randn(width, width, 1) / width**0.5)
        self.depth = nn.Parameter(torch.randn(width, 1, 3))
        self.table = nn.Parameter(torch.randn(tokens, width))


PIECES = tuple(
    name.removeprefix("_")
    for name, method in vars(Block).items()
    if name.startswith("_") and not name.startswith("__") and callable(method)
)
