"""Saving and loading what `compile` made.

::

    OUT/qcompiler.json          manifest; names the content folder, replaced atomically
    OUT/content-<digits>/       program.json  params.safetensors  history.json.gz
                                backend/      what the artifact itself needs
                                tokenizer/    from the source folder, if it had one; end tokens

New content is written beside the old and the manifest replaced last, in one atomic step: whatever
happens before it, a full disk or a kill, the old artifact is still there and whole.
"""

from __future__ import annotations

import gzip
import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qcompiler.backend import Artifact
from qcompiler.capture import Source
from qcompiler.codec import Json, decode_history, decode_program, encode_history, encode_program
from qcompiler.errors import BadInput
from qcompiler.keep import check_folder
from qcompiler.program import Program, digest
from qcompiler.version import __version__

MANIFEST = "qcompiler.json"
VERSION = 1
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class About:
    """What is worth knowing of a compilation beside the program itself."""

    backend: str
    float_bytes: int
    """Bytes of the parameters at capture."""
    source: Source
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """A saved artifact, read without building anything: enough to inspect and to compare."""

    folder: Path
    program: Program
    about: About
    content: Path

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer files, if the source had some."""
        path = self.content / "tokenizer"
        return path if path.is_dir() else None


def save(program: Program, artifact: Artifact, about: About, folder: Path) -> Path:
    """Write a compilation to `folder`; the module docstring says what a failure leaves behind."""
    check_place(folder)
    made = not folder.exists()
    content = folder / f"content-{secrets.token_hex(4)}"
    try:
        content.mkdir(parents=True)
        _write_content(program, artifact, about, content)
        _write_manifest(program, about, content)
    except BaseException as error:
        shutil.rmtree(folder if made else content, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise BadInput(
                f"cannot write to {folder}: {error}; nothing was changed there"
            ) from error
        raise
    for old in folder.glob("content-*"):
        if old != content:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def check_place(folder: Path) -> None:
    """Refuse a `folder` that no compilation is written to."""
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise BadInput(
            f"{folder} holds other files and no qcompiler artifact; choose another place"
        )


def _is_ours(folder: Path) -> bool:
    names = {p.name for p in folder.iterdir()}
    return MANIFEST in names or all(n.startswith("content-") for n in names)


def _write_content(program: Program, artifact: Artifact, about: About, content: Path) -> None:
    tensors = {name: t.contiguous() for name, t in program.params.items()}
    save_file(tensors, content / "params.safetensors")
    (content / "program.json").write_text(json.dumps(encode_program(program), indent=1))
    with gzip.open(content / "history.json.gz", "wt", encoding="utf-8", compresslevel=5) as file:
        json.dump(encode_history(program.history), file)
    (content / "backend").mkdir()
    artifact.save(content / "backend")
    if about.source.kind == "folder":
        _copy_tokenizer(Path(about.source.place), content / "tokenizer")


def _copy_tokenizer(source: Path, target: Path) -> None:
    found = [source / n for n in TOKENIZER_FILES if (source / n).is_file()]
    if found:
        target.mkdir()
        for file in found:
            shutil.copy(file, target)


def _write_manifest(program: Program, about: About, content: Path) -> None:
    manifest = {
        "format": VERSION,
        "qcompiler": __version__,
        "content": content.name,
        "pipeline": ",".join(step.spec for step in program.history[1:]),
        "bytes": program.bytes,
        **asdict(about),
    }
    temporary = content / MANIFEST  # inside, so that a kill here leaves nothing beside it
    with temporary.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, content.parent / MANIFEST)


def read(folder: str | Path) -> Saved:
    """Read a saved artifact without building it."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    content = folder / str(manifest["content"])
    if content.parent != folder or not content.is_dir():
        raise BadInput(f"{folder / MANIFEST} names {manifest['content']!r}, which is not there")
    try:
        params = load_file(content / "params.safetensors")
        raw = json.loads((content / "program.json").read_text())
        with gzip.open(content / "history.json.gz", "rt", encoding="utf-8") as file:
            history = decode_history(json.load(file))
        program = replace(decode_program(raw, params), history=history)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, EOFError) as error:
        raise BadInput(
            f"the artifact in {folder} is damaged: {error!r}; compile it again"
        ) from error
    for name, text in history[-1].after.params.items():
        if name not in params or digest(params[name]) != text.digest:
            raise BadInput(f"parameter {name!r} in {folder} is damaged; compile it again")
    about = About(
        manifest["backend"],
        manifest["float_bytes"],
        Source(**manifest["source"]),
        tuple(manifest["notes"]),
    )
    return Saved(folder, program, about, content)


def _read_manifest(folder: Path) -> Json:
    file = folder / MANIFEST
    if not file.is_file():
        raise BadInput(f"{folder} is no qcompiler artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise BadInput(f"{file} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != VERSION:
        raise BadInput(f"{file} has another format than this qcompiler reads ({VERSION})")
    return manifest
