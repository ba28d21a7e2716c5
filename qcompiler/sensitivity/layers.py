"""Importance of whole layers, which says nothing of schemes but by the error of their weights.

    loss = (1 - cos(x_in, x_out)) · ‖ΔW‖² / ‖W‖²        `change`: what a layer makes of its input
    loss = share( |w - μ| > σ ) · ‖ΔW‖² / ‖W‖²          `outliers`: without data

(Dumitru et al. 2024, layer-wise quantization: layer input modification, z-score distribution; a
layer is a block as in `blocks.py`.)

    loss = Σ ΔW_ij² / [H⁻¹]²_jj        H = XᵀX + λI     `salience` (SliM-LLM, Huang et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.nn.functional import cosine_similarity

from qcompiler.blocks import blocks
from qcompiler.run import evaluate
from qcompiler.samples import Flat
from qcompiler.sensitivity.base import Metric
from qcompiler.sensitivity.study import Study
from qcompiler.sensitivity.traced import trace
from qcompiler.vectors import freedom, vectors


@dataclass(frozen=True, kw_only=True)
class LayerImportance(Metric):
    """How much a layer changes what passes through it, or how many of its weights stand out."""

    name: ClassVar[str] = "layer"

    by: Literal["change", "outliers"] = "change"

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        weight = self._changes(study, batch) if self.by == "change" else _outliers(study)
        columns = []
        for id, site in study.sites.items():
            size = float(study.weight(site).square().sum()) or 1.0
            for scheme in study.candidates[id]:
                error = float(study.change(site, scheme.weight).square().sum()) / size
                columns.append(weight[id] * error)
        return torch.tensor([columns], dtype=torch.float64)

    def _changes(self, study: Study, batch: Flat) -> dict[str, float]:
        """Site id → 1 - cos of its block's input and output; 1 where they differ in shape."""
        found: dict[str, float] = {}
        before: Tensor | None = None
        values: dict[fx.Node, Tensor] = {}
        layers = blocks(study.program)
        ends = {b.tensors[0]: b for b in layers if len(b.tensors) == 1}

        def watch(node: fx.Node, value: object) -> None:
            if node in ends and isinstance(value, Tensor):
                values[node] = value.float()

        evaluate(study.program, batch, watch)
        for block in layers:
            end = values.get(block.tensors[0]) if len(block.tensors) == 1 else None
            change = 1.0
            if before is not None and end is not None and before.shape == end.shape:
                change = 1 - float(cosine_similarity(before, end, dim=-1).mean())
            found |= {s.id: change for s in block.sites}
            before = end
        return {id: found.get(id, 1.0) for id in study.sites}


def _outliers(study: Study) -> dict[str, float]:
    """Site id → share of its weights that are more than a standard deviation off their mean."""
    found = {}
    for id, site in study.sites.items():
        w = study.weight(site)
        found[id] = float(((w - w.mean()).abs() > w.std()).float().mean())
    return found


@dataclass(frozen=True, kw_only=True)
class Salience(Metric):
    """The error of each weight in units of how freely the others could make up for it."""

    name: ClassVar[str] = "salience"

    def sample(self, study: Study, batch: Flat, draw: int) -> Tensor:
        seen = trace(study, batch)
        columns = []
        for id, site in study.sites.items():
            free = freedom(vectors(site, seen.inputs[id])) if id in seen.inputs else None
            for scheme in study.candidates[id]:
                change = study.change(site, scheme.weight)
                change = change.reshape(len(change), -1).double().square().sum(0)
                columns.append(float((change if free is None else change / free.square()).sum()))
        return torch.tensor([columns], dtype=torch.float64)
