"""The table: ONNX operator → function of torch tensors. `ops/` fills it, subject by subject."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qcompiler.capture.onnx.call import Array, Call

Result = Tensor | Array | tuple[Tensor | Array | None, ...]
Function = Callable[..., Result]
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Operator:
    """How one operator is computed."""

    function: Function
    tensors: int | None
    """Number of inputs that it takes as tensors after the call itself; None for all of them."""

    def __call__(self, call: Call) -> Result:
        count = len(call.values) if self.tensors is None else self.tensors
        values = [call.values[i] if i < len(call.values) else None for i in range(count)]
        return self.function(call, *(None if v is None else v.tensor for v in values))


OPERATORS: dict[tuple[str, str], Operator] = {}


def op(*names: str, domain: str = "") -> Callable[[Function], Function]:
    """Register `f(call, x, y, …)` for the operators called `names`.

    It is given as many inputs, as tensors, as it has parameters beside `call` (None for an optional
    one that is left out); the rest it reads from `call`, as numbers that must be known.
    """

    def register(function: Function) -> Function:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        for name in names:
            OPERATORS[domain, name] = Operator(function, None if variadic else len(parameters))
        return function

    return register
