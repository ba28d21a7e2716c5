"""Running a lowered program: what can be settled once is, and a call does the rest.

Of a value whose shape is known the memory is known too. It gets a place beforehand, which others
take over behind its last reader. Then a view is nothing at run time, and a generated kernel is one
call with addresses that are already filled in. The others run as they are: one line each of a
Python function that is written for the program.

    decode, one token: norms, products and rotations are settled; what reads the cache is not
    a prompt of any length: nothing is settled but what depends on no input, until the same
                            length has come several times (`fixed.py`)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompiler.append import append
from qcompiler.backend import ProgramArtifact
from qcompiler.backends.cpu import convolution, generated
from qcompiler.backends.cpu.append import APPEND
from qcompiler.backends.cpu.calls import LinearCall, RopeCall, by_rows
from qcompiler.backends.cpu.coded import APPEND_ROWS, append_rows
from qcompiler.backends.cpu.codegen import layout
from qcompiler.backends.cpu.conv_calls import MeanCall
from qcompiler.backends.cpu.executor_conv import CONV, Convolutions, placed
from qcompiler.backends.cpu.fixed import Open, Repeated, fixed, symbols
from qcompiler.backends.cpu.floats import FLOATS
from qcompiler.backends.cpu.fuse_conv import anyhow
from qcompiler.errors import BadInput
from qcompiler.program import Program
from qcompiler.run import last_readers
from qcompiler.samples import Flat

aten = torch.ops.aten
LINEAR, ROPE = torch.ops.qc_cpu.linear.default, torch.ops.qc_cpu.rope.default
ATTEND, MEAN = torch.ops.qc_cpu.attend.default, torch.ops.qc_cpu.mean.default
DIRECT: dict[object, object] = {
    LINEAR: generated.linear,
    ROPE: generated.rope,
    ATTEND: generated.attend,
    CONV: convolution.conv,
    MEAN: convolution.mean,
    APPEND: append,
    APPEND_ROWS: append_rows,
    **FLOATS,
}
"""Operators that are Python functions."""
VIEWS = {
    aten.slice.Tensor,
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.select.int,
    aten.flatten.using_ints,
}
FRESH = {aten.scaled_dot_product_attention.default, aten.rms_norm.default}
"""Operators that are made of others and yet never return what they read."""
FOLDED = 1 << 16
"""Numbers in a value that depends on no input and is kept instead of computed anew."""


class CpuArtifact(ProgramArtifact):
    """A lowered program with the memory that it runs in; each thread has its own."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._own = threading.local()
        self._open = Open(program)
        self._worth: dict[frozenset[object], bool] = {}
        """Symbols left open → whether any product is settled then."""

    def __getstate__(self) -> dict[str, object]:
        return {"program": self.program}  # memory is made anew

    def __setstate__(self, state: dict[str, Program]) -> None:
        self.__init__(state["program"])  # type: ignore[misc]

    def run(self, inputs: Flat) -> tuple[object, ...]:
        threads = torch.get_num_threads()  # how calls are bound depends on it
        settled: Settled | None = getattr(self._own, "settled", None)
        if settled is None or settled.threads != threads:
            settled = self._own.settled = Settled(self.program, threads)
            self._own.fixed = Repeated[Settled]()
        if self._open:
            settled = self._fixed(inputs) or settled
        with torch.no_grad():
            return tuple(settled.run(*inputs))

    def _fixed(self, inputs: Flat) -> Settled | None:
        """What has been settled for inputs of these sizes."""
        known: Repeated[Settled] = self._own.fixed
        sizes = self._open.sizes(inputs)
        pattern = known.due(sizes)
        if pattern is not None:
            varying = self._open.varying(pattern)
            if self._settles(varying):
                made = fixed(self.program, inputs, varying)
                known.put(pattern, Settled(made, torch.get_num_threads()))
        return known.get(sizes)

    def _settles(self, varying: frozenset[object]) -> bool:
        """Whether any product is settled while sizes of `varying` are open."""
        if varying not in self._worth:
            products = (n for n in self.program.graph.nodes if n.target in (LINEAR, CONV))
            open_ = (symbols(n.meta["val"]) for n in products)
            self._worth[varying] = any(map(varying.isdisjoint, open_))
        return self._worth[varying]


@dataclass
class Pool:
    """Memory that is given out, taken back and given out again."""

    free: dict[int, list[Tensor]] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    def take(self, like: Tensor) -> Tensor:
        """Contiguous memory of the shape and type of `like`."""
        size = like.numel() * like.element_size()
        if waiting := self.free.get(size):
            block = waiting.pop()
        else:
            block = torch.empty(size, dtype=torch.uint8)
            self.held.append(block)
        return block.view(like.dtype).reshape(like.shape)

    def give(self, value: Tensor) -> None:
        """Take it back."""
        block = next(b for b in self.held if b.data_ptr() == value.untyped_storage().data_ptr())
        self.free.setdefault(block.numel(), []).append(block)


