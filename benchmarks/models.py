"""The models that the benchmarks time, of the sizes asked for, with random weights or real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForCausalLM


def llama(hidden: int, layers: int, intermediate: int, vocabulary: int) -> nn.Module:
    """A float32 Llama in evaluation mode, grouped queries (2 heads to a key), no cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def tokens(vocabulary: int, length: int) -> dict[str, Tensor]:
    """Token ids (1, length)."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)}


class Logits(nn.Module):
    """ids (1, tokens) → logits, nothing else: every exporter and compiler takes this."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class Step(nn.Module):
    """ids (1, 1) and the keys and values of each layer so far → logits, and both with one more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key, value, layer)
        out = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        layers = out.past_key_values.layers
        return out.logits, [c.keys for c in layers], [c.values for c in layers]


def step_inputs(layers: int, heads: int, vocabulary: int, past: int) -> dict[str, object]:
    """What a `Step` takes behind `past` tokens."""
    generator = torch.Generator().manual_seed(1)

    def cache() -> list[Tensor]:
        return [torch.randn(1, heads, past, 64, generator=generator) for _ in range(layers)]

    return {**tokens(vocabulary, 1), "keys": cache(), "values": cache()}


class Words(nn.Module):
    """MiniLM: ids and mask (batch, words) → a vector for each word."""

    def __init__(self, folder: object) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        hidden: Tensor = out.last_hidden_state
        return hidden


class Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            convolution = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones (Sandler et al. 2018, figure 3b)."""

    def __init__(self, inner: int, outer: int, stride: int, wider: int) -> None:
        super().__init__()
        hidden = inner * wider
        widen = [nn.Conv2d(inner, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        self.body = nn.Sequential(
            *(widen if wider > 1 else ()),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outer, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.adds = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return x + made if self.adds else made


def mobilenet() -> nn.Module:
    """A MobileNetV2 for pictures of 224×224 (Sandler et al. 2018, table 2)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)]
    layers.append(nn.ReLU6())
    width = 32
    for wider, outer, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            layers.append(Inverted(width, outer, stride if number == 0 else 1, wider))
            width = outer
    layers += [nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # with torch's own little is left behind 52 of them
            nn.init.kaiming_normal_(module.weight)
    return _with_statistics(model)


def resnet() -> nn.Module:
    """A ResNet-18 for pictures of 64×64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outer, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)):
        layers.append(Residual(width, outer, stride))
        width = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 100)]
    return _with_statistics(nn.Sequential(*layers))


def _with_statistics(model: nn.Module) -> nn.Module:
    """In evaluation mode, as if trained: what the norms have seen is not all alike."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.data.uniform_(0.5, 1.5)
    return model.eval()
