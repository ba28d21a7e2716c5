"""LSTM, GRU, RNN: torch's own where it computes the same, else step by step.

Both ways the number of steps is fixed when the model is captured: torch.export unrolls its own too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.ops.gates import Activation, activations
from qcompiler.capture.onnx.table import op

State = tuple[Tensor, ...]
"""h, and for an LSTM c: (batch, hidden) each."""
Step = Callable[[Tensor, State], State]
"""(the input's part of the gates, state) → the next state."""
DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


@dataclass(frozen=True)
class Weights:
    """Of one direction; gates one below the other: (gates · hidden, …)."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None

    def ordered(self, order: tuple[int, ...]) -> list[Tensor]:
        """As torch takes them, whose gates come in another order."""
        tensors = (self.input, self.hidden, self.input_bias, self.hidden_bias)
        gates = [t.chunk(len(order)) for t in tensors if t is not None]
        return [torch.cat([parts[i] for i in order]) for parts in gates]


@dataclass(frozen=True)
class Layer:
    """What the three operators share: the node's inputs in the order time, batch, feature."""

    x: Tensor
    directions: tuple[bool, ...]
    """For each direction, whether it reads the sequence from its end."""
    weights: list[Weights]
    lengths: Tensor | None
    states: State
    """(direction, batch, hidden) each."""
    batch_first: bool

    @property
    def bidirectional(self) -> bool:
        return len(self.directions) == 2

    def results(self, y: Tensor, states: State) -> State:
        """Y (time, direction, batch, hidden) and the last states, as the node lays them out."""
        if not self.batch_first:
            return y, *states
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in states)

    def by_torch(self, run: Callable[[Tensor, bool], State]) -> State:
        """`run(x, bidirectional)` is one of torch's; one that reads from the end gets x turned."""
        turned = self.directions == (True,)
        y, *states = run(self.x.flip(0) if turned else self.x, self.bidirectional)
        y = y.reshape(*y.shape[:2], len(self.directions), -1).permute(0, 2, 1, 3)
        return self.results(y.flip(0) if turned else y, tuple(states))

    def by_steps(self, steps: list[Step]) -> State:
        found = [self._walk(i, step) for i, step in enumerate(steps)]
        y = torch.stack([y for y, _ in found], 1)
        return self.results(
            y, tuple(torch.stack(last) for last in zip(*(s for _, s in found), strict=True))
        )

    def _walk(self, direction: int, step: Step) -> tuple[Tensor, State]:
        w = self.weights[direction]
        gates = F.linear(self.x, w.input, w.input_bias).unbind(0)
        state = tuple(s[direction] for s in self.states)
        outputs = [state[0]] * len(gates)
        order = range(len(gates))
        for t in reversed(order) if self.directions[direction] else order:
            new = step(gates[t], state)
            outputs[t] = new[0]
            if self.lengths is not None:  # a sequence that is over keeps its state, and yields 0
                going = (self.lengths > t).unsqueeze(-1)
                outputs[t] = torch.where(going, new[0], 0.0)
                new = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
            state = new
        return torch.stack(outputs), state


