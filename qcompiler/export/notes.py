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


def stored_format(site: Site) -> QFormat | None:
    """The format of the site's weight, if that is stored as codes."""
    for node in (site.weight, *site.weight.all_input_nodes):
        if node.target is qc.dequantize.default:
            return QFormat.parse(str(node.args[3]))
    return None


def notes(program: Program, unsigned: bool) -> tuple[str, ...]:
    """Those that a file of the program needs, its weights written as uint8 if `unsigned`."""
    found: dict[str, None] = {}
    for site in sites(program.nodes):
        weight, x = stored_format(site), site.x
        if weight is None or x is None or not weight.is_integer:
            continue
        if x.target is not qc.fake_quantize.default:
            found |= {ROUNDS: None} if weight.bits <= 8 else {}
        elif weight.bits == 8 and _is_eight_bits(QFormat.parse(str(x.args[1]))) and not unsigned:
            found[SATURATES] = None
    return tuple(found)


def _is_eight_bits(format: QFormat) -> bool:
    return format.is_integer and format.bits == 8
