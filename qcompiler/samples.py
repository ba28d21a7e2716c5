"""Inputs to check and to calibrate on: the user's, and random ones drawn like them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompiler.io import Port, Signature

Flat = tuple[object, ...]


def random_inputs(io: Signature, seed: int, sizes: dict[str, int] | None = None) -> Flat:
    """One flat random input. Dynamic dimensions take `sizes`, or small odd sizes of their own.

    Values are drawn from the range of the example at capture, so that token ids stay in the
    vocabulary and masks stay 0/1.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = drawn_sizes(io, seed)
    for name, wanted in (sizes or {}).items():
        if name in io.dims:
            chosen[name] = within(wanted, *io.dims[name], io.steps.get(name, 1))
    return tuple(
        _draw(port, chosen, generator) if port.is_tensor else port.constant for port in io.ports
    )


def drawn_sizes(io: Signature, seed: int) -> dict[str, int]:
    """The size of each dynamic dimension in `random_inputs(io, seed)`."""
    sizes = {d: (3, 11, 5, 7, 13, 9)[i % 6] + seed - 1 for i, d in enumerate(io.dims)}
    # `batch2` need not be `batch`, and yet may have to be as large, or no larger: it is, here.
    sizes = {d: sizes.get(d.rstrip("0123456789"), n) for d, n in sizes.items()}
    return {d: within(n, *io.dims[d], io.steps.get(d, 1)) for d, n in sizes.items()}


def check_inputs(io: Signature, example: Flat | None) -> list[Flat]:
    """What each effect is checked on: the example, and two random inputs of other sizes."""
    drawn = [random_inputs(io, seed) for seed in (1, 2)]
    return [example, *drawn] if example is not None else drawn


def synthetic_data(io: Signature, batches: int = 8) -> Iterator[Flat]:
    """Calibration inputs for lack of real ones."""
    for seed in range(batches):
        yield random_inputs(io, 100 + seed, sizes_for(io, batch=4, sequence=64))


def sizes_for(io: Signature, batch: int, sequence: int, past: int = 0) -> dict[str, int]:
    """Sizes of the dynamic dimensions that are called a batch, a sequence or a past, in whatever
    form (`batch_size`, `encoder_sequence_length`): files have names of their own."""
    wanted = {"batch": batch, "seq": sequence, "past": past}
    return {d: size for d in io.dims for word, size in wanted.items() if word in d.lower()}


def within(size: int, low: int, high: int | None, step: int) -> int:
    """The size nearest to `size` within bounds, and a multiple of `step`."""
    size = max(low, min(size, high or size))
    above = -(-size // step) * step
    return above if high is None or above <= high else high // step * step


def _draw(port: Port, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    assert port.dtype is not None
    shape = [sizes[d] if isinstance(d, str) else d for d in port.shape]
    if port.dtype == torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if port.dtype.is_floating_point:
        unit = torch.rand(shape, generator=generator, dtype=torch.float32)
        return (port.low + (port.high - port.low) * unit).to(port.dtype)
    return torch.randint(
        int(port.low), int(port.high) + 1, shape, generator=generator, dtype=port.dtype
    )
