"""What all commands print with: tables on standard output or JSON, the rest on standard error."""

from __future__ import annotations

import json
import math

import click
from rich.console import Console

out = Console(soft_wrap=True)
err = Console(stderr=True)
as_json = click.option("--json", "json_", is_flag=True, help="Print JSON instead of tables.")


def print_json(value: object) -> None:
    """One JSON document; what JSON has no word for is null, or text."""
    click.echo(json.dumps(value, indent=1, default=_plain))


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value)
