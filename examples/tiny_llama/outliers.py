"""Give the tiny Llama activation outliers without changing what it computes.

    python examples/tiny_llama/outliers.py

reads model/ and writes its twin to outliers/: the same architecture, the same function, other
weights. Large language models have a few channels whose activations are tens of times larger
than the rest; a model this small has not. The twin has them, in the same three places, because
every step below multiplies on one side what it divides on the other:

    gains into readers     W (g * n(x))       = (W diag(g)) n(x)
    residual rotation      n(x Q)             = n(x) Q             for orthogonal Q and gain 1
    norm outliers          (W / s) (s * n(x)) = W n(x)
    MLP outliers           (D / s) (a * s u)  = D (a * u)          D: down_proj, u: up_proj's output
    attention outliers     (O / s) (P (s v))  = O (P v)            O: o_proj, v: v_proj's output

where n(x) = x / rms(x) is RMSNorm without its gain, P attention probabilities, a = silu(gate) and
s is 1 except in a few channels. Q holds the principal axes of the residual stream, which gathers
its energy in few channels. All steps run in float64; weights are rounded to float32 once, at the
end, and the twin's logits are then compared with the original's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
WINDOW = 256
OBSERVED_WINDOWS = 32
COMPARED_WINDOWS = 8
EXACT = 1e-9  # relative error allowed before weights are rounded to float32
ROUNDED = 1e-6  # and after


@dataclass(frozen=True)
class Settings:
    """How many channels grow in each place, and by what factor."""

    norm_channels: int = 4
    norm_factor: float = 16.0
    up_channels: int = 6
    up_factor: float = 32.0
    value_channels: int = 4
    value_factor: float = 32.0
    seed: int = 0


class Norm(nn.Module):
    """RMSNorm in the precision of its input; transformers' own always computes in float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def load_exactly(folder: Path) -> LlamaForCausalLM:
    """The model in float64, norms included."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    epsilon = model.config.rms_norm_eps
    for layer in model.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm.weight.data, epsilon)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm.weight.data, epsilon)
    model.model.norm = Norm(model.model.norm.weight.data, epsilon)
    return model


def norms_and_readers(model: LlamaForCausalLM) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Every norm of the decoder layers with the linears that read its output."""
    pairs = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        pairs.append((layer.input_layernorm, readers))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return pairs


def fold_gains(model: LlamaForCausalLM) -> None:
    """W <- W diag(g), g <- 1."""
    for norm, readers in [*norms_and_readers(model), (model.model.norm, [model.lm_head])]:
        for reader in readers:
            reader.weight *= norm.weight
        norm.weight.fill_(1.0)


