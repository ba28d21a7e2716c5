"""Sony's model-compression-toolkit, its mixed precision; `choosing.py` says what goes in and out.

Everything is the peer's default but for the platform, which is its IMX500 with weights of our
formats (it has output channels only) and with activations in floating point. Head and patch
convolution stay at 8 bits.
"""

from __future__ import annotations

from choosing import main  # isort: skip - sets the environment
import declared  # noqa: F401  # isort: skip - before the peer asks torchvision

from collections.abc import Iterator

import model_compression_toolkit as mct
import torch
from common import Format, Task
from mct_quantizers import PytorchQuantizationWrapper
from model_compression_toolkit.core.common.network_editors import NodeNameFilter
from model_compression_toolkit.target_platform_capabilities.constants import (
    KERNEL_ATTR,
    WEIGHTS_N_BITS,
)
from model_compression_toolkit.target_platform_capabilities.schema.mct_current_schema import (
    TargetPlatformCapabilities,
)
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import tpc
from torch import nn

KEPT = 8
"""Bits of what must be left alone."""


def choose(task: Task, forms: list[Format], bits: list[float]) -> Iterator[dict[str, str]]:
    data = [[*batch.values()] for batch in task.batches(task.calibration)]
    named = {form.bits: form.name for form in forms}
    places = {name.replace(".", "_"): name for name in task.shapes}
    kept = {
        name: module.weight.numel()
        for name, module in task.model().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in task.shapes
    }
    scales = task.stored(forms[0], 16) - task.stored(forms[0], 0)
    for target in bits:
        widths = mct.core.BitWidthConfig()
        for name in kept:
            widths.set_manual_weights_bit_width(NodeNameFilter(name), KEPT, "weight")
        size = target * task.weights - scales + KEPT * sum(kept.values())
        with torch.enable_grad():
            model, _ = mct.ptq.pytorch_post_training_quantization(
                task.model(),
                lambda: iter(data),
                mct.core.ResourceUtilization(weights_memory=size / 8),
                mct.core.CoreConfig(
                    mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(),
                    bit_width_config=widths,
                ),
                platform(forms),
            )
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, PytorchQuantizationWrapper) and name in places:
                found[places[name]] = named[module.weights_quantizers["weight"].num_bits]
        yield found


def platform(forms: list[Format]) -> TargetPlatformCapabilities:
    """The peer's own, with weights as in `forms`."""
    linear, _, rest = (
        found.clone_and_edit(enable_activation_quantization=False) if i != 1 else found
        for i, found in enumerate(tpc.get_op_quantization_configs())
    )
    widths = sorted((form.bits for form in forms), reverse=True)
    mixed = [linear.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: b}}) for b in widths]
    return tpc.generate_tpc(rest, linear, mixed, "weights")


if __name__ == "__main__":
    main(__doc__, ("model-compression-toolkit", "torch"), choose)
