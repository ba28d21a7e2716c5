"""From operators to statements about axes: one walk over the graph, one small rule per family."""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.program import Program, is_tensor, op_name, shape_of
from qcompiler.spaces import semantics as op
from qcompiler.spaces.axes import (
    ALL,
    CENTRING,
    DIAGONAL,
    MATRIX,
    ORTHOGONAL,
    Axes,
    Mixed,
    Place,
    Value,
    mentioned,
)
from qcompiler.spaces.terms import Conflict, Prod, Sum, cut, divides, fresh, size, unify

aten = torch.ops.aten


def walk(program: Program) -> Axes:
    """Terms and statements of the whole program, in one pass over its nodes."""
    axes = Axes(program)
    for node in program.graph.nodes:
        if node.op == "output":
            for value in filter(None, map(axes.of, node.all_input_nodes)):
                axes.mark(node, value, "it is an output of the program")
        elif node.op == "placeholder":
            if is_tensor(node) and node.meta["val"].is_floating_point():
                value = axes.new(node)
                if program.param_of(node) is not None:
                    axes.edges.add(node)
                else:
                    axes.mark(node, value, "it is an input of the program")
        elif node not in program.activations and node.target not in op.LAYOUT:
            _weight_expression(axes, node)
        elif is_tensor(node) and node.meta["val"].is_floating_point():
            before = len(axes.statements)
            _rule(axes, node)
            _speak_for_all(axes, node, before)
        else:
            _reader(axes, node)
    return axes


def _rule(axes: Axes, node: fx.Node) -> None:
    target = node.target
    if target in op.PRODUCTS:
        _products(axes, node, op.PRODUCTS[target])
    elif target in op.ELEMENTWISE_PRODUCT | op.ELEMENTWISE_QUOTIENT | op.ELEMENTWISE_SUM:
        _binary(axes, node)
    elif target in op.PASS | op.HOMOGENEOUS:
        _pass(axes, node)
    elif target in op.BREAK:
        _break(axes, node)
    elif target in op.NORMS:
        _norm(axes, node)
    elif target in op.RESHAPES:
        _reshape(axes, node)
    elif target in op.PERMUTATIONS:
        _permute(axes, node)
    elif target in op.REDUCTIONS:
        _reduce(axes, node)
    elif target in op.CONVOLUTIONS:
        _convolution(axes, node, op.CONVOLUTIONS[target])
    elif target in op.POOLS:
        _pool(axes, node)
    elif target in _SPECIAL:
        _SPECIAL[target](axes, node)
    else:
        _unknown(axes, node)


def _weight_expression(axes: Axes, node: fx.Node) -> None:
    """Arithmetic on a weight's edge: a further map goes behind it, whatever it computes."""
    if is_tensor(node) and node.meta["val"].is_floating_point():
        axes.new(node)
        axes.edges.add(node)
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        axes.mark(node, value, "an expression on its edge reads it")
        axes.edges.discard(value.node)


def _speak_for_all(axes: Axes, node: fx.Node, before: int) -> None:
    """An operand that the rule said nothing about (an additive mask, say) lets nothing pass."""
    spoken = {v for s in axes.statements[before:] for v in mentioned(s)}
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        if value not in spoken:
            axes.mark(node, value, f"{op_name(node.target)} reads it as it is")


def _input(axes: Axes, node: fx.Node, index: int = 0) -> Value | None:
    return axes.of(node.args[index]) if len(node.args) > index else None


def _products(axes: Axes, node: fx.Node, summands: tuple[str, ...]) -> None:
    result = axes.new(node)
    for text in summands:
        left, _, right = text.partition("->")
        parts = [p.strip().partition(":") for p in left.split(",")]
        operands = [_input(axes, node, int(number)) for number, _, _ in parts]
        if all(operands):
            names = ",".join(letters for _, _, letters in parts)
            axes.product(node, f"{names} -> {right}", operands, result)  # type: ignore[arg-type]


