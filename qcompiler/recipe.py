"""Recipes: named pipelines in TOML.

::

    about = "int8 weights and per-token int8 activations, smoothed"

    [[pass]]
    name = "smooth"
    alpha = 0.5
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qcompiler.errors import BadInput, unknown
from qcompiler.passbase import Pass
from qcompiler.registry import make_passes
from qcompiler.spec import PassSpec, Value

DEFAULT = "w8a8-dynamic-smooth"


@dataclass(frozen=True)
class Recipe:
    """A named pipeline."""

    name: str
    about: str
    specs: tuple[PassSpec, ...]

    def passes(self) -> tuple[Pass, ...]:
        """The passes, built; a misspelt pass or option is a `BadInput`."""
        return make_passes(self.specs)

    def __str__(self) -> str:
        return ",".join(map(str, self.specs))


def recipe_names() -> list[str]:
    """Names of the recipes that ship with qcompiler."""
    return sorted(
        f.name.removesuffix(".toml")
        for f in files("qcompiler.recipes").iterdir()
        if f.name.endswith(".toml")
    )


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a `.toml` file."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise BadInput(f"no recipe file at {path}")
        return parse_recipe(path.read_text(), path.stem)
    if str(name) not in recipe_names():
        raise unknown("recipe", str(name), recipe_names())
    return parse_recipe((files("qcompiler.recipes") / f"{name}.toml").read_text(), str(name))


def parse_recipe(text: str, name: str) -> Recipe:
    """A recipe from TOML text; unknown keys are errors, since they would be ignored silently."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"recipe {name!r} is no TOML: {error}") from error
    for key in raw:
        if key not in ("about", "pass"):
            raise unknown(f"key in recipe {name!r}", key, ["about", "pass"])
    entries = raw.get("pass", [])
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"recipe {name!r} has no [[pass]] entries")
    specs = []
    for entry in entries:
        options = dict(entry)
        pass_name = options.pop("name", None)
        if not isinstance(pass_name, str):
            raise BadInput(f"recipe {name!r}: a [[pass]] has no name; found {sorted(entry)}")
        specs.append(PassSpec(pass_name, {k: _value(v) for k, v in options.items()}))
    recipe = Recipe(name, str(raw.get("about", "")), tuple(specs))
    recipe.passes()  # a misspelt option fails here, before any work is done
    return recipe


def _value(value: object) -> Value:
    if isinstance(value, list):
        return tuple(_value(v) for v in value)
    if isinstance(value, bool | int | float | str):
        return value
    raise BadInput(f"a recipe's options are numbers, words and lists; found {value!r}")
