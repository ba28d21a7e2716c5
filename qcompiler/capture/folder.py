"""A Hugging Face model folder: `config.json` and safetensors, loaded through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qcompiler.capture.cached import writes
from qcompiler.errors import BadInput, first_line

SEQUENCE = 16
"""Length of the example text that a folder is captured with; the captured program takes any."""
FRAMES = 2
"""Frames of a spectrum for each position of an encoder of speech."""


def load_folder(path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The module in `path` with the class its config names, and example inputs for it."""
    config = read_config(path)
    try:
        import transformers
    except ImportError as error:
        raise BadInput(
            "loading a Hugging Face folder needs transformers; pip install 'qcompiler[hf]'"
        ) from error
    names = config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise BadInput(
            f"{path}/config.json names architecture {names or None}; "
            f"transformers {transformers.__version__} has no such model"
        )
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        module, report = cls.from_pretrained(
            path,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    except Exception as error:  # safetensors, json, pickle, and shape errors of many types
        raise BadInput(f"cannot load the weights in {path}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(level)
    _check_loading(path, report)
    return module, _example(module)


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder."""
    file = path / "config.json"
    if not file.is_file():
        raise BadInput(f"{path} has no config.json; expected a Hugging Face model folder")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file} holds {type(config).__name__}; expected an object")
    return config


def _check_loading(path: Path, report: dict[str, object]) -> None:
    """transformers fills what a checkpoint lacks with random numbers; here that is an error."""
    for key, words in (
        ("missing_keys", "has no weights for"),
        ("mismatched_keys", "has weights of another shape than config.json says for"),
        ("unexpected_keys", "has weights that config.json knows nothing of:"),
    ):
        found = sorted(str(k) for k in report.get(key) or ())  # type: ignore[attr-defined]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise BadInput(
                f"{path} {words} {', '.join(found[:3])}{more}; config and weights differ"
            )


def _example(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Example inputs from the config: what the model's main input is, decides."""
    config: Any = module.config
    main = getattr(module, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (2, length), generator=generator)

    def numbers(*shape: int) -> torch.Tensor:
        dtype = next(module.parameters()).dtype
        return torch.randn(2, *shape, generator=generator, dtype=dtype)

    if main == "input_ids":
        example = {main: ids(SEQUENCE)}
        # A decoder builds its own causal mask; an encoder needs to be told what is padding.
        if not writes(module) and not getattr(config, "is_decoder", False):
            example["attention_mask"] = torch.ones_like(example[main])
    elif main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        example = {main: numbers(config.num_channels, height, width)}
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        example = {main: numbers(config.num_mel_bins, FRAMES * config.max_source_positions)}
    else:
        raise BadInput(
            f"the model's main input is {main!r}, of which config.json tells no shape; hand over "
            "example_inputs in Python, or MODULE:FACTORY that returns (model, example inputs)"
        )
    # Those that write nothing make what the decoder reads of what the encoder does.
    able = getattr(module, "can_generate", lambda: False)
    if getattr(config, "is_encoder_decoder", False) and able():
        example["decoder_input_ids"] = ids(SEQUENCE // 2)
    return example