def _binary(axes: Axes, node: fx.Node) -> None:
    a, b = _input(axes, node, 0), _input(axes, node, 1)
    result = axes.new(node)
    if node.target in op.ELEMENTWISE_SUM:
        for value in filter(None, (a, b)):
            axes.product(node, "* -> *", [value], result)
        if a is None or (b is None and node.args[1] != 0):
            axes.mark(node, result, "a constant is added")
    elif a is not None and b is not None:
        axes.product(node, "*, * -> *", [a, b], result)
        if node.target in op.ELEMENTWISE_QUOTIENT:
            axes.mark(node, b, "it is a divisor")
    else:  # times a number, or a mask that carries no channels of its own
        only = a or b
        if only is None:
            axes.mark(node, result, "it has no floating point operand")
        else:
            axes.product(node, "* -> *", [only], result)
            if any(
                is_tensor(n) and shape_of(n) for n in node.all_input_nodes if n is not only.node
            ):
                axes.mark(node, result, "a mask multiplies it", kinds=MATRIX)
            if node.target in op.ELEMENTWISE_QUOTIENT and a is None:
                axes.mark(node, only, "it is a divisor")


def _pass(axes: Axes, node: fx.Node) -> None:
    x, result = _input(axes, node), axes.new(node)
    if x is None:
        axes.mark(node, result, "it is made from integers")
    else:
        homogeneous = node.target in op.HOMOGENEOUS
        axes.all_same(node, x, result, DIAGONAL if homogeneous else ALL)
        if homogeneous:
            _nonlinear(axes, node, x, result)


def _nonlinear(axes: Axes, node: fx.Node, *values: Value) -> None:
    """Factors pass, matrices do not."""
    for value in values:
        axes.mark(node, value, f"{op_name(node.target)} is not linear", kinds=MATRIX)


def _break(axes: Axes, node: fx.Node) -> None:
    result = axes.new(node)
    why = f"{op_name(node.target)} commutes with no map"
    axes.mark(node, result, why)
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        axes.mark(node, value, why)
        if len(value.axes) == len(result.axes):  # still the same indices
            for a, b in zip(value.axes, result.axes, strict=True):
                _try_unify(a, b)


def _norm(axes: Axes, node: fx.Node) -> None:
    """core(x) · gain + bias. Rotations pass the core of RMSNorm; gain and bias carry scales."""
    x, gain, bias = (_input(axes, node, i) for i in (0, 2, 3))
    if x is None:
        return _unknown(axes, node)
    result = axes.new(node)
    core = axes.new(node, virtual=True, axes=list(x.axes))
    why = f"{op_name(node.target)} normalises it"
    *others, last = range(len(x.axes))
    passes: frozenset[str] = frozenset()
    if len(node.args[1]) == 1:  # type: ignore[arg-type]
        passes = ORTHOGONAL if node.target is aten.rms_norm.default else CENTRING
    axes.mark(node, x, why, kinds=ALL - passes)
    axes.mark(node, x, why, others, passes)
    if passes == ORTHOGONAL:
        axes.mark(node, core, why, kinds=ALL - passes)
        axes.mark(node, core, why, others, passes)
        axes.same(node, [([Place(x, last)], [Place(core, last)])], ORTHOGONAL)
    else:  # LayerNorm takes the mean off by itself; what it returns has none
        axes.mark(node, core, why)
    axes.product(node, "*, * -> *" if gain else "* -> *", [core, gain] if gain else [core], result)
    if bias is not None and node.target is aten.layer_norm.default:
        axes.product(node, "* -> *", [bias], result)
    return None


