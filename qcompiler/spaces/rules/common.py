"""What all rules share: operands, operators without a rule, masks."""

from __future__ import annotations

from torch import fx

from qcompiler.program import is_tensor, op_name, shape_of
from qcompiler.spaces.axes import PERMUTATION, Axes, Value
from qcompiler.spaces.terms import Conflict, unify


def input_of(axes: Axes, node: fx.Node, index: int = 0) -> Value | None:
    return axes.of(node.args[index]) if len(node.args) > index else None


def unknown(axes: Axes, node: fx.Node) -> None:
    """Whatever is not known stops everything, and says so by name."""
    name = op_name(node.target)
    axes.unknown[name] = axes.unknown.get(name, 0) + 1
    result = axes.new(node)
    for value in [result, *filter(None, map(axes.of, node.all_input_nodes))]:
        axes.mark(node, value, f"no rule for operator {name}")


def try_unify(a: object, b: object) -> bool:
    try:
        unify(a, b)  # type: ignore[arg-type]
    except Conflict:
        return False
    return True


def told_apart(axes: Axes, node: fx.Node, value: Value, *operands: object) -> None:
    """Masks and indices among `operands` know which index is which: no other order of `value`.

    They carry no channels of their own, so that an order could not follow them.
    """
    for operand in operands:
        if is_tensor(operand) and axes.of(operand) is None:
            why = f"{op_name(node.target)} tells its indices apart by a mask"
            axes.mark(node, value, why, varying(value, operand), PERMUTATION)


def varying(value: Value, operand: object) -> list[int]:
    """The axes of `value` along which `operand` has more than one index, counted from the right."""
    if not is_tensor(operand):
        return []
    sizes = shape_of(operand)  # type: ignore[arg-type]
    first = len(value.axes) - len(sizes)
    return [first + i for i, n in enumerate(sizes) if n != 1 and first + i >= 0]
