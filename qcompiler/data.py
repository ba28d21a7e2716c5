"""Calibration and evaluation data from files: text, `.npy`, `.npz`, `.safetensors`; a folder of
tags."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from qcompiler.errors import BadInput
from qcompiler.io import Signature
from qcompiler.tagged import Tagged

WINDOW = 256
"""Tokens of one window of text, unless the model takes fewer."""
BATCH = 8


def read_data(
    path: Path, io: Signature, tokenizer: Path | None, limit: int | None = None
) -> Sequence[object]:
    """Batches of a file, or of a folder with one file for each tag, which its stem is.

    Tags take turns, so that `limit` batches are as many of each, as far as it has them.
    """
    if not path.is_dir():
        return read_batches(path, io, tokenizer, limit)
    files = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    if not files:
        raise BadInput(
            f"{path} holds no files; expected one (text, .npy, .npz, .safetensors) a tag"
        )
    if limit is not None and limit < len(files):
        raise BadInput(
            f"{path} holds {len(files)} tags; expected at least as many batches, found {limit}. A "
            f"file is one kind of data: give --batches {len(files)} or more, or put samples of one "
            "kind into one .npy, with the batch first"
        )
    tags = [[Tagged(f.stem, b) for b in read_batches(f, io, tokenizer, limit)] for f in files]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*tags))
    return [batch for batch in turns if batch is not None][:limit]


def read_batches(
    path: Path, io: Signature, tokenizer: Path | None, limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Batches for a model with signature `io`, at most `limit` of them.

    Text is cut in windows of equal length by the model's tokenizer; `.npy` holds one input with the
    batch first; `.safetensors` and `.npz` one tensor per input name.
    """
    if not path.is_file():
        raise BadInput(f"no data file at {path}")
    if path.suffix == ".npy":
        whole = {io.tensors[0].name: _read_numpy(path)}
    elif path.suffix in (".safetensors", ".npz"):
        whole = _named(path, io)
    else:
        whole = {io.tensors[0].name: text_windows(path, io, tokenizer)}
    rows = next(iter(whole.values())).shape[0]
    if rows == 0:
        raise BadInput(f"{path} holds no data; expected at least one row (or {WINDOW} tokens)")
    for port in io.tensors:
        if port.name not in whole and port.dtype is not None and not port.dtype.is_floating_point:
            filled = _filled(port.name, whole[io.tensors[0].name])
            whole[port.name] = filled.to(port.dtype)
        if port.name in whole and port.dtype is not None:
            whole[port.name] = _as_wide(whole[port.name], port.dtype)
            _check_kind(whole[port.name], port.name, port.dtype, path)
    step = BATCH if isinstance(io.tensors[0].shape[0], str) else int(io.tensors[0].shape[0])
    batches = [{k: v[i : i + step] for k, v in whole.items()} for i in range(0, rows, step)]
    return batches[:limit]


def _as_wide(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in the type of its input, if both are of real numbers or both of integers: files
    have numpy's own width, 64 bits."""
    kinds = [(t.is_floating_point, t.is_complex, t == torch.bool) for t in (value.dtype, dtype)]
    return value.to(dtype) if kinds[0] == kinds[1] else value


def _check_kind(value: Tensor, name: str, dtype: torch.dtype, path: Path) -> None:
    """Pixels of an image file, say, are no floats: how they become some, only the source knows."""
    if value.dtype != dtype:
        want, have = (str(t).removeprefix("torch.") for t in (dtype, value.dtype))
        scaled = ", scaled as the model expects them," if dtype.is_floating_point else ""
        raise BadInput(
            f"{path}: input {name!r} takes {want}; found {have}. Write the values{scaled} to "
            f"the file as {want}"
        )


def _filled(name: str, first: Tensor) -> Tensor:
    """An integer input that the data lack, by its name: positions, one segment, or no padding."""
    if "position" in name:
        return torch.arange(first.shape[1]).expand_as(first).contiguous()
    return torch.zeros_like(first) if "type" in name else torch.ones_like(first)


def text_windows(path: Path, io: Signature, tokenizer: Path | None) -> Tensor:
    """Token ids (windows, length) of a text file; the rest of the last window is left out."""
    ids = list(_tokenize(path, tokenizer))
    shape = io.tensors[0].shape
    last = shape[1] if len(shape) > 1 else WINDOW
    bound = io.dims.get(last, (1, None))[1] if isinstance(last, str) else last
    length = min(WINDOW, bound) if bound else WINDOW
    length -= length % io.steps.get(str(last), 1)
    count = len(ids) // length
    if count == 0:
        raise BadInput(f"{path} has {len(ids)} tokens; expected at least {length}")
    return torch.tensor(ids[: count * length]).reshape(count, length)


def open_tokenizer(folder: Path | None, lacking: str) -> Any:
    """The tokenizer in `folder`; `lacking` is what to say if there is none."""
    file = folder / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        raise BadInput(lacking)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput("reading text needs tokenizers; pip install 'qcompiler[hf]'") from error
    return Tokenizer.from_file(str(file))


def _tokenize(path: Path, tokenizer: Path | None) -> Iterator[int]:
    made = open_tokenizer(
        tokenizer,
        f"{path} is text, and the model has no tokenizer.json beside it; "
        "give token ids as .npy, .npz or .safetensors",
    )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no UTF-8 text: {error}") from error
    yield from made.encode(text, add_special_tokens=False).ids


def _read_numpy(path: Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise BadInput(f"{path} is no .npy array: {error}") from error


def _named(path: Path, io: Signature) -> dict[str, Tensor]:
    """Tensors by the names of inputs."""
    found = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    names = {p.name for p in io.tensors}
    if set(found) - names:
        raise BadInput(f"{path} holds {sorted(found)}; the model's inputs are {sorted(names)}")
    return found


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (ValueError, TypeError, AttributeError, OSError, EOFError, BadZipFile) as error:
        raise BadInput(f"{path} is no .npz file of arrays: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is no safetensors file: {error}") from error