def _reshape(axes: Axes, node: fx.Node) -> None:
    """Align both shapes from the left: each group of axes with equal products is one index set."""
    x = _input(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    left, right = list(range(len(x.axes))), list(range(len(result.axes)))
    pairs = []
    while left or right:
        a, b = [left.pop(0)] if left else [], [right.pop(0)] if right else []
        while (m := _total(x, a)) != (n := _total(result, b)):
            grow_a = left and (not right or _smaller(m, n))
            if not left and not right:
                axes.mark(node, x, "this view has no fixed grouping of axes")
                return axes.mark(node, result, "this view has no fixed grouping of axes")
            (a if grow_a else b).append((left if grow_a else right).pop(0))
        pairs.append(([Place(x, i) for i in a], [Place(result, i) for i in b]))
    return axes.same(node, pairs)


def _total(value: Value, axes: list[int]) -> object:
    return size(Prod(tuple(value.axes[i] for i in axes))) if axes else 1


def _smaller(m: object, n: object) -> bool:
    """Which side must grow. Of symbolic sizes, one that the other contains is the smaller."""
    if isinstance(m, int) and isinstance(n, int):
        return m < n
    return divides(m, n)  # type: ignore[arg-type]


def _permute(axes: Axes, node: fx.Node) -> None:
    x = _input(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    rank = len(x.axes)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr,operator]
    else:
        order = list(range(rank))
        if rank > 1:
            a, b = (0, 1) if node.target is aten.t.default else node.args[1:3]
            order[a], order[b] = order[b], order[a]  # type: ignore[index]
    pairs = [([Place(x, source)], [Place(result, i)]) for i, source in enumerate(order)]
    return axes.same(node, pairs)


def _reduce(axes: Axes, node: fx.Node) -> None:
    x = _input(axes, node)
    dims = node.args[1] if len(node.args) > 1 else None
    if x is None or dims is None:
        return _unknown(axes, node)
    rank = len(x.axes)
    gone = {d % rank for d in dims}  # type: ignore[union-attr,operator]
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    result = axes.new(node)
    names = [f"a{i}" for i in range(rank)]
    out = [f"r{i}" if i in gone else n for i, n in enumerate(names) if keep or i not in gone]
    axes.product(node, f"{' '.join(names)} -> {' '.join(out)}", [x], result)
    return None


def _convolution(axes: Axes, node: fx.Node, spatial: int) -> None:
    x, weight, bias = (_input(axes, node, i) for i in range(3))
    rest = node.args[3:]
    groups = rest[3] if len(rest) > 3 else 1
    if x is None or weight is None or not isinstance(groups, int):
        return _unknown(axes, node)
    result = axes.new(node)
    s = [f"s{i}" for i in range(spatial)]
    k = " ".join(f"k{i}" for i in range(spatial))
    y = " ".join(f"y{i}" for i in range(spatial))
    channels = shape_of(node.args[0])[1]  # type: ignore[arg-type]
    if groups == 1:
        axes.product(node, f"b c {' '.join(s)}, o c {k} -> b o {y}", [x, weight], result)
    elif groups == channels == shape_of(node)[1]:  # depthwise: a factor per channel
        axes.product(node, f"b c {' '.join(s)}, c i {k} -> b c {y}", [x, weight], result)
    else:
        for value in (x, weight, result):
            axes.mark(node, value, "a grouped convolution")
    if bias is not None:
        axes.product(node, f"o -> b o {y}", [bias], result)
    return None


def _pool(axes: Axes, node: fx.Node) -> None:
    x = _input(axes, node)
    if x is None:
        return _unknown(axes, node)
    result = axes.new(node)
    spatial = range(len(x.axes) - 2)
    s, y = (" ".join(f"{c}{i}" for i in spatial) for c in "sy")
    axes.product(node, f"b c {s} -> b c {y}", [x], result)
    if node.target in op.MAX_POOLS:
        _nonlinear(axes, node, x, result)
    return None


def _attention(axes: Axes, node: fx.Node) -> None:
    """softmax(q kᵀ) v with its hidden scores; query heads (g r) share key/value head g."""
    q, k, v = (_input(axes, node, i) for i in range(3))
    if q is None or k is None or v is None or len(q.axes) != 4:
        return _unknown(axes, node)
    result = axes.new(node)
    heads, shared = shape_of(node.args[0])[1], shape_of(node.args[1])[1]  # type: ignore[arg-type]
    repeat = heads // shared if isinstance(heads, int) and isinstance(shared, int) else 1
    group = v.axes[1]
    _try_unify(group, k.axes[1])
    wide_q = _grouped(axes, node, q, group, repeat)
    wide_out = _grouped(axes, node, result, group, repeat)
    scores = axes.new(
        node,
        virtual=True,
        axes=[q.axes[0], group, wide_q.axes[2], q.axes[2], k.axes[2]],
    )
    axes.product(node, "b g r s d, b g t d -> b g r s t", [wide_q, k], scores)
    axes.mark(node, scores, "softmax does not commute with a scale")
    axes.product(node, "b g r s t, b g t e -> b g r s e", [scores, v], wide_out)
    return None


def _grouped(axes: Axes, node: fx.Node, x: Value, group: object, repeat: int) -> Value:
    """(b, g·r, s, d) seen as (b, g, r, s, d)."""
    factor = fresh(repeat)
    wide = axes.new(
        node,
        virtual=True,
        axes=[x.axes[0], group, factor, x.axes[2], x.axes[3]],  # type: ignore[list-item]
    )
    split = [Place(wide, 1), Place(wide, 2)] if repeat > 1 else [Place(wide, 1)]
    pairs = [([Place(x, 0)], [Place(wide, 0)]), ([Place(x, 1)], split)]
    pairs += [([Place(x, i)], [Place(wide, i + 1)]) for i in (2, 3)]
    axes.same(node, pairs)
    return wide


def _rope(axes: Axes, node: fx.Node) -> None:
    """Mixes channel i with i + d/2 (or 2i with 2i + 1): both must take the same scale."""
    x = _input(axes, node)
    if x is None:
        return _unknown(axes, node)
    result = axes.new(node)
    interleaved = len(node.args) > 3 and node.args[3]
    last, width = x.axes[-1], shape_of(node)[-1]
    assert isinstance(width, int)
    try:
        if interleaved:
            unify(last, Prod((fresh(width // 2), fresh(2))))
            axes.mark(node, x, "an interleaved rotary embedding", [len(x.axes) - 1])
        else:
            unify(*cut(last, width // 2))
    except Conflict:
        axes.mark(node, x, "its channels do not split into rotary pairs")
    *others, last_axis = range(len(x.axes))
    axes.same(node, [([Place(x, i)], [Place(result, i)]) for i in others])
    axes.same(node, [([Place(x, last_axis)], [Place(result, last_axis)])], DIAGONAL)
    for value in (x, result):
        axes.statements.append(Mixed(node, Place(value, last_axis)))
        axes.mark(node, value, "a rotary embedding mixes it in pairs", [last_axis], MATRIX)
    for table in node.args[1:3]:
        if value := axes.of(table):
            axes.mark(node, value, "it is a table of rotation angles")
    return None


def _slice(axes: Axes, node: fx.Node) -> None:
    x = _input(axes, node)
    _, axis, start, _end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axis %= len(x.axes)  # type: ignore[operator]
    width, length = shape_of(node.args[0])[axis], shape_of(node)[axis]  # type: ignore[arg-type,index]
    if length == 0:
        return None
    pairs = [([Place(x, i)], [Place(result, i)]) for i in range(len(x.axes)) if i != axis]
    if step == 1 and isinstance(width, int) and isinstance(length, int):
        first = max(start + width if (start or 0) < 0 else start or 0, 0)  # type: ignore
        pairs.append(([Place(x, axis, first, first + length)], [Place(result, axis)]))  # type: ignore
    else:
        for value in (x, result):
            axes.mark(node, value, "a slice of unknown extent or with a step", [axis])  # type: ignore
    return axes.same(node, pairs)


def _select(axes: Axes, node: fx.Node) -> None:
    x = _input(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axis = node.args[1] % len(x.axes)  # type: ignore[operator]
    kept = [i for i in range(len(x.axes)) if i != axis]
    axes.mark(node, x, "one index of it is selected", [axis])
    return axes.same(node, [([Place(x, i)], [Place(result, j)]) for j, i in enumerate(kept)])


def _cat(axes: Axes, node: fx.Node) -> None:
    result = axes.new(node)
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(result.axes)  # type: ignore
    inputs = [n for n in node.args[0] if shape_of(n)[axis] != 0]  # type: ignore
    parts, widths = [axes.of(n) for n in inputs], [shape_of(n)[axis] for n in inputs]
    if any(p is None for p in parts) or not all(isinstance(w, int) for w in widths):
        for value in filter(None, [*parts, result]):
            axes.mark(node, value, "a cat of unknown sizes")
        return
    values = [p for p in parts if p is not None]
    _try_unify(result.axes[axis], Sum(tuple(p.axes[axis] for p in values)))
    at = 0
    for value, width in zip(values, widths, strict=True):
        pairs = [
            ([Place(value, i)], [Place(result, i)]) for i in range(len(value.axes)) if i != axis
        ]
        pairs.append(([Place(value, axis)], [Place(result, axis, at, at + width)]))  # type: ignore
        axes.same(node, pairs)
        at += width  # type: ignore[operator]


def _expand(axes: Axes, node: fx.Node) -> None:
    """An axis that is repeated is constant along its copies."""
    x = _input(axes, node)
    result = axes.new(node)
    if x is None:
        return axes.mark(node, result, "it is made from integers")
    axes.product(node, "* -> *", [x], result)
    return None


def _rows(axes: Axes, node: fx.Node) -> None:
    """A gather along one axis: tables of experts by expert, rows in another order, copies."""
    x = _input(axes, node)
    axis, count = _gathered(node)
    if x is None or axis is None:
        return _unknown(axes, node)
    result = axes.new(node)
    names = [f"a{i}" for i in range(len(x.axes))]
    out = [*names[:axis], *(f"r{i}" for i in range(count)), *names[axis + 1 :]]
    axes.product(node, f"{' '.join(names)} -> {' '.join(out)}", [x], result)
    return None


def _gathered(node: fx.Node) -> tuple[int | None, int]:
    """(axis of the input that rows are taken from, axes that stand there afterwards)."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if node.target is aten.repeat_interleave.self_int:
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return (axis % rank, 1) if isinstance(axis, int) else (None, 0)
    if node.target is aten.index_select.default:
        return node.args[1] % rank, 1  # type: ignore[operator,return-value]
    given = [(i, n) for i, n in enumerate(node.args[1]) if n is not None]  # type: ignore
    if len(given) != 1 or given[0][1].meta["val"].dtype is torch.bool:  # type: ignore[union-attr]
        return None, 0
    return given[0][0], len(shape_of(given[0][1]))  # type: ignore[arg-type]


def _pad(axes: Axes, node: fx.Node) -> None:
    """Zeros around some axes: the others are the same."""
    x = _input(axes, node)
    pads, mode, fill = (*node.args[1:], *("constant", None)[len(node.args) - 2 :])[:3]
    if x is None or mode != "constant" or fill or not isinstance(pads, list | tuple):
        return _unknown(axes, node)
    result = axes.new(node)
    rank, wide = len(x.axes), len(pads) // 2
    for i in range(rank):
        at = 2 * (rank - 1 - i)
        if i >= rank - wide and (pads[at] != 0 or pads[at + 1] != 0):
            for value in (x, result):
                axes.mark(node, value, "it is padded along this axis", [i])
        else:
            axes.same(node, [([Place(x, i)], [Place(result, i)])])
    return None


def _matmul(axes: Axes, node: fx.Node) -> None:
    a, b = _input(axes, node, 0), _input(axes, node, 1)
    if a is None or b is None or len(a.axes) < 2 or len(b.axes) < 2:
        return _unknown(axes, node)
    axes.product(node, "* m k, * k n -> * m n", [a, b], axes.new(node))
    return None


def _where(axes: Axes, node: fx.Node) -> None:
    result = axes.new(node)
    for argument in node.args[1:3]:
        value = axes.of(argument)
        if value is None:
            axes.mark(node, result, "a constant is chosen in places")
        else:
            axes.product(node, "* -> *", [value], result)
            axes.mark(node, value, "it is chosen in places", kinds=MATRIX)


def _unknown(axes: Axes, node: fx.Node) -> None:
    """Whatever is not known stops everything, and says so by name."""
    name = op_name(node.target)
    axes.unknown[name] = axes.unknown.get(name, 0) + 1
    result = axes.new(node)
    for value in [result, *filter(None, map(axes.of, node.all_input_nodes))]:
        axes.mark(node, value, f"no rule for operator {name}")


def _reader(axes: Axes, node: fx.Node) -> None:
    """A node that makes no floating point tensor: comparisons and such read values as they are.

    Shapes and parts of lists do not depend on the values.
    """
    if node.target in (aten.sym_size.int, aten.sym_numel.default):
        return
    for value in filter(None, map(axes.of, node.all_input_nodes)):
        axes.mark(node, value, f"{op_name(node.target)} reads it")


def _try_unify(a: object, b: object) -> bool:
    try:
        unify(a, b)  # type: ignore[arg-type]
    except Conflict:
        return False
    return True


_SPECIAL = {
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.qc.rope.default: _rope,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    aten.index.Tensor: _rows,
    aten.index_select.default: _rows,
    aten.repeat_interleave.self_int: _rows,
    aten.pad.default: _pad,
    aten.matmul.default: _matmul,
    aten.where.self: _where,
}
