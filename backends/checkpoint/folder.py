"""The folder: `config.json`, `model.safetensors`, and the files of the source that stay true."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompiler.backends.checkpoint.source import Source
from qcompiler.errors import BackendError
from qcompiler.export.target import beside

KEPT = (".json", ".txt", ".jinja", ".model", ".py")
"""Ends of the files beside the weights: tokenizer, templates, generation, code of the model."""
FLAGS = ("attention_bias", "mlp_bias")
"""Fields of a config that give layers a bias."""


def write_folder(
    output: Path, source: Source, tensors: Mapping[str, Tensor], changes: dict[str, Any]
) -> int:
    """Write a folder like that of `source`, with `changes` to its config. Returns its bytes."""
    with beside(output) as place:
        place.mkdir()
        for file in kept_files(source.folder):
            shutil.copy(file, place / file.name)
        for part in parts_of(source.folder):
            shutil.copytree(part, place / part.name)
        (place / "config.json").write_text(json.dumps(source.config | changes, indent=2) + "\n")
        owned = {name: tensors[name].contiguous().clone() for name in sorted(tensors)}
        save_file(owned, place / "model.safetensors", metadata={"format": "pt"})
        # safetensors lets nobody else read it
        (place / "model.safetensors").chmod((place / "config.json").stat().st_mode)
        return sum(f.stat().st_size for f in place.rglob("*") if f.is_file())


def kept_files(folder: Path) -> list[Path]:
    """Files that say nothing of the weights: all but weights, their indices, and the config."""
    return [
        f
        for f in sorted(folder.iterdir())
        if f.is_file()
        and (f.suffix in KEPT or f.name.startswith(("LICENSE", "NOTICE")))
        and f.name != "config.json"
        and not f.name.endswith(".index.json")
    ]


def parts_of(folder: Path) -> list[Path]:
    """Folders of what stands behind the model in sentence-transformers: pooling and the like."""
    file = folder / "modules.json"
    listed = json.loads(file.read_text()) if file.is_file() else []
    return [folder / m["path"] for m in listed if m["path"] and (folder / m["path"]).is_dir()]


def with_biases(
    source: Source, biases: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the config that give the architecture all of `biases`, and all that it then has."""
    if not biases:
        return {}, {}
    known = [f for f in FLAGS if getattr(source.settings, f, None) is False]
    for count in range(1, len(known) + 1):
        for flags in combinations(known, count):
            had = _biases_of(source, flags)
            if biases.keys() <= had.keys():
                zeros = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in had.items()}
                return dict.fromkeys(flags, True), zeros | dict(biases)
    listed = ", ".join(sorted(biases)[:3])
    raise BackendError(
        f"the program has {len(biases)} biases that {source.architecture} has no place for: "
        f"{listed}; compile without what adds them (`absorb_norms` of norms with a bias, `shift`, "
        "`quantize{bias_correction=true}`)"
    )


def _biases_of(source: Source, flags: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors that the architecture has more with `flags` set, without storage."""
    config = copy.deepcopy(source.settings)
    for flag in flags:
        setattr(config, flag, True)
    with torch.device("meta"):
        module = type(source.module)(config)
    return {n: t for n, t in module.state_dict().items() if n not in source.tensors}