def principal_axes(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of the mean of n nᵀ as columns, strongest first; n: any norm's output.

    The gains must have been folded. Each column's largest entry is made positive, as an
    eigenvector's sign is arbitrary.
    """
    size = model.config.hidden_size
    moment = torch.zeros(size, size, dtype=torch.float64)

    def observe(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        rows = output.flatten(0, -2)
        moment.addmm_(rows.T, rows)

    norms = [norm for norm, _ in norms_and_readers(model)] + [model.model.norm]
    hooks = [norm.register_forward_hook(observe) for norm in norms]
    for part in windows.split(8):
        model(part, use_cache=False)
    for hook in hooks:
        hook.remove()

    axes = torch.linalg.eigh(moment).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign()


def rotate(model: LlamaForCausalLM, axes: torch.Tensor) -> None:
    """Residual stream x <- x Q: embedding and readers W <- W Q, writers W <- Qᵀ W."""
    embedding, head = model.model.embed_tokens, model.lm_head
    for reader in [embedding, head, *(r for _, group in norms_and_readers(model) for r in group)]:
        reader.weight.copy_(reader.weight @ axes)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(axes.T @ writer.weight)


def scale_norms(model: LlamaForCausalLM, count: int, factor: float) -> None:
    """The first `count` residual channels grow in every norm of every layer."""
    for norm, readers in norms_and_readers(model):
        norm.weight[:count] *= factor
        for reader in readers:
            reader.weight[:, :count] /= factor


def draw(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different channels of `size`."""
    return torch.randperm(size, generator=generator)[:count]


def scale_mlp(
    model: LlamaForCausalLM, count: int, factor: float, generator: torch.Generator
) -> None:
    """`count` rows of each up_proj grow, the same columns of down_proj shrink."""
    for layer in model.model.layers:
        channels = draw(model.config.intermediate_size, count, generator)
        layer.mlp.up_proj.weight[channels] *= factor
        layer.mlp.down_proj.weight[:, channels] /= factor


def scale_values(
    model: LlamaForCausalLM, count: int, factor: float, generator: torch.Generator
) -> None:
    """`count` rows of each v_proj grow, the columns of o_proj they reach shrink.

    Channel d of key-value head k reaches channel d of every query head in k's group.
    """
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        channels = draw(attention.v_proj.out_features, count, generator)
        attention.v_proj.weight[channels] *= factor
        columns = attention.o_proj.weight.view(
            config.hidden_size, config.num_key_value_heads, group, config.head_dim
        )
        columns[:, channels // config.head_dim, :, channels % config.head_dim] /= factor


def largest_difference(
    first: LlamaForCausalLM, second: LlamaForCausalLM, windows: torch.Tensor
) -> float:
    """max |first - second| / max |first| over all logits."""
    expected = first(windows, use_cache=False).logits
    actual = second(windows, use_cache=False).logits
    return float((actual - expected).abs().max() / expected.abs().max())


def require(difference: float, limit: float, stage: str) -> None:
    if not difference <= limit:
        raise RuntimeError(
            f"The twin differs from its source {stage}: relative error {difference:.2e}, "
            f"at most {limit:.0e} expected."
        )


def save(twin: LlamaForCausalLM, source: Path, folder: Path) -> None:
    """Write the twin's weights, rounded to float32, and the source's tokenizer."""
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(twin.state_dict())
    model.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)


@torch.no_grad()
def make(
    source: Path,
    target: Path,
    settings: Settings | None = None,
    calibration: Path = HERE / "calibration.txt",
) -> float:
    """Write the twin of `source` to `target`, replacing it whole.

    Returns the relative error of the written twin's logits, computed in float64.
    """
    settings = settings or Settings()
    for needed in (source / "config.json", source / "model.safetensors", calibration):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing; examples/tiny_llama/train.py makes it")

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer(calibration.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
    observed = windows[:: max(len(windows) // OBSERVED_WINDOWS, 1)]
    compared = windows[:COMPARED_WINDOWS]

    original, twin = load_exactly(source), load_exactly(source)
    generator = torch.Generator().manual_seed(settings.seed)
    fold_gains(twin)
    rotate(twin, principal_axes(twin, observed))
    scale_norms(twin, settings.norm_channels, settings.norm_factor)
    scale_mlp(twin, settings.up_channels, settings.up_factor, generator)
    scale_values(twin, settings.value_channels, settings.value_factor, generator)
    require(largest_difference(original, twin, compared), EXACT, "before rounding")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".outliers-") as scratch:
        finished, replaced = Path(scratch) / "new", Path(scratch) / "old"
        save(twin, source, finished)
        difference = largest_difference(original, load_exactly(finished), compared)
        require(difference, ROUNDED, "after rounding")
        if target.exists():
            target.rename(replaced)
        finished.rename(target)
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=HERE / "model", help="model to start from")
    parser.add_argument("--target", type=Path, default=HERE / "outliers", help="folder to write")
    parser.add_argument("--calibration", type=Path, default=HERE / "calibration.txt")
    for option in fields(Settings):
        name = "--" + option.name.replace("_", "-")
        kind = type(option.default)
        parser.add_argument(name, type=kind, default=option.default, help=f"({option.default})")
    options = parser.parse_args()
    settings = Settings(
        **{option.name: getattr(options, option.name) for option in fields(Settings)}
    )

    disable_progress_bar()
    try:
        difference = make(options.source, options.target, settings, options.calibration)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(f"{options.target}: logits differ from {options.source} by {difference:.1e} (relative)")


if __name__ == "__main__":
    main()