def _layer(call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, states: int) -> Layer:
    name = call.text("direction", "forward")
    if name not in DIRECTIONS or len(DIRECTIONS[name]) != w.shape[0]:
        raise call.refusal(f"direction is {name!r} with weights for {w.shape[0]}")
    batch_first = bool(call.int("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    given = [call.tensor(5 + i) if call.given(5 + i) else None for i in range(states)]
    shape = [w.shape[0], x.shape[1], r.shape[-1]]
    start = tuple(
        torch.zeros(shape, dtype=x.dtype) if s is None else s.transpose(0, 1) if batch_first else s
        for s in given
    )
    weights = []
    for i in range(w.shape[0]):
        first, second = (None, None) if b is None else b[i].chunk(2)
        weights.append(Weights(w[i], r[i], first, second))
    lengths = call.tensor(4) if call.given(4) else None
    return Layer(x, DIRECTIONS[name], weights, lengths, start, batch_first)


def _plain(call: Call, layer: Layer, names: list[str]) -> bool:
    """Whether the node is what torch computes, with the activations `names` in each direction."""
    wanted = names * len(layer.directions)
    same = call.texts("activations", wanted) == wanted
    return same and layer.lengths is None and not call.has("clip")


@op("LSTM")
def lstm(call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None) -> State:
    layer = _layer(call, x, w, r, b, 2)
    peepholes = call.tensor(7) if call.given(7) else None
    coupled = bool(call.int("input_forget", 0))
    plain = _plain(call, layer, ["Sigmoid", "Tanh", "Tanh"])
    if plain and peepholes is None and not coupled:
        params = [t for side in layer.weights for t in side.ordered((0, 2, 3, 1))]
        return layer.by_torch(
            lambda x, both: torch.lstm(
                x, layer.states, params, b is not None, 1, 0.0, False, both, False
            )
        )
    return layer.by_steps([
        _lstm_step(side, f, None if peepholes is None else peepholes[i], coupled)
        for i, (side, f) in enumerate(zip(
            layer.weights, activations(call, ["Sigmoid", "Tanh", "Tanh"], w.shape[0]), strict=True
        ))
    ])  # fmt: skip


def _lstm_step(w: Weights, f: list[Activation], peepholes: Tensor | None, coupled: bool) -> Step:
    first, second, third = f
    pi, po, pf = (None, None, None) if peepholes is None else peepholes.chunk(3)

    def step(gates: Tensor, state: State) -> State:
        h, c = state
        i, o, f, n = (gates + F.linear(h, w.hidden, w.hidden_bias)).chunk(4, -1)
        i = first(i if pi is None else i + pi * c)
        f = 1 - i if coupled else first(f if pf is None else f + pf * c)
        c = f * c + i * second(n)
        return first(o if po is None else o + po * c) * third(c), c

    return step


@op("GRU")
def gru(call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None) -> State:
    layer = _layer(call, x, w, r, b, 1)
    late = bool(call.int("linear_before_reset", 0))
    if late and _plain(call, layer, ["Sigmoid", "Tanh"]):
        params = [t for side in layer.weights for t in side.ordered((1, 0, 2))]
        return layer.by_torch(
            lambda x, both: torch.gru(
                x, layer.states[0], params, b is not None, 1, 0.0, False, both, False
            )
        )
    functions = activations(call, ["Sigmoid", "Tanh"], w.shape[0])
    step = _gru_late if late else _gru_early
    return layer.by_steps([step(s, *f) for s, f in zip(layer.weights, functions, strict=True)])


def _gru_late(w: Weights, first: Activation, second: Activation) -> Step:
    """The reset acts on the hidden state's part of the new one."""

    def step(gates: Tensor, state: State) -> State:
        z, r, n = gates.chunk(3, -1)
        hz, hr, hn = F.linear(state[0], w.hidden, w.hidden_bias).chunk(3, -1)
        z, r = first(z + hz), first(r + hr)
        return ((1 - z) * second(n + r * hn) + z * state[0],)

    return step


def _gru_early(w: Weights, first: Activation, second: Activation) -> Step:
    """The reset acts on the hidden state before it is multiplied."""
    wz, wr, wn = w.hidden.chunk(3)
    bz, br, bn = (None,) * 3 if w.hidden_bias is None else w.hidden_bias.chunk(3)

    def step(gates: Tensor, state: State) -> State:
        z, r, n = gates.chunk(3, -1)
        h = state[0]
        z, r = first(z + F.linear(h, wz, bz)), first(r + F.linear(h, wr, br))
        return ((1 - z) * second(n + F.linear(r * h, wn, bn)) + z * h,)

    return step


@op("RNN")
def rnn(call: Call, x: Tensor, w: Tensor, r: Tensor, b: Tensor | None) -> State:
    layer = _layer(call, x, w, r, b, 1)
    tanh = _plain(call, layer, ["Tanh"])
    if tanh or (call.has("activations") and _plain(call, layer, ["Relu"])):
        function = torch.rnn_tanh if tanh else torch.rnn_relu
        params = [t for side in layer.weights for t in side.ordered((0,))]
        return layer.by_torch(
            lambda x, both: function(
                x, layer.states[0], params, b is not None, 1, 0.0, False, both, False
            )
        )
    functions = activations(call, ["Tanh"], w.shape[0])
    return layer.by_steps([
        _rnn_step(side, f[0]) for side, f in zip(layer.weights, functions, strict=True)
    ])  # fmt: skip


def _rnn_step(w: Weights, function: Activation) -> Step:
    def step(gates: Tensor, state: State) -> State:
        return (function(gates + F.linear(state[0], w.hidden, w.hidden_bias)),)

    return step
