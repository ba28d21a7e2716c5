"""Which rows there are: formats, methods and rotations as tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qcompiler.spec import PassSpec

BITS = (4, 3, 2)
TOKEN = ":token:dynamic:mirrored"


def _both(name: str, size: str) -> dict[str, str]:
    scale = "" if "channel" in size else ":scale(fp16)"  # what the peers store for groups
    return {
        name: f"weight={size}:mirrored{scale}",
        f"{name}-asym": f"weight={size}:asym{scale}",
    }


def _weight_only() -> dict[str, str]:
    """Without a zero point: codes -8 … 7, ours with the extreme of a group at -8."""
    found = {}
    for name, size in (("w8", "int8:channel"), ("w4g128", "int4:group128")):
        found |= _both(name, size)
    for bits in BITS:
        found |= _both(f"w{bits}g32", f"int{bits}:group32")
    return found


FORMATS: dict[str, str] = _weight_only() | {
    "w8a8": f"weight=int8:channel:mirrored activation=int8{TOKEN}",
    "w4a8": f"weight=int4:group32:mirrored:scale(fp16) activation=int8{TOKEN}",
    "w4a4": f"weight=int4:channel:mirrored activation=int4{TOKEN}",
}
"""Name, the same in the peers' scripts → what `assign` is told."""

ROTATIONS: dict[str, str] = {
    "none": "",
    "merged": "rotate{seed=$seed}",
    "online": "rotate{seed=$seed online=true}",
    "learned": "rotate{online=true},learn_rotation{rate=1}",
}
"""Merged into weights throughout; with operators at run time where weights cannot take it."""
STREAM = "untie{optional=true},absorb_norms{optional=true},center{optional=true}"
BUDGET = 10
"""It lets through what is worse than no answer at all: how bad is what this benchmark shows."""


@dataclass(frozen=True)
class Method:
    """How the numbers are found."""

    rounding: str = "nearest"
    smooth: str | None = None
    """Options of `smooth` before it; None: without it."""
    online: bool = False
    """Put scales at run time where `smooth` finds none."""
    split: str = ""
    """A pass that takes something out of the weights."""
    rotations: tuple[str, ...] = ("none", "online")
    weights_only: bool = True
    """Whether it is of use where activations stay in floating point."""


EVERY = tuple(ROTATIONS)
METHODS: dict[str, Method] = {
    "nearest": Method(rotations=EVERY),
    "search": Method("search"),
    "gptq": Method("gptq"),
    "awq": Method("clip", "method=awq"),
    "awq + gptq": Method("gptq", "method=awq"),
    "hqq": Method("hqq"),
    "adaround": Method("adaround"),
    "signround": Method("signround"),
    "search + signround": Method("signround{search=mse}"),
    "smooth": Method(smooth="", rotations=EVERY),
    "smooth (searched)": Method(smooth="search=true", rotations=("none",), weights_only=False),
    "smooth + gptq": Method("gptq", "", weights_only=False),
    "smooth (run time) + gptq": Method(
        "gptq", "search=true", online=True, rotations=("none",), weights_only=False
    ),
    "split outliers": Method(split="split_outliers", rotations=("none",), weights_only=False),
}


@dataclass(frozen=True)
class Cell:
    """One row to be made: a pipeline, in which $seed stands where a matrix is drawn."""

    format: str
    method: str
    rotation: str
    pipeline: str


def cells(
    formats: list[str], methods: list[str], rotations: list[str], keep: str
) -> Iterator[Cell]:
    """The rows of these formats, methods and rotations; `keep` are the sites that stay float."""
    for form in formats:
        for name in methods:
            method = METHODS[name]
            for rotation in method.rotations:
                acts = "activation=" in FORMATS[form]
                asked = rotation in rotations and (acts or method.weights_only)
                if asked and (acts or rotation in ("none", "online")):
                    yield Cell(form, name, rotation, pipeline(form, method, rotation, keep))


def pipeline(form: str, method: Method, rotation: str, keep: str) -> str:
    """The whole pipeline as text."""
    turned = rotation != "none"
    # a rotation of the stream takes the scales of norms away
    smooth = f"{method.smooth or ''}{' norms=false' if turned else ''}".strip()
    maps = [
        "scale_inputs{optional=true}" if method.online else "",
        (f"smooth{{{smooth}}}" if smooth else "smooth") if method.smooth is not None else "",
        f"{STREAM},{ROTATIONS[rotation]}" if turned else "",
        method.split,
    ]
    steps = [
        "canonicalize{optional=true}",
        f"assign{{{FORMATS[form]}{keep}}}",
        *maps,
        "fold" if any(maps) else "",
        str(PassSpec("quantize", {"rounding": method.rounding, "budget": BUDGET})),
    ]
    return ",".join(step for step in steps if step)
