"""Commands that list what there is: passes, roundings, recipes, formats, backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TypeVar

import click
from rich.markup import escape
from rich.table import Table

from qcompiler.backend import Capability
from qcompiler.console import as_json, out, print_json
from qcompiler.errors import BadInput, QCompilerError
from qcompiler.formats import ALIASES, NAMED_BLOCKS, element_names
from qcompiler.options import Optioned
from qcompiler.recipe import load_recipe, recipe_names
from qcompiler.registry import get_backend, get_pass, metric_class, rounding_class, table

BLOCKS = [*NAMED_BLOCKS, "groupN", "blockNxM"]
FORMATS = {
    "int8:channel": "weights, one scale per output channel",
    "int4:group128": "weights, one scale per 128 inputs of a channel",
    "int4:group32:asym:scale(fp16)": "the same with zero points, scales in 16 bits",
    "nf4:group64": "weights, quantiles of a normal distribution",
    "codebook3:channel": "weights, eight learned numbers for each row",
    "int8:token:dynamic": "activations, one scale per token, found as they come",
    "int8:tensor": "activations, one calibrated scale",
    "uint8:tensor:asym": "the same with a zero point",
    "int4:channel:full": "all of -8 … 7 where a symmetric format leaves -8 out",
}


@click.command("passes")
@as_json
def passes_(json_: bool) -> None:
    """List all passes with their options."""
    rows = _rows("passes", get_pass, lambda cls: {"effect": cls.effect.value})
    _show("passes", rows, ("pass", "effect", "what it does"), json_)


@click.command()
@as_json
def roundings(json_: bool) -> None:
    """List the roundings with their options: how the codes of weights are found."""
    rows = _rows("roundings", rounding_class, lambda cls: {"needs": list(cls().needed())})
    _show("roundings", rows, ("rounding", "needs", "what it does"), json_)


@click.command()
@as_json
def metrics(json_: bool) -> None:
    """List the metrics of sensitivity with their options (see `plan`)."""
    _show("metrics", _rows("metrics", metric_class), ("metric", "what it is"), json_)


Class = TypeVar("Class", bound=Optioned)


def _rows(
    group: str,
    load: Callable[[str], type[Class]],
    more: Callable[[type[Class]], dict[str, object]] = lambda cls: {},
) -> list[dict[str, object]]:
    """What is plugged in as a `group`, with `more` of each; a broken plug-in is named, the others
    go on."""
    rows: list[dict[str, object]] = []
    for name in sorted(table(f"qcompiler.{group}")):
        try:
            cls = load(name)
        except BadInput as error:
            rows.append({"name": name, "error": str(error)})
            continue
        about = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
        options = {k: {"type": t, "default": d} for k, (t, d) in cls.options().items()}
        rows.append({"name": name, **more(cls), "about": about, "options": options})
    return rows


def _show(group: str, rows: list[dict[str, object]], columns: tuple[str, ...], json_: bool) -> None:
    if json_:
        return print_json({group: rows})
    shown = Table(*columns, "options")
    for row in rows:
        middle = next((v for k, v in row.items() if k in ("effect", "needs")), "")
        words = ", ".join(middle) if isinstance(middle, list) else str(middle)
        options = row.get("options", {})
        assert isinstance(options, dict)
        cells = [str(row["name"]), *([words] if len(columns) == 3 else [])]
        listed = " ".join(f"{k}={v['default']}" for k, v in options.items())
        shown.add_row(*cells, str(row.get("about", row.get("error"))), listed)
    return out.print(shown)


@click.command()
@as_json
def recipes(json_: bool) -> None:
    """List the recipes that ship with qcompiler."""
    found = [load_recipe(name) for name in recipe_names()]
    rows = [{"name": r.name, "about": r.about, "pipeline": str(r)} for r in found]
    if json_:
        return print_json({"recipes": rows})
    shown = Table("recipe", "what it does", "pipeline")
    for row in rows:
        shown.add_row(row["name"], row["about"], row["pipeline"])
    return out.print(shown)


@click.command()
@as_json
def formats(json_: bool) -> None:
    """List elements, blocks and formats with names of their own (see docs/formats.md)."""
    elements = element_names()
    if json_:
        found = {"elements": elements, "blocks": BLOCKS, "aliases": ALIASES, "examples": FORMATS}
        return print_json(found)
    out.print(f"elements: {' '.join(elements)}\nblocks: {' '.join(BLOCKS)}")
    out.print("words: asym dynamic full mirrored planes clip0.9 scale(fp16)")
    for text, what in [*FORMATS.items(), *ALIASES.items()]:
        out.print(f"  {text:26} {what}", markup=False)
    return None


@click.command()
@as_json
def backends(json_: bool) -> None:
    """List the backends, whether they run here, and what their kernels serve."""
    rows: list[dict[str, object]] = []
    shown = Table("backend", "what it is", "kernels")
    for name in sorted(table("qcompiler.backends")):
        try:
            backend = get_backend(name)
        except QCompilerError as error:  # a broken plug-in is named, the others go on
            rows.append({"name": name, "about": str(error), "kernels": [], "error": str(error)})
            shown.add_row(name, escape(str(error)), "")
            continue
        kernels = backend.capabilities
        rows.append(
            {"name": name, "about": backend.summary, "kernels": [asdict(k) for k in kernels]}
        )
        shown.add_row(name, escape(backend.summary), escape("\n".join(_grouped(kernels))))
    if json_:
        return print_json({"backends": rows})
    return out.print(shown)


def _grouped(kernels: Iterable[Capability]) -> list[str]:
    """A line for each kernel and what it asks for, with all formats that it claims."""
    groups: dict[tuple[str, str, str], list[Capability]] = {}
    for claim in kernels:
        groups.setdefault((claim.kernel, claim.op, claim.conditions), []).append(claim)
    lines = []
    for (kernel, op, conditions), claims in groups.items():
        weights, activations = (
            ", ".join(dict.fromkeys(getattr(c, which) for c in claims))
            for which in ("weight", "activation")
        )
        line = f"{kernel}: {op} {weights} × {activations}; {conditions}"
        lines.append(line.removesuffix("; "))
    return lines


LISTS = (passes_, roundings, metrics, recipes, formats, backends)
