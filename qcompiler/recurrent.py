"""Shapes of what recurrent layers return, without a step for each token.

Where torch computes with shapes alone it takes LSTM, GRU and RNN apart, step by step, and the
length of sequences with them becomes a number. Here their outputs are known without steps, so that
it stays a symbol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
KEY = DispatchKey.CompositeImplicitAutograd


def _one_state(
    x: Tensor, h: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (…, in), h (layers and directions, batch, hidden) → (…, directions · hidden), h."""
    width = (1 + bidirectional) * h.shape[-1]
    return x.new_empty((*x.shape[:-1], width)), h.new_empty(h.shape)


def _two_states(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the states (h, c) of an LSTM."""
    h, c = states
    flags = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return (*_one_state(x, h, params, *flags), c.new_empty(c.shape))


SHAPES: dict[Any, Any] = {
    aten.lstm.input: _two_states,
    aten.gru.input: _one_state,
    aten.rnn_tanh.input: _one_state,
    aten.rnn_relu.input: _one_state,
}


@contextmanager
def recurrent_shapes() -> Iterator[None]:
    """While this lasts, torch finds shapes of recurrent layers so, in this thread."""
    with _lock:
        if not _inside:
            _kernels.update({operator: operator.py_kernels[KEY] for operator in SHAPES})
            for operator in SHAPES:
                operator.py_kernels[KEY] = partial(_either, operator)
                operator._dispatch_cache.clear()
        _inside.append(get_ident())
    try:
        yield
    finally:
        with _lock:
            _inside.remove(get_ident())
            if not _inside:
                for operator, kernel in _kernels.items():
                    operator.py_kernels[KEY] = kernel
                    operator._dispatch_cache.clear()


_lock = Lock()
_inside: list[int] = []
"""Threads that are within."""
_kernels: dict[Any, Any] = {}
"""What torch has for each operator."""


def _either(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The shape in a thread that wants it, else what torch does: its numbers, maybe."""
    inside = get_ident() in _inside and isinstance(args[0], FakeTensor)
    return (SHAPES[operator] if inside else _kernels[operator])(*args, **kwargs)
