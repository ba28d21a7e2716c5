"""auto-round's `AutoScheme`; `choosing.py` says what goes in and out.

Everything is the peer's default but for the data, which are ours in place of `pile-10k`. It scores
by the loss that a language model of transformers computes for itself; other kinds have none, and
the peer says so in its own way.
"""

from __future__ import annotations

from choosing import main  # isort: skip - sets the environment

from collections.abc import Iterator

import torch
from auto_round import AutoScheme
from auto_round.auto_scheme import delta_loss
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from auto_round.schemes import QuantizationScheme
from common import Format, Task
from transformers import AutoTokenizer


def choose(task: Task, forms: list[Format], bits: list[float]) -> Iterator[dict[str, str]]:
    data = task.batches(task.calibration)
    delta_loss.get_dataloader = lambda *args, **options: data
    schemes = [
        QuantizationScheme(form.bits, form.group or -1, form.symmetric, act_bits=16)
        for form in forms
    ]
    names = {(s.bits, s.group_size): form.name for s, form in zip(schemes, forms, strict=True)}
    with torch.enable_grad():
        found = GenScheme(
            AutoScheme(avg_bits=bits, options=schemes, low_gpu_mem_usage=False),
            task.model(),
            [*task.shapes],
            {},
            device_map="cpu",
            tokenizer="" if task.kind == "digits" else AutoTokenizer.from_pretrained(task.folder),
            enable_torch_compile=False,
        ).get_layer_config()
    for target in bits:
        yield {n: names[s["bits"], s["group_size"]] for n, s in found[target].items()}


if __name__ == "__main__":
    main(__doc__, ("auto-round", "transformers", "torch"), choose)
