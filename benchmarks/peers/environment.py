"""The peers' own environments: `python_of("auto-round")` is a Python that has auto-round.

    python benchmarks/peers/environment.py [NAME …]      make those named, or all

A peer's packages and pins are in `<name>.txt`. Peers whose pins agree share an environment; each
leaves its own stamp there, so that one which cannot be installed takes no other with it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "llmcompressor": "llmcompressor",  # its compressed-tensors and transformers are older
    "torchao": "shared",
    "autoround": "shared",
    "nncf": "shared",
    "onnxruntime": "shared",
}
"""Peer → the environment `.venv-<name>` that it lives in."""
CHOOSING = {
    "autoround": "shared",
    "modelopt": "shared",
    "mct": "mct",  # its pydantic, networkx and matplotlib are older
}
"""The same of those that choose formats for each layer."""


class Unavailable(Exception):
    """A peer that cannot be installed here, and why."""


def script_of(name: str) -> Path:
    """The peer's script, to be run by its `python_of`."""
    return HERE / f"{name}_run.py"


def chooser_of(name: str) -> Path:
    """The same for a script that chooses formats."""
    return HERE / f"{name}_choice.py"


def python_of(name: str) -> Path:
    """The Python of the peer's environment, made when it is missing or the peer's pins changed."""
    known = ENVIRONMENTS | CHOOSING
    if name not in known:
        raise Unavailable(f"there is no peer {name!r}; there are {', '.join(known)}")
    folder = HERE / f".venv-{known[name]}"
    python, pins = folder / "bin" / "python", HERE / f"{name}.txt"
    stamp, wanted = folder / f".ready-{name}", pins.read_text()
    if python.exists() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"installing {name} with its own torch in {folder.name}, 1.5 GB …", file=sys.stderr)
    try:
        if not python.exists():
            venv.create(folder, clear=True, with_pip=True)
        for arguments in steps(pins):
            command = [python, "-m", "pip", "install", "-q", *arguments]
            subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        why = f"{name} cannot be installed: pip ended with {error.returncode}, see above"
        raise Unavailable(why) from error
    except OSError as error:
        raise Unavailable(f"{name} cannot be installed: {error}") from error
    stamp.write_text(wanted)
    return python


def steps(pins: Path) -> list[list[str | Path]]:
    """Arguments of pip, in order: torch first and pinned, or several GB of CUDA follow.

    Lines that start with `#!no-deps` are packages that ask for more than their use here needs.
    """
    mark = "#!no-deps "
    alone = [r.removeprefix(mark) for r in pins.read_text().splitlines() if r.startswith(mark)]
    last: list[list[str | Path]] = [["--no-deps", *alone]] if alone else []
    return [["-c", pins, "torch"], ["-r", pins], *last]


def main() -> None:
    failed = False
    for name in sys.argv[1:] or ENVIRONMENTS | CHOOSING:
        try:
            print(f"{name}: {python_of(name)}")
        except Unavailable as error:
            failed = True
            print(error, file=sys.stderr)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
