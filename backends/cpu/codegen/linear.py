"""The kernel of a linear layer: tiles of `tile.py` over all tokens and outputs, in threads.

Each thread has outputs of its own and sums them in one order, so that no result depends on how many
there are. Blocks of outputs are the outer loop: a block's weights are read from memory once, for
all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

from llvmlite import ir

from qcompiler.backends.cpu.codegen.emit import Code, Value
from qcompiler.backends.cpu.codegen.frame import Kernel, entry, share
from qcompiler.backends.cpu.codegen.isa import Isa
from qcompiler.backends.cpu.codegen.layout import CHUNK
from qcompiler.backends.cpu.codegen.tile import NUMBERS, POINTERS, Spec, Tile

SIZES = (*NUMBERS, "tokens", "blocks")
TILES = {
    "vnni": ((6, 2), (4, 2), (2, 2), (1, 4)),
    "avx2": ((4, 1), (2, 1), (1, 2)),
    "neon": ((4, 1), (2, 1), (1, 1)),
    "plain": ((2, 1), (1, 1)),
}
"""Instruction set → (tokens, blocks) of a tile, large first: as registers and what was measured
allow."""


@lru_cache(maxsize=256)
def linear(isa: Isa, spec: Spec) -> Kernel:
    """The kernel for `spec`. Frame: POINTERS, SIZES, threads."""
    return Kernel(module(isa, spec), isa, len(POINTERS) + len(SIZES) + 1)


def module(isa: Isa, spec: Spec) -> ir.Module:
    """Its IR."""
    made = ir.Module("linear")
    entry(made, SIZES, POINTERS, Loops(made, isa, spec).write)
    return made


class Loops:
    """Tiles over tokens and blocks."""

    tile: ClassVar[type[Tile]] = Tile
    sizes: ClassVar[Mapping[str, tuple[tuple[int, int], ...]]] = TILES

    def __init__(self, module: ir.Module, isa: Isa, spec: Spec) -> None:
        self._spec, self._sizes = spec, self.sizes[isa.name]
        self._wide = max(blocks for _, blocks in self._sizes)
        made = [*self._sizes, *((tokens, 1) for tokens, _ in self._sizes)]
        self._tiles = {s: self.tile(module, isa, spec, *s).function for s in dict.fromkeys(made)}

    def write(self, code: Code, given: Mapping[str, Value], thread: Value, threads: Value) -> None:
        """The blocks of one thread: as many at a time as the widest tile has, then one by one."""
        start, end = share(code, given["blocks"], thread, threads)
        span = code.mul(code.div(code.add(end, code.mul(start, -1)), self._wide), self._wide)
        middle = code.add(start, span)
        with code.loop(start, middle, self._wide) as block:
            self._tokens(code, given, block, self._wide, code.i64(0), given["tokens"])
        with code.loop(middle, end) as block:
            self._tokens(code, given, block, 1, code.i64(0), given["tokens"])

    def _tokens(
        self,
        code: Code,
        given: Mapping[str, Value],
        block: Value,
        wide: int,
        start: Value,
        stop: Value,
    ) -> None:
        """These tokens by these blocks: large tiles, then smaller ones for the rest."""
        for tokens, blocks in self._sizes:
            blocks = min(blocks, wide)
            left = code.add(stop, code.mul(start, -1))
            end = code.add(start, code.mul(code.div(left, tokens), tokens))
            for part in range(0, wide, blocks):
                with code.loop(start, end, tokens) as token:
                    tile = self._tiles[tokens, blocks]
                    arguments = self._arguments(code, given, token, code.add(block, part))
                    code.b.call(tile, arguments)
            start = end

    def _arguments(
        self, code: Code, given: Mapping[str, Value], token: Value, block: Value
    ) -> list[Value]:
        places = self._places(code, given, token, block)
        pointers = [code.at(given[name], places[name]) for name in self.tile.pointers]
        return [*pointers, *(given[name] for name in self.tile.numbers)]

    def _places(
        self, code: Code, given: Mapping[str, Value], token: Value, block: Value
    ) -> dict[str, Value]:
        """Bytes from the start of each pointer to what belongs to a token and a block."""
        chunks, spec = given["chunks"], self._spec
        groups = code.div(chunks, spec.group // CHUNK) if spec.group else code.i64(1)
        return {
            "y": code.add(code.mul(token, given["y_stride"]), code.mul(block, 64)),
            "x": code.mul(token, given["x_stride"]),
            "total": code.mul(token, code.mul(groups, 4)),
            "x_scale": code.mul(token, 4),
            "weight": code.mul(block, code.mul(chunks, 64 * spec.bits)),
            "scale": code.mul(block, code.mul(groups, spec.side_bytes)),
            "zero": code.mul(block, code.mul(groups, 64)),
            "start": code.mul(block, code.mul(groups, 64)),
            "x_zero": code.i64(0),
            "bias": code.mul(block, 64),
            "residual": code.add(code.mul(token, given["residual_stride"]), code.mul(block, 64)),
        }
