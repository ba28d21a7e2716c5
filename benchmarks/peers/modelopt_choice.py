"""NVIDIA Model-Optimizer's `auto_quantize`, by gradients; `choosing.py` says what goes in and out.

Everything is the peer's default but for these, all to its favour: no linear is left in floating
point, q, k and v need not agree (a rule of its deployment), and a format counts its scales. The
loss is the cross-entropy of the next token, or, of images, of classes drawn from what the float
model says.
"""

from __future__ import annotations

from choosing import effective, main  # isort: skip - sets the environment

import re
from collections.abc import Iterator

import modelopt.torch.quantization as mtq
import torch
from common import Batch, Format, Task
from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Labelled = tuple[Batch, Tensor]


def choose(task: Task, forms: list[Format], bits: list[float]) -> Iterator[dict[str, str]]:
    if task.kind == "minilm":
        raise NotImplementedError("scores by gradients need a loss, and sentence vectors have none")
    AutoQuantizeGradientSearcher.quant_grouping_rules = []
    AutoQuantizeGradientSearcher._custom_support.clear()  # would give gradients to embeddings only
    data = [labelled(task, batch) for batch in task.batches(task.calibration)]
    formats = [recipe(task, form) for form in forms]
    kept = {
        name: module.weight.numel()
        for name, module in task.model().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in task.shapes
    }
    size, rest = task.weights, sum(kept.values())  # the peer counts what it must keep, 16 bits each
    for target in bits:
        with torch.enable_grad():
            _, state = mtq.auto_quantize(
                task.model(),
                constraints={"effective_bits": (size * target + rest * 16) / (size + rest)},
                module_search_spaces=[
                    {
                        "module_name_patterns": list(task.shapes),
                        "quantization_formats": formats,
                        "allow_no_quant": False,
                    }
                ],
                quantization_formats=formats,
                data_loader=data,
                forward_step=lambda model, batch: task.runner(model)(batch[0]),
                loss_func=lambda logits, batch: loss(task, logits, batch),
                disabled_layers=[*kept],
                num_calib_steps=len(data),
                num_score_steps=len(data),
                checkpoint=f"{task.scratch.name}/scores.pth",
            )
        found = {n.removesuffix(".quant_recipe"): r for n, r in state["best"]["recipe"].items()}
        yield {name: forms[place(found[name])].name for name in task.shapes}


def recipe(task: Task, form: Format) -> dict[str, object]:
    weight: dict[str, object] = {"num_bits": form.bits}
    weight |= {"block_sizes": {-1: form.group}} if form.group else {"axis": 0}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
        ],
        "algorithm": "max",
        "effective_bits": effective(task, form),
    }


def place(chosen: object) -> int:
    """Which of the recipes it was, by the name that it is given."""
    found = re.match(r"CUSTOM_MODULE_0_(\d+)\(", str(chosen))
    assert found is not None, chosen
    return int(found[1])


def labelled(task: Task, batch: Batch) -> Labelled:
    if task.kind == "llama":
        return batch, batch["input_ids"]
    with torch.no_grad():
        classes = task.runner(task.model())(batch).softmax(-1)
    return batch, torch.multinomial(classes, 1).flatten()


def loss(task: Task, logits: Tensor, batch: Labelled) -> Tensor:
    labels = batch[1]
    if task.kind == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


if __name__ == "__main__":
    main(__doc__, ("nvidia-modelopt", "torch"), choose)
