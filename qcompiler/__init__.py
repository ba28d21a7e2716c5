"""qcompiler: a compiler-style graph rewriting toolkit that quantizes neural networks.

compiled = qcompiler.compile(model, example_inputs, recipe="w8a8-dynamic-smooth", data=batches)
print(compiled.diff())        # what each pass did, why, what it cost, what it skipped
compiled.save("out")          # qcompiler.load("out") brings it back
"""

from qcompiler import ops as _ops  # registers the qc:: operators
from qcompiler.backend import Artifact, Backend, Capability
from qcompiler.capture import capture
from qcompiler.compiled import Compiled, compile, load
from qcompiler.edit import Edit
from qcompiler.errors import BackendError, BadInput, PassError, QCompilerError
from qcompiler.export import export_onnx
from qcompiler.facts import Facts
from qcompiler.formats import Grid, QFormat, QTensor, Scheme
from qcompiler.history import Effect, Step
from qcompiler.passbase import Pass
from qcompiler.planning.front import plan
from qcompiler.program import Program, Tag
from qcompiler.recipe import load_recipe
from qcompiler.rounding import Rounding
from qcompiler.sensitivity import Metric
from qcompiler.spaces import find as spaces
from qcompiler.spaces.verify import verify
from qcompiler.tagged import Tagged
from qcompiler.version import __version__

del _ops
__all__ = [
    "Artifact",
    "Backend",
    "BackendError",
    "BadInput",
    "Capability",
    "Compiled",
    "Edit",
    "Effect",
    "Facts",
    "Grid",
    "Metric",
    "Pass",
    "PassError",
    "Program",
    "QCompilerError",
    "QFormat",
    "QTensor",
    "Rounding",
    "Scheme",
    "Step",
    "Tag",
    "Tagged",
    "__version__",
    "capture",
    "compile",
    "export_onnx",
    "load",
    "load_recipe",
    "plan",
    "spaces",
    "verify",
]
