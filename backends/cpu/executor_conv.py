"""Convolutions of a settled program: images that several read are rounded once, and codes are
handed from one to the next.

    conv → relu → round → conv        the first writes what the second reads, and nothing else

where its scale is known beforehand; numbers are written as well if anybody else reads them. So
which calls there are is only known at the end (`finish`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from qcompiler.backends.cpu.codegen.depthwise import is_packed
from qcompiler.backends.cpu.codegen.layout import OUTPUTS
from qcompiler.backends.cpu.conv_calls import ConvCall
from qcompiler.backends.cpu.images import FrameCall, Image, RoundCall
from qcompiler.backends.cpu.window import Window, pitch

if TYPE_CHECKING:
    from qcompiler.backends.cpu.executor import Settled
    from qcompiler.program import Program

CONV = torch.ops.qc_cpu.conv.default
WEIGHT, X_SCALE, FORMAT, ACTIVATION, KERNEL = 1, 6, 8, 9, 11
"""Arguments of the operator; the window begins with the kernel."""


class Key(NamedTuple):
    """What an image is rounded from, and how."""

    x: fx.Node
    static: tuple[float, ...]
    """Scale and zero point, where they are given."""
    activation: str
    pitch: int


class Made(NamedTuple):
    """A convolution that is called."""

    node: fx.Node
    name: str
    y: Tensor
    hand: Key | None
    """The image that its codes may be handed to."""


def placed(node: fx.Node) -> bool:
    """Whether a convolution can be called with its memory known, as far as the graph tells."""
    value = node.meta.get("val")
    return (
        node.target is CONV
        and bool(node.kwargs.get("last"))
        and value is not None
        and value.dtype == torch.float32
        and all(isinstance(n, int) for n in value.shape)
        and bool(value.numel())
    )


class Convolutions:
    """What `Settled` has to do with them."""

    def __init__(self, owner: Settled, program: Program) -> None:
        self._owner, self._program = owner, program
        self._readers: dict[Key, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if placed(node):
                self._readers.setdefault(self._key(node), []).append(node)
        self._left = {key: len(nodes) for key, nodes in self._readers.items()}
        self._images: dict[Key, tuple[Image, Tensor]] = {}
        """With their memory."""
        self._handed: set[Key] = set()
        """Images that codes are handed to, whose readers have been met."""
        self._made: dict[fx.Node, Made] = {}

    def call(self, node: fx.Node) -> bool:
        """Settle a convolution; False if it cannot be."""
        if not placed(node):
            return False
        owner = self._owner
        batch, out, *size = node.meta["val"].shape
        padded = OUTPUTS * owner.given(node.args[WEIGHT]).shape[0]
        if node.kwargs.get("residual") is not None and self._residual(node, padded) is None:
            return False  # it would have to be laid out anew in every call
        if not self._rounded(self._key(node)):
            return False
        y = owner.names[owner.place(node, torch.empty(batch, *size, padded, device="meta"))]
        owner.values[node] = y[..., :out].permute(0, 3, 1, 2)
        name = owner.name(None)
        self._made[node] = Made(node, name, y, self._next(node, padded))
        owner.lines.append(f"{name}()")
        return True

    def release(self, node: fx.Node) -> None:
        """Behind a convolution: memory of images that nobody is still to read is free."""
        if not placed(node):
            return
        key = self._key(node)
        self._left[key] -= 1
        if not self._left[key] and key in self._images:
            self._owner.pool.give(self._images[key][1])

    def finish(self) -> None:
        """Bind all calls."""
        for made in self._made.values():
            node, owner = made.node, self._owner
            hand = made.hand if made.hand in self._handed else None
            others = [u for u in node.users if hand is None or not self._by_image(u, node, hand)]
            _, *parameters, format, _, _ = owner.given(node.args[:KERNEL])
            owner.names[made.name] = ConvCall(
                self._images[self._key(node)][0],
                made.y if others or hand is None else None,
                tuple(parameters),
                format,
                _window(node),
                owner.work,
                residual=self._residual(node, made.y.shape[-1]),
                behind=str(node.kwargs.get("behind", "")),
                hand=None if hand is None else self._images[hand][0],
            )

    def _rounded(self, key: Key) -> bool:
        """See to it that an image is there: from numbers, or handed on."""
        owner = self._owner
        if key not in self._images:
            source = _packed(owner.values[key.x])
            if source is None:
                return False
            image = self._image(key)
            owner.lines.append(f"{owner.name(RoundCall(source, image, owner.work))}()")
        elif key.x in self._made and self._made[key.x].hand == key and key not in self._handed:
            self._handed.add(key)
            frame = FrameCall(self._images[key][0], self._made[key.x].y.shape[-1])
            owner.lines.append(f"{owner.name(frame)}()")
        return True

    def _residual(self, node: fx.Node, padded: int) -> Tensor | None:
        """What is added to a result, for whole blocks of outputs, if it lies so: a convolution's
        own result has zeros behind its channels."""
        added: Any = node.kwargs.get("residual")
        if added is None:
            return None
        if added in self._made:
            found: Tensor | None = self._made[added].y
        else:
            found = _packed(self._owner.values[added])
        return found if found is not None and found.shape[-1] == padded else None

    def _next(self, node: fx.Node, written: int) -> Key | None:
        """The image that most convolutions make of the result, if it has room for whole blocks."""
        keys = [
            key for key in self._readers if key.x is node and key.static and written <= key.pitch
        ]
        if not keys:
            return None
        key = max(keys, key=lambda k: len(self._readers[k]))
        self._image(key)
        return key

    def _image(self, key: Key) -> Image:
        """Memory for an image, with the padding of whoever wants most."""
        owner = self._owner
        windows = [_window(n) for n in self._readers[key]]
        top, left = (max(w.padding[i] for w in windows) for i in (0, 1))
        batch, channels, height, width = key.x.meta["val"].shape
        memory: list[Tensor] = []

        def take(size: int) -> int:
            memory.append(owner.pool.take(torch.empty(size, dtype=torch.uint8, device="meta")))
            return memory[0].data_ptr()

        x_scale, x_zero = owner.given(self._readers[key][0].args[X_SCALE:FORMAT])
        image = Image(
            batch,
            height,
            width,
            channels,
            (top, left),
            key.pitch,
            key.activation,
            x_scale,
            x_zero,
            take,
            summed=not all(_depthwise(n) for n in self._readers[key]),
        )
        self._images[key] = image, memory[0]
        return image

    def _key(self, node: fx.Node) -> Key:
        arguments: tuple[Any, ...] = node.args
        x, activation = arguments[0], arguments[ACTIVATION]
        names = [self._program.slots[n.name] for n in arguments[X_SCALE:FORMAT] if n is not None]
        static = tuple(float(self._program.params[name]) for name in names)
        channels, taps = x.meta["val"].shape[1], _window(node).taps
        return Key(x, static, activation, pitch(channels, taps, _depthwise(node)))

    def _by_image(self, user: fx.Node, node: fx.Node, key: Key) -> bool:
        """Whether `user` reads nothing of `node` but the codes."""
        mine = user in self._made and self._key(user) == key
        return mine and user.kwargs.get("residual") is not node


def _window(node: fx.Node) -> Window:
    sizes: tuple[Any, ...] = node.args[KERNEL:]
    return Window.of(*sizes)


def _depthwise(node: fx.Node) -> bool:
    weight: Any = node.args[WEIGHT]
    return is_packed(weight.meta["val"])


def _packed(x: Tensor) -> Tensor | None:
    """An image as (batch, height, width, channels), if it lies so in memory."""
    if x.ndim != 4 or x.dtype != torch.float32:
        return None
    found = x.permute(0, 2, 3, 1)
    return found if found.is_contiguous() else None
