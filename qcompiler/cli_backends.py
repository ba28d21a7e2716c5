"""`qcompiler check-backend` and `new-backend`: for whoever adds a target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from qcompiler.cli_shared import bar
from qcompiler.console import as_json, out, print_json
from qcompiler.skeleton import write_skeleton
from qcompiler.testing import conformance


@click.command("check-backend")
@click.argument("name")
@click.option("--claim", default="*", help="Kernels to try, as a pattern: 'int8*'.")
@click.option("--quick", is_flag=True, help="A few formats and shapes of each claim, no times.")
@as_json
def check_backend(name: str, claim: str, quick: bool, json_: bool) -> None:
    """Hold every claim of the backend NAME against the reference; exit code 1 if one fails."""
    with _progress(f"checking {name}", json_) as tick:
        report = conformance(name, claims=claim, quick=quick, speed=not quick, tick=tick)
    if json_:
        print_json(report.as_dict())
    else:
        out.print(str(report), markup=False, highlight=False)
    if not report.ok:
        raise SystemExit(1)


@click.command("new-backend")
@click.argument("name")
@click.option("--folder", type=Path, help="Where to write it.  [default: NAME]")
def new_backend(name: str, folder: Path | None) -> None:
    """Write an installable package with a backend called NAME, and its test."""
    place = write_skeleton(name, Path(name) if folder is None else folder)
    out.print(
        f"written to {place}; go on with: pip install -e {place}, qcompiler check-backend {name}",
        markup=False,
    )


@contextlib.contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told how far it is, and learns at the start of what."""
    with contextlib.ExitStack() as stack:
        advance: list[Callable[[], None]] = []

        def tick(done: int, total: int) -> None:
            if not advance:
                advance.append(stack.enter_context(bar(what, total, quiet)))
            elif done:
                advance[0]()

        yield tick


BACKENDS = (check_backend, new_backend)
