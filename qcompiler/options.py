"""What has a name and options in recipes: passes and roundings, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from qcompiler.errors import BadInput, unknown
from qcompiler.spec import PassSpec, Value


@dataclass(frozen=True, kw_only=True)
class Optioned(ABC):
    """Made from text, and printed as text that parses back."""

    what: ClassVar[str] = "pass"
    """What it is called in errors."""
    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Text where text is wanted: a rounding, say, is named, not handed over."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name, f.default)
            if f.type in ("str", str) and not isinstance(value, str):
                raise BadInput(
                    f"{self.what} {self.name!r}: option {f.name} is str; found {value!r}"
                )

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
    def make(cls, options: Mapping[str, Value]) -> Self:
        """Build it from parsed options; a wrong name or type is a `BadInput`."""
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        for key, value in options.items():
            if key not in known:
                raise unknown(f"option of {cls.what} {cls.name!r}", key, known)
            if not _fits(value, hints[key]):
                raise BadInput(
                    f"{cls.what} {cls.name!r}: option {key} is {_type_name(hints[key])}; "
                    f"found {value!r}"
                )
        return cls(**options)  # checked just above


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
