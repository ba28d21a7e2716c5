"""Quantized tensors in a graph: a `QTensor` as nodes, and nodes as the `QTensor` that they decode.

    W = dequantize(data, scale, zero)        scale = dequantize(codes, …)  if it is quantized itself

Scales that are stored in less than float32 (MX, NVFP4, double quantization), and zero points, are
expressions like any other weight: no operator and no pass need know of them.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompiler.edit import Edit
from qcompiler.formats import Grid, QFormat, QTensor
from qcompiler.program import Program

qc = torch.ops.qc
DECODERS = (qc.dequantize.default, qc.lookup.default)
"""Operators that make numbers of codes."""


def write(
    edit: Edit, q: QTensor, stem: str, dtype: torch.dtype, *, of: fx.Node, like: fx.Node
) -> fx.Node:
    """The node that decodes `q` to `dtype`, its parameters called `stem.…` and held as `of` is."""
    fmt, grid = q.format, q.grid
    width = int(q.data.shape[-1])
    data = edit.new_param(f"{stem}.data", fmt.pack(q.data), like=of)
    if grid.table is not None:
        table = edit.new_param(f"{stem}.table", grid.table, like=of)
        return edit.call(qc.lookup.default, data, table, str(fmt), width, dtype, like=like)
    zero: fx.Node | None = None
    if grid.zero is not None and grid.zero.is_floating_point():
        half = grid.zero.half()
        short = half if torch.equal(half.float(), grid.zero.float()) else grid.zero
        zero = edit.new_param(f"{stem}.zero", short, like=of)
    elif grid.zero is not None:
        packed = QTensor(grid.zero, Grid(fmt.zeros, torch.ones(1)))
        zero = write(edit, packed, f"{stem}.zero", torch.int16, of=of, like=like)
    scale: fx.Node | None = None
    if grid.stored is not None:
        scale = write(edit, grid.stored, f"{stem}.scale", torch.float32, of=of, like=like)
    elif not fmt.unscaled:
        scale = edit.new_param(f"{stem}.scale", grid.scale, like=of)
    return edit.call(qc.dequantize.default, data, scale, zero, str(fmt), width, dtype, like=like)


def read(edit: Edit, node: fx.Node) -> QTensor | None:
    """What `node` decodes, or None if it decodes no stored tensor."""
    if node.target not in DECODERS:
        return None
    data, second = node.args[0], node.args[1]
    if not isinstance(data, fx.Node) or edit.param_of(data) is None:
        return None
    if node.target is qc.lookup.default:
        text, width = node.args[2:4]
    else:
        text, width = node.args[3:5]
    fmt = QFormat.parse(str(text))
    assert isinstance(width, int)
    codes = fmt.unpack(edit.tensor(data), width)
    if node.target is qc.lookup.default:
        assert isinstance(second, fx.Node)
        return QTensor(codes, Grid(fmt, torch.ones(1), None, edit.tensor(second)))
    zero = None
    if isinstance(node.args[2], fx.Node):
        kept = read(edit, node.args[2])
        zero = edit.tensor(node.args[2]) if kept is None else kept.data
    if not isinstance(second, fx.Node):
        return QTensor(codes, Grid(fmt, torch.ones(1), zero))
    inner = read(edit, second)
    scale = edit.tensor(second) if inner is None else inner.dequantize()
    return QTensor(codes, Grid(fmt, scale, zero, None, inner))


def is_stored(weight: fx.Node) -> bool:
    """Whether `weight` decodes codes, perhaps in another shape (a convolution's are rows)."""
    inner = weight.args[0] if weight.target is torch.ops.aten.reshape.default else weight
    return isinstance(inner, fx.Node) and inner.target in DECODERS


def bits_per_weight(program: Program) -> float | None:
    """Bits of all that stored tensors are decoded from, codes, scales, zero points and tables, for
    each of their numbers; None if nothing is stored in codes."""
    ends = [n for n in program.graph.nodes if n.target in DECODERS]
    ends = [n for n in ends if not all(u.target in DECODERS for u in n.users)]
    held: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        held.add(node)
        waiting += [n for n in node.all_input_nodes if n not in held]
    names = {program.slots[n.name] for n in held if n.name in program.slots}
    size = sum(program.params[n].numel() * program.params[n].element_size() for n in names)
    count = sum(n.meta["val"].numel() for n in ends)
    return 8 * size / count if count else None
