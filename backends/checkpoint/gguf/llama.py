"""Llama and its kin as GGUF: architectures, names, the order of rows, and what the header says.

llama.cpp rotates neighbours (2i, 2i + 1) where transformers rotates halves (i, i + d/2), so that
rows of queries and keys of each head are interleaved for the architecture `llama`.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor

from qcompiler.backends.checkpoint.source import Source
from qcompiler.backends.checkpoint.weights import Weights
from qcompiler.errors import BackendError

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}


class Naming:
    """How llama.cpp calls and orders the tensors of a model."""

    def __init__(self, source: Source, weights: Weights) -> None:
        self.arch = _arch(source)
        self._config = source.settings
        self._map = get_tensor_name_map(self.arch, self._config.num_hidden_layers)
        _check(source, weights, self.arch)

    @property
    def arch_name(self) -> str:
        return str(MODEL_ARCH_NAMES[self.arch])

    def name(self, ours: str) -> str:
        """The name of the tensor that the source calls `ours`."""
        layer, _, leaf = ours.rpartition(".")
        found = self._map.get_name(layer)
        if found is None:
            raise BackendError(f"GGUF's architecture {self.arch_name} has no tensor {ours!r}")
        return f"{found}.{leaf}"

    def rows(self, ours: str, count: int) -> Tensor | None:
        """The order in which rows are written; None for the order that they have."""
        part = ours.split(".")[-2]
        if self.arch is not MODEL_ARCH.LLAMA or part not in ("q_proj", "k_proj"):
            return None
        config = self._config
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        return torch.arange(count).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)

    def header(self, writer: GGUFWriter) -> None:
        """What a reader must know to build the model."""
        c = self._config
        head = head_size(c)
        writer.add_context_length(c.max_position_embeddings)
        writer.add_embedding_length(c.hidden_size)
        writer.add_block_count(c.num_hidden_layers)
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count(c.num_attention_heads)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_vocab_size(c.vocab_size)


def head_size(config: Any) -> int:
    """Channels of a head."""
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _arch(source: Source) -> MODEL_ARCH:
    if source.architecture not in ARCHITECTURES:
        raise BackendError(
            f"a GGUF file holds {', '.join(ARCHITECTURES)}; {source.folder} is a "
            f"{source.architecture}. Export it as `onnx` or `checkpoint`"
        )
    return ARCHITECTURES[source.architecture]


def _check(source: Source, weights: Weights, arch: MODEL_ARCH) -> None:
    """Refuse what the file's header cannot say of the model."""
    config = source.settings
    rope = config.rope_parameters
    biases = [n for n in (*weights.floats, *weights.biases) if n.endswith(".bias")]
    own = {"q_proj", "k_proj", "v_proj"} if arch is MODEL_ARCH.QWEN2 else set()
    odd = [n for n in biases if n.split(".")[-2] not in own]
    for wrong, what in (
        (rope.get("rope_type", "default") != "default", f"rotary embeddings {rope}"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, f"rotary embeddings {rope}"),
        (config.hidden_act != "silu", f"activation {config.hidden_act!r}; silu is expected"),
        (getattr(config, "sliding_window", None) is not None, "attention in a sliding window"),
        (bool(weights.inputs), "inputs that are rounded"),
        (bool(odd), f"a bias {odd[0] if odd else ''} that readers leave out"),
    ):
        if wrong:
            raise BackendError(f"{source.folder} has {what}, which is not written to GGUF files")
