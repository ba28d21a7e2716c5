"""A small vision transformer for images of 8 × 8 pixels, and the data it is measured on.

    x = patches(image) + position        x += attention(norm(x))        x += mlp(norm(x))

Pre-norm blocks (Dosovitskiy et al. 2021) on 16 patches of 2 × 2; the classes are read from the mean
of the tokens. Needs nothing but torch and safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

HERE = Path(__file__).resolve().parent
SIZE, PATCH, CLASSES = 8, 2, 10
WIDTH, LAYERS, HEADS, MLP = 64, 4, 4, 256
BATCH = 64


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        return self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class DigitsViT(nn.Module):
    """Images (n, 1, 8, 8) from 0 to 1 → logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build() -> DigitsViT:
    """The module with first weights."""
    return DigitsViT().eval()


def load() -> tuple[DigitsViT, list[dict[str, Tensor]], list[dict[str, Tensor]], Tensor]:
    """(trained module, calibration batches, held-out batches, labels of the held-out images)."""
    module, data = build(), load_file(HERE / "digits.safetensors")
    module.load_state_dict(load_file(HERE / "model.safetensors"))
    calibration, heldout = (
        [{"images": part} for part in data[f"{name}.images"].split(BATCH)]
        for name in ("calibration", "heldout")
    )
    return module, calibration, heldout, data["heldout.labels"]
