"""What runtimes make of a file with their default options, where that is not what it says."""

from __future__ import annotations

import torch

from qcompiler.formats import QFormat
from qcompiler.program import Program
from qcompiler.sites import Site, sites

qc = torch.ops.qc
SATURATES = (
    "on x86 CPUs without VNNI, onnxruntime and OpenVINO add products of int8 weights and 8-bit "
    "activations in 16 bits, which overflow: open a session with session.x64quantprecision = 1, or "
    "write the file with --unsigned (docs/onnx.md, Saturation)"
)
ROUNDS = (
    "onnxruntime and OpenVINO may round floating-point activations to int8 in front of weights of "
    "4 and 8 bits: open a session with session.qdq_matmulnbits_accuracy_level = 0 (docs/onnx.md, "
    "Rounded activations)"
)


def bits_of(site: Site) -> int:
    """Bits of the site's weight; 0 if it is not stored as codes."""
    stored = (n for n in (site.weight, *site.weight.all_input_nodes) if _is_stored(n))
    return max((QFormat.parse(str(n.args[3])).bits for n in stored), default=0)


def notes(program: Program, unsigned: bool) -> tuple[str, ...]:
    """Those that a file of the program needs, its weights written as uint8 if `unsigned`."""
    found = []
    products = [(bits_of(s), s.x) for s in sites(program.nodes) if s.x is not None]
    rounded = [bits for bits, x in products if x.target is qc.fake_quantize.default]
    if max(rounded, default=0) >= 8 and not unsigned:
        found.append(SATURATES)
    if any(0 < bits <= 8 and x.target is not qc.fake_quantize.default for bits, x in products):
        found.append(ROUNDS)
    return tuple(found)


def _is_stored(node: torch.fx.Node) -> bool:
    return node.target is qc.dequantize.default
