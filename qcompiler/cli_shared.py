"""What several commands share: bars, and calibration data from files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qcompiler import pipeline
from qcompiler.capture import Source, open_model
from qcompiler.compiled import Batches
from qcompiler.console import err
from qcompiler.data import read_data


def with_data(command: Callable[..., object]) -> Callable[..., object]:
    """The options of a command that calibrates."""
    kinds = "text, .npy, .npz, .safetensors, a folder of such files (one a tag), or `synthetic`"
    data = click.option("--data", type=Path, help=f"Calibration data: {kinds}.")
    batches = click.option("--batches", default=16, show_default=True, help="Batches of it to use.")
    return data(batches(command))


def calibration(model: str, data: Path | None, batches: int) -> Batches | None:
    """What `--data` and `--batches` name, for a model."""
    if data is None:
        return None
    if str(data) == "synthetic":
        return "synthetic"
    program, source, _ = open_model(model)
    return read_data(data, program.io, tokenizer_of(source), batches)


def tokenizer_of(source: Source) -> Path | None:
    """The folder that holds the tokenizer: the model's own, or the one that a file lies in."""
    if source.kind == "onnx":
        folder = Path(source.place).parent
        return folder if (folder / "tokenizer.json").is_file() else None
    return Path(source.place) if source.kind == "folder" else None


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[pipeline.Progress], None]]:
    """A bar over the passes, on a terminal only."""
    if quiet or not err.is_terminal:
        yield lambda _: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        passes = bar.add_task("capturing", total=None)
        inside = bar.add_task("", visible=False)
        now = ""

        def watch(p: pipeline.Progress) -> None:
            nonlocal now
            bar.update(
                passes,
                description=f"{p.name}: {p.doing}",
                total=p.total,
                completed=p.index + (p.doing == "done"),
            )
            if now != (now := f"  {p.name}, {p.doing}"):  # other work has another pace
                bar.reset(inside, description=now, visible=p.of > 0)
            if p.of:
                bar.update(inside, total=p.of, completed=p.batch, visible=True)

        yield watch


@contextlib.contextmanager
def bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar with the time left, on a terminal only."""
    if quiet or not err.is_terminal:
        yield lambda: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
