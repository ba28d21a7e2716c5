"""What a pass is: a frozen dataclass with a name, a declared effect, options, and one method.

::

    @dataclass(frozen=True, kw_only=True)
    class DropIdentity(Pass):
        '''y = x * 1 is x.'''

        name: ClassVar[str] = "drop_identity"
        effect: ClassVar[Effect] = Effect.EXACT

        def run(self, edit: Edit, facts: Facts) -> None:
            for node in edit.calls(torch.ops.aten.mul.Tensor):
                if node.args[1] == 1:
                    edit.spend("multiplies by one", node)
                    edit.replace(node, node.args[0])
"""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qcompiler.edit import Edit
from qcompiler.errors import BadInput, unknown
from qcompiler.history import Effect
from qcompiler.spec import PassSpec, Value

if TYPE_CHECKING:
    from qcompiler.facts import Facts
    from qcompiler.program import Program


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite. It reads `facts`, changes the program through `edit`, and nothing else.

    Valid before, valid after, and valid after every single edit in between.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    needs: ClassVar[tuple[str, ...]] = ()
    """Facts that need data (see `facts.NEEDS`): computed by the pipeline before `run`."""

    makes: ClassVar[tuple[str, ...]] = ()
    """What the program has after the pass that later passes read or spoil (see `order.py`)."""
    reads: ClassVar[tuple[str, ...]] = ()
    """What a pass before it must have made, if one in the pipeline makes it at all."""
    destroys: ClassVar[tuple[str, ...]] = ()
    """What it makes void: a pass that makes it comes later."""
    ends: ClassVar[tuple[str, ...]] = ()
    """What there is no more behind it: a pass that reads it comes before."""

    optional: bool = False
    """A pass that changes nothing is an error, unless it is optional."""

    @abstractmethod
    def run(self, edit: Edit, facts: Facts) -> None:
        """Edit the program. Raise `BadInput` for an option that does not fit this program."""

    def needs_for(self, program: Program) -> tuple[str, ...]:
        """The facts needed for this program: `needs`, or fewer where the plan asks for none."""
        return self.needs

    def tolerance(self, facts: Facts) -> float:
        """Largest relative error that the effect's check accepts."""
        return 1e-9 if self.effect is Effect.EXACT else 1.0

    def gives(self) -> tuple[str, ...]:
        """What the pass makes with these options: `makes`, or less."""
        return self.makes

    @property
    def spec(self) -> PassSpec:
        """Name and the options that differ from their defaults."""
        options = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                options[f.name] = value
        return PassSpec(self.name, options)

    def __str__(self) -> str:
        return str(self.spec)

    @classmethod
    def options(cls) -> dict[str, tuple[str, object]]:
        """Option → (type in words, default)."""
        hints = typing.get_type_hints(cls)
        return {f.name: (_type_name(hints[f.name]), f.default) for f in dataclasses.fields(cls)}

    @classmethod
    def make(cls, options: Mapping[str, Value]) -> Pass:
        """Build the pass from parsed options; a wrong name or type is a `BadInput`."""
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        for key, value in options.items():
            if key not in known:
                raise unknown(f"option of pass {cls.name!r}", key, known)
            if not _fits(value, hints[key]):
                raise BadInput(
                    f"pass {cls.name!r}: option {key} is {_type_name(hints[key])}; found {value!r}"
                )
        return cls(**options)  # type: ignore[arg-type]  # checked just above


def _members(hint: object) -> tuple[object, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: object, hint: object) -> bool:
    for member in _members(hint):
        origin = typing.get_origin(member)
        if origin is tuple and isinstance(value, tuple):
            item = typing.get_args(member)[0]
            return all(_fits(v, item) for v in value)
        if origin is typing.Literal and value in typing.get_args(member):
            return True
        if member is float and isinstance(value, int) and not isinstance(value, bool):
            return True
        if isinstance(member, type) and type(value) is member:
            return True
    return False


def _type_name(hint: object) -> str:
    names = []
    for member in _members(hint):
        if typing.get_origin(member) is typing.Literal:
            names.append(" or ".join(map(repr, typing.get_args(member))))
        elif typing.get_origin(member) is tuple:
            names.append(f"list of {_type_name(typing.get_args(member)[0])}")
        else:
            nothing = member is type(None)
            names.append("nothing" if nothing else getattr(member, "__name__", str(member)))
    return " or ".join(names)
