"""NonMaxSuppression: the best boxes, without those that overlap a better one.

How many are left depends on the data. How many rounds it takes does not: one for each box that may
be chosen, over all images and classes at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.capture.onnx.call import Call
from qcompiler.capture.onnx.table import op

ROUNDS = 256
"""Most rounds that are unrolled; each is 21 nodes of the graph."""


@op("NonMaxSuppression")
def non_max_suppression(call: Call, boxes: Tensor, scores: Tensor) -> Tensor:
    """Rows (image, class, box), by image, class and falling score."""
    # The sizes that both share: picking needs only that one is no larger, so export keeps two.
    torch._check(boxes.shape[0] == scores.shape[0])
    torch._check(boxes.shape[1] == scores.shape[2])
    rounds = _rounds(call, boxes)
    if not rounds:
        return torch.zeros([0, 3], dtype=torch.int64)
    ranked, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    alive = ranked > call.operand(4) if call.given(4) else torch.ones_like(ranked, dtype=torch.bool)
    limit = call.operand(3) if call.given(3) else 0.0
    low, high = (_ranked(side, order) for side in _corners(boxes, call.int("center_point_box", 0)))
    area = (high - low).prod(-1)
    place = torch.arange(order.shape[-1])
    chosen, found = [], []
    for _ in range(rounds):
        best = alive.to(torch.uint8).argmax(-1, keepdim=True)
        chosen.append(best)
        found.append(alive.any(-1, keepdim=True))
        at = best.unsqueeze(-1).expand(-1, -1, -1, 2)
        common = torch.minimum(high, high.gather(2, at)) - torch.maximum(low, low.gather(2, at))
        shared = common.clamp(min=0).prod(-1)
        overlap = shared / (area + area.gather(2, best) - shared)
        alive = alive & ~(overlap > limit) & (place != best)
    return _rows(order.gather(2, torch.cat(chosen, -1)), torch.cat(found, -1))


def _rounds(call: Call, boxes: Tensor) -> int:
    most = call.whole(2)[0] if call.given(2) else 0
    count = boxes.shape[1]
    rounds = min(most, count) if isinstance(count, int) else most
    if rounds > ROUNDS:
        raise call.refusal(
            f"up to {rounds} boxes are chosen one after the other in each class, and each is a "
            f"round of the graph; expected max_output_boxes_per_class of at most {ROUNDS}"
        )
    return max(rounds, 0)


def _corners(boxes: Tensor, centred: int) -> tuple[Tensor, Tensor]:
    """Lower and upper corner, (image, box, 2) each; the order of the axes does not matter."""
    first, second = boxes.chunk(2, -1)
    if centred:
        return first - second / 2, first + second / 2
    return torch.minimum(first, second), torch.maximum(first, second)


def _ranked(corner: Tensor, order: Tensor) -> Tensor:
    """A corner of every box in the order of each class: (image, class, box, 2)."""
    wide = corner.unsqueeze(1).expand(-1, order.shape[1], -1, -1)
    return wide.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 2))


def _rows(box: Tensor, found: Tensor) -> Tensor:
    image = torch.arange(box.shape[0]).reshape(-1, 1, 1).expand(box.shape)
    kind = torch.arange(box.shape[1]).reshape(-1, 1).expand(box.shape)
    rows = torch.stack([image, kind, box], -1).reshape(-1, 3)
    return rows.index_select(0, found.reshape(-1).nonzero().squeeze(-1))
