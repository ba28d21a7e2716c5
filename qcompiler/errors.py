"""The one family of errors that a user of qcompiler meets.

An error says what was expected, what was found, where (node id and module path), and what to do.
The command line prints exactly that text and exits with code 2; anything else is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QCompilerError(Exception):
    """Base of every error that qcompiler raises on purpose."""


class BadInput(QCompilerError):
    """What the user handed over (model, file, recipe, option, data) cannot be used as it is."""


class PassError(QCompilerError):
    """A pass broke its promise; the program was rolled back to the state before it."""

    def __init__(self, message: str, *, what: str = "", nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.what = what
        """What went wrong, without the story around it."""
        self.nodes = nodes
        """Ids that the first bad edit is about."""


class BackendError(QCompilerError):
    """A backend cannot build or run what it was given."""


def first_line(error: BaseException, lines: int = 1) -> str:
    """The beginning of an error's text, at most 300 characters; other libraries append pages."""
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(words) > 1 and words[0].endswith(":"):  # where it was, not what
        del words[0]
    return " ".join(words[:lines])[:300] or type(error).__name__


MOST = 20
"""Names listed when none is near."""


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a misspelt name: it offers the nearest one, or lists all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    near = near or [n for n in names if name and name in n]
    if near:
        return BadInput(f"unknown {kind} {name!r}; did you mean {near[0]!r}?")
    listed = ", ".join(names[:MOST]) or "none"
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return BadInput(f"unknown {kind} {name!r}; known: {listed}{more}")
