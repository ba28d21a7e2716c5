"""llm-compressor's own recipes at our formats; `common.py` says what goes in and comes out.

Everything is the peer's default but for what the rows' names say. What is needed to read them:

* A symmetric int4 is −8 … 7 with s = max|x| / 7.5 there, which is our word `full`.
* `gptq` orders columns by activation with static groups, its default; `gptq (no order)` does not.
* `search` takes the observer `memoryless_mse` in place of `memoryless_minmax`.
* `SpinQuantModifier` subtracts each embedding's mean before it rotates. That is exact where a
  LayerNorm reads the stream; RMSNorm sees the mean, so a Llama becomes another function. Rows "(not
  centred)" leave this one step out. The modifier has no seed and every run of it draws the same
  signs; its factory of matrices takes a seed, and gets the row's.
* AWQ pins host memory, which is an error where there is no accelerator and nothing more where there
  is one: it is not done here.
* `autoround` leaves blocks in bfloat16 when it rounds weights alone, and then fails on a float32
  model; the method's own tool is the peer `autoround`.
* Scales are as wide as the model's weights, here 32 bits; zero points are packed like codes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "true"

from common import Format, Method, Result, Task, main  # isort: skip - it sets the environment

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.transform import TransformFactory
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQMapping
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.smoothquant.utils import DEFAULT_SMOOTHQUANT_MAPPINGS
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from torch import nn
from torch.utils.data import DataLoader

BATCH = 8
PACKAGES = ("llmcompressor", "compressed-tensors", "auto-round", "transformers", "torch")
UP_TO_DOWN = (["re:.*down_proj"], "re:.*up_proj")
MAPPINGS = {
    "digits": [
        (["re:.*attention.q", "re:.*attention.k", "re:.*attention.v"], "re:.*norm1"),
        (["re:.*up"], "re:.*norm2"),
        (["re:.*attention.o"], "re:.*attention.v"),
    ],
    "minilm": [(["re:.*attention.output.dense"], "re:.*attention.self.value")],
}
"""(readers, writer) as a user writes them for a model that the peer does not know, unlike Llama."""
Stages = Callable[[Task, dict[str, object]], list[list[Modifier]]]
"""(task, arguments of the quantizing modifier) → a list of modifiers for each call of `oneshot`."""


class NotCentred(SpinQuantModifier):
    """`SpinQuantModifier` without the step that changes what an RMSNorm model computes."""

    def _center_embeddings(self, model: nn.Module) -> None:
        pass


def smooth(task: Task, more: bool = False) -> Modifier:
    """Between norms and linears, its default; `more`: also between up_proj and down_proj.

    Between v_proj and o_proj, as ours, it cannot: with grouped queries the two differ in width, and
    it multiplies the one's columns by the other's rows (a RuntimeError on the tiny Llama).
    """
    mappings = MAPPINGS.get(task.kind)
    if more:
        mappings = [*DEFAULT_SMOOTHQUANT_MAPPINGS, UP_TO_DOWN]
    return SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings)


def awq(task: Task) -> Modifier:
    mappings = [AWQMapping(writer, readers) for readers, writer in MAPPINGS.get(task.kind, [])]
    return AWQModifier(mappings=mappings or None)


def spin(*rotations: str, centred: bool = True) -> Modifier:
    """Random Hadamard rotations at the places named."""
    kind = SpinQuantModifier if centred else NotCentred
    return kind(rotations=list(rotations), transform_type="random-hadamard")


def method(stages: Stages, **options) -> Method:
    """`stages`, with the weights' observer when `observer` is given."""
    observer = options.pop("observer", None)

    def apply(task: Task, form: Format, seed: int) -> Result:
        model = task.model()
        quantize = {"config_groups": {"all": scheme(form, observer)}, "ignore": ["lm_head", "head"]}
        with seeded(seed):
            for modifiers in stages(task, quantize):
                calibrate(task, model, modifiers)
        return result(task, model, form)

    return Method(apply, **options)


