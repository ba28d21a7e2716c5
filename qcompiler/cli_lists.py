"""Commands that list what there is: passes, roundings, recipes, formats, backends."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table

from qcompiler.console import as_json, out, print_json
from qcompiler.errors import BadInput, QCompilerError
from qcompiler.formats import ALIASES, NAMED_BLOCKS, element_names
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
    rows: list[dict[str, object]] = []
    for name in sorted(table("qcompiler.passes")):
        try:
            cls = get_pass(name)
        except BadInput as error:  # a broken plug-in is named, the others go on
            rows.append({"name": name, "error": str(error)})
            continue
        about = (cls.__doc__ or "").strip().splitlines()[0]
        options = {k: {"type": t, "default": d} for k, (t, d) in cls.options().items()}
        rows.append({"name": name, "effect": cls.effect.value, "about": about, "options": options})
    if json_:
        return print_json({"passes": rows})
    shown = Table("pass", "effect", "what it does", "options")
    for row in rows:
        listed = row.get("options", {})
        assert isinstance(listed, dict)
        words = " ".join(f"{k}={v['default']}" for k, v in listed.items())
        shown.add_row(
            str(row["name"]),
            str(row.get("effect", "")),
            str(row.get("about", row.get("error"))),
            words,
        )
    return out.print(shown)


@click.command()
@as_json
def roundings(json_: bool) -> None:
    """List the roundings with their options: how the codes of weights are found."""
    rows: list[dict[str, object]] = []
    for name in sorted(table("qcompiler.roundings")):
        try:
            cls = rounding_class(name)
        except BadInput as error:  # a broken plug-in is named, the others go on
            rows.append({"name": name, "about": str(error), "needs": [], "options": {}})
            continue
        about = (cls.__doc__ or "").strip().splitlines()[0]
        options = {k: {"type": t, "default": d} for k, (t, d) in cls.options().items()}
        needs = list(cls().needed())
        rows.append({"name": name, "about": about, "needs": needs, "options": options})
    if json_:
        return print_json({"roundings": rows})
    shown = Table("rounding", "needs", "what it does", "options")
    for row in rows:
        needed, listed = row["needs"], row["options"]
        assert isinstance(needed, list) and isinstance(listed, dict)
        words = " ".join(f"{k}={v['default']}" for k, v in listed.items())
        shown.add_row(str(row["name"]), ", ".join(needed), str(row["about"]), words)
    return out.print(shown)


@click.command()
@as_json
def metrics(json_: bool) -> None:
    """List the metrics of sensitivity with their options (see `plan`)."""
    rows: list[dict[str, object]] = []
    for name in sorted(table("qcompiler.metrics")):
        try:
            cls = metric_class(name)
        except BadInput as error:  # a broken plug-in is named, the others go on
            rows.append({"name": name, "about": str(error), "options": {}})
            continue
        about = (cls.__doc__ or "").strip().partition("\n\n")[0]
        options = {k: {"type": t, "default": d} for k, (t, d) in cls.options().items()}
        rows.append({"name": name, "about": " ".join(about.split()), "options": options})
    if json_:
        return print_json({"metrics": rows})
    shown = Table("metric", "what it is", "options")
    for row in rows:
        listed = row["options"]
        assert isinstance(listed, dict)
        words = " ".join(f"{k}={v['default']}" for k, v in listed.items())
        shown.add_row(str(row["name"]), str(row["about"]), words)
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
            rows.append({"name": name, "about": str(error), "kernels": []})
            shown.add_row(name, str(error), "")
            continue
        kernels = backend.capabilities
        rows.append(
            {"name": name, "about": backend.summary, "kernels": [asdict(k) for k in kernels]}
        )
        lines = [f"{k.kernel}: {k.op} {k.weight} × {k.activation}" for k in kernels]
        shown.add_row(name, backend.summary, "\n".join(lines))
    if json_:
        return print_json({"backends": rows})
    return out.print(shown)


LISTS = (passes_, roundings, metrics, recipes, formats, backends)
