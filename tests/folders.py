"""Hugging Face folders for tests of what is written back to them, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY = Path(__file__).parents[1] / "examples/tiny_llama/model"
ROTATED = (
    "canonicalize{{optional=true}},assign{{{}}},smooth{{norms=false optional=true}},"
    "untie{{optional=true}},absorb_norms{{optional=true}},rotate{{optional=true}},"
    "fold{{optional=true}},quantize"
)
"""Smoothed and rotated, offline; the options of `assign` go in."""
PLAIN = "canonicalize{{optional=true}},assign{{{}}},quantize"
SMOOTHED = "canonicalize{{optional=true}},smooth,fold{{optional=true}},assign{{{}}},quantize"
SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=100,
    max_position_embeddings=64,
)


def tied_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def biased_qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False))


def large_heads_qwen3() -> nn.Module:
    """Heads of 128, which readers of GGUF assume."""
    config = Qwen3Config(**SMALL, head_dim=128, tie_word_embeddings=False)
    return Qwen3ForCausalLM(config)


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))


OWN = {f.__name__: f for f in (tied_llama, biased_qwen2, large_heads_qwen3, mistral)}


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a model of the zoo, or of one here, with jittered parameters."""
    if name in OWN:
        torch.manual_seed(0)
        module = zoo.jitter(OWN[name]()).to(dtype).eval()
    else:
        module, _ = zoo.build(name, dtype)
    module.save_pretrained(folder)
    return folder


def tokens(vocab: int = 100) -> Tensor:
    return torch.randint(0, vocab, (3, 17), generator=torch.Generator().manual_seed(3))


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative error."""
    return float((found - wanted).float().norm() / wanted.float().norm())
