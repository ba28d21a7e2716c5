"""A toy accelerator: int8 times int8 in tiles of 8 × 8, activations rounded per token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompiler import Backend, Capability, Pass, QTensor, Scheme
from qcompiler.lowering import LowerSites
from qcompiler.sites import Site

TILE, SECONDS = 8, {1: 2e-9, 8: 4e-9, 64: 2.5e-8}  # tokens → time of a tile, from its manual
INT8 = Capability("tiles", "linear", "int8:channel", "int8:token:dynamic", 1e-5, "exact sums")


@torch.library.custom_op("my_backend::linear", mutates_args=())
def linear(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """y = (q_x q_wᵀ) s_x s_w + b; tiles (outputs / 8, inputs / 8, 8, 8)."""
    size = x.float().abs().amax(-1, keepdim=True) / 127
    q = (x.float() / size.where(size > 0, 1.0)).round().double()
    q = pad(q, (0, tiles.shape[1] * TILE - q.shape[-1])).unflatten(-1, (-1, TILE))
    sums = torch.einsum("...it,oirt->...or", q, tiles.double()).flatten(-2)[..., : len(scale)]
    y = sums.float() * size * scale
    return (y if bias is None else y + bias).to(x.dtype)


@linear.register_fake
def _(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(scale)))


@dataclass(frozen=True, kw_only=True)
class LowerTiles(LowerSites):
    name: ClassVar[str] = "my_backend_tiles"
    capability: ClassVar[Capability] = INT8
    operator: ClassVar[Any] = torch.ops.my_backend.linear.default

    def pack(self, weight: QTensor) -> dict[str, Tensor]:
        """Rows and columns filled up with zeros to whole tiles."""
        out, width = weight.data.shape
        codes = pad(weight.data.to(torch.int8), (0, -width % TILE, 0, -out % TILE))
        tiles = codes.reshape(-(-out // TILE), TILE, -1, TILE).transpose(1, 2)
        return {"tiles": tiles.contiguous(), "scale": weight.scale.reshape(-1)}


class MyBackend(Backend):
    name, summary = "my_backend", "a toy accelerator: int8 only, tiles of 8 × 8"
    capabilities = (INT8,)

    def cost(self, site: Site, scheme: Scheme, tokens: int) -> float | None:
        if not INT8.fits(site, scheme):
            return None
        out, width = (-(-int(n) // TILE) for n in site.weight.meta["val"].shape)
        most = next((n for n in SECONDS if n >= tokens), max(SECONDS))
        return out * width * SECONDS[most] * -(-tokens // most)

    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[Pass, ...]:
        return (LowerTiles(exclude=tuple(sorted(exclude))),)
