"""Fourier transforms and what belongs to them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Array, Call, Size
from qcompiler.capture.onnx.table import op

WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}
"""a, b, c of a - b cos(2πi/n) + c cos(4πi/n)."""


@op(*WINDOWS)
def window(call: Call) -> Tensor:
    size, dtype = call.sizes(0)[0], call.dtype("output_datatype", torch.float32)
    a, b, c = WINDOWS[call.node.op_type]
    length = size if call.int("periodic", 1) else size - 1
    angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / length)
    return (a - b * torch.cos(angle) + c * torch.cos(2 * angle)).to(dtype)


@op("MelWeightMatrix")
def mel_weights(call: Call) -> Array:
    """Triangles over the bins of a spectrum, evenly spaced in mels: 2595 log₁₀(1 + f / 700)."""
    bands, length, rate = (int(call.number(i)) for i in range(3))
    low, high = (2595 * math.log10(1 + float(call.number(i)) / 700) for i in (3, 4))
    mels = low + np.arange(bands + 2) * ((high - low) / (bands + 2))
    hertz = 700 * (10 ** (mels / 2595) - 1)
    bins = (hertz * (length + 1) // rate).astype(np.int64)
    number = np.arange(length // 2 + 1)[:, None]
    first, middle, last = bins[:-2], bins[1:-1], bins[2:]
    rising = np.where(middle == first, 1.0, (number - first) / np.maximum(middle - first, 1))
    falling = (last - number) / np.maximum(last - middle, 1)
    up = (number >= first) & (number <= middle)
    down = (number >= middle) & (number < last)
    weights = np.where(down, falling, np.where(up, rising, 0.0))
    weights[:, middle == first] = np.where(number == middle, 1.0, weights)[:, middle == first]
    return weights.astype(ir.DataType(call.int("output_datatype", 1)).numpy())


def _complex(x: Tensor) -> Tensor:
    """(…, 1) real or (…, 2) complex as one number each."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.view_as_complex(wide.contiguous()) if x.shape[-1] == 2 else wide.squeeze(-1)


@op("DFT")
def dft(call: Call, x: Tensor) -> Tensor:
    """Σ x e^(∓2πi jk/n) along an axis; the last axis holds real and imaginary part."""
    if call.version < 20:
        axis = call.int("axis", 1)
    else:
        axis = int(call.number(2)) if call.given(2) else -2
    axis %= x.ndim
    length = call.sizes(1)[0] if call.given(1) else None
    one_sided, inverse = bool(call.int("onesided", 0)), bool(call.int("inverse", 0))
    values = _complex(x)
    if inverse and one_sided:
        y: Tensor = torch.fft.irfft(values, length, axis)
        return y.unsqueeze(-1).to(x.dtype)
    if one_sided and not values.is_complex():
        y = torch.fft.rfft(values, length, axis)
    else:
        y = (torch.fft.ifft if inverse else torch.fft.fft)(values, length, axis)
        if one_sided:
            y = y.narrow(axis, 0, y.shape[axis] // 2 + 1)
    return torch.view_as_real(y).to(x.dtype)


@op("STFT")
def stft(call: Call, signal: Tensor) -> Tensor:
    """The transform of each frame of a signal: (batch, frames, bins, 2)."""
    step = int(call.whole(1)[0])
    weights = call.tensor(2) if call.given(2) else None
    if call.given(3):
        length: Size = call.whole(3)[0]
    elif weights is not None:
        length = weights.shape[0]
    else:
        raise call.refusal("has neither window nor frame_length")
    values = _complex(signal)
    frames = values.unfold(1, length, step)
    frames = frames if weights is None else frames * weights
    one_sided = bool(call.int("onesided", 1)) and not values.is_complex()
    y = torch.fft.rfft(frames) if one_sided else torch.fft.fft(frames)
    return torch.view_as_real(y).to(signal.dtype)
