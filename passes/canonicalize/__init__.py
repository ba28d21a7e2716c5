"""Bring a captured graph into the one form that all other passes match.

No-ops go (casts to the same type, full slices, evaluation dropout), equal nodes become one, and
what the source spelled out is raised to one operator: RMSNorm, LayerNorm, RoPE, grouped-query
attention, fused splits, Conv1D / addmm / matmul, BatchNorm. Every rule is an equation over the
reals, so the pass is exact; each file holds the rules of one subject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.edit import Edit
from qcompiler.facts import Facts
from qcompiler.history import Effect
from qcompiler.passbase import Pass
from qcompiler.passes.canonicalize import attention, batchnorm, fused, linear, norms, tidy

RULES = (
    tidy.drop_no_ops,
    tidy.raise_splits,
    fused.select_before_permute,
    fused.slice_constant_index,
    fused.slice_fused,
    tidy.merge_equal,
    norms.raise_rms_core,
    norms.raise_layer_norm,
    norms.absorb_gain,
    norms.absorb_bias,
    attention.raise_rope,
    attention.raise_grouped_heads,
    linear.raise_linear,
    linear.absorb_bias,
    linear.drop_flattening,
    batchnorm.raise_batch_norm,
    batchnorm.fold_batch_norm,
    tidy.drop_no_ops,
)


@dataclass(frozen=True, kw_only=True)
class Canonicalize(Pass):
    """Drop no-ops and raise what the source spelled out (norms, RoPE, attention, linear)."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT
    reads: ClassVar[tuple[str, ...]] = ("weights",)
    destroys: ClassVar[tuple[str, ...]] = ("rotation", "scales")

    def run(self, edit: Edit, facts: Facts) -> None:
        for rule in RULES:
            rule(edit)
