"""What was measured on this machine, on disk: one JSON file for each backend and environment.

A file is replaced in one step, so that a kill leaves the old one; one that cannot be read is
measured anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from qcompiler.version import __version__

RUNTIMES = ("torch", "onnxruntime", "openvino")


def cache_folder(name: str) -> Path:
    """Where this user keeps what can be measured again: `$QCOMPILER_CACHE`, else the system's."""
    if own := os.environ.get("QCOMPILER_CACHE"):
        return Path(own) / name
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcompiler" / name


def environment(backend: str) -> dict[str, str]:
    """All of this machine that seconds depend on."""
    return {
        "backend": backend,
        "qcompiler": __version__,
        **{name: _version(name) for name in RUNTIMES},
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


class Cache:
    """Key → measured value (JSON) of one environment."""

    def __init__(self, folder: Path, about: Mapping[str, str], fresh: bool = False) -> None:
        """`fresh`: forget what is there."""
        name = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:16]
        self._place = folder / f"{name}.json"
        self._about = dict(about)
        self._known: dict[str, object] = {} if fresh else self._read()

    def get(self, key: str) -> object:
        """What was measured, or None."""
        return self._known.get(key)

    def put(self, key: str, value: object) -> None:
        """Write it down at once, beside what other processes wrote meanwhile. Where nothing can be
        written it is known to this process alone."""
        self._known[key] = value
        known = self._read() | self._known
        beside = self._place.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            try:
                beside.write_text(json.dumps({"about": self._about, "known": known}, indent=1))
                os.replace(beside, self._place)
            finally:
                beside.unlink(missing_ok=True)

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(self._place.read_text())["known"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found if isinstance(found, dict) else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
