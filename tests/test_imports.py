"""Imports point downward only, and passes and backends know the core but never each other."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    "errors version hadamard layout append coded recurrent",
    "spec formats allocate cores",
    "options observers keep ops ranges tagged seen timing",
    "io history program match",
    "diff edit run samples shapes sites objective module",
    "rounding",
    "stored attention sums blocks vectors indices",
    "padding states",
    "fisher state synthetic",
    "walk",
    "facts check",
    "comparison",
    "activations spaces trial",
    "schemes sensitivity",
    "split learn",
    "passbase",
    "order",
    "backend pipeline lowering gather",
    "agreement",
    "registry",
    "recipe codec capture export skeleton rounded",
    "show.account show.page store",
    "generation",
    "compiled",
    "costs testing dynamo",
    "planning",
    "data evaluate show",
    "console",
    "cli_export cli_lists cli_shared cli_backends cli_generate",
    "cli_plan",
    "cli __main__",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def imports(file: Path) -> set[str]:
    """Modules that `file` imports when it runs; those for type checkers alone are left out."""
    tree = ast.parse(file.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in typing_only:
            found.add(node.module)
        elif isinstance(node, ast.Import) and node not in typing_only:
            found |= {alias.name for alias in node.names}
    return {m for m in found if m.split(".")[0] == "qcompiler"}


def layer(module: str) -> int:
    """Rank of `qcompiler.a.b`: the longest name in the table that it starts with."""
    parts = module.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in RANK:
            return RANK[".".join(parts[:end])]
    raise AssertionError(f"{module} stands in no layer: add it to the table")


CORE = [
    f
    for f in (ROOT / "qcompiler").rglob("*.py")
    if f.relative_to(ROOT / "qcompiler").parts[0] not in ("passes", "backends", "recipes")
    and f != ROOT / "qcompiler/__init__.py"
]


@pytest.mark.parametrize("file", CORE, ids=lambda f: str(f.relative_to(ROOT)))
def test_core_imports_point_downward(file: Path) -> None:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for other in imports(file) - {"qcompiler"}:
        assert not other.startswith(("qcompiler.passes", "qcompiler.backends")), other
        assert layer(other) <= layer(name), f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_passes_and_backends_do_not_know_each_other(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        own = ".".join(("qcompiler", *file.relative_to(ROOT).with_suffix("").parts[:2]))
        for other in imports(file):
            if other.startswith(("qcompiler.passes.", "qcompiler.backends.")):
                assert other.startswith(own), f"{file.name} imports {other}"


def _named(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that `file` imports from qcompiler by name."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qcompiler")
        for alias in node.names
    ]


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_scripts_import_what_there_is(folder: str) -> None:
    """They are run by hand, so that no other test would see it."""
    for file in (ROOT / folder).rglob("*.py"):
        for module, name in _named(file) if ".venv" not in str(file) else ():
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (
                file,
                name,
            )
