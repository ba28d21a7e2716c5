"""Passes and pipelines as text that parses back.

::

    canonicalize,smooth{alpha=0.5 optional=true},assign{weight=int8:channel except="*lm_head*"}

A value is `true`, `false`, a number, a word, a "quoted string", or a list `[a, b]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qcompiler.errors import BadInput

Value = bool | int | float | str | tuple["Value", ...]

_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}=,\[\]])|(?P<word>[^\s{}=,"\[\]]+))'
)


@dataclass(frozen=True)
class PassSpec:
    """A pass by name with its options, before anything is looked up."""

    name: str
    options: Mapping[str, Value]

    def __str__(self) -> str:
        options = " ".join(f"{k}={_text(v)}" for k, v in self.options.items())
        return f"{self.name}{{{options}}}" if options else self.name


def parse_pipeline(text: str) -> tuple[PassSpec, ...]:
    """Parse a pipeline; a bad text is a `BadInput` that shows where."""
    return tuple(_Parser(text).pipeline())


def print_pipeline(specs: tuple[PassSpec, ...]) -> str:
    """The inverse of `parse_pipeline`."""
    return ",".join(map(str, specs))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def pipeline(self) -> Iterator[PassSpec]:
        while True:
            yield self._pass()
            if self._peek() == "":
                return
            self._expect(",")

    def _pass(self) -> PassSpec:
        name = self._word("the name of a pass")
        options: dict[str, Value] = {}
        if self._peek() == "{":
            self._next()
            while self._peek() != "}":
                key = self._word("an option's name or }")
                self._expect("=")
                if key in options:
                    raise self._error(f"option {key!r} is given twice")
                options[key] = self._value()
            self._next()
        return PassSpec(name, options)

    def _value(self) -> Value:
        token = self._next()
        if token == "[":
            items: list[Value] = []
            while self._peek() != "]":
                items.append(self._value())
                if self._peek() == ",":
                    self._next()
            self._next()
            return tuple(items)
        if token in ("", "{", "}", "=", ",", "]"):
            raise self._error(f"expected a value, found {token or 'the end'!r}")
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        return _scalar(token)

    def _word(self, what: str) -> str:
        token = self._next()
        if not re.match(r"[\w.-]+$", token):
            raise self._error(f"expected {what}, found {token or 'the end'!r}")
        return token

    def _expect(self, mark: str) -> None:
        token = self._next()
        if token != mark:
            raise self._error(f"expected {mark!r}, found {token or 'the end'!r}")

    def _peek(self) -> str:
        match = _TOKEN.match(self._text, self._at)
        return match.group(0).strip() if match else ""

    def _next(self) -> str:
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            if self._text[self._at :].strip():
                raise self._error(f"cannot read {self._text[self._at :].strip()[:10]!r}")
            return ""
        self._at = match.end()
        return match.group(0).strip()

    def _error(self, what: str) -> BadInput:
        return BadInput(f"pipeline {self._text!r}, at character {self._at}: {what}")


def _scalar(word: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str) and (
        not re.fullmatch(r'[^\s{}=,"\[\]]+', value) or not isinstance(_scalar(value), str)
    ):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
