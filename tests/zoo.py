"""Small random models that tests capture; sizes are chosen so that no two axes coincide."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def jitter(model: nn.Module) -> nn.Module:
    """Move gains away from 1 and biases away from 0, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            noise = torch.rand(p.shape, generator=generator).to(p.dtype)
            p.data.add_(noise * 0.5 if "bias" in name else noise - 0.5)
        else:
            p.data.mul_(2.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def _tokens(vocab: int = 100) -> torch.Tensor:
    return torch.randint(0, vocab, (3, 11), generator=torch.Generator().manual_seed(2))


def llama() -> tuple[nn.Module, object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=100,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config), {"input_ids": _tokens()}


def qwen3() -> tuple[nn.Module, object]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=100,
        max_position_embeddings=64,
    )
    return Qwen3ForCausalLM(config), {"input_ids": _tokens()}


def opt() -> tuple[nn.Module, object]:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
        dropout=0.0,
    )
    return OPTForCausalLM(config), {"input_ids": _tokens()}


def gpt2() -> tuple[nn.Module, object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=48, n_inner=80, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    return GPT2LMHeadModel(config), {"input_ids": _tokens()}


def bert() -> tuple[nn.Module, object]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
    )
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    return BertModel(config), {"input_ids": _tokens(), "attention_mask": mask}


def vit() -> tuple[nn.Module, object]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=24,
        patch_size=8,
        num_labels=10,
    )
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    return ViTForImageClassification(config), {"pixel_values": images}


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Sequential(
            nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.short(x))


class Cnn(nn.Module):
    """A small ResNet: BatchNorm, in-place ReLU, a stride, a 1×1 shortcut, a pool, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(_Block(8, 16, 2), _Block(16, 24, 1))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def cnn() -> tuple[nn.Module, object]:
    return Cnn(), torch.randn(3, 3, 18, 18, generator=torch.Generator().manual_seed(2))


MODELS: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    "llama": llama,
    "qwen3": qwen3,
    "opt": opt,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "cnn": cnn,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """A model of `MODELS` with jittered parameters, in evaluation mode, and example inputs."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    model = jitter(model).to(dtype).eval()

    def cast(x: object) -> object:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    if isinstance(example, dict):
        return model, {k: cast(v) for k, v in example.items()}
    return model, cast(example)