def scheme(form: Format, observer: str | None) -> QuantizationScheme:
    """Weights per group or channel, activations per token, dynamic and symmetric."""
    weights = QuantizationArgs(
        num_bits=form.bits,
        type="int",
        symmetric=form.symmetric,
        strategy="group" if form.group else "channel",
        group_size=form.group,
        **({"observer": observer} if observer else {}),
    )
    inputs = form.activation and QuantizationArgs(
        num_bits=form.activation, type="int", symmetric=True, strategy="token", dynamic=True
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def calibrate(task: Task, model: nn.Module, modifiers: list[Modifier]) -> None:
    """`oneshot`, with the calibration inputs in order where a modifier wants some."""
    data: dict[str, object] = {}
    if any(m.requires_calibration_data for m in modifiers):
        first = next(iter(task.calibration.values()))
        rows = [{k: v[i] for k, v in task.calibration.items()} for i in range(len(first))]
        data = {
            "dataset": DataLoader(rows, batch_size=BATCH),
            "num_calibration_samples": len(rows),
            "batch_size": BATCH,
            "processor": object(),  # what would make tokens of text
        }
    oneshot(model=model, recipe=modifiers, **data)


def result(task: Task, model: nn.Module, form: Format) -> Result:
    """What the layers hold, and the matrices of rotations, each once where layers share it."""
    stored = task.stored(form, 32, form.bits)
    mine = {id(p): p for p in model.parameters()}
    codes = ("weight_scale", "weight_zero_point")
    skipped = {id(p) for n, p in model.named_parameters() if n.rpartition(".")[2] in codes}
    held = sum(8 * p.nbytes for i, p in mine.items() if i not in skipped)
    return Result(task.runner(model), stored, held - 32 * task.parameters)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Give the factories of random matrices a seed, which they take and the modifier does not."""
    plain = TransformFactory.__dict__["from_scheme"]

    def from_scheme(cls: type, scheme: object, **options: object) -> object:
        return plain.__get__(None, cls)(scheme, seed=seed, **options)

    TransformFactory.from_scheme = classmethod(from_scheme)
    try:
        yield
    finally:
        TransformFactory.from_scheme = plain


def weights_only(form: Format) -> bool:
    return form.activation is None


def activations_too(form: Format) -> bool:
    return form.activation is not None


def rotated(*places: str, centred: bool = True, first: bool = False) -> Method:
    """Rotations, then rounding to nearest; `first`: SmoothQuant in a run of its own before."""

    def stages(task: Task, quantize: dict[str, object]) -> list[list[Modifier]]:
        before = [[smooth(task, more=True)]] if first else []
        return [*before, [spin(*places, centred=centred), QuantizationModifier(**quantize)]]

    return method(stages, seeded=True, kinds=("llama",))


METHODS: dict[str, Method] = {
    "nearest": method(lambda task, q: [[QuantizationModifier(**q)]]),
    "search": method(lambda task, q: [[QuantizationModifier(**q)]], observer="memoryless_mse"),
    "gptq": method(lambda task, q: [[GPTQModifier(**q)]]),
    "gptq (no order)": method(lambda task, q: [[GPTQModifier(actorder=None, **q)]]),
    "gptq + search": method(lambda task, q: [[GPTQModifier(**q)]], observer="memoryless_mse"),
    "awq": method(lambda task, q: [[awq(task), QuantizationModifier(**q)]], offers=weights_only),
    "awq + gptq": method(lambda task, q: [[awq(task), GPTQModifier(**q)]], offers=weights_only),
    "autoround": method(lambda task, q: [[AutoRoundModifier(**q)]]),
    "SmoothQuant": method(
        lambda task, q: [[smooth(task), QuantizationModifier(**q)]], offers=activations_too
    ),
    "SmoothQuant + gptq": method(
        lambda task, q: [[smooth(task), GPTQModifier(**q)]], offers=activations_too
    ),
    "SmoothQuant + up/down": method(
        lambda task, q: [[smooth(task, more=True), QuantizationModifier(**q)]],
        offers=activations_too,
        kinds=("llama",),
    ),
    "SpinQuant R1 R2": rotated("R1", "R2"),
    "SpinQuant R1 R2 R4": rotated("R1", "R2", "R4"),
    "SpinQuant R1 R2 (not centred)": rotated("R1", "R2", centred=False),
    "SpinQuant R1 R2 R4 (not centred)": rotated("R1", "R2", "R4", centred=False),
    "SpinQuant R1 R2 (not centred) + gptq": method(
        lambda task, q: [[spin("R1", "R2", centred=False)], [GPTQModifier(**q)]],
        seeded=True,
        kinds=("llama",),
    ),
    "SpinQuant R1 R2 (not centred) + awq + gptq": method(
        lambda task, q: [[spin("R1", "R2", centred=False)], [awq(task), GPTQModifier(**q)]],
        offers=weights_only,
        seeded=True,
        kinds=("llama",),
    ),
    "SmoothQuant + up/down + SpinQuant R1 R2 R4 (not centred)": rotated(
        "R1", "R2", "R4", centred=False, first=True
    ),
}


if __name__ == "__main__":
    logger.remove()
    IntermediatesCache.pin_memory = lambda self, index: None
    centred = tuple(name for name in METHODS if name.endswith(("R2", "R4")))
    main(
        __doc__, PACKAGES, METHODS, slow=("gptq (no order)", "gptq + search", "autoround", *centred)
    )
