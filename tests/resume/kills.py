"""Kill a run at random moments, let it go on, and compare with the undisturbed one.

    python tests/resume/kills.py PASSES KILLS FOLDER

One process imports everything and forks a child for each run, so that a run takes as long as its
work. Prints one JSON object: the digests of all results, how far each kill came, and how many
files were found that cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import qcompiler
from qcompiler import facts
from qcompiler.sensitivity import sampling

WIDTH, DEPTH, BATCHES = 96, 6, 24


class Residual(nn.Module):
    """A residual block of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def batches() -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, WIDTH, generator=generator) for _ in range(BATCHES)]


def run(passes: str, work: Path, result: Path) -> None:
    """One compilation; the digest of its parameters, and what it had to do, go to `result`."""
    torch.set_num_threads(1)
    facts.EVERY = sampling.EVERY = 0.0  # these runs last a second, not hours
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(DEPTH)))
    compiled = qcompiler.compile(
        model,
        (torch.randn(64, WIDTH),),
        passes=passes,
        backend="reference",
        data=batches(),
        work=work,
    )
    hasher = hashlib.sha256()
    for name, value in sorted(compiled.program.params.items()):
        held = value.contiguous().reshape(-1).view(torch.uint8)
        hasher.update(name.encode() + held.numpy().tobytes())
    result.write_text(hasher.hexdigest()[:16])


def child(passes: str, work: Path, result: Path, delay: float | None) -> float:
    """Run in a fork, and kill it `delay` seconds after it has written something down.

    Returns how long it lived since then.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(passes, work, result)
            code = 0
        finally:
            os._exit(code)
    began = None
    while began is None or delay is None or time.monotonic() - began < delay:
        done, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            if status:
                raise RuntimeError(f"a run ended with {status}")
            return now - (began or now)
        if began is None and work.exists():
            began = now
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return delay


def unreadable(folder: Path) -> int:
    """Files in their place that are not whole; what is beside its place is not counted."""
    found = 0
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    opened.get_tensor(key)
        except (SafetensorError, OSError):
            found += 1
    return found


def main() -> None:
    passes, kills, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    result = folder / "result.json"
    whole = child(passes, folder / "undisturbed", result, None)
    wanted = result.read_text()
    moments = random.Random(0)
    digests, broken, went_on = [], 0, 0
    for number in range(kills):
        work = folder / f"work{number}"
        result.unlink(missing_ok=True)
        child(passes, work, result, moments.uniform(0, whole))
        broken += unreadable(work)
        kept = len(list(work.rglob("*.safetensors"))) if work.exists() else 0
        if not result.exists():
            child(passes, work, result, None)
            went_on += kept > 0
        digests.append(result.read_text())
        broken += work.exists()  # a finished run leaves nothing behind
    print(json.dumps({"wanted": wanted, "found": digests, "broken": broken, "went_on": went_on}))


if __name__ == "__main__":
    main()
