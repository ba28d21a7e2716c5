"""A plan as data: a TOML file that is printed, edited by hand, compared and handed to `compile`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qcompiler.errors import BadInput, unknown
from qcompiler.formats import Scheme
from qcompiler.keep import write_whole
from qcompiler.schemes import FLOAT

HEAD = """\
# Which format each weight gets. Change formats by hand as you like, then:
#   qcompiler compile MODEL --plan THIS_FILE -o OUT
"""
CHOICE = ("site", "weight", "activation", "loss", "bytes", "why")


@dataclass(frozen=True)
class Choice:
    """What one site is given."""

    site: str
    weight: str = FLOAT
    activation: str = FLOAT
    why: str = ""
    """What it costs and saves beside its neighbours among the candidates."""
    loss: float = 0.0
    """Predicted, of the whole program."""
    bytes: float = 0.0

    @property
    def scheme(self) -> str:
        return self.weight if self.activation == FLOAT else f"{self.weight}/{self.activation}"


@dataclass(frozen=True)
class PlanFile:
    """Choices, and what they come to."""

    choices: tuple[Choice, ...]
    about: Mapping[str, object] = field(default_factory=dict)
    """What stands above the choices: texts, numbers, lists of texts."""

    def write(self, place: Path) -> None:
        """Write it whole or not at all."""
        lines = [HEAD, *(f"{k} = {_value(v)}" for k, v in self.about.items()), ""]
        for choice in self.choices:
            lines += ["[[choice]]", *(f"{k} = {_value(getattr(choice, k))}" for k in CHOICE), ""]
        write_whole(place, "\n".join(lines))


def read_plan(place: Path) -> PlanFile:
    """A plan from a file; what cannot be understood is a `BadInput` that names the choice."""
    if not place.is_file():
        raise BadInput(f"no plan at {place}; make one with: qcompiler plan MODEL -o {place}")
    try:
        raw = tomllib.loads(place.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{place} is no TOML: {error}") from error
    entries = raw.pop("choice", [])
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{place} has no [[choice]] entries, each with a site and its formats")
    choices = tuple(_choice(place, n, entry) for n, entry in enumerate(entries, 1))
    seen: set[str] = set()
    for number, choice in enumerate(choices, 1):
        if choice.site in seen:
            raise BadInput(f"{place}, choice {number}: {choice.site} was chosen for above already")
        seen.add(choice.site)
    return PlanFile(choices, raw)


def _choice(place: Path, number: int, entry: object) -> Choice:
    where = f"{place}, choice {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("site"), str):
        raise BadInput(f"{where} names no site; found {entry!r}")
    for key, value in entry.items():
        if key not in CHOICE:
            raise unknown(f"key in {where}", key, CHOICE)
        wanted = (int, float) if key in ("loss", "bytes") else (str,)
        if not isinstance(value, wanted):
            raise BadInput(f"{where}, {entry['site']}: {key} is no {wanted[0].__name__}: {value!r}")
    return Choice(**entry)


def scheme_texts(scheme: Scheme) -> tuple[str, str]:
    """(weight, activation) as texts."""
    return str(scheme.weight or FLOAT), str(scheme.activation or FLOAT)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{text}"'
