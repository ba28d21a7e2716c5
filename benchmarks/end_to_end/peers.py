"""What else there is, by kind of model: compilers and quantizers with their own advice followed."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from run import Case


@dataclass
class Contender:
    """Something that runs a case's inputs."""

    run: Callable[[dict[str, object]], object]
    bytes: int | None = None
    """Of weights, or of the file."""
    comparable: bool = True
    """Whether what it returns is for the same inputs: a cache of its own holds other numbers."""


Maker = Callable[["Case", int], Contender]


def size(case: Case) -> int:
    """Bytes of the float model's parameters."""
    return sum(p.numel() * p.element_size() for p in case.model.parameters())


def compile_float(case: Case, threads: int) -> Contender:
    """torch.compile."""
    model = torch.compile(case.model, dynamic=True)
    return Contender(lambda x: model(**x), size(case))


def torchao(config: str) -> Maker:
    """torchao's `quantize_`, compiled as its documentation advises."""

    def make(case: Case, threads: int) -> Contender:
        from torchao import quantization

        model = copy.deepcopy(case.model)
        quantization.quantize_(model, getattr(quantization, config)())
        run = torch.compile(model, dynamic=True)
        return Contender(lambda x: run(**x))

    return make


def ort(how: str) -> Maker:
    """onnxruntime on the exported model: `float`, `dynamic`, `static`, `nbits4:32`, `nbits8:32`."""

    def make(case: Case, threads: int) -> Contender:
        with tempfile.TemporaryDirectory() as folder:
            path = _exported(case, Path(folder))
            made = _quantized(case, path, how)
            return _session(made, threads)

    return make


def openvino(how: str) -> Maker:
    """OpenVINO on the exported model, `float`, or on what onnxruntime made of it, `static`."""

    def make(case: Case, threads: int) -> Contender:
        import openvino as ov

        with tempfile.TemporaryDirectory() as folder:
            path = _quantized(case, _exported(case, Path(folder)), how)
            bytes_ = path.stat().st_size
            model = ov.Core().read_model(path)
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

        def run(inputs: dict[str, object]) -> object:
            request.infer([t.numpy() for t in _flat(inputs)], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data)

        return Contender(run, bytes_)

    return make


GGUF = {"Q4_0": "int4:group32:mirrored", "Q8_0": "int8:group32"}


def gguf_file(model: Any, kind: str, folder: Path) -> Path:
    """What `export --format gguf` writes of a model, all layers in one type."""
    import qcompiler
    from qcompiler.backends.checkpoint.gguf import GgufBackend

    source, path = folder / "model", folder / "model.gguf"
    model.save_pretrained(source)
    weight = f"{GGUF[kind]}:scale(fp16)"
    passes = f"canonicalize{{optional=true}},assign{{weight={weight} head={weight}}},quantize"
    made = qcompiler.compile(source, passes=passes, backend="gguf")
    GgufBackend().write(made.program, source, path)
    return path


def llama_cpp(kind: str) -> Maker:
    """llama.cpp on a file of ours, with a cache in float32 that is its own: a step of decoding is
    behind as many tokens, and others."""

    def make(case: Case, threads: int) -> Contender:
        import llama_cpp

        past = next((k[0].shape[2] for k in [case.inputs.get("keys")] if k), 0)
        ids = case.inputs["input_ids"].flatten().tolist()
        with tempfile.TemporaryDirectory() as folder:
            path = gguf_file(case.model.model, kind, Path(folder))
            bytes_ = path.stat().st_size
            model = llama_cpp.Llama(
                str(path), n_ctx=past + len(ids), n_batch=512, n_threads=threads,
                n_threads_batch=threads, logits_all=not past, use_mmap=False, verbose=False,
                type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
            )  # fmt: skip
        model.eval([1] * past)

        def run(inputs: dict[str, object]) -> object:
            model.n_tokens = past
            model.eval(ids)
            return torch.from_numpy(model.scores[past : past + len(ids)][None])

        return Contender(run, bytes_, comparable=not past)

    return make