class Settled:
    """A program made into a Python function."""

    def __init__(self, program: Program, threads: int) -> None:
        self.threads = threads
        self._program = program
        self.pool = Pool()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._old: list[Tensor] = []
        self.values: dict[fx.Node, Any] = {}
        """Values with a place: parameters, what depends on nothing, what is computed into one."""
        self._constant: set[fx.Node] = set()
        self._wanted = _wanted(program)
        self._base: dict[fx.Node, fx.Node] = {}
        """View → the node whose memory it looks at."""
        self._placed: set[fx.Node] = set()
        """Nodes that have been given a place in the pool."""
        self._lent: set[fx.Node] = set()
        """Values without a place that may look at the memory of one that has."""
        self._readers: dict[fx.Node, int] = {}
        """Node with a place in the pool → how many are still to read it."""
        self.names: dict[str, Any] = {"torch": torch}
        self.lines: list[str] = []
        self._convolutions = Convolutions(self, program)
        self.run = self._written()

    def _written(self) -> Callable[..., tuple[object, ...]]:
        arguments = []
        last = last_readers(self._program.graph.nodes)
        with torch.no_grad():
            for node in self._program.graph.nodes:
                if node.op == "placeholder":
                    arguments += self._placeholder(node)
                elif node.op == "call_function":
                    self._call(node)
                    self._convolutions.release(node)
                    self._done(node, last.get(node, ()))
                else:
                    self._output(node)
        self._convolutions.finish()
        head = f"def run({', '.join(arguments)}):"
        text = "\n    ".join([head, *self.lines])
        exec(compile(text, "<settled program>", "exec"), self.names)
        run: Callable[..., tuple[object, ...]] = self.names["run"]
        return run

    def _placeholder(self, node: fx.Node) -> list[str]:
        """A parameter is its value; an input has a place if its shape is known."""
        name = self._program.slots.get(node.name)
        if name is not None:
            self.values[node] = self._program.params[name]
            self._constant.add(node)
            return []
        if node in self._wanted:
            fill = self.name(partial(_fill, node.name))
            self.lines.append(f"{fill}({self.place(node)}, {node.name})")
        return [node.name]

    def _call(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if _known(node) and all(n in self._constant for n in inputs) and self._fold(node):
            self._constant.add(node)
            return
        settled = _known(node) and all(n in self.values for n in inputs)
        makers = (self._view, self._linear, self._rope, self._convolutions.call, self._mean)
        if settled and any(make(node) for make in makers):
            return
        text = self._text(node)
        if node in self._wanted:
            self.lines.append(f"{self.place(node)}.copy_({text})")
            return
        self.lines.append(f"{node.name} = {text}")
        if not _fresh(node.target):
            self._lend(node)

    def _lend(self, node: fx.Node) -> None:
        """`node` may look at the memory of what it reads, which is then never given back."""
        for value in node.all_input_nodes:
            base = self._base.get(value, value)
            if base in self._placed or value in self._lent:
                self._lent.add(node)
                self._readers.pop(base, None)

    def _fold(self, node: fx.Node) -> bool:
        """What depends on no input is computed now."""
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random or node.meta["val"].numel() > FOLDED:
            return False
        self.values[node] = node.target(*self.given(node.args), **self.given(node.kwargs))
        return True

    def _view(self, node: fx.Node) -> bool:
        if node.target not in VIEWS:
            return False
        source = node.all_input_nodes[0]
        value = node.target(*self.given(node.args), **self.given(node.kwargs))
        memory = self.values[source].untyped_storage().data_ptr()
        if len(node.all_input_nodes) > 1 or value.untyped_storage().data_ptr() != memory:
            return False  # a reshape that had to copy
        self.values[node] = value
        base = self._base.get(source, source)
        self._base[node] = base
        if base in self._readers:
            self._readers[base] += len(node.users)
        return True

    def _linear(self, node: fx.Node) -> bool:
        if node.target is not LINEAR:
            return False
        x, *parameters, format, activation, out = self.given(node.args)
        others = self.given(node.kwargs)
        residual = others.get("residual")
        if residual is not None and residual.shape[-1] % layout.OUTPUTS:
            return False  # its rows must be filled up, in every call
        if x.dtype != torch.float32 or not all(map(_by_rows, (x, *others.values()))):
            return False
        padded = parameters[0].shape[0] * layout.OUTPUTS
        y = self.place(node, torch.empty(*x.shape[:-1], padded, device="meta"))
        call = LinearCall(
            x, self.names[y], tuple(parameters), format, activation, self.work, **others
        )
        self.values[node] = self.names[y][..., :out]
        self.lines.append(f"{self.name(call)}()")
        return True

    def _rope(self, node: fx.Node) -> bool:
        if node.target is not ROPE or any(p.stride(-1) != 1 for p in self.given(node.args)):
            return False
        x, cos, sin = self.given(node.args)
        like = torch.empty(x.shape, dtype=x.dtype, device="meta")
        call = RopeCall(x, self.names[self.place(node, like)], cos, sin)
        self.lines.append(f"{self.name(call)}()")
        return True

    def _mean(self, node: fx.Node) -> bool:
        if node.target is not MEAN:
            return False
        x, _ = self.given(node.args)
        image = x.permute(0, 2, 3, 1)
        if x.dtype != torch.float32 or not image.is_contiguous():
            return False
        call = MeanCall(image, self.names[self.place(node)])
        self.lines.append(f"{self.name(call)}()")
        return True

    def _output(self, node: fx.Node) -> None:
        """What lies in memory that the next call uses again is copied out of it."""
        parts = [
            f"{self._part(n)}.clone()" if n in self.values or n in self._lent else self._part(n)
            for n in node.args[0]
        ]
        self.lines.append(f"return ({''.join(p + ', ' for p in parts)})")

    # -- memory -------------------------------------------------------------------------------

    def place(self, node: fx.Node, like: Tensor | None = None) -> str:
        """The name of a place for the value of `node`."""
        like = node.meta["val"] if like is None else like
        if self._wanted.get(node):
            value = self.pool.take(like.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            value = self.pool.take(like)
        self.values[node] = value
        self._readers[node] = len(node.users)
        self._placed.add(node)
        return self.name(value)

    def _done(self, node: fx.Node, read: Sequence[fx.Node]) -> None:
        """Memory is free behind its last reader; `node` is that of the values `read`."""
        for value in node.all_input_nodes:
            base = self._base.get(value, value)
            if base in self._readers:
                self._readers[base] -= 1
                if not self._readers[base]:
                    del self._readers[base]
                    self.pool.give(self.values[base])
        gone = [n.name for n in read if n not in self.values]
        if gone:
            self.lines.append(f"del {', '.join(gone)}")

    def work(self, size: int) -> int:
        """Memory that each call may use while it runs."""
        if self._scratch.numel() < size:
            self._old.append(self._scratch)  # calls that are bound to it still use it
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch.data_ptr()

    # -- text ---------------------------------------------------------------------------------

    def _text(self, node: fx.Node) -> str:
        parts = [self._part(a) for a in node.args]
        parts += [f"{key}={self._part(a)}" for key, a in node.kwargs.items()]
        target = DIRECT.get(node.target, node.target)  # the dispatcher has nothing to add
        return f"{self.name(target)}({', '.join(parts)})"

    def _part(self, value: object) -> str:
        if isinstance(value, fx.Node):
            return self.name(self.values[value]) if value in self.values else value.name
        if isinstance(value, list | tuple):
            inner = ", ".join(map(self._part, value))
            return f"[{inner}]"
        return self.name(value)

    def name(self, value: object) -> str:
        name = f"_{len(self.names)}"
        self.names[name] = value
        return name

    def given(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda n: self.values[n])


def _fill(name: str, place: Tensor, x: Tensor) -> None:
    """Put an input in its place, which has the size that was captured."""
    if x.shape != place.shape:
        raise BadInput(
            f"expected {name} of shape {tuple(place.shape)}, as the program was captured; found "
            f"{tuple(x.shape)}; name the axis that varies (`dynamic`) when you compile"
        )
    place.copy_(x)


def _known(node: fx.Node) -> bool:
    """Whether the shape of its value is: all sizes are numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)


def _fresh(target: object) -> bool:
    """Whether results are new memory, whatever is read. A composite operator may do nothing at all,
    as `reshape` and `contiguous` do."""
    if not isinstance(target, torch._ops.OpOverload) or target in FRESH:
        return target in FRESH
    composite = "CompositeImplicitAutograd"
    views = any(result.alias_info is not None for result in target._schema.returns)
    return not views and not torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), composite
    )


def _wanted(program: Program) -> dict[fx.Node, bool]:
    """What generated kernels read, views looked through: it pays to give these values a place.
    True for what only convolutions do, which want its channels last."""
    waiting = [
        n
        for node in program.graph.nodes
        if node.target in (LINEAR, ROPE) and _known(node)
        for n in node.all_input_nodes
    ]
    found: dict[fx.Node, bool] = {}
    while waiting:
        node = waiting.pop()
        if node.target in VIEWS:
            waiting.append(node.all_input_nodes[0])
        elif _placeable(program, node):
            found[node] = False
    for node in filter(placed, program.graph.nodes):
        for n in node.all_input_nodes:
            if n not in found and n.target not in VIEWS and _placeable(program, n) and anyhow(n):
                found[n] = True
    return found


def _placeable(program: Program, node: fx.Node) -> bool:
    """Whether a value that is no kernel's can be copied to a place."""
    mine = node.target in (LINEAR, ROPE, MEAN) or placed(node)
    return _known(node) and node.name not in program.slots and not mine


def _by_rows(value: object) -> bool:
    """Whether rows of a tensor lie one like the other, so that it need not be copied."""
    return not isinstance(value, Tensor) or by_rows(value)[0] is value
