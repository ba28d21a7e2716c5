"""Give every site a scheme: one for all, and patterns for the exceptions.

A plan is data: this pass changes no graph and no weight, and what it wrote can be printed, edited
by hand and compared.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.activations import channelwise
from qcompiler.attention import attentions
from qcompiler.edit import Edit
from qcompiler.errors import BadInput
from qcompiler.facts import Facts
from qcompiler.formats import QFormat, Scheme
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.program import op_name
from qcompiler.schemes import FLOAT, fit, is_head, why_not
from qcompiler.sites import Site, site_of, sites
from qcompiler.sums import sums


@dataclass(frozen=True, kw_only=True)
class Assign(Pass):
    """One scheme for all linears and convolutions, with patterns for exceptions."""

    name: ClassVar[str] = "assign"
    effect: ClassVar[Effect] = Effect.PLAN
    makes: ClassVar[tuple[str, ...]] = ("plan",)

    weight: str = "int8:channel"
    activation: str = FLOAT
    embedding: str = FLOAT
    """Format of embedding tables."""
    head: str = FLOAT
    """Weight format of the last linear before an output; `same` is like all others."""
    key: str = FLOAT
    """Format of attention's keys, before their rotary embedding: `int4:channel` is KVQuant's."""
    value: str = FLOAT
    """Format of attention's values: `int4:token:asym:dynamic`."""
    probabilities: str = FLOAT
    """Format of attention's probabilities: `log4:tensor:dynamic`."""
    sum: str = FLOAT
    """Format of both addends where a convolution's result is added, `uint8:tensor:asym`: for
    runtimes whose kernels yield integers."""
    exceptions: tuple[str, ...] = ()
    """`pattern=weight` or `pattern=weight/activation`, matched against node ids, first one wins."""

    def run(self, edit: Edit, facts: Facts) -> None:
        rules = [_parse_rule(text) for text in self.exceptions]
        used: set[int] = set()
        for site in sites(edit.nodes):
            if (why := why_not(site, edit.is_weight)) is not None:
                edit.skip(site.node, why)
                continue
            number, (weight, activation) = self._choose(site, rules)
            used |= {number} if number is not None else set()
            scheme = fit(site, weight, activation)
            if scheme.weight is None and scheme.activation is None:
                edit.skip(site.node, self._why(site, number))
                continue
            edit.spend(f"{scheme}", site.node)
            edit.assign(site.node, scheme)
        self._others(edit)
        self._attention(edit)
        self._sums(edit)
        for number, (pattern, *_) in enumerate(rules):
            if number not in used:
                raise BadInput(f"assign: exception {pattern!r} matches no site; see `inspect`")

    def _why(self, site: Site, number: int | None) -> str:
        if number is None and site.kind.x is not None and self.head == FLOAT and is_head(site.node):
            return (
                "is taken for the head, the last layer before an output, which stays in floating "
                "point; write assign{head=same} to treat it like all others"
            )
        return "stays in floating point, as the options say"

    def _others(self, edit: Edit) -> None:
        """Say what stays in floating point since no format is made for its operator."""
        for node in edit.calls():
            weights = [x for x in node.all_input_nodes if edit.is_weight(x)]
            large = [x for x in weights if x.meta["val"].ndim > 1 and x.meta["val"].numel() > 1]
            if large and site_of(node) is None and not edit.is_weight(node):
                shape = " × ".join(map(str, large[0].meta["val"].shape))
                edit.skip(
                    node,
                    f"stays in floating point, with a weight of {shape}: formats are for linear, "
                    f"convolution and embedding, not for {op_name(node.target)}",
                )

    def _attention(self, edit: Edit) -> None:
        texts = {"key": self.key, "value": self.value, "probabilities": self.probabilities}
        formats = {part: QFormat.parse(t) for part, t in texts.items() if t != FLOAT}
        found = attentions(edit.nodes) if formats else []
        if formats and not found:
            raise BadInput(
                f"assign: there is no attention whose {' or '.join(formats)} could be rounded; "
                "put `canonicalize` before it, or leave the option out"
            )
        for attention in found:
            scheme = Scheme(
                **{
                    part: f if part == "probabilities" else channelwise(attention.edge(part), f)
                    for part, f in formats.items()
                }
            )
            edit.spend(f"{scheme}", attention.node)
            edit.assign(attention.node, scheme)

    def _sums(self, edit: Edit) -> None:
        if self.sum == FLOAT:
            return
        scheme, every = Scheme(activation=QFormat.parse(self.sum)), sums(edit.nodes)
        if not every:
            edit.note("no result of a convolution is added to anything: `sum` rounds nothing")
        for found in every:
            edit.spend(f"{scheme}", found.node)
            edit.assign(found.node, scheme)

    def _choose(
        self, site: Site, rules: list[tuple[str, str, str]]
    ) -> tuple[int | None, tuple[str, str]]:
        for number, (pattern, weight, activation) in enumerate(rules):
            if fnmatch.fnmatch(site.id, pattern):
                return number, (weight, activation)
        if site.kind.x is None:
            return None, (self.embedding, FLOAT)
        if self.head != "same" and is_head(site.node):
            return None, (self.head, FLOAT if self.head == FLOAT else self.activation)
        return None, (self.weight, self.activation)


def _parse_rule(text: str) -> tuple[str, str, str]:
    pattern, mark, formats = text.partition("=")
    if not mark or not pattern or not formats:
        raise BadInput(f"assign: an exception is pattern=weight[/activation]; found {text!r}")
    weight, _, activation = formats.partition("/")
    return pattern, weight, activation or FLOAT
