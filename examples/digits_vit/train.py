"""Train the vision transformer of `model.py` on scikit-learn's digits.

    pip install scikit-learn rich
    python examples/digits_vit/train.py [--epochs 80] [--seed 0]

writes next to this file, each whole or not at all:

    digits.safetensors   images and labels: 512 of the training images to calibrate on, and the held
                         out ones
    model.safetensors    the weights

397 of the 1,797 images, drawn by a fixed seed, are held out and play no part in training. The
others are moved by up to half a pixel, turned and scaled a little each time they are seen.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from model import HERE, DigitsViT
from rich.progress import track
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

HELDOUT, CALIBRATION = 397, 512
SPLIT_SEED = 0
BATCH = 50
RATE, DECAY, WARMUP = 3e-3, 0.05, 0.05
TURN, SCALE, MOVE = 0.15, 0.1, 0.15
"""Deviations of the angle in radians and of log size; the furthest move, in half images."""
SMOOTHING = 0.1


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, labels, held-out images, labels); images (n, 1, 8, 8) from 0 to 1."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    heldout, training = order[:HELDOUT], order[HELDOUT:]
    return images[training], labels[training], images[heldout], labels[heldout]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned, scaled and moved by chance."""
    turn, scale = torch.randn(2, len(images), generator=generator)
    turn, scale = turn * TURN, (scale * SCALE).exp()
    move = (torch.rand(len(images), 2, generator=generator) * 2 - 1) * MOVE
    cos, sin = turn.cos() * scale, turn.sin() * scale
    rows = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(-1, 2, 3)
    grid = affine_grid(rows, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def learning_rate(share: float) -> float:
    """A linear rise, then a cosine down to 1 %."""
    if share < WARMUP:
        return RATE * share / WARMUP
    return RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP))) / 2)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the right one."""
    return float((model.eval()(images).argmax(-1) == labels).float().mean())


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> DigitsViT:
    """Weights after `epochs` passes over the images; the same for the same seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DigitsViT().train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    )
    for epoch in track(range(epochs), description="training"):
        batches = torch.randperm(len(images), generator=generator).split(BATCH)
        for number, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((epoch + number / len(batches)) / epochs)
            logits = model(augmented(images[batch], generator))
            loss = cross_entropy(logits, labels[batch], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Written beside the old file and then renamed, so that a kill never leaves half of one."""
    unfinished = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=HERE, help="folder to write")
    options = parser.parse_args()
    images, labels, heldout, truth = digits()
    model = train(images, labels, options.epochs, options.seed)
    options.target.mkdir(parents=True, exist_ok=True)
    data = {"heldout.images": heldout, "heldout.labels": truth}
    data |= {"calibration.images": images[:CALIBRATION], "calibration.labels": labels[:CALIBRATION]}
    write(data, options.target / "digits.safetensors")
    write(model.state_dict(), options.target / "model.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters; {accuracy(model, images, labels):.2%} of the training images"
    )
    print(f"and {accuracy(model, heldout, truth):.2%} of the {HELDOUT} held-out images are right")


if __name__ == "__main__":
    main()
