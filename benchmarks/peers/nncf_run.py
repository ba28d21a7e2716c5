"""NNCF's weight compression and quantization at our formats; `common.py` says what goes in and out.

Models go through OpenVINO, as NNCF has all its algorithms there (its torch backend lacks GPTQ), and
run there in float32. Everything is the peer's default but for what the rows' names say, and for
`all_layers`, with the embedding and the last linear excepted: the peer would give them 8 bits. What
is needed to read the rows:

* `nearest` and what follows are `compress_weights`, in int4 for groups and int8 for channels; there
  are neither 2 nor 3 bits. Scales are float16, zero points are packed like codes.
* `ptq` is `quantize` for transformers: SmoothQuant (0.95), weights per channel, and activations per
  tensor with static scales, where our w8a8 has dynamic ones per token. It also rounds what enters
  the products inside attention. `ptq` halves the range of some weights for processors whose 8-bit
  product saturates, its default.
"""

from __future__ import annotations

from functools import cache

from common import Format, Method, Result, Run, Task, main  # isort: skip - sets the environment

import nncf
import openvino as ov
import torch
from nncf import CompressWeightsMode

PACKAGES = ("nncf", "openvino", "transformers", "torch")
MODES = {
    (4, True): CompressWeightsMode.INT4_SYM,
    (4, False): CompressWeightsMode.INT4_ASYM,
    (8, True): CompressWeightsMode.INT8_SYM,
    (8, False): CompressWeightsMode.INT8_ASYM,
}
PLUGIN = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # or activations are rounded to 8 bits on the way
}


@cache
def converted(task: Task) -> ov.Model:
    return ov.convert_model(task.exported())


def opened(task: Task) -> tuple[ov.Model, nncf.Dataset, nncf.IgnoredScope]:
    """(the float model, its calibration inputs, what stays float)."""
    model = converted(task).clone()
    products = [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]
    names = [] if task.kind == "minilm" else [products[-1].get_friendly_name()]
    stays = nncf.IgnoredScope(names=names, types=["Gather", "Convolution"], validate=False)
    batches = task.batches(task.calibration)
    return model, nncf.Dataset([[v.numpy() for v in b.values()] for b in batches]), stays


def runner(model: ov.Model) -> Run:
    compiled = ov.Core().compile_model(model, "CPU", PLUGIN)
    return lambda batch: torch.from_numpy(compiled([v.numpy() for v in batch.values()])[0].copy())


def compress(data: bool = True, **options) -> Method:
    """`options` are those of `compress_weights`."""

    def apply(task: Task, form: Format, seed: int) -> Result:
        model, dataset, stays = opened(task)
        arguments = {"mode": MODES[form.bits, form.symmetric], "ignored_scope": stays} | options
        if form.bits == 4:
            arguments |= {"all_layers": True, "group_size": form.group}
        if data:
            arguments["dataset"] = dataset
        model = nncf.compress_weights(model, **arguments)
        return Result(runner(model), task.stored(form, 16, form.bits))

    return Method(apply, offers=grouped if options else weights_only, prepare=converted)


def ptq(task: Task, form: Format, seed: int) -> Result:
    model, dataset, stays = opened(task)
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(model, dataset, model_type=kind, ignored_scope=stays)
    return Result(runner(model), task.stored(form, 32))


def grouped(form: Format) -> bool:
    return form.activation is None and form.bits == 4 and form.group is not None


def weights_only(form: Format) -> bool:
    return grouped(form) or form.name in ("w8", "w8-asym")


METHODS: dict[str, Method] = {
    "nearest": compress(data=False),
    "scale estimation": compress(scale_estimation=True),
    "awq": compress(awq=True),
    "awq + scale estimation": compress(awq=True, scale_estimation=True),
    "gptq": compress(gptq=True),
    "gptq + scale estimation": compress(gptq=True, scale_estimation=True),
    "ptq": Method(ptq, offers=lambda f: f.name == "w8a8", prepare=converted),
}


if __name__ == "__main__":
    main(__doc__, PACKAGES, METHODS)
