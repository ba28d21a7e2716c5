"""Shared by all tests: one thread, a quiet log, and each small model captured once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

Captured = Callable[..., tuple[torch.nn.Module, object, object]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two spinning threads are slower than one whenever anything else runs."""
    torch.set_num_threads(1)
    for name in ("torchao", "transformers", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def captured() -> Captured:
    """`captured(name, dtype)` → (module, example inputs, program) of a model in `zoo.py`."""
    import zoo

    import qcompiler

    @cache
    def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[object, object, object]:
        module, example = zoo.build(name, dtype)
        return module, example, qcompiler.capture(module, example)

    return make
