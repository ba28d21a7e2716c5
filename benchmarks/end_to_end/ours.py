"""Our artifacts, by kind of model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import qcompiler
from end_to_end.peers import Contender

if TYPE_CHECKING:
    from run import Case

W4 = "int4:group32:mirrored:scale(fp16)"
INT8 = "int8:token:dynamic"
SUMS = "uint8:tensor:asym sum=uint8:tensor:asym"
UINT8 = "uint8:tensor:asym"
OURS: dict[str, dict[str, tuple[str, str, str]]] = {
    "decoder": {
        "qcompiler cpu W4A8 g32": ("cpu", W4, INT8),
        "qcompiler cpu W4A8 g128": ("cpu", W4.replace("32", "128"), INT8),
        "qcompiler cpu W8A8": ("cpu", "int8:channel", INT8),
        "qcompiler cpu W4A32": ("cpu", "int4:group128:mirrored:scale(fp16)", "float"),
        "qcompiler onnxruntime W8A8": ("onnxruntime", "int8:channel", INT8),
        "qcompiler onnxruntime W4A8 g32": ("onnxruntime", W4, "int8:group32:dynamic"),
    },
    "encoder": {
        "qcompiler cpu W4A8 g32": ("cpu", W4, INT8),
        "qcompiler cpu W8A8": ("cpu", "int8:channel", INT8),
        "qcompiler onnxruntime W8A8": ("onnxruntime", "int8:channel", INT8),
        "qcompiler onnxruntime W4A8 g32": ("onnxruntime", W4, "int8:group32:dynamic"),
    },
    "pictures": {
        "qcompiler cpu W8A8 static": ("cpu", "int8:channel", UINT8),
        "qcompiler onnxruntime W8A8 static": ("onnxruntime", "int8:channel", UINT8),
        "qcompiler onnxruntime W8A8 static, sums": ("onnxruntime", "int8:channel", SUMS),
    },
}
"""Kind → name → backend, weight and activation format; the head is like all other layers."""


def compiled(case: Case, backend: str, weight: str, activation: str) -> Contender:
    """The model compiled."""
    assign = f"assign{{weight={weight} activation={activation} head={weight}}}"
    artifact = qcompiler.compile(
        case.model,
        case.inputs,
        passes=f"canonicalize{{optional=true}},fold{{optional=true}},{assign},quantize",
        backend=backend,
        dynamic=case.dynamic,
        data=case.calibration or None,
    )
    return Contender(lambda inputs: artifact(**inputs), artifact.bytes)
