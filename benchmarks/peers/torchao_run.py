"""torchao's configurations at our formats; `common.py` says what goes in and comes out.

Everything is the peer's default but for what the rows' names say. What is needed to read them:

* `nearest` is `Int8WeightOnlyConfig` (w8), `IntxWeightOnlyConfig` (other weights alone),
  `Int8DynamicActivationInt8WeightConfig` (w8a8) and `Int8DynamicActivationIntxWeightConfig` (w4a8,
  whose activations are asymmetric). A symmetric int4 is −8 … 7 with s = max|x| / 7.5.
* `hqq` takes `hqq_scale_only` to find the scales; `tinygemm` and `tinygemm hqq` are the int4
  prototype for CPUs, asymmetric with zero points in floating point.
* `gptq` observes the float model's inputs in one go, as the prototype does by itself. It has int8
  here; for int4 it wants the package `mslk`, which needs CUDA.
* `awq` takes bases whose weights can be scaled at run time: int8 here, int4 on accelerators.
* Codes are counted at their width, although `intx` unpacks them to int8 in memory.
"""

from __future__ import annotations

from common import Format, Method, Result, Task, main  # isort: skip - it sets the environment

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.awq import AWQConfig
from torchao.prototype.gptq import GPTQConfig
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType

PACKAGES = ("torchao", "transformers", "torch")


def configuration(form: Format, search: str = "affine") -> AOBaseConfig:
    """The configuration for a format; `search`: how its scales are found, where it has a choice."""
    width = getattr(torch, f"int{form.bits}")
    granularity = PerGroup(form.group) if form.group else PerAxis(0)
    mapping = MappingType.SYMMETRIC if form.symmetric else MappingType.ASYMMETRIC
    if form.name == "w8" and search == "affine":
        return Int8WeightOnlyConfig()
    if form.name == "w8a8":
        return Int8DynamicActivationInt8WeightConfig()
    if form.activation == 8:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=width,
            weight_granularity=granularity,
            weight_mapping_type=mapping,
            intx_choose_qparams_algorithm=search,
        )
    return IntxWeightOnlyConfig(
        weight_dtype=width,
        granularity=granularity,
        mapping_type=mapping,
        intx_choose_qparams_algorithm=search,
    )


def quantize(task: Task, model: nn.Module, config: AOBaseConfig) -> None:
    quantize_(model, config, filter_fn=lambda module, name: name in task.shapes)


def result(task: Task, model: nn.Module, form: Format, zero: int) -> Result:
    return Result(task.runner(model), task.stored(form, 32, zero))


def nearest(task: Task, form: Format, seed: int) -> Result:
    model = task.model()
    quantize(task, model, configuration(form))
    return result(task, model, form, zero=8)


def hqq(task: Task, form: Format, seed: int) -> Result:
    model = task.model()
    quantize(task, model, configuration(form, "hqq_scale_only"))
    return result(task, model, form, zero=8)


def tinygemm(search: str) -> Method:
    def apply(task: Task, form: Format, seed: int) -> Result:
        model = task.model()
        config = PrototypeInt4WeightOnlyConfig(
            group_size=form.group, int4_choose_qparams_algorithm=search
        )
        quantize(task, model, config)
        return result(task, model, form, zero=32)

    return Method(apply, offers=lambda f: int4(f) and not f.symmetric)


def observed(kind: type, steps: tuple[str, str]) -> Method:
    """Observe the calibration inputs, one by one as `awq` joins only batches of one size."""

    def apply(task: Task, form: Format, seed: int) -> Result:
        model, base = task.model(), configuration(form)
        first, last = steps
        quantize(task, model, kind(base_config=base, step=first))
        run = task.runner(model)
        with torch.no_grad():
            for row in zip(*task.calibration.values(), strict=True):
                run({k: v.unsqueeze(0) for k, v in zip(task.calibration, row, strict=True)})
        quantize(task, model, kind(base_config=base, step=last))
        return result(task, model, form, zero=8)

    return Method(apply, offers=lambda f: f.bits == 8 and f.symmetric and f.group is None)


def int4(form: Format) -> bool:
    return form.bits == 4 and form.group is not None and form.activation is None


def known(form: Format) -> bool:
    """All but 4-bit activations, and asymmetric weights beside 8-bit ones."""
    return form.activation != 4 and (form.symmetric or form.name != "w8a8-asym")


METHODS: dict[str, Method] = {
    "nearest": Method(nearest, offers=known),
    "hqq": Method(hqq, offers=lambda f: known(f) and f.symmetric and f.name != "w8a8"),
    "tinygemm": tinygemm("tinygemm"),
    "tinygemm hqq": tinygemm("hqq"),
    "gptq": observed(GPTQConfig, ("observe", "convert")),
    "awq": observed(AWQConfig, ("prepare", "convert")),
    "SmoothQuant": observed(SmoothQuantConfig, ("prepare", "convert")),
}


if __name__ == "__main__":
    main(__doc__, PACKAGES, METHODS)
