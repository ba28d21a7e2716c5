"""Bring a captured graph into the one form that all other passes match.

No-ops go (casts to the same type, full slices, evaluation dropout), equal nodes become one, and
what the source spelled out is raised to one operator: activations, RMSNorm, LayerNorm, RoPE,
attention, fused splits, Conv1D / addmm / matmul, BatchNorm, the integer arithmetic of quantized
files. Every rule is an equation over the reals, so the pass is exact; each file holds the rules of
one subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.passes.canonicalize import (
    activations,
    attention,
    batchnorm,
    fused,
    integers,
    layout,
    linear,
    norms,
    pooling,
    rounding,
    sdpa,
    stored,
    tidy,
)

RULES = (
    tidy.drop_no_ops,
    tidy.drop_empty_parts,
    layout.merge_casts,
    layout.transpose_batches,
    layout.merge_turns,
    layout.drop_view_chains,
    tidy.raise_splits,
    fused.slice_constant_index,
    layout.select_from_slice,
    fused.select_before_permute,
    fused.slice_fused,
    tidy.merge_equal,
    rounding.raise_rounding,
    integers.raise_integer_products,
    activations.raise_silu,
    activations.raise_gelu,
    activations.raise_hardswish,
    norms.raise_rms_core,
    norms.raise_layer_norm,
    norms.absorb_gain,
    norms.absorb_bias,
    attention.raise_rope,
    sdpa.raise_attention,
    sdpa.give_heads,
    attention.raise_grouped_heads,
    linear.raise_linear,
    linear.store_turned,
    linear.absorb_bias,
    linear.drop_flattening,
    stored.raise_tables,
    stored.store_weights,
    stored.settle_stored,
    pooling.raise_means,
    batchnorm.raise_batch_norm,
    batchnorm.fold_batch_norm,
    layout.drop_view_chains,
    tidy.drop_no_ops,
    tidy.merge_equal,
)


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Drop no-ops and raise what the source spelled out (norms, RoPE, attention, linear)."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("rotation", "scales")

    optional: bool = True
    """A graph may be in that form already."""

    def run(self, edit: Edit, facts: Facts) -> None:
        for rule in RULES:
            rule(edit)
