"""`qcompiler export`: a compiled folder, or a model as it is, as an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from qcompiler.capture import open_model
from qcompiler.export import dialect_of
from qcompiler.store import MANIFEST, read


@click.command()
@click.argument("artifact")
@click.option("-o", "--output", required=True, type=Path, help="File to write.")
@click.option("--target", default="onnx", show_default=True, help="onnx, onnxruntime or openvino.")
@click.option("--unsigned", is_flag=True, help="Write int8 weights as uint8: see docs/onnx.md.")
@click.option("--json", "json_", is_flag=True, help="Print JSON instead of a line.")
def export(artifact: str, output: Path, target: str, unsigned: bool, json_: bool) -> None:
    """Write a compiled folder, or a model in floating point, as an ONNX file."""
    dialect = dialect_of(target, unsigned)  # wrong options fail before minutes of work
    from qcompiler.export.model import BYTES, to_model
    from qcompiler.export.write import LIMIT, check_place, data_of, write_model

    check_place(output)
    compiled = (Path(artifact) / MANIFEST).is_file()
    program = read(artifact).program if compiled else open_model(artifact)[0]
    model = to_model(program, dialect)
    write_model(model, output)
    size = int(model.metadata_props[BYTES])
    result = {
        "output": str(output),
        "target": dialect.name,
        "opset": model.opset_imports[""],
        "bytes": size,
        "external_data": str(data_of(output)) if size > LIMIT else None,
        "inputs": [value.name for value in model.graph.inputs],
        "outputs": [value.name for value in model.graph.outputs],
    }
    if json_:
        click.echo(json.dumps(result, indent=1))
        return
    Console(soft_wrap=True).print(
        f"written to {output}: target {target}, opset {result['opset']}, {size:,} bytes of weights",
        markup=False,
    )
