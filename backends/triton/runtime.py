"""Where Triton's kernels run: on a GPU, or, for tests, in Triton's interpreter on the CPU.

The interpreter is chosen by `TRITON_INTERPRET=1` before triton is first imported, and for good.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether kernels run in the interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device() -> torch.device:
    """The device on which artifacts run."""
    if interpreted() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def unavailable() -> str | None:
    """Why no kernel can run here, in one sentence, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'qcompiler[triton]'"
    if not interpreted() and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no GPU; use --backend cpu, or set TRITON_INTERPRET=1 "
            "to try the kernels, very slowly, in Triton's interpreter"
        )
    return None


@lru_cache(maxsize=8)
def capability(where: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU, (9, 0) for an H100; (8, 0) of the interpreter."""
    return torch.cuda.get_device_capability(where) if where.type == "cuda" else (8, 0)


def has(feature: str) -> bool:
    """Whether the GPU is of compute capability `sm_89`, say, or a later one; the interpreter has
    everything."""
    if device().type != "cuda":
        return True
    number = int(feature.removeprefix("sm_"))
    return capability(device()) >= divmod(number, 10)


@lru_cache(maxsize=8)
def processors(where: torch.device) -> int:
    """Multiprocessors of a GPU; a few in the interpreter."""
    if where.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(where).multi_processor_count)
