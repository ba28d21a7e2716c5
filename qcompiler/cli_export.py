"""`qcompiler export`: a compiled folder, or a model as it is, in a format that others read."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from qcompiler.capture import Source, open_model
from qcompiler.errors import BadInput
from qcompiler.export import dialect_of
from qcompiler.export.target import check_free, file_target
from qcompiler.program import Program
from qcompiler.store import MANIFEST, read

Result = dict[str, object]


@click.command()
@click.argument("artifact")
@click.option("-o", "--output", required=True, type=Path, help="File or folder to write.")
@click.option(
    "--format",
    "format_",
    default="onnx",
    show_default=True,
    help="onnx, or a backend of files: checkpoint (Hugging Face folder), gguf.",
)
@click.option("--target", default="onnx", show_default=True, help="onnx, onnxruntime or openvino.")
@click.option("--unsigned", is_flag=True, help="Write int8 weights as uint8: see docs/onnx.md.")
@click.option("--source", type=Path, help="Hugging Face folder that the model came from.")
@click.option("--json", "json_", is_flag=True, help="Print JSON instead of a line.")
def export(
    artifact: str,
    output: Path,
    format_: str,
    target: str,
    unsigned: bool,
    source: Path | None,
    json_: bool,
) -> None:
    """Write a compiled folder, or a model in floating point, as an ONNX file, a Hugging Face
    folder (checkpoint) or a GGUF file."""
    if format_ == "onnx":
        if source is not None:
            raise BadInput("--source is for files that need the source's own; ONNX needs none")
        result, line = _onnx(artifact, output, target, unsigned)
    else:
        if target != "onnx" or unsigned:
            raise BadInput(f"--target and --unsigned are for ONNX files; found --format {format_}")
        result, line = _files(artifact, output, format_, source)
    if json_:
        click.echo(json.dumps(result, indent=1))
    else:
        Console(soft_wrap=True).print(line, markup=False)


def _onnx(artifact: str, output: Path, target: str, unsigned: bool) -> tuple[Result, str]:
    dialect = dialect_of(target, unsigned)  # wrong options fail before minutes of work
    from qcompiler.export.model import BYTES, to_model
    from qcompiler.export.notes import notes
    from qcompiler.export.write import LIMIT, check_ours, check_place, data_of, write_model

    check_place(output)
    check_ours(output)
    program, origin = _open(artifact)
    if output.exists() and Path(origin.place).exists() and output.samefile(origin.place):
        raise BadInput(f"{output} is what {artifact} was made of; choose another name")
    model = to_model(program, dialect)
    write_model(model, output)
    size = int(model.metadata_props[BYTES])
    result: Result = {
        "output": str(output),
        "target": dialect.name,
        "opset": model.opset_imports[""],
        "bytes": size,
        "external_data": str(data_of(output)) if size > LIMIT else None,
        "inputs": [value.name for value in model.graph.inputs],
        "outputs": [value.name for value in model.graph.outputs],
        "notes": list(found := notes(program, unsigned)),
    }
    line = f"target {target}, opset {result['opset']}, {size:,} bytes of weights"
    return result, "\nnote: ".join([f"written to {output}: {line}", *found])


def _files(artifact: str, output: Path, format_: str, source: Path | None) -> tuple[Result, str]:
    target = file_target(format_)
    check_free(output)
    program, origin = _open(artifact)
    if source is None and origin.kind != "folder":
        raise BadInput(
            f"{artifact} was compiled from a {origin.kind}; {format_} needs the Hugging Face "
            "folder with its config and tokenizer: say where it is by --source FOLDER"
        )
    written = target.write(program, source or Path(origin.place), output)
    result: Result = {
        "output": str(output),
        "format": format_,
        "bytes": written.bytes,
        "formats": dict(written.formats),
        "notes": list(written.notes),
    }
    stored = ", ".join(f"{n} weights in {name}" for name, n in written.formats.items())
    notes = "".join(f"\n  {note}" for note in written.notes)
    return result, f"written to {output}: {written.bytes:,} bytes, {stored or 'no codes'}{notes}"


def _open(artifact: str) -> tuple[Program, Source]:
    """The program of a compiled folder, or of a model, and where that came from."""
    if (Path(artifact) / MANIFEST).is_file():
        saved = read(artifact)
        return saved.program, saved.about.source
    program, source, _ = open_model(artifact)
    return program, source
