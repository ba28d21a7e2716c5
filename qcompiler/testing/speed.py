"""How much faster than float a claim's kernel is: copies of one layer, in turn with torch's."""

from __future__ import annotations

from functools import partial

import torch

from qcompiler.backend import Backend, Capability
from qcompiler.capture import capture
from qcompiler.testing.catalogue import schemes
from qcompiler.testing.subjects import Shape, Sites, Subject
from qcompiler.testing.trial import Built, quantized
from qcompiler.timing import floors

SHAPES = {
    "linear": Shape("linear", (512, 512), (-1, 512)),
    "conv": Shape("conv", (64, 64, 3, 3), (-1, 64, 8, 8)),
    "embedding": Shape("embedding", (2048, 512), (-1,)),
}
COPIES = 8
"""Layers of one program, so that calling it costs little beside them."""
TOKENS = (1, 64)
TRIED = 3
"""Schemes of a claim, until one is served."""


def speeds(backend: Backend, claim: Capability) -> dict[int, float]:
    """Tokens (images for a convolution) → times as fast as torch in float32, in the first format
    that the kernel serves on one shape; nothing if it serves none."""
    if claim.op not in SHAPES:
        return {}
    made = _layers(SHAPES[claim.op])
    for scheme in schemes(claim, made.sites[0])[:TRIED]:
        program = quantized(made, scheme)
        if program is None or all(backend.refuses(site, scheme) for site in made.sites):
            continue
        built = Built.of(program, backend, claim.kernel)
        if {built.kernel(site.id) for site in made.sites} <= {"", claim.kernel}:
            return {tokens: _ratio(made, built, tokens) for tokens in TOKENS}
    return {}


def _layers(shape: Shape) -> Subject:
    """Copies of one layer with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(shape.weight, generator=generator), False) for _ in range(COPIES)]
    x = shape.example(2, 0)
    program = capture(Sites(shape, weights, behind=False).eval(), x)
    return Subject(shape, torch.float32, program, ("random",) * COPIES, (("two", (x,)),))


def _ratio(made: Subject, built: Built, tokens: int) -> float:
    x = (made.shape.example(tokens, 1),)
    runs = {"float": partial(made.program.flat, x), "kernel": partial(built.artifact.run, x)}
    found = floors(runs)
    return found["float"] / found["kernel"]