def inductor(case: Case, threads: int) -> Contender:
    """torch's static int8 for x86, compiled by Inductor with its constants folded."""
    import torch._inductor.config as config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = tuple(_flat(case.inputs))
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(case.model, example).module(), quantizer)
    for batch in case.calibration:
        prepared(*_flat(batch))
    with config.patch(freezing=True):
        model = torch.compile(convert_pt2e(prepared))
        model(*example)
    return Contender(lambda inputs: model(*_flat(inputs)))


def _flat(inputs: dict[str, object]) -> list[Tensor]:
    return pytree.tree_leaves(inputs)


def _exported(case: Case, folder: Path) -> Path:
    path = folder / "float.onnx"
    dims = {d: torch.export.Dim(d) for axes in case.dynamic.values() for d in axes.values()}

    def shape(name: str, value: object) -> object:
        axes = {axis: dims[d] for axis, d in case.dynamic.get(name, {}).items()}
        return pytree.tree_map(lambda _: axes, value)

    shapes = {name: shape(name, value) for name, value in case.inputs.items()}
    program = torch.export.export(
        case.model, (), kwargs=case.inputs, dynamic_shapes=shapes, strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip
    torch.onnx.export(program, (), str(path), dynamo=True, verbose=False, external_data=False)
    return path


def _quantized(case: Case, path: Path, how: str) -> Path:
    from onnxruntime import quantization as q

    target = path.with_name("quantized.onnx")
    if how == "float":
        return path
    if how == "dynamic":
        q.quantize_dynamic(path, target, weight_type=q.QuantType.QInt8)
        return target
    if how == "static":
        cleaned = path.with_name("cleaned.onnx")
        q.shape_inference.quant_pre_process(path, cleaned)
        q.quantize_static(
            cleaned, target, _Reader(case), per_channel=True,
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )  # fmt: skip
        return target
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    bits, block = map(int, how.removeprefix("nbits").split(":"))
    quantizer = MatMulNBitsQuantizer(
        onnx.load(path), bits=bits, block_size=block, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))
    return target


class _Reader:
    """Calibration batches as onnxruntime reads them."""

    def __init__(self, case: Case) -> None:
        self._left = [{k: v.numpy() for k, v in batch.items()} for batch in case.calibration]

    def get_next(self) -> dict[str, object] | None:
        return self._left.pop() if self._left else None


def _session(path: Path, threads: int) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = path.read_bytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: dict[str, object]) -> object:
        feed = dict(zip(names, (t.numpy() for t in _flat(inputs)), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return Contender(run, len(model))


_COMPILED: dict[str, Maker] = {
    "torch.compile float32": compile_float,
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8 weight-only": torchao("Int8WeightOnlyConfig"),
}
_ORT: dict[str, Maker] = {
    "onnxruntime float32": ort("float"),
    "onnxruntime quantize_dynamic": ort("dynamic"),
    "onnxruntime MatMulNBits 4:32": ort("nbits4:32"),
    "onnxruntime MatMulNBits 4:128": ort("nbits4:128"),
    "onnxruntime MatMulNBits 8:32": ort("nbits8:32"),
}
PEERS: dict[str, dict[str, Maker]] = {
    "decoder": {
        **_COMPILED,
        **_ORT,
        "OpenVINO float32": openvino("float"),
        **{f"llama.cpp {kind}": llama_cpp(kind) for kind in GGUF},
    },
    "encoder": {**_COMPILED, **_ORT, "OpenVINO float32": openvino("float")},
    "pictures": {
        "torch.compile float32": compile_float,
        "onnxruntime float32": ort("float"),
        "onnxruntime quantize_static": ort("static"),
        "OpenVINO float32": openvino("float"),
        "OpenVINO int8 (the same file)": openvino("static"),
        "torch int8, Inductor": inductor,
    },
}
"""Kind of model → name → maker."""
