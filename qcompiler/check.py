"""Each pass's promise, checked: exact, plan, lossy, lower (see `history.Effect`).

float64 is what tells right from wrong: a correct rotation differs by 6e-3 in bfloat16, more than
int8 rounding itself, while in float64 a right fold and a wrong one are 13 orders apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qcompiler.diff import Diff
from qcompiler.errors import PassError, first_line
from qcompiler.history import Effect
from qcompiler.program import Program, Tag, node_id
from qcompiler.run import evaluate_wide, watch_ids
from qcompiler.samples import Flat


@dataclass(frozen=True)
class Verdict:
    """Result of a check. `error` is the largest relative error of an output, ‖a - b‖ / ‖a‖."""

    error: float = 0.0
    output: str = ""
    """Which of several outputs it is of."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    nodes: Mapping[str, float] = field(default_factory=dict)
    """SQNR in dB of each touched node that both programs have."""
    failure: str = ""
    """Why the rewritten program could not even be run."""


class Checker:
    """Compares programs on fixed inputs; outputs of the last programs are kept, not recomputed."""

    def __init__(self, capture: Program, inputs: list[Flat]) -> None:
        self._capture = capture
        self._given = inputs
        self._cache: dict[tuple[int, torch.dtype], tuple[Program, list[tuple[object, ...]]]] = {}

    @cached_property
    def _inputs(self) -> list[Flat]:
        """Those that the captured program itself takes: drawn ones need not be inputs of a model
        that looks for the last token of some kind, say."""
        taken, outputs, failure = [], [], ""
        for inputs in self._given:
            try:
                outputs.append(evaluate_wide(self._capture, inputs))
            except Exception as error:  # whatever an operator raises
                failure = f"{type(error).__name__}: {first_line(error)}"
            else:
                taken.append(inputs)
        if not taken:
            raise PassError(
                "the captured program, computed in float64, takes none of the inputs that passes "
                f"are checked on ({failure}); hand over example inputs that the model takes"
            )
        self._cache[id(self._capture), torch.float64] = (self._capture, outputs)
        return taken

    def check(
        self,
        effect: Effect,
        before: Program,
        after: Program,
        change: Diff,
        touched: Collection[str],
    ) -> Verdict:
        """Measure what `effect` promises. The pipeline compares the error with the tolerance."""
        if effect is Effect.PLAN:
            return Verdict(error=math.inf if change.graph_changed else 0.0)
        if effect is Effect.LOWER:
            return self._lowered(before, after, touched)
        numbers, decided = self._errors(before, after)
        if effect is Effect.EXACT:
            return Verdict(*_worst({**numbers, **decided}))
        # Integers (an argmax, a mask) are decided by numbers, and some turn where these move.
        error, output = _worst(numbers or decided)
        since, turned = self._errors(self._capture, after)
        capture_error, _ = _worst(since or turned)
        metrics = {
            "sqnr_db": sqnr_db(error),
            "capture_error": capture_error,
            "capture_sqnr_db": sqnr_db(capture_error),
        }
        if turned:
            metrics["turned"] = max(turned.values())
        return Verdict(error, output, metrics, self._touched(before, after, touched))

    def _errors(
        self, before: Program, after: Program
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Output → its largest error, of numbers and of integers."""
        numbers: dict[str, float] = {}
        decided: dict[str, float] = {}
        pairs = zip(
            self._outputs(before, torch.float64), self._outputs(after, torch.float64), strict=True
        )
        for a, b in pairs:
            for name, x, error in zip(before.io.output_names, a, output_errors(a, b), strict=True):
                kind = decided if is_decided(x) else numbers
                kind[name] = max(kind.get(name, 0.0), error)
        return numbers, decided

    def _outputs(self, program: Program, dtype: torch.dtype) -> list[tuple[object, ...]]:
        key, inputs = (id(program), dtype), self._inputs
        if key not in self._cache:
            keep = [v for v in self._cache.items() if v[1][0] is self._capture]
            self._cache = dict([*keep, *list(self._cache.items())[-2:]])
            outputs = [evaluate_wide(program, x, dtype=dtype) for x in inputs]
            self._cache[key] = (program, outputs)
        return self._cache[key][1]

    def _lowered(self, before: Program, after: Program, touched: Collection[str]) -> Verdict:
        """Hold each new node against the one it stands for, on the reference's own inputs.

        Errors do not add up over the depth of a network this way: a kernel is judged by what it
        does, not by how the layers behind it amplify a rounding that fell the other way. All in
        float32, so that a bfloat16 program's own rounding does not hide a kernel's error.
        """
        errors: dict[str, float] = {}
        for inputs in self._inputs:
            wanted: dict[str, object] = {}  # not the weights: too many to keep, and known anyway
            keep = watch_ids({node_id(n) for n in before.activations}, wanted)
            outputs = evaluate_wide(before, inputs, keep, torch.float32)
            beside = Beside(wanted, touched, errors)
            found = evaluate_wide(after, inputs, dtype=torch.float32, instead=beside)
            # What no new node stands for reaches the outputs as it is.
            errors[""] = max(errors.get("", 0.0), relative_error(outputs, found))
        worst = max(errors.values())
        return Verdict(worst, nodes={i: sqnr_db(e) for i, e in errors.items() if i})

    def _touched(
        self, before: Program, after: Program, touched: Collection[str]
    ) -> Mapping[str, float]:
        """Error of each touched node on the first input, both programs run from its start."""
        ids = {
            i for i in touched if i in before.by_id and i in after.by_id and i not in after.params
        }
        was: dict[str, object] = {}
        now: dict[str, object] = {}
        evaluate_wide(before, self._inputs[0], watch_ids(ids, was))
        evaluate_wide(after, self._inputs[0], watch_ids(ids, now))
        return {
            i: sqnr_db(relative_error(was[i], now[i])) for i in sorted(ids) if i in was and i in now
        }


class Beside:
    """Compares each replaced node with the value it should have, and goes on with that value."""

    def __init__(
        self, wanted: Mapping[str, object], touched: Collection[str], errors: dict[str, float]
    ) -> None:
        self._wanted = wanted
        self._touched = touched
        self._errors = errors

    def __call__(self, node: fx.Node, compute: Callable[[], object]) -> object:
        """The reference's value of `node` where there is one, else what `compute` gives."""
        id = node_id(node)
        if id in self._wanted and id not in self._touched:
            return self._wanted[id]
        value = compute()
        stands_for = [i for i in (*Tag.of(node).origin, id) if i in self._wanted]
        if not stands_for:
            return value
        last = stands_for[-1]
        error = relative_error(self._wanted[last], value)
        self._errors[last] = max(self._errors.get(last, 0.0), error)
        return self._wanted[last]


def _worst(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest error, and the name of its output where there are several."""
    name = max(errors, key=errors.__getitem__, default="")
    return errors.get(name, 0.0), name if len(errors) > 1 else ""


def is_decided(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of integers or truth values."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def relative_error(a: object, b: object) -> float:
    """Largest ‖a - b‖ / ‖a‖ over the tensors of two structures; of integers, the share that differ.

    Places where both are the same NaN or infinity count as equal.
    """
    return max(output_errors(a, b), default=0.0)


def output_errors(a: object, b: object) -> list[float]:
    """`relative_error` of each tensor."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return [_output_error(x, y) for x, y in pairs]


def _output_error(x: object, y: object) -> float:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return 0.0 if x == y else math.inf
    if x.shape != y.shape:
        return math.inf
    if x.is_complex() != y.is_complex():
        return math.inf
    if x.is_complex():
        x, y = (torch.view_as_real(v.resolve_conj()) for v in (x, y))
    if x.is_floating_point():
        return _relative(x.double(), y.double())
    return (x != y.to(x.device)).double().mean().item() if x.numel() else 0.0


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ in float64, wherever they are. Places where both are the same NaN or infinity count
    as equal."""
    a, b = a.double(), b.to(a.device).double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.linalg.vector_norm(torch.where(same, 0.0, a - b)).item()
    return math.inf if math.isnan(gap) else gap


def _relative(x: Tensor, y: Tensor) -> float:
    gap = distance(x, y)
    size = torch.linalg.vector_norm(torch.where(x.isfinite(), x, 0.0)).item()
    return 0.0 if gap == 0 else gap / size if size else math.inf


def sqnr_db(relative: float) -> float:
    """Signal to quantization noise ratio in dB of a relative error: -20 log10(error)."""
    if relative == 0:
        return math.inf
    return -20 * math.log10(relative) if math.isfinite(relative) else -math.inf
