"""The input vectors of a site, in the basis of its weight's rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qcompiler.sites import Site


def vectors(site: Site, x: Tensor) -> Tensor:
    """(vectors, in · taps) float32: what each row of the weight is multiplied with.

    A convolution's are its patches, channel by channel. Groups of channels have rows of their own:
    theirs are put together, as if one row had read them all.
    """
    x = x.detach().float()
    if site.kind.name != "conv":
        return x.movedim(site.kind.channel, -1).flatten(0, -2)
    at = window_of(site)
    flat = len(at.kernel) == 1  # an image of height 1
    x = x.unsqueeze(-2) if flat else x
    kernel, dilation, stride = ((1, *v) if flat else v for v in (at.kernel, at.dilation, at.stride))
    padding = (0, *at.padding) if flat else at.padding
    patches = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    batch, width, places = patches.shape
    patches = patches.reshape(batch, at.groups, width // at.groups, places)
    return patches.permute(0, 1, 3, 2).reshape(-1, width // at.groups)


def freedom(rows: Tensor, damping: float = 0.01) -> Tensor:
    """[H⁻¹]_jj of H = XᵀX/n + λ I for vectors X (n, in): how far input j can be made up for by the
    others. Float64; λ is `damping` times the mean diagonal."""
    wide = rows.double()
    gram = wide.T @ wide / max(len(wide), 1)
    gram.diagonal().add_(damping * float(gram.diagonal().mean()) + 1e-12)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()


class Window(NamedTuple):
    """How a convolution walks over its input: a number for each axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def window_of(site: Site) -> Window:
    """What a convolution's arguments say, with the defaults of its operator."""
    kernel = tuple(int(n) for n in site.weight.meta["val"].shape[2:])
    schema = site.node.target._schema  # type: ignore[union-attr]
    given: dict[str, Any] = {
        a.name: v for a, v in zip(schema.arguments, site.node.args, strict=False)
    }
    given |= site.node.kwargs

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(numbers if len(numbers) > 1 else numbers * len(kernel))

    groups = int(given.get("groups", 1))
    return Window(kernel, each("stride", 1), each("padding", 0), each("dilation", 1), groups)
