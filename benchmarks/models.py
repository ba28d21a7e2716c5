"""The models that the benchmarks time: Llamas with random weights, of the sizes asked for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


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


def tokens(vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids (1, length)."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)}
