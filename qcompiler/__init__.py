"""qcompiler: a compiler-style graph rewriting toolkit that quantizes neural networks."""

from qcompiler import ops as _ops  # registers the qc:: operators
from qcompiler.capture import capture
from qcompiler.errors import BackendError, BadInput, PassError, QCompilerError
from qcompiler.formats import QFormat, Scheme
from qcompiler.program import Program

__version__ = "0.1.0"
__all__ = [
    "BackendError", "BadInput", "PassError", "Program", "QCompilerError", "QFormat", "Scheme",
    "capture",
]
