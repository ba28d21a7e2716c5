"""What is decided: which sites there are, what each may be given, and which must be given the same.

=============  ====================================================================================
`inputs`       sites that read one value: q, k and v, gate and up, experts of one router
`joins`        sites whose outputs are added up: what stands in a residual stream (HAWQ-V3)
a pattern      sites whose ids match it, as in `*q_proj*`
=============  ====================================================================================

Sites with one weight always agree, and whatever the backend says besides.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from qcompiler.backend import Backend
from qcompiler.errors import BadInput
from qcompiler.formats import Scheme
from qcompiler.program import Program
from qcompiler.schemes import FLOAT, fit, is_head, why_not
from qcompiler.sites import Site, site_of, sites

FORMATS = (
    "int2:group32:mirrored:scale(fp16)",
    "int3:group128:mirrored:scale(fp16)",
    "int3:group32:mirrored:scale(fp16)",
    "int4:group128:mirrored:scale(fp16)",
    "int4:group32:mirrored:scale(fp16)",
    "int6:group128:mirrored:scale(fp16)",
    "int8:channel",
)
"""What is chosen from unless the user says otherwise: weights of 2.5 to 8 bits."""
FASTER = (
    "int4:group128:mirrored:scale(fp16)/int8:token:dynamic",
    "int4:group32:mirrored:scale(fp16)/int8:token:dynamic",
    "int8:channel/int8:token:dynamic",
    "int8:channel/int8:tensor",
    FLOAT,
)
"""What is chosen from besides where a budget is about time or arithmetic: products of integers, and
float for sites where nothing is faster."""


@dataclass(frozen=True)
class Units:
    """Sites with their candidates, by the texts that the user gave."""

    sites: tuple[Site, ...]
    candidates: tuple[Mapping[str, Scheme], ...]
    """For each site: text → scheme in the site's shape."""
    groups: tuple[tuple[int, ...], ...]
    """Places of sites that must agree."""
    refused: Mapping[str, str]
    """Text → at which site the backend refuses it, and why."""

    @property
    def schemes(self) -> dict[str, tuple[Scheme, ...]]:
        """Site id → its candidates."""
        pairs = zip(self.sites, self.candidates, strict=True)
        return {site.id: tuple(candidates.values()) for site, candidates in pairs}


def units(
    program: Program,
    formats: Sequence[str],
    backend: Backend,
    agree: Sequence[str] = (),
    include: Sequence[str] = (),
) -> Units:
    """Every site of `program` that can have one of `formats` (`weight` or `weight/activation`).

    The head and embeddings stay in floating point unless `include` names them.
    """
    if not formats:
        raise BadInput(
            "there are no formats to choose from; name some, as in int4:group32,int8:channel"
        )
    found, candidates = [], []
    refused: dict[str, list[str]] = {}
    barred: list[str] = []
    for site in sites(program.graph.nodes):
        if not _included(site, include):
            continue
        if why := why_not(site, program.weights.__contains__):
            barred.append(f"{site.id}: {why}")
            continue
        mine: dict[str, Scheme] = {}
        for text in formats:
            scheme = scheme_of(site, text)
            why = None if scheme == Scheme() else backend.refuses(site, scheme)
            if why is not None:
                refused.setdefault(text, []).append(f"{site.id}: {why}")
            elif scheme not in mine.values():  # a convolution has no groups, so that texts meet
                mine[text] = scheme
        if mine:
            found.append(site)
            candidates.append(mine)
    if all([*c] == [FLOAT] for c in candidates) and (refused or not found):
        raise nothing([*(whys[0] for whys in refused.values()), *barred])
    told = {
        text: whys[0] + (f" (and {len(whys) - 1} more sites)" if len(whys) > 1 else "")
        for text, whys in refused.items()
    }
    groups = _groups(found, agree, backend)
    return Units(tuple(found), tuple(candidates), groups, told)


def nothing(refused: Iterable[str]) -> BadInput:
    """That no site can have another format than float, with the first refusal."""
    first = next(iter(refused), "it has no linear or convolution")
    return BadInput(f"there is nothing to choose in this program: {first}")


def scheme_of(site: Site, text: str) -> Scheme:
    """`weight` or `weight/activation` in a site's shape."""
    weight, _, activation = text.partition("/")
    return fit(site, weight, activation or FLOAT)


def _included(site: Site, include: Sequence[str]) -> bool:
    if site.kind.x is None:
        return "embedding" in include
    return "head" in include or not is_head(site.node)


def _groups(
    found: Sequence[Site], agree: Sequence[str], backend: Backend
) -> tuple[tuple[int, ...], ...]:
    place = {s.id: i for i, s in enumerate(found)}
    sets = [*_by(found, lambda s: s.weight), *backend.agree(found)]
    for word in agree:
        if word == "inputs":
            sets += _by(found, lambda s: s.x)
        elif word == "joins":
            sets += _joins(found)
        elif matched := fnmatch.filter(place, word):
            sets.append(tuple(matched))
        else:
            raise BadInput(
                f"{word!r} matches no site that could agree with another; write inputs, joins, or "
                "a pattern of ids as `inspect` shows them"
            )
    return tuple(tuple(place[id] for id in ids) for ids in sets if len(ids) > 1)


def _by(found: Sequence[Site], key: Callable[[Site], fx.Node | None]) -> list[tuple[str, ...]]:
    """Ids of the sites that have one key."""
    known: dict[fx.Node, list[str]] = {}
    for site in found:
        if (value := key(site)) is not None:
            known.setdefault(value, []).append(site.id)
    return [tuple(ids) for ids in known.values()]


def _joins(found: Sequence[Site]) -> list[tuple[str, ...]]:
    """Sites that reach one chain of additions without another site between."""
    return _by(found, lambda site: _stream(site.node))


def _stream(node: fx.Node) -> fx.Node | None:
    """The last of the additions that `node` goes into, one into the next."""
    last: fx.Node | None = None
    waiting, seen = list(node.users), set()
    while waiting:
        user = waiting.pop(0)
        if user in seen or site_of(user) is not None:
            continue
        seen.add(user)
        if user.target is torch.ops.aten.add.Tensor:
            last = user
            waiting += list(user.users)
        elif last is None and len(user.all_input_nodes) == 1:  # a reshape on the way
            waiting += list(user.users)
    return last
