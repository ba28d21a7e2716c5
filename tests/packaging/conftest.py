"""A fresh environment in which packages with backends are installed by pip."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees what this one has, and has nothing of its own."""

    folder: Path

    @property
    def python(self) -> Path:
        windows = sys.platform == "win32"
        return self.folder / ("Scripts/python.exe" if windows else "bin/python")

    @property
    def packages(self) -> Path:
        """Its own site-packages."""
        paths = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", paths))

    def run(self, *arguments: str, code: int = 0) -> str:
        """What `python arguments` prints, from another directory; it must end with `code`."""
        done = subprocess.run(
            [str(self.python), *arguments], capture_output=True, text=True, cwd=self.folder
        )
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def qcompiler(self, *arguments: str, code: int = 0) -> str:
        """What the command prints."""
        return self.run("-m", "qcompiler.cli", *arguments, code=code)

    def install(self, package: Path) -> None:
        """By pip, without a network: what it needs is there."""
        quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
        self.run("-m", "pip", "install", "--disable-pip-version-check", *quiet, str(package))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "environment")
    venv.create(made.folder, with_pip=False)
    here = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    # A line that imports is run; packages that were installed to be edited have such files too.
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (made.packages / "outside.pth").write_text("\n".join(lines))
    return made
