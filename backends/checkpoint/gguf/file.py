"""The file: header, tokenizer, tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

from qcompiler.backends.checkpoint.gguf.blocks import pack
from qcompiler.backends.checkpoint.gguf.llama import Naming
from qcompiler.backends.checkpoint.gguf.tokenizer import write_tokenizer
from qcompiler.backends.checkpoint.source import Source
from qcompiler.backends.checkpoint.weights import Weights
from qcompiler.export.target import beside

FLOATS = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file, and what is worth knowing of them."""

    data: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = field(default_factory=dict)
    """Name → bytes by rows, or numbers, and what they are."""
    stored: Counter[str] = field(default_factory=Counter)
    """Type of blocks → weights."""
    notes: dict[str, None] = field(default_factory=dict)


def tensors_of(weights: Weights, naming: Naming) -> Tensors:
    """All tensors in the types, under the names and in the order of rows of a file."""
    made, moved = Tensors(), dict[str, float]()
    for layer, stored in weights.codes.items():
        name = f"{layer}.weight"
        blocks = pack(name, stored)
        rows = naming.rows(name, len(blocks.data))
        made.data[naming.name(name)] = (
            blocks.data if rows is None else blocks.data[rows.numpy()],
            blocks.kind,
        )
        made.stored[blocks.kind.name] += 1
        fmt = str(stored.format)
        moved[fmt] = max(blocks.moved, moved.get(fmt, 0.0))
    for name, value in weights.floats.items():
        rows = naming.rows(name, len(value))
        made.data[naming.name(name)] = _float(value if rows is None else value[rows])
    for fmt, most in moved.items():
        if most > 0:
            made.notes[
                f"{fmt}: scales (and minima) are rounded to float16, as GGUF stores them, which "
                f"moves a number by {most:.1g} of a step at most"
            ] = None
    return made


def _float(value: Tensor) -> tuple[np.ndarray, GGMLQuantizationType]:
    """A tensor as it is; vectors, which llama.cpp adds and multiplies by, in float32."""
    kind = FLOATS[value.dtype] if value.ndim > 1 else GGMLQuantizationType.F32
    numbers = value.float().contiguous().numpy()
    if kind is GGMLQuantizationType.BF16:
        return quants.quantize(numbers, kind), kind
    return numbers.astype(np.float16) if kind is GGMLQuantizationType.F16 else numbers, kind


def write_file(output: Path, source: Source, naming: Naming, tensors: Tensors) -> int:
    """Write everything to `output`. Returns its bytes."""
    with beside(output) as place:
        writer = GGUFWriter(place, naming.arch_name)
        writer.add_name(source.folder.resolve().name)
        naming.header(writer)
        if tensors.stored:
            kind = tensors.stored.most_common(1)[0][0]
            writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
            writer.add_quantization_version(GGML_QUANT_VERSION)
        if missing := write_tokenizer(writer, source.folder, source.settings.vocab_size):
            tensors.notes[missing] = None
            writer.add_tokenizer_model("no_vocab")  # else llama.cpp does not load the file
        for name, (data, kind) in tensors.data.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return place.stat().st_size
