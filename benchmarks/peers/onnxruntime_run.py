"""onnxruntime's quantizers at our formats; `common.py` says what goes in and comes out.

The model is exported with `torch.onnx` and runs in onnxruntime, products of weights alone in
float32 and those of 8 bits without the saturation of processors that lack VNNI. Everything is the
peer's default but for what the rows' names say. What is needed to read the rows:

* `nearest`, `rtn`, `k_quant`, `hqq` and `gptq` are `MatMulNBitsQuantizer`'s algorithms, for 2, 4
  and 8 bits in groups. A group that is not full is stored full. `k_quant` and `hqq`
  are asymmetric whatever is asked for. `gptq` reads the lower half of an upper triangular factor,
  zeros, so that it carries no error over; then the rounded weights are rounded once more on
  `rtn`'s grid. What is left is round to nearest (release 1.31.1).
* `dynamic` and `static` are `quantize_dynamic` and `quantize_static` with int8 weights per channel;
  their activations are asymmetric per tensor, static ones from the smallest and largest value,
  where our w8a8 has dynamic ones per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from common import Format, Method, Result, Run, Task, main  # isort: skip - sets the environment

import onnx
import onnxruntime as ort
import torch
from onnx.numpy_helper import to_array
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)

PACKAGES = ("onnxruntime", "onnx", "onnxscript", "transformers", "torch")


class Batches(CalibrationDataReader):
    """The calibration batches under the graph's names of inputs."""

    def __init__(self, task: Task, model: onnx.ModelProto) -> None:
        names = [i.name for i in model.graph.input]
        batches = task.batches(task.calibration)
        arrays = [[v.numpy() for v in b.values()] for b in batches]
        self.feeds = iter([dict(zip(names, a, strict=True)) for a in arrays])

    def get_next(self) -> dict | None:
        return next(self.feeds, None)

    def __deepcopy__(self, memo: object) -> Batches:
        return self


class Quantizer(MatMulNBitsQuantizer):
    """RTN leaves out the nodes to exclude, GPTQ forgets to."""

    def _generate_q4_node_config(self) -> dict:
        found = super()._generate_q4_node_config()
        for config in found.values():
            config["bits"] = self.bits
        return found | dict.fromkeys(self.nodes_to_exclude, "fp32")


@cache
def exported(task: Task) -> onnx.ModelProto:
    program = torch.onnx.export(task.exported(), verbose=False)
    file = Path(task.scratch.name) / "float.onnx"
    program.save(file)
    return onnx.load(file)


def products(task: Task) -> tuple[onnx.ModelProto, list[str], list[str]]:
    """(a copy of the float model, its products with weights, what stays float of them)."""
    model = onnx.ModelProto()
    model.CopyFrom(exported(task))
    del model.graph.value_info[:]  # `quantize_dynamic` leaves them wrong where it splits a Gemm
    weights = {i.name for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
    names = [n.name for n in nodes if n.input[1] in weights]
    kept = len(task.shapes)
    return model, names[:kept], names[kept:]


def runner(model: onnx.ModelProto | Path) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options)
    names = [i.name for i in session.get_inputs()]

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        arrays = (v.numpy() for v in batch.values())
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return run


def nbits(algorithm: Callable | None = None, offers: Callable[[Format], bool] | None = None):
    """`algorithm`: (task, model, format) → a configuration; the default one without."""

    def apply(task: Task, form: Format, seed: int) -> Result:
        model, names, kept = products(task)
        quantizer = Quantizer(
            model,
            bits=form.bits,
            block_size=form.group,
            is_symmetric=form.symmetric,
            nodes_to_exclude=kept,
            algo_config=(algorithm or default)(task, model, form),
        )
        quantizer.process()
        found = quantizer.model.model
        nodes = [n for n in found.graph.node if n.op_type == "MatMulNBits"]
        if len(nodes) != len(names):
            raise RuntimeError(f"it quantized {len(nodes)} of {len(names)} products")
        held = {name for n in nodes for name in n.input[1:]}
        tensors = [to_array(i) for i in found.graph.initializer if i.name in held]
        return Result(runner(found), sum(8 * t.nbytes for t in tensors))

    return Method(apply, offers or grouped, prepare=exported)


def default(task: Task, model: onnx.ModelProto, form: Format) -> DefaultWeightOnlyQuantConfig:
    return DefaultWeightOnlyQuantConfig(form.group, form.symmetric, bits=form.bits)


def dynamic(task: Task, form: Format, seed: int) -> Result:
    model, names, _ = products(task)
    file = Path(task.scratch.name) / "dynamic.onnx"
    quantize_dynamic(
        model, file, nodes_to_quantize=names, per_channel=True, weight_type=QuantType.QInt8
    )
    return Result(runner(file), task.stored(form, 32))


def static(task: Task, form: Format, seed: int) -> Result:
    model, names, _ = products(task)
    file = Path(task.scratch.name) / "static.onnx"
    data = Batches(task, model)
    quantize_static(model, file, data, nodes_to_quantize=names, per_channel=True)
    return Result(runner(file), task.stored(form, 32))


def grouped(form: Format) -> bool:
    return form.activation is None and form.group is not None and form.bits in (2, 4, 8)


def four(form: Format) -> bool:
    return grouped(form) and form.bits == 4


def four_asymmetric(form: Format) -> bool:
    return four(form) and not form.symmetric


def w8a8(form: Format) -> bool:
    return form.name == "w8a8"


METHODS: dict[str, Method] = {
    "nearest": nbits(),
    "rtn": nbits(lambda task, model, form: RTNWeightOnlyQuantConfig(), four),
    "k_quant": nbits(lambda task, model, form: KQuantWeightOnlyQuantConfig(), four_asymmetric),
    "hqq": nbits(
        lambda task, model, form: HQQWeightOnlyQuantConfig(form.group, form.bits),
        lambda f: grouped(f) and not f.symmetric,
    ),
    "gptq": nbits(lambda task, model, form: GPTQWeightOnlyQuantConfig(Batches(task, model)), four),
    "dynamic": Method(dynamic, w8a8, prepare=exported),
    "static": Method(static, w8a8, prepare=exported),
}


if __name__ == "__main__":
    main(__doc__, PACKAGES, METHODS, slow=("gptq",))
