"""auto-round's algorithms at our formats; `common.py` says what goes in and comes out.

Everything is the peer's default but for what the rows' names say, and for `amp=False`: tuning runs
in the model's float32 rather than in bfloat16. What is needed to read the rows:

* `rtn` is zero iterations without its search of scales, `opt-rtn` zero iterations with it (weighted
  by the inputs' second moments where the format is symmetric), `signround 50` a light setting of 50
  iterations, `signround` its default of 200, `signround ext` the option `enable_alg_ext` and
  `signround neuqi` the option `enable_neuqi`, both with 200.
* Scales are float16, but float32 as `opt-rtn` leaves them; zero points are packed like codes.
"""

from __future__ import annotations

from common import BATCH, Format, Method, Result, Task, main  # isort: skip - sets the environment

import torch
from auto_round import AutoRound
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

PACKAGES = ("auto-round", "transformers", "torch")


def method(offers=lambda form: True, **options) -> Method:
    """`options` are those of `AutoRound`."""

    def apply(task: Task, form: Format, seed: int) -> Result:
        model = task.model()
        first = next(iter(task.calibration.values()))
        rows = [{k: v[i] for k, v in task.calibration.items()} for i in range(len(first))]
        compressor = AutoRound(
            model,
            tokenizer="" if task.kind == "digits" else AutoTokenizer.from_pretrained(task.folder),
            scheme=scheme(form),
            dataset=DataLoader(rows, batch_size=BATCH[task.kind]),
            nsamples=len(rows),
            seqlen=first.shape[1],
            amp=False,
            device_map="cpu",
            **options,
        )
        with torch.enable_grad():
            model, _ = compressor.quantize()
        return Result(task.runner(model.eval()), stored(task, model, form))

    return Method(apply, offers)


def scheme(form: Format) -> dict[str, object]:
    weights = {"bits": form.bits, "group_size": form.group or -1, "sym": form.symmetric}
    if form.activation is None:
        return weights | {"data_type": "int", "act_bits": 16}
    inputs = {"act_bits": form.activation, "act_group_size": -1, "act_data_type": "int"}
    return weights | inputs | {"data_type": "int", "act_sym": True, "act_dynamic": True}


def stored(task: Task, model: nn.Module, form: Format) -> int:
    """Bits by the width of the scales that it left beside each layer."""
    found = 0
    for name, shape in task.shapes.items():
        layer = model.get_submodule(name)
        scale = getattr(layer, "orig_layer", layer).scale
        if not isinstance(scale, torch.Tensor):
            raise RuntimeError(f"{name} was left as it was")
        found += form.stored(shape, 8 * scale.element_size(), form.bits)
    return found


def weights_only(form: Format) -> bool:
    return form.activation is None


METHODS: dict[str, Method] = {
    "rtn": method(iters=0, disable_opt_rtn=True),
    "opt-rtn": method(iters=0),
    "signround 50": method(iters=50),
    "signround": method(iters=200),
    "signround ext": method(iters=200, enable_alg_ext=True),
    "signround neuqi": method(iters=200, enable_neuqi=True, offers=weights_only),
    "awq": method(alg_configs="awq", offers=weights_only),
    "awq + signround": method(alg_configs=["awq", "signround"], offers=weights_only),
}


if __name__ == "__main__":
    rest = ("signround 50", "signround ext", "signround neuqi", "awq + signround")
    main(__doc__, PACKAGES, METHODS, slow=rest)
