"""Tagged batches: calibration data of several kinds, and where their ranges lie apart.

A tag is what a batch is one of: the time step of a diffusion model, a modality, a language, an
expert. One static scale has to cover the tag with the largest inputs, and for the one with the
smallest it wastes

    log₂ ( max over tags of max|x|  /  min over tags of max|x| )   bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from qcompiler.errors import BadInput
from qcompiler.formats import Scheme
from qcompiler.observers import Range

APART = 4.0
"""Largest inputs of two tags are told from this ratio on."""
TOLD = 3
"""Sites that are told of, at most."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Tagged(Generic[T]):
    """One batch of calibration data, `inputs`, and what it is one of."""

    tag: str
    inputs: T

    def __post_init__(self) -> None:
        if not isinstance(self.tag, str) or not self.tag:
            raise BadInput(f"a tag is a text such as 't=10' or 'image'; found {self.tag!r}")


def untag(batch: T | Tagged[T]) -> tuple[str, T]:
    """(tag, inputs) of a batch; the tag is empty where there is none."""
    return (batch.tag, batch.inputs) if isinstance(batch, Tagged) else ("", batch)


def apart(by_tag: Mapping[str, Mapping[str, Range]], plan: Mapping[str, Scheme]) -> list[str]:
    """Which sites the plan gives one static scale for tags that lie far apart, the worst first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for tag, ranges in by_tag.items():
        for id in _static(plan) & set(ranges):
            if (size := float(ranges[id].absmax.max())) > 0:
                found.setdefault(id, []).append((size, tag))
    ratios = {id: max(sizes)[0] / min(sizes)[0] for id, sizes in found.items()}
    far = sorted((id for id in ratios if ratios[id] > APART), key=lambda id: (-ratios[id], id))
    return [_told(id, max(found[id]), min(found[id])) for id in far[:TOLD]]


def _told(id: str, most: tuple[float, str], least: tuple[float, str]) -> str:
    return (
        f"{id}: largest input {most[0]:.3g} {with_tag(most[1])}, {least[0]:.3g} "
        f"{with_tag(least[1])}: a static scale for both wastes "
        f"{math.log2(most[0] / least[0]):.1f} bits; make its activation dynamic"
    )


def with_tag(tag: str) -> str:
    """Words for messages."""
    return f"with tag {tag}" if tag else "without a tag"


def _static(plan: Mapping[str, Scheme]) -> set[str]:
    """Names of what has static scales: sites, keys and values of attention."""
    formats = {
        name: fmt
        for id, s in plan.items()
        for name, fmt in ((id, s.activation), (f"{id}:key", s.key), (f"{id}:value", s.value))
    }
    return {name for name, fmt in formats.items() if fmt is not None and not fmt.dynamic}
