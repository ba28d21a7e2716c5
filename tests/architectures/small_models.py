"""Small random models of transformers' architectures, a line each.

A line is (the Auto class of what the model does, the sizes in its configuration's own words).
"""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import nn

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
WIDE = {**LAYERS, "intermediate_size": 80}
TEXT = {**WIDE, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 1}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
ROTARY = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {
    **GROUPED,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
}
IMAGE = {**WIDE, "image_size": 24, "patch_size": 8, "num_labels": 10}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
TWO = {
    **SPECIAL,
    "vocab_size": 100,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 64,
}
T5 = {
    **SPECIAL, "vocab_size": 100, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2,
    "num_heads": 4,
}  # fmt: skip
SPEECH = {
    **WIDE,
    "vocab_size": 30,
    "conv_dim": [16, 24],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}

CAUSAL, ENCODER, SEQ2SEQ = "AutoModelForCausalLM", "AutoModel", "AutoModelForSeq2SeqLM"
MASKED, VISION, SPEECH_TEXT = (
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
)

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders: grouped heads, rotary embeddings of all sorts
    "llama": (CAUSAL, GROUPED),
    "llama (tied)": (CAUSAL, {**GROUPED, "tie_word_embeddings": True}),
    "mistral": (CAUSAL, {**GROUPED, "sliding_window": 8}),
    "qwen2": (CAUSAL, ROTARY),
    "qwen3": (CAUSAL, GROUPED),
    "gemma": (CAUSAL, GROUPED),
    "gemma2": (CAUSAL, {**GROUPED, "query_pre_attn_scalar": 12}),
    "gemma3_text": (CAUSAL, {**GROUPED, "query_pre_attn_scalar": 12}),
    "phi": (CAUSAL, ROTARY),
    "phi3": (CAUSAL, ROTARY),
    "stablelm": (CAUSAL, {**ROTARY, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "cohere": (CAUSAL, ROTARY),
    "cohere2": (CAUSAL, GROUPED),
    "olmo": (CAUSAL, ROTARY),
    "olmo2": (CAUSAL, ROTARY),
    "granite": (CAUSAL, ROTARY),
    "starcoder2": (CAUSAL, ROTARY),
    "glm": (CAUSAL, GROUPED),
    "glm4": (CAUSAL, GROUPED),
    "smollm3": (CAUSAL, ROTARY),
    "nemotron": (CAUSAL, GROUPED),
    "exaone4": (CAUSAL, {**ROTARY, "sliding_window": 8}),
    "helium": (CAUSAL, GROUPED),
    "persimmon": (CAUSAL, TEXT),
    # decoders: fused projections, parallel blocks, learned positions, no positions
    "gpt2": (CAUSAL, {**TEXT, "n_inner": 80}),
    "gpt_neo": (
        CAUSAL,
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": (CAUSAL, TEXT),
    "gptj": (
        CAUSAL,
        {**TEXT, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 80, "rotary_dim": 8},
    ),
    "opt": (CAUSAL, {**TEXT, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "falcon": (CAUSAL, {**TEXT, "ffn_hidden_size": 80}),
    "falcon (grouped)": (
        CAUSAL,
        {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
    ),
    "bloom": (CAUSAL, {**TEXT, "n_layer": 2, "n_head": 4}),
    "mpt": (
        CAUSAL,
        {"d_model": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 100, "max_seq_len": 64},
    ),
    "biogpt": (CAUSAL, TEXT),
    # mixtures of experts
    "mixtral": (CAUSAL, {**EXPERTS, "num_local_experts": 3}),
    "qwen2_moe": (
        CAUSAL,
        {**EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (CAUSAL, {**EXPERTS, "num_experts": 3}),
    "olmoe": (CAUSAL, {**EXPERTS, "num_experts": 3}),
    # encoders
    "bert": (MASKED, TEXT),
    "roberta": (MASKED, TEXT),
    "distilbert": (MASKED, {**TEXT, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80}),
    "albert": (MASKED, {**TEXT, "embedding_size": 20}),
    "electra": (ENCODER, {**TEXT, "embedding_size": 20}),
    "mpnet": (ENCODER, TEXT),
    "modernbert": (
        MASKED,
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    # encoder and decoder
    "t5": (SEQ2SEQ, T5),
    "t5 (gated)": (SEQ2SEQ, {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (SEQ2SEQ, TWO),
    "marian": (SEQ2SEQ, TWO),
    "pegasus": (SEQ2SEQ, TWO),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {**TWO, "num_mel_bins": 10, "max_source_positions": 16, "max_target_positions": 64},
    ),
    # vision
    "vit": (VISION, IMAGE),
    "deit": (ENCODER, IMAGE),
    "dinov2": (VISION, IMAGE),
    "beit": (VISION, IMAGE),
    "swin": (
        VISION,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 24,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 10,
        },
    ),
    "segformer": (
        VISION,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 24],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 20,
            "num_labels": 10,
        },
    ),
    "convnext": (
        VISION,
        {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 10},
    ),
    "resnet": (
        VISION,
        {
            "embedding_size": 12,
            "hidden_sizes": [16, 24],
            "depths": [1, 2],
            "layer_type": "basic",
            "num_labels": 10,
        },
    ),
    "mobilenet_v2": (VISION, {"depth_multiplier": 0.25, "num_labels": 10}),
    # sound
    "wav2vec2": (SPEECH_TEXT, SPEECH),
    "hubert": (SPEECH_TEXT, SPEECH),
    "audio-spectrogram-transformer": (
        "AutoModelForAudioClassification",
        {
            **WIDE,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 32,
            "num_mel_bins": 16,
        },
    ),
}
"""Name (with a variant in brackets) → (Auto class, configuration)."""


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small model with jittered parameters, in evaluation mode, and example inputs."""
    import transformers

    auto, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split(" (")[0], **sizes)
    config.use_cache = False
    model = getattr(transformers, auto).from_config(config)
    for module in zoo.jitter(model).modules():
        if isinstance(module, nn.Conv2d):  # else nothing is left after many small layers
            nn.init.kaiming_normal_(module.weight)
    return model.eval(), _example(auto, model)


def _example(auto: str, model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    config = model.config
    main = model.main_input_name
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        return {main: torch.randn(3, 3, size, size, generator=generator)}
    if main == "input_features":
        example = {main: torch.randn(3, 10, 32, generator=generator)}
    elif main == "input_values" and hasattr(config, "conv_dim"):
        return {main: torch.randn(3, 400, generator=generator)}
    elif main == "input_values":
        return {main: torch.randn(3, 32, 16, generator=generator)}
    else:
        example = {main: torch.randint(4, 100, (3, 11), generator=generator)}
    if "Seq2Seq" in auto:
        example["decoder_input_ids"] = torch.randint(4, 100, (3, 7), generator=generator)
    return example
