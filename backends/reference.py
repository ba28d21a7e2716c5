"""The reference: runs the quantized program as it is written, in plain torch, in every format.

Slow and right. Every other backend is compared with it.
"""

from __future__ import annotations

from typing import ClassVar

from qcompiler.backend import Backend
from qcompiler.formats import Scheme
from qcompiler.sites import Site


class ReferenceBackend(Backend):
    """Plain torch, every format."""

    name: ClassVar[str] = "reference"
    summary: ClassVar[str] = (
        "plain torch, every format, no speed: what the others are compared with"
    )
    tolerance: ClassVar[float] = 0.0

    def refuses(self, site: Site, scheme: Scheme) -> str | None:
        return None
